import gymnasium as gym
import pytest
from gymnasium import spaces

from worldloom.envs.suites.catch import Catch
from worldloom.envs.suites.custom import make_env, split_options
from worldloom.envs.vector import episode_length


def plain(rows=10):
    return Catch(rows=rows, image_size=32)


def sized(image_size, **options):
    return Catch(image_size=image_size, **options)


def test_options_that_a_function_does_not_take_are_put_around_it():
    given = {
        "rows": 6,
        "action_repeat": 2,
        "image_size": 16,
        "frame_stack": 1,
        "pixels": False,
        "time_limit": None,
    }
    options, around = split_options(plain, given)
    assert options == {"rows": 6}
    env = make_env(plain, options, **around)
    assert env.observation_space.shape == (16, 16, 3)
    env.reset(seed=0)
    env.step(1)
    assert env.unwrapped.row == 2 and env.unwrapped.rows == 6


def test_options_that_it_takes_are_its_own():
    options, around = split_options(sized, {"image_size": 48, "action_repeat": 3, "columns": 4})
    assert options == {"image_size": 48, "columns": 4} and around == {"action_repeat": 3}
    assert make_env(sized, options, **around).observation_space.shape == (48, 48, 3)


def test_null_leaves_a_function_its_own_default():
    assert split_options(Catch, {"image_size": None, "time_limit": None, "rows": None}) == (
        {"rows": None},
        {},
    )


def test_a_time_limit_truncates():
    env = make_env(plain, {}, time_limit=3)
    assert episode_length(env) == 3
    env.reset(seed=0)
    assert [env.step(1)[2:4] for _ in range(3)] == [(False, False)] * 2 + [(False, True)]


def test_classes_are_functions_too():
    assert split_options(Catch, {"image_size": 48, "frame_stack": 2}) == (
        {"image_size": 48},
        {"frame_stack": 2},
    )
    env = make_env(Catch, {"image_size": 48}, frame_stack=2)
    assert env.observation_space == spaces.Box(0, 255, (48, 48, 6), "uint8")


def test_an_option_that_nobody_takes_is_an_error_of_the_function():
    options, around = split_options(plain, {"levl": 3})
    with pytest.raises(TypeError, match="unexpected keyword argument 'levl'"):
        make_env(plain, options, **around)


def test_what_is_no_environment_is_handed_on():
    assert make_env(lambda: None, {}, action_repeat=2) is None
    assert isinstance(make_env(plain, {}, action_repeat=2), gym.Env)
