import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env

from worldloom.envs.suites.catch import BALL, PADDLE, Catch


def cells(image, color):
    """Bounding box (top, bottom, left, right) of a colour."""
    rows, columns = np.nonzero((image == color).all(-1))
    return rows.min(), rows.max() + 1, columns.min(), columns.max() + 1


def test_is_a_proper_registered_environment():
    env = gym.make("worldloom/Catch-v0", render_mode="rgb_array", disable_env_checker=True)
    check_env(env.unwrapped)


@pytest.mark.parametrize("seed", range(5))
def test_walking_to_the_ball_catches_it(seed):
    env = Catch()
    env.reset(seed=seed)
    rewards, ends = [], []
    while not any(ends):
        action = 1 + np.sign(env.column - env.paddle)
        _, reward, terminated, truncated, info = env.step(action)
        rewards.append(reward)
        ends.append(terminated)
        assert not truncated
    assert rewards == [0.0] * 8 + [1.0]
    assert info == {"success": True}


def test_walking_away_misses_it():
    env = Catch()
    env.reset(seed=0)
    action = 0 if env.column > 0 else 2
    steps = [env.step(action) for _ in range(9)]
    assert [step[1] for step in steps] == [0.0] * 8 + [-1.0]
    assert steps[-1][4] == {"success": False}


def test_paddle_stops_at_the_walls():
    env = Catch()
    env.reset(seed=0)
    for _ in range(4):
        env.step(0)
    assert env.paddle == 0
    env.step(1)
    assert env.paddle == 0
    env.step(2)
    assert env.paddle == 1


def test_the_picture_shows_ball_and_paddle():
    env = Catch(rows=8, columns=4, image_size=32)
    obs, _ = env.reset(seed=0)
    assert obs.shape == (32, 32, 3) and obs.dtype == np.uint8
    assert cells(obs, BALL) == (0, 4, 8 * env.column, 8 * env.column + 8)
    assert cells(obs, PADDLE) == (28, 32, 16, 24)
    obs = env.step(0)[0]
    assert cells(obs, BALL)[:2] == (4, 8)
    assert cells(obs, PADDLE) == (28, 32, 8, 16)


def test_every_column_and_seed():
    env = Catch()
    first = [env.reset(seed=seed)[0] for seed in range(30)]
    again = [env.reset(seed=seed)[0] for seed in range(30)]
    assert all((a == b).all() for a, b in zip(first, again, strict=True))
    assert {cells(image, BALL)[2] for image in first} == {c * 32 // 5 for c in range(5)}


def test_sizes_that_cannot_be_drawn_are_refused():
    with pytest.raises(ValueError, match=r"image_size=40; expected a multiple of 16"):
        Catch(image_size=40)
    with pytest.raises(
        ValueError, match=r"rows=100, columns=5, image_size=32.*raise env\.image_size"
    ):
        Catch(rows=100)
    with pytest.raises(ValueError, match=r"rows=10, columns=1"):
        Catch(columns=1)
