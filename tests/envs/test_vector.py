from functools import partial

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import NormalizeObservation, NormalizeReward

from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.gymnasium import make_env
from worldloom.envs.vector import (
    RowStream,
    episode_length,
    frames_per_step,
    make_vector_env,
    order_vectors,
)
from worldloom.envs.workers import WorkerError, WorkerVectorEnv
from worldloom.envs.wrappers import ActionRepeat

catch = partial(make_env, "worldloom/Catch-v0", image_size=16)


class Scripted(gym.Env):
    """Observe (episode, step); reward = action * step; episode lengths repeat `lengths`.

    A positive length terminates, a negative one truncates.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(0, 10, (1,))

    def __init__(self, lengths):
        self.lengths, self.episode = lengths, -1

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.count = self.episode + 1, 0
        return self._obs(), {"success": False}

    def step(self, action):
        self.count += 1
        length = self.lengths[self.episode % len(self.lengths)]
        end = self.count == abs(length)
        info = {"success": length > 0} if end else {}
        return (
            self._obs(),
            float(action[0] * self.count),
            end and length > 0,
            end and length < 0,
            info,
        )

    def _obs(self):
        return np.array([self.episode, self.count], np.float32)


def rows_of(env):
    obs_spec = ObsSpec.from_space(env.single_observation_space)
    return RowStream(env, obs_spec, ActionSpec.from_space(env.single_action_space))


def scripted_rows(*lengths):
    scripts = iter(lengths)
    return rows_of(make_vector_env(lambda: Scripted(next(scripts)), num_envs=len(lengths)))


def test_zero_workers_step_in_this_process():
    env = make_vector_env(catch, num_envs=3)
    assert isinstance(env, SyncVectorEnv) and env.num_envs == 3
    assert env.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP


def test_workers_give_the_same_rows_from_processes_of_their_own():
    here, there = make_vector_env(catch, 2), make_vector_env(catch, 2, workers=1)
    try:
        assert isinstance(there, WorkerVectorEnv) and there.num_envs == 2
        assert there.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
        a, b = rows_of(here), rows_of(there)
        rng = np.random.default_rng(0)
        a.reset(3)
        b.reset(3)
        for _ in range(25):
            actions = a.action_spec.sample(rng, 2)
            assert a.step(actions) == b.step(actions)
            for name in ("obs", "rewards", "is_first", "is_last", "is_terminal"):
                assert (getattr(a, name) == getattr(b, name)).all()
    finally:
        there.close()


def test_rows_are_the_episodes_with_their_resets():
    rows = scripted_rows([2, -3], [3])
    rows.reset(seed=0)
    # The environments take actions in [0, 10], so a model's -0.8 is 1 and its 0.6 is 8.
    seen, ended = [], []
    for _ in range(8):
        seen.append((rows.obs, rows.rewards, rows.is_first, rows.is_last, rows.is_terminal))
        ended.append(rows.step(np.array([[-0.8], [0.6]], np.float32)))
    obs, rewards, is_first, is_last, is_terminal = (np.stack(x, 1) for x in zip(*seen, strict=True))
    assert obs[0].tolist() == [[0, 0], [0, 1], [0, 2], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0]]
    assert obs[1].tolist() == [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3]]
    np.testing.assert_allclose(rewards, [[0, 1, 2, 0, 1, 2, 3, 0], [0, 8, 16, 24, 0, 8, 16, 24]])
    assert rewards.dtype == np.float32
    assert np.argwhere(is_first).tolist() == [[0, 0], [0, 3], [0, 7], [1, 0], [1, 4]]
    assert np.argwhere(is_last).tolist() == [[0, 2], [0, 6], [1, 3], [1, 7]]
    assert np.argwhere(is_terminal).tolist() == [[0, 2], [1, 3], [1, 7]]
    # An episode is told in the step that makes its last row, hence one tick before that row.
    long = {"return": pytest.approx(48.0), "length": 3, "success": 1.0}
    assert [[i for i, _ in tick] for tick in ended] == [[], [0], [1], [], [], [0], [1], []]
    assert ended[1] == [(0, {"return": pytest.approx(3.0), "length": 2, "success": 1.0})]
    assert ended[2] == ended[6] == [(1, long)]
    assert ended[5] == [(0, {"return": pytest.approx(6.0), "length": 3, "success": 0.0})]


def test_success_is_left_out_where_the_environment_does_not_tell():
    rows = rows_of(make_vector_env(lambda: gym.make("CartPole-v1", max_episode_steps=3)))
    rows.reset(seed=0)
    ended = [rows.step(np.array([[1, 0]], np.float32)) for _ in range(3)]
    assert ended == [[], [], [(0, {"return": 3.0, "length": 3})]]


def test_seeds_differ_between_environments_and_reproduce():
    rows = rows_of(make_vector_env(lambda: gym.make("CartPole-v1"), 2))
    rows.reset(seed=5)
    first = rows.obs
    assert (first[0] != first[1]).all()
    rows.reset(seed=5)
    assert (rows.obs == first).all()


def test_environments_instead_of_functions_are_refused():
    with pytest.raises(TypeError, match=r"make_env is <.*CartPole.*expected a function that makes"):
        make_vector_env(gym.make("CartPole-v1"))


def test_numbers_that_make_no_sense_are_refused():
    with pytest.raises(ValueError, match=r"num_envs is 0; expected at least 1"):
        make_vector_env(catch, num_envs=0)
    with pytest.raises(ValueError, match=r"workers is -1; expected 'auto' or at least 0"):
        make_vector_env(catch, workers=-1)
    with pytest.raises(ValueError, match=r"workers is 'many'; expected 'auto' or at least 0"):
        make_vector_env(catch, workers="many")
    for timeout in (0.0, float("inf"), float("nan")):
        with pytest.raises(ValueError, match=rf"timeout is {timeout}; expected seconds, above 0"):
            make_vector_env(catch, timeout=timeout)


def test_one_environment_for_all_is_refused():
    env = Scripted([3])
    with pytest.raises(ValueError, match=r"returned the same .* more than once for num_envs=2"):
        make_vector_env(lambda: env, num_envs=2)


@pytest.mark.parametrize(("workers", "error"), [(0, TypeError), (1, WorkerError)])
def test_what_is_no_environment_is_refused(workers, error):
    old = type("OldEnv", (type("Env", (), {"__module__": "gym.core"}),), {})
    with pytest.raises(error, match=r"OldEnv, an environment of old gym; expected a gymn"):
        make_vector_env(old, workers=workers)
    with pytest.raises(error, match=r"returned a builtins\.NoneType; expected a gymnasium.Env"):
        make_vector_env(lambda: None, workers=workers)


def test_other_autoreset_modes_are_refused():
    env = SyncVectorEnv([catch], autoreset_mode=AutoresetMode.SAME_STEP)
    with pytest.raises(ValueError, match=r"SAME_STEP; expected AutoresetMode.NEXT_STEP"):
        rows_of(env)


@pytest.mark.parametrize(
    ("options", "decisions"),
    [
        ({}, 200),
        ({"action_repeat": 3}, 67),
        ({"time_limit": 30}, 30),
        ({"time_limit": 30, "action_repeat": 2}, 15),
    ],
)
def test_an_episode_is_as_long_as_its_time_limit_allows(options, decisions):
    env = make_env("Pendulum-v1", **options)
    assert episode_length(env) == decisions
    env.reset(seed=0)
    steps, truncated = 0, False
    while not truncated:
        *_, truncated, _ = env.step(env.action_space.sample())
        steps += 1
    assert steps == decisions


@pytest.mark.parametrize(("repeat", "frames"), [(1, 1), (3, 3)])
def test_frames_are_counted_through_the_wrappers(repeat, frames):
    assert frames_per_step(make_env("Pendulum-v1", action_repeat=repeat)) == frames
    own = Scripted([3])
    own.frames_per_step = 4  # a simulator that repeats by itself
    assert frames_per_step(ActionRepeat(own, repeat)) == 4 * frames


def test_without_a_time_limit_there_is_no_length():
    assert episode_length(Scripted([3])) is None


@pytest.mark.parametrize("wrapper", [NormalizeObservation, NormalizeReward])
def test_running_statistics_are_refused_unless_they_are_fixed(wrapper):
    def make(fixed):
        env = wrapper(gym.make("Pendulum-v1"))
        env.update_running_mean = not fixed
        return env

    with pytest.raises(ValueError, match=rf"wrapper {wrapper.__name__}, whose running statistics"):
        make_vector_env(partial(make, False))
    make_vector_env(partial(make, True)).close()


def test_running_statistics_of_vector_environments_are_refused():
    inner = SyncVectorEnv([catch], autoreset_mode=AutoresetMode.NEXT_STEP)
    with pytest.raises(ValueError, match=r"wrapper NormalizeReward, whose running statistics"):
        rows_of(gym.wrappers.vector.NormalizeReward(inner))


def test_only_the_kept_observations_are_read():
    class Robot(Scripted):
        observation_space = spaces.Dict(a=spaces.Box(-9, 9, (2,)), log=spaces.Box(-9, 9, (3,)))

        def _obs(self):
            return {"a": super()._obs(), "log": [np.nan] * self.count}

    env = make_vector_env(lambda: Robot([3]), keys=["a"])
    rows = RowStream(env, ObsSpec.from_space(Robot.observation_space, keep="a"),
                     ActionSpec.from_space(Robot.action_space))  # fmt: skip
    rows.reset(0)
    rows.step(np.zeros((1, 1)))
    assert rows.obs["a"].tolist() == [[0, 1]] and rows.restarts == 0


@pytest.mark.parametrize(
    ("given", "keep", "order"),
    [
        (("c", "a", "b", "image"), None, ("c", "a", "b")),
        (["c", "a", "b"], "a|c|image", ("c", "a")),
        (("c", "a", "b"), "a|image", None),  # a single vector
        (("c", "a"), None, None),  # not all of them
        (("c", "a", "b", "a"), None, None),
        ("cab", None, None),  # of another meaning
        (None, None, None),
    ],
)
def test_an_environment_may_name_the_order_of_its_vectors(given, keep, order):
    class Robot(gym.Env):
        observation_space = spaces.Dict(
            {key: spaces.Box(-1, 1, (1,)) for key in "abc"}
            | {"image": spaces.Box(0, 255, (16, 16, 3), np.uint8)}
        )
        obs_order = given

    wrapped = ActionRepeat(Robot(), 2)
    assert order_vectors(wrapped, ObsSpec.from_space(Robot.observation_space, keep=keep)) == order
