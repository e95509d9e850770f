"""Episodes that are saved, and played again in other environments and other processes."""

import importlib.util
import logging
import os
import re
import signal
import sys
from functools import partial

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.replayable import episode_seed
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites import (
    atari,
    crafter,
    custom,
    dmc,
    memory_maze,
    metaworld,
    minigrid,
    robotics,
)
from worldloom.envs.suites.gymnasium import make_env
from worldloom.envs.vector import RowStream, make_vector_env

# No process can import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
FIELDS = ("rewards", "is_first", "is_last", "is_terminal")


def rows_of(make, num_envs=1, workers=0, timeout=60.0):
    env = make_vector_env(make, num_envs, workers, timeout)
    obs_spec = ObsSpec.from_space(env.single_observation_space)
    return RowStream(env, obs_spec, ActionSpec.from_space(env.single_action_space))


def moved(rows, seed, ticks):
    """Reset, and take some random steps; return the generator that goes on with them."""
    rng = np.random.default_rng(seed)
    rows.reset(seed)
    for _ in range(ticks):
        rows.step(rows.action_spec.sample(rng, rows.num_envs))
    return rng


def snapshot(rows):
    obs = rows.obs if isinstance(rows.obs, dict) else {"": rows.obs}
    present = {**obs, **{name: getattr(rows, name) for name in FIELDS}}
    return {name: (value.dtype, value.shape, value.tobytes()) for name, value in present.items()}


def assert_go_on_alike(rows, others, rng, ticks):
    """Step all with the same actions; everything has to agree bit for bit."""
    for _ in range(ticks):
        for other in others:
            assert snapshot(other) == snapshot(rows)
        actions = rows.action_spec.sample(rng, rows.num_envs)
        ended = rows.step(actions)
        for other in others:
            assert other.step(actions) == ended


# ---- every suite ---------------------------------------------------------------------------------

SHORT = {"time_limit": 12}
SUITES = {
    "cartpole": (None, partial(make_env, "CartPole-v1", **SHORT)),
    "pendulum": (None, partial(make_env, "Pendulum-v1", **SHORT, action_repeat=2)),
    "catch": (None, partial(make_env, "worldloom/Catch-v0", image_size=16, frame_stack=3)),
    "cartpole pixels": (
        "pygame",
        partial(make_env, "CartPole-v1", pixels=True, image_size=32, frame_stack=2),
    ),
    "lunar lander": ("Box2D", partial(make_env, "LunarLander-v3", time_limit=90)),
    "bipedal walker": ("Box2D", partial(make_env, "BipedalWalker-v3", time_limit=30)),
    "half cheetah": ("mujoco", partial(make_env, "HalfCheetah-v5", **SHORT)),
    "ant pixels": ("EGL", partial(make_env, "Ant-v5", **SHORT, pixels=True, image_size=32)),
    "humanoid": ("mujoco", partial(make_env, "Humanoid-v5")),
    "dmc": ("dm_control", partial(dmc.make_env, "walker-walk", **SHORT)),
    "dmc stacker": ("dm_control", partial(dmc.make_env, "stacker-stack_2", **SHORT)),
    "dmc pixels": (
        "EGL",
        partial(dmc.make_env, "cheetah-run", **SHORT, pixels=True, frame_stack=3),
    ),
    "atari": ("ale_py", partial(atari.make_env, "pong", sticky=True, time_limit=60)),
    "atari assault": (
        "ale_py",
        partial(atari.make_env, "assault", protocol="atari", time_limit=60),
    ),
    "crafter": ("crafter", partial(crafter.make_env, time_limit=40)),
    "minigrid": ("minigrid", partial(minigrid.make_env, "Dynamic-Obstacles-6x6", time_limit=20)),
    "babyai": ("minigrid", partial(minigrid.make_env, "BabyAI-GoToObj", time_limit=20)),
    "metaworld": ("metaworld", partial(metaworld.make_env, "push", time_limit=20)),
    "fixed goal": ("metaworld", partial(metaworld.make_env, "reach", fixed_goal=1, time_limit=20)),
    "fetch": ("gymnasium_robotics", partial(robotics.make_env, "FetchPush-v4", **SHORT)),
    "hand": ("gymnasium_robotics", partial(robotics.make_env, "HandManipulateBlock-v1", **SHORT)),
    "kitchen": ("gymnasium_robotics", partial(robotics.make_env, "FrankaKitchen-v1", **SHORT)),
    "maze": ("EGL", partial(memory_maze.make_env, "9x9", time_limit=8)),
}
SLOW = ("maze", "ant pixels", "kitchen", "hand", "crafter", "dmc pixels", "cartpole pixels")


# Where deprecation warnings are errors, the import of Box2D crashes the interpreter.
BEARABLE = pytest.mark.filterwarnings("ignore::DeprecationWarning")


SHARED = pytest.mark.filterwarnings("ignore:.*share an object")  # gymnasium's word on Kitchen


def suites():
    for name, (needs, _) in SUITES.items():
        marks = [pytest.mark.slow] * (name in SLOW) + [BEARABLE] * (needs == "Box2D") + [SHARED]
        yield pytest.param(name, marks=marks)


def maker(name, request):
    needs, make = SUITES[name]
    if needs == "EGL":
        request.getfixturevalue("renderer")
        needs = {"maze": "labmaze", "ant pixels": "mujoco"}.get(name, "dm_control")
    if needs and importlib.util.find_spec(needs) is None:
        pytest.skip(f"needs {needs}")
    return make


@pytest.mark.parametrize("name", list(suites()))
def test_every_suite_goes_on_bit_for_bit_in_its_second_episode(name, request):
    make = maker(name, request)
    rows = rows_of(make)
    rng, ended = moved(rows, 3, 0), 0
    while ended < 1 or rows._lengths[0] < 3:
        ended += len(rows.step(rows.action_spec.sample(rng, 1)))
    state = rows.state_dict()
    again = rows_of(make)
    again.load_state_dict(state)
    assert again._lengths.tolist() == rows._lengths.tolist() and not again.is_first.any()
    assert_go_on_alike(rows, [again], rng, 25)
    for one in (rows, again):
        one.env.close()


@pytest.mark.parametrize("name", ["pendulum", "atari", "dmc", "minigrid"])
def test_another_process_goes_on_too(name, request):
    make = maker(name, request)
    rows, there = rows_of(make, 2), rows_of(make, 2, workers=2)
    rng = moved(rows, 1, 17)
    there.load_state_dict(rows.state_dict())
    back = rows_of(make, 2)
    back.load_state_dict(there.state_dict())
    assert_go_on_alike(rows, [there, back], rng, 15)
    there.env.close()


# ---- at any moment -------------------------------------------------------------------------------


class Lottery(gym.Env):
    """Episodes of 1 to 5 steps that end in either way; all is drawn from the reset's seed."""

    def __init__(self, joints=1, choices=False):
        self.action_space = spaces.Box(-2, 2, (joints,))
        if choices:
            self.action_space = spaces.MultiDiscrete([3, 4])
        image = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        parts = {
            "image": image,
            "way": spaces.Discrete(3),
            "x": spaces.Box(-9, 9, (2,), np.float64),
        }
        self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 6))
        return self._obs(), {}

    def step(self, action):
        self.left -= 1
        ended, terminal = self.left == 0, bool(self.np_random.integers(2))
        info = {"success": terminal} if ended else {}
        self.sum = float(np.sum(action))
        reward = self.sum + float(self.np_random.normal())
        return self._obs(), reward, ended and terminal, ended and not terminal, info

    def _obs(self):
        image = self.np_random.integers(0, 256, (16, 16, 3), np.uint8)
        draws = self.np_random
        return {"image": image, "way": int(draws.integers(3)), "x": draws.normal(size=2)}


@pytest.mark.parametrize("case", range(40))
def test_at_any_tick_new_environments_go_on_with_the_same_rows(case):
    draws = np.random.default_rng(case)
    num_envs, ticks = int(draws.integers(1, 6)), int(draws.integers(0, 30))
    make = partial(Lottery, choices=True) if case % 2 else partial(Lottery, joints=3)
    rows = rows_of(make, num_envs)
    rng = moved(rows, case, ticks)
    again = rows_of(make, num_envs)
    moved(again, 99, int(draws.integers(0, 7)))  # what it did before must not matter
    again.load_state_dict(rows.state_dict())
    assert_go_on_alike(rows, [again], rng, 20)


def test_the_cases_above_save_first_rows_and_last_rows():
    seen = {"is_first": 0, "is_last": 0, "neither": 0}
    for ticks in range(8):
        rows = rows_of(Lottery, 3)
        moved(rows, 5, ticks)
        again = rows_of(Lottery, 3)
        again.load_state_dict(rows.state_dict())
        assert snapshot(again) == snapshot(rows)
        seen["is_first"] += int(again.is_first.sum())
        seen["is_last"] += int(again.is_last.sum())
        seen["neither"] += int((~again.is_first & ~again.is_last).sum())
    assert min(seen.values()) >= 4


@pytest.mark.parametrize(
    ("before", "after"), [((5, 2), (5, 3)), ((3, 2), (3, 0)), ((4, 0), (4, 3))]
)
def test_another_number_of_workers_goes_on_with_the_same_rows(before, after):
    rows = rows_of(Lottery, *before)
    rng = moved(rows, 8, 11)
    again = rows_of(Lottery, *after)
    again.load_state_dict(rows.state_dict())
    assert_go_on_alike(rows, [again], rng, 15)
    for one in (rows, again):
        one.env.close()


def test_before_the_first_reset_there_is_nothing_to_save():
    assert rows_of(Lottery).state_dict() is None


def test_a_reset_without_a_seed_can_be_saved_too():
    rows, other = rows_of(Lottery, 2), rows_of(Lottery, 2)
    rows.reset()
    other.reset()
    assert (rows.obs["x"] != other.obs["x"]).all()
    other.load_state_dict(rows.state_dict())
    assert_go_on_alike(rows, [other], np.random.default_rng(0), 12)


def test_the_seeds_of_episodes():
    # The first is what the user gave. The others must stay, or saved runs lose their episodes.
    assert [episode_seed(7, n) for n in range(3)] == [7, 220170063, 1100689298]
    seeds = [episode_seed(seed, n) for seed in range(20) for n in range(1, 100)]
    assert len(set(seeds)) == len(seeds) and min(seeds) >= 0 and max(seeds) < 2**31


def test_a_vector_environment_may_reuse_its_array_of_actions():
    env, other = make_vector_env(Lottery), make_vector_env(Lottery)
    env.reset(seed=2)
    actions = np.zeros((1, 1), np.float32)
    for value in (0.5, 0.25):
        actions[:] = value
        env.step(actions)
    (episode,) = env.save()["episodes"]
    assert episode["actions"].tolist() == [[0.5], [0.25]]
    assert episode["actions"].dtype == np.float32
    *_, infos = other.restore(env.save())
    assert infos == {} and other.envs[0].unwrapped.sum == 0.25


# ---- what cannot be played again -----------------------------------------------------------------


class Wilful(Lottery):
    """Ignores the seed from some call of reset on; its observations tell the number of resets."""

    resets = 0

    def __init__(self, obedient):
        super().__init__()
        self.obedient, self.resets = obedient, 0

    def reset(self, *, seed=None, options=None):
        self.resets += 1
        super().reset(seed=seed)
        self.left = 4
        return self._obs(), {}

    def step(self, action):
        if not self.obedient and action[0] > 1.5:
            raise ZeroDivisionError("of the\nsimulator")
        return super().step(action)

    def _obs(self):
        return {**super()._obs(), "x": np.array([0.0 if self.obedient else self.resets, self.left])}


def wilful(*obedient, workers=0):
    kinds = iter(obedient)
    return rows_of(lambda: Wilful(next(kinds)), len(obedient), workers)


def test_where_the_seed_is_ignored_only_this_environment_begins_anew(caplog):
    rows, again = wilful(True, False, True), wilful(True, False, True)
    rng = np.random.default_rng(0)
    rows.reset(4)
    calm = [rows.action_spec.sample(rng, 3) * 0.5 for _ in range(7)]
    for actions in calm:
        rows.step(actions)
    again.load_state_dict(rows.state_dict())
    (record,) = caplog.records
    assert record.levelno == logging.WARNING
    assert re.match(
        r"the episode of environment 1 could not .*a different result", record.getMessage()
    )
    assert rows._lengths.tolist() == [2, 2, 2] and again._lengths.tolist() == [2, 0, 2]
    assert again.is_first.tolist() == [False, True, False] and again.rewards[1] == 0
    assert again._returns.tolist() == [rows._returns[0], 0.0, rows._returns[2]]
    assert again.obs["x"][1].tolist() == [2, 4]  # one reset went into the attempt
    for actions in calm[:3]:
        ended, rest = rows.step(actions), again.step(actions)
        mine = [episode for i, episode in rest if i != 1]
        assert mine == [episode for i, episode in ended if i != 1]
        for i in (0, 2):
            assert again.obs["image"][i].tobytes() == rows.obs["image"][i].tobytes()
    assert [i for i, _ in again.step(calm[3])] == [1]


def test_what_raises_while_it_is_played_again_begins_anew(caplog):
    rows, again = wilful(True), wilful(False)
    rows.reset(0)
    rows.step(np.array([[0.9]], np.float32))  # 1.8 in the environment's units
    again.load_state_dict(rows.state_dict())
    assert (
        "environment 0 could not be replayed (it raised ZeroDivisionError: of the simulator in step"
        in (caplog.text)
    )
    assert again.is_first.all() and len(again.step(np.zeros((1, 1)))) == 0


def test_a_shorter_time_limit_begins_anew(caplog):
    rows, again = (rows_of(partial(make_env, "Pendulum-v1", time_limit=n)) for n in (9, 5))
    moved(rows, 0, 7)
    again.load_state_dict(rows.state_dict())
    assert "(it ended after 5 of 7 steps)" in caplog.text and again.is_first.all()


def test_an_episode_that_is_over_must_be_over_again(caplog):
    """The last observation is the same; that the limit now lies further away has to be noticed."""
    rows, again = (rows_of(partial(make_env, "Pendulum-v1", time_limit=n)) for n in (7, 9))
    moved(rows, 0, 7)
    assert rows.is_last.all()
    again.load_state_dict(rows.state_dict())
    assert "a different result" in caplog.text and again.is_first.all() and not again.is_last.any()


def test_other_rewards_are_noticed(caplog):
    def paid(wage):
        return gym.wrappers.TransformReward(gym.make("CartPole-v1"), lambda r: r * wage)

    rows, again = (rows_of(partial(paid, wage)) for wage in (1.0, 1.5))
    moved(rows, 0, 4)
    again.load_state_dict(rows.state_dict())
    assert "a different result" in caplog.text and again.is_first.all()


def test_episodes_without_end_are_not_remembered(monkeypatch, caplog):
    monkeypatch.setattr("worldloom.envs.replayable.MAX_STEPS", 6)
    rows, again = (rows_of(partial(gym.make, "Pendulum-v1")) for _ in range(2))
    moved(rows, 0, 6)
    again.load_state_dict(rows.state_dict())
    assert snapshot(again) == snapshot(rows) and not caplog.records
    moved(rows, 0, 20)
    assert len(rows.env.envs[0]._actions) == 7
    again.load_state_dict(rows.state_dict())
    assert "(it could not be saved)" in caplog.text and again.is_first.all()
    assert again.obs.tolist() != rows.obs.tolist()


# ---- workers -------------------------------------------------------------------------------------


class Deadly(Lottery):
    """One of them kills or stops its process in its n-th step if a test has put a file."""

    def __init__(self, file, step):
        super().__init__()
        self.file, self.at, self.steps = file, step, 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 50
        return self._obs(), {}

    def step(self, action):
        self.steps += 1
        if self.steps == self.at:
            self._meet_fate()
        return super().step(action)

    def _meet_fate(self):
        mine = self.file.with_name("taken")
        try:
            self.file.rename(mine)  # only one process can
        except FileNotFoundError:
            return
        if mine.read_text() == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        signal.pause()


@pytest.mark.parametrize(("fate", "reason"), [("kill", "SIGKILL"), ("hang", "within 1.5 seconds")])
def test_a_worker_that_crashes_while_it_plays_again_begins_anew(tmp_path, caplog, fate, reason):
    make = partial(Deadly, tmp_path / "fate", 5)
    rows, there = rows_of(make, 3), rows_of(make, 3, workers=2, timeout=1.5)
    moved(rows, 6, 7)
    state = rows.state_dict()
    (tmp_path / "fate").write_text(fate)
    there.load_state_dict(state)
    (record,) = caplog.records
    assert reason in record.getMessage() and there.restarts == 1
    begun = there.is_first.copy()
    assert begun.tolist() in ([True, False, False], [False, True, True])  # one of the two workers
    assert (there.rewards[begun] == 0).all() and (there._lengths == np.where(begun, 0, 7)).all()
    actions = np.zeros((3, 1), np.float32)
    rows.step(actions)
    there.step(actions)
    kept = rows.obs["image"][~begun].tobytes()
    assert there.obs["image"][~begun].tobytes() == kept and not there.is_first.any()
    there.env.close()


def test_what_a_worker_has_been_through_is_saved(caplog):
    rows, there = rows_of(Lottery, 3, 2), rows_of(Lottery, 3, 2)
    moved(rows, 1, 4)
    os.kill(rows.env._workers[1]._process.pid, signal.SIGKILL)
    rows.step(np.zeros((3, 1)))
    there.load_state_dict(rows.state_dict())
    assert there.restarts == rows.restarts == 1
    assert [w.crashes for w in there.env._workers] == [w.crashes for w in rows.env._workers]
    # The same seeds follow the next crash.
    for one in (rows, there):
        os.kill(one.env._workers[1]._process.pid, signal.SIGKILL)
    assert_go_on_alike(rows, [there], np.random.default_rng(0), 8)
    assert there.restarts == rows.restarts == 2
    for one in (rows, there):
        one.env.close()


def test_a_worker_that_is_dead_when_it_is_saved_ends_nothing(caplog):
    rows, there = rows_of(Lottery, 3, 2), rows_of(Lottery, 3)
    rng = moved(rows, 1, 4)
    before = snapshot(rows)
    os.kill(rows.env._workers[0]._process.pid, signal.SIGKILL)
    state = rows.state_dict()
    assert "environment 0 cannot be saved: the process was killed by SIGKILL" in caplog.text
    assert snapshot(rows) == before
    there.load_state_dict(state)
    assert "environment 0 could not be replayed (it could not be saved)" in caplog.text
    assert there.is_first[0] and (there.is_first[1:] == rows.is_first[1:]).all()
    rows.step(rows.action_spec.sample(rng, 3))
    assert rows.restarts == 1 and rows.is_first[0]
    # It begins with the episode that the saved state begins with.
    assert rows.obs["image"][0].tobytes() == there.obs["image"][0].tobytes()
    rows.env.close()


class Slow(Lottery):
    def reset(self, *, seed=None, options=None):
        result = super().reset(seed=seed)
        self.left = 50
        return result

    def step(self, action):
        import time

        time.sleep(0.1)
        return super().step(action)


@pytest.mark.slow
def test_a_long_episode_may_take_longer_than_the_timeout_of_a_step(caplog):
    rows, there = rows_of(Slow), rows_of(Slow, workers=1, timeout=1.0)
    moved(rows, 0, 25)
    there.load_state_dict(rows.state_dict())
    assert not caplog.records and snapshot(there) == snapshot(rows)
    there.env.close()


def test_saving_before_reset_is_an_error():
    env = make_vector_env(Lottery, 1, 1)
    with pytest.raises(RuntimeError, match="save was called before reset"):
        env.save()
    env.close()


def test_a_users_own_environment_needs_nothing():
    make = partial(custom.make_env, Lottery, {}, time_limit=3, action_repeat=2)
    rows, again = rows_of(make, 2), rows_of(make, 2)
    rng = moved(rows, 2, 9)
    again.load_state_dict(rows.state_dict())
    assert_go_on_alike(rows, [again], rng, 12)
