"""Workers that crash and hang for real; each environment tells in its rows who and where it is."""

import contextlib
import itertools
import json
import logging
import multiprocessing
import os
import re
import signal
import subprocess
import sys
import time
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import SyncVectorEnv

from worldloom.envs.process import EnvProcess
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import RowStream, make_vector_env
from worldloom.envs.workers import (
    MAX_CRASHES,
    WorkerError,
    choose_workers,
    count_cores,
    measure_step,
)

# No process can import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])


class Lottery(gym.Env):
    """Episodes of 1 to 5 steps that end in either way; all is drawn from the reset's seed."""

    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, nested=False):
        self.nested = nested
        box = spaces.Box(-np.inf, np.inf, (2,))
        image = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        inner = spaces.Dict({"image": image, "choice": spaces.Discrete(3)})
        self.observation_space = spaces.Dict({"a": box, "in": inner}) if nested else box

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 6))
        return self._obs(), {"unsendable": lambda: 0}

    def step(self, action):
        self.left -= 1
        ended, terminal = self.left == 0, bool(self.np_random.integers(2))
        tells = {"success": terminal} if ended and self.np_random.random() < 0.7 else {}
        reward = float(action[0] + self.np_random.normal())
        info = {"unsendable": lambda: 0, **tells}
        return self._obs(), reward, ended and terminal, ended and not terminal, info

    def _obs(self):
        values = self.np_random.normal(size=2).astype(np.float32)
        if not self.nested:
            return values
        image = self.np_random.integers(0, 256, (16, 16, 3), np.uint8)
        return {"a": values, "in": {"image": image, "choice": int(self.np_random.integers(3))}}


def born(file):
    """Take a number that no other process has taken."""
    try:
        file.touch(exist_ok=False)
    except FileExistsError:
        return False
    return True


class Mortal(gym.Env):
    """Observe (life, episode, step, seed of the last reset that had one).

    life: number of this environment, over all that were ever made for a test's folder.
    fates: {life: (call, what befalls it)}; resets and steps are counted together, from 1.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (4,), np.float64)
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, folder, fates, length=4):
        self.life = next(n for n in itertools.count() if born(folder / f"born{n}"))
        self.fate = fates.get(self.life, fates.get("all", (0, "")))
        self.truth = folder / f"life{self.life}"
        self.length, self.episode, self.calls, self.seed = length, -1, 0, -1

    def reset(self, *, seed=None, options=None):
        self._live()
        self.seed = self.seed if seed is None else seed
        self.episode, self.count = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        before = self._obs()
        self._live()
        self.count += 1
        # The reward belongs to one observation only; every second episode is truncated.
        reward, ended = 100.0 * self.episode + self.count, self.count == self.length
        terminal = ended and self.episode % 2 == 0
        transition = [*before, float(action[0]), reward, *self._obs(), terminal, ended]
        with self.truth.open("a") as file:
            file.write(json.dumps([float(x) for x in transition]) + "\n")
        return self._obs(), reward, terminal, ended and not terminal, {}

    def _live(self):
        self.calls += 1
        if self.calls != self.fate[0]:
            return
        if self.fate[1] == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.fate[1] == "exit":
            os._exit(7)
        if self.fate[1] == "hang":
            time.sleep(60)
        raise ValueError("a simulated\nbug")

    def _obs(self):
        return np.array([self.life, self.episode, self.count, self.seed], np.float64)


@contextlib.contextmanager
def mortals(folder, num_envs, workers, fates, length=4, timeout=60.0):
    make_env = partial(Mortal, folder, fates, length)
    env = make_vector_env(make_env, num_envs, workers, timeout=timeout)
    try:
        yield env
    finally:
        env.close()


def specs_of(env):
    actions = ActionSpec.from_space(env.single_action_space)
    return {"obs_spec": ObsSpec.from_space(env.single_observation_space), "action_spec": actions}


def pid_of(env, worker):
    return env._workers[worker]._process.pid


def assert_same(a, b):
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert a.keys() == b.keys()
        for key in a:
            assert_same(a[key], b[key])
    else:
        assert a.dtype == b.dtype
        np.testing.assert_array_equal(a, b)


def wait_for(condition, seconds=20.0):
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)
    assert condition()


def is_gone(pid):
    try:
        status = Path(f"/proc/{pid}/status").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return True
    # A dead child of a killed parent is a zombie until the system's first process has looked.
    return "State:\tZ" in status


# ---- healthy environments -----------------------------------------------------------------------


@pytest.mark.parametrize("nested", [False, True])
@pytest.mark.parametrize(("num_envs", "workers"), [(1, 1), (1, 2), (3, 1), (3, 2), (5, 3)])
def test_everything_is_as_from_a_sync_vector_env(num_envs, workers, nested):
    make_env = partial(Lottery, nested)
    here, there = make_vector_env(make_env, num_envs), make_vector_env(make_env, num_envs, workers)
    assert isinstance(here, SyncVectorEnv)
    assert len(there._workers) == min(num_envs, workers)
    for name in ("num_envs", "observation_space", "single_action_space", "action_space"):
        assert getattr(here, name) == getattr(there, name)
    assert here.single_observation_space == there.single_observation_space
    told = 0
    for seed in (3, 8, None):  # None goes on with the random numbers of before
        assert_same(here.reset(seed=seed)[0], there.reset(seed=seed)[0])
        for tick in range(15):
            actions = np.full((num_envs, 1), 0.1 * tick, np.float32)
            *arrays, infos = here.step(actions)
            *others, rest = there.step(actions)
            for a, b in zip(arrays, others, strict=True):
                assert_same(a, b)
            assert_same({k: v for k, v in infos.items() if "success" in k}, rest)
            told += "success" in rest
    assert told > 3 and there.restarts == 0
    there.close()


def test_rows_and_their_episodes_are_the_same_too():
    here, there = make_vector_env(Lottery, 5), make_vector_env(Lottery, 5, 2)
    a, b = RowStream(here, **specs_of(here)), RowStream(there, **specs_of(there))
    a.reset(1)
    b.reset(1)
    ended = []
    for _ in range(30):
        actions = np.zeros((5, 1), np.float32)
        ended.append(a.step(actions))
        assert ended[-1] == b.step(actions)
        for name in ("obs", "rewards", "is_first", "is_last", "is_terminal"):
            assert_same(getattr(a, name), getattr(b, name))
    assert {len(episode) for tick in ended for _, episode in tick} == {2, 3}  # success or not
    assert a.restarts == b.restarts == 0
    there.close()


MODULES = """
import os, sys
from types import ModuleType
import gymnasium as gym, numpy as np
from worldloom.envs.vector import make_vector_env

print("once", flush=True)
sys.modules["torch"] = ModuleType("torch")

def modules():
    main = hasattr(sys.modules["__main__"], "__file__")
    return ["torch" in sys.modules, main, "OMP_NUM_THREADS" in os.environ]

class Modules(gym.Env):
    observation_space = gym.spaces.MultiBinary(3)
    action_space = gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return np.array(modules(), np.int8), {}

env = make_vector_env(Modules, 1, workers=1)
print(modules(), env.reset(seed=0)[0].tolist())
env.close()
"""


def test_workers_import_neither_torch_nor_the_main_script(tmp_path):
    (tmp_path / "script.py").write_text(MODULES)
    env = {key: value for key, value in os.environ.items() if key != "OMP_NUM_THREADS"}
    command = [sys.executable, str(tmp_path / "script.py")]
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.stdout == "once\n[True, True, False] [[0, 0, 1]]\n", done.stderr


SCRIPT = """
import sys, time
from pathlib import Path
from types import SimpleNamespace
import gymnasium as gym, numpy as np
from worldloom.envs.vector import make_vector_env

print("once", flush=True)

class Here(gym.Env):
    observation_space = action_space = gym.spaces.Discrete(2)
    def reset(self, *, seed=None, options=None):
        return 1, {}
    def step(self, action):
        time.sleep(SECONDS)
        return 1, 0.0, False, False, {}

env = make_vector_env(Here, 3, workers=2)
env.reset(seed=0)
print(*(w._process.pid for w in env._workers), flush=True)
while True:
    env.step(np.zeros(3, int))
"""


@pytest.mark.parametrize("seconds", [0.001, 0.5])
def test_a_killed_parent_leaves_no_process(tmp_path, seconds):
    # It has no `if __name__ == "__main__"` either: a worker that ran it again would not get far.
    (tmp_path / "script.py").write_text(SCRIPT.replace("SECONDS", str(seconds)))
    command = [sys.executable, str(tmp_path / "script.py")]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout.readline() == "once\n"
        pids = [int(pid) for pid in parent.stdout.readline().split()]
        assert len(pids) == 2 and not any(map(is_gone, pids))
        parent.kill()
    wait_for(lambda: all(map(is_gone, pids)))


def test_signals_to_the_group_are_the_parents_business(tmp_path):
    with mortals(tmp_path, 2, 2, {}) as env:
        env.reset(seed=0)
        for name in (signal.SIGINT, signal.SIGTERM):
            os.kill(pid_of(env, 0), name)
        time.sleep(0.05)
        assert "restarted" not in env.step(np.zeros((2, 1)))[-1]
        assert env.restarts == 0


def test_closing_twice_and_afterwards(tmp_path):
    with mortals(tmp_path, 2, 2, {}) as env:
        env.reset(seed=0)
        pids = [pid_of(env, 0), pid_of(env, 1)]
        start = time.monotonic()
        env.close()
        assert time.monotonic() - start < 3 and all(map(is_gone, pids))
        env.close()
        for call in (env.reset, partial(env.step, np.zeros((2, 1)))):
            with pytest.raises(ClosedEnvironmentError, match="make new ones"):
                call()


def test_forgotten_environments_are_closed():
    env = make_vector_env(Lottery, 1, 1)
    pid = pid_of(env, 0)
    del env
    wait_for(lambda: is_gone(pid))
    assert not multiprocessing.active_children()


def test_calls_in_the_wrong_order(tmp_path):
    with mortals(tmp_path, 2, 2, {}) as env:
        with pytest.raises(RuntimeError, match="before reset"):
            env.step(np.zeros((2, 1)))
        with pytest.raises(ValueError, match=r"options are .* expected none"):
            env.reset(options={"a": 1})


def test_after_an_interrupted_step_a_reset_is_needed(tmp_path, monkeypatch):
    def interrupted(worker):
        raise KeyboardInterrupt

    with mortals(tmp_path, 3, 2, {}) as env:
        env.reset(seed=0)
        env.step(np.zeros((3, 1)))
        with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
            patch.setattr(EnvProcess, "answer", interrupted)
            env.step(np.zeros((3, 1)))
        with pytest.raises(RuntimeError, match="a step that was interrupted"):
            env.step(np.zeros((3, 1)))
        assert env.reset(seed=5)[0][:, 1:].tolist() == [[0, 0, 5], [0, 0, 6], [0, 0, 7]]
        assert env.step(np.zeros((3, 1)))[0][:, 2].tolist() == [1, 1, 1]
        assert env.restarts == 0


# ---- crashes ------------------------------------------------------------------------------------


def test_a_killed_worker_is_replaced_and_the_others_go_on(tmp_path, caplog):
    with mortals(tmp_path, 3, 2, {}) as env:
        rows = RowStream(env, **specs_of(env))
        rows.reset(10)
        rows.step(np.zeros((3, 1)))
        old = rows.obs
        os.kill(pid_of(env, 1), signal.SIGKILL)  # of environments 1 and 2
        assert rows.step(np.zeros((3, 1))) == []
        assert rows.is_first.tolist() == [False, True, True]
        assert rows.obs[0].tolist() == [old[0, 0], 0, 2, 10] and rows.rewards.tolist() == [2, 0, 0]
        assert not rows.is_last.any() and not rows.is_terminal.any()
        assert sorted(rows.obs[1:, 0]) == [3, 4] and (rows.obs[1:, 1:3] == 0).all()
        ended = [rows.step(np.zeros((3, 1))) for _ in range(4)]
        # Environment 0 has its fourth step two ticks later; the others begin at zero again.
        assert [[i for i, _ in tick] for tick in ended] == [[], [0], [], [1, 2]]
        assert ended[3][0][1] == {"return": 1 + 2 + 3 + 4, "length": 4}
        assert env.restarts == rows.restarts == 1
    message = "restarting environments 1, 2: the process was killed by SIGKILL (out of memory?)"
    assert [record.getMessage() for record in caplog.records] == [message]


def test_fresh_seeds_reproduce_and_differ(tmp_path):
    def seeds(name, seed):
        (folder := tmp_path / name).mkdir()
        with mortals(folder, 3, 1, {}) as env:
            seen = [env.reset(seed=seed)[0][:, 3]]
            for _ in range(2):
                os.kill(pid_of(env, 0), signal.SIGKILL)
                obs, *_, infos = env.step(np.zeros((3, 1)))
                assert infos["restarted"].tolist() == [True] * 3
                seen.append(obs[:, 3])
        return np.concatenate(seen).tolist()

    first = seeds("a", 7)
    assert first[:3] == [7, 8, 9] and len(set(first)) == 9
    assert seeds("b", 7) == first
    assert not set(seeds("c", 8)[3:]) & set(first)
    unseeded = seeds("d", None)
    assert len(set(unseeded)) == 9 and not set(unseeded) & set(first)


@pytest.mark.parametrize(
    ("fate", "call", "reason"),
    [
        ("kill", 3, r"the process was killed by SIGKILL .*"),
        ("exit", 3, r"the process ended with exit code 7"),
        (
            "raise",
            3,
            r"environment . raised ValueError: a simulated bug in step \(.*:\d+\)",
        ),
        ("hang", 3, r"no answer within 1\.5 seconds"),
        # The sixth call is the reset that follows four steps.
        (
            "raise",
            6,
            r"environment . raised ValueError: a simulated bug in reset \(.*:\d+\)",
        ),
        ("exit", 6, r"the process ended with exit code 7"),
    ],
)
def test_whatever_happens_to_a_worker(tmp_path, caplog, fate, call, reason):
    with mortals(tmp_path, 2, 2, {0: (call, fate)}, timeout=1.5 if fate == "hang" else 60) as env:
        rows = RowStream(env, **specs_of(env))
        rows.reset(0)
        hit = int(rows.obs[1, 0] == 0)  # which of the two was made first
        for step in range(call - 1):
            assert rows.obs[hit].tolist() == [0, 0, step, hit] and rows.restarts == 0
            rows.step(np.zeros((2, 1)))
        assert rows.restarts == 1
        assert rows.obs[hit, :3].tolist() == [2, 0, 0] and rows.rewards[hit] == 0
        assert rows.is_first[hit] and not rows.is_last.any()
        other = [1, 1, 0] if call == 6 else [1, 0, 2]
        assert rows.obs[1 - hit, :3].tolist() == other
        assert rows.is_first[1 - hit] == (call == 6)
        rows.step(np.zeros((2, 1)))
        assert rows.obs[[hit, 1 - hit], 2].tolist() == [1, other[2] + 1]
    (record,) = caplog.records
    assert record.levelno == logging.WARNING and record.name == "worldloom.envs.workers"
    first, *trace = record.getMessage().splitlines()
    assert re.fullmatch(rf"restarting environment {hit}: {reason}", first)
    assert bool(trace) == ("ValueError" in reason)  # what raised says where


def test_a_later_reset_may_crash_too(tmp_path):
    with mortals(tmp_path, 2, 2, {0: (2, "exit")}) as env:
        env.reset(seed=0)
        obs, _ = env.reset(seed=5)
        assert env.restarts == 1 and set(obs[:, 0]) == {1, 2}
        assert (obs[:, 1] == [obs[0, 0] == 1, obs[1, 0] == 1]).all() and (obs[:, 2] == 0).all()


@pytest.mark.parametrize(
    ("fate", "words"),
    [("raise", [r"a simulated bug in step \(", r"in step\n", r"a simulated\nbug$"]),
     ("kill", [r"killed by SIGKILL", r"env\.workers=0, which runs it in the main process$"])],
)  # fmt: skip
def test_crash_after_crash_is_no_accident(tmp_path, caplog, fate, words):
    with mortals(tmp_path, 2, 1, {"all": (3, fate)}) as env:
        env.reset(seed=0)
        with pytest.raises(WorkerError, match=r"environments 0, 1 failed 3 times") as error:
            for _ in range(20):
                env.step(np.zeros((2, 1)))
        assert env.restarts == len(caplog.records) == MAX_CRASHES - 1
        assert env.closed and not multiprocessing.active_children()
    for word in words:
        assert re.search(word, str(error.value))


def test_worker_that_crashes_while_it_is_replaced(tmp_path, caplog):
    with mortals(tmp_path, 1, 1, {0: (2, "kill"), 1: (1, "exit")}) as env:
        env.reset(seed=0)
        obs, *_, infos = env.step(np.zeros((1, 1)))
        assert obs[0, :3].tolist() == [2, 0, 0] and infos["restarted"].all()
        assert env.restarts == len(caplog.records) == 2


def test_crashes_between_finished_episodes_are_bearable(tmp_path):
    with mortals(tmp_path, 1, 1, {"all": (7, "exit")}, length=3) as env:
        env.reset(seed=0)
        for _ in range(30):
            env.step(np.zeros((1, 1)))
        assert env.restarts == 5


@pytest.mark.parametrize("fate", ["raise", "exit"])
def test_a_failing_first_reset_ends_at_once(tmp_path, caplog, fate):
    with mortals(tmp_path, 2, 2, {0: (1, fate)}) as env:
        words = "ValueError: a simulated bug" if fate == "raise" else "exit code 7"
        with pytest.raises(WorkerError, match=rf"could not be reset.*{words}") as error:
            env.reset(seed=0)
    assert ("in reset\n" in str(error.value)) == (fate == "raise")
    assert not caplog.records and not multiprocessing.active_children()


def test_failing_construction_ends_at_once(tmp_path):
    shared = Lottery()

    def different():
        try:
            (tmp_path / "made").mkdir()  # only one process can
        except FileExistsError:
            return Lottery(nested=True)
        return Lottery()

    with pytest.raises(
        WorkerError, match=r"could not be made .*NameError: name 'nothing'"
    ) as error:
        make_vector_env(lambda: nothing(), 2, 2)  # noqa: F821
    assert "line " in str(error.value)
    with pytest.raises(WorkerError, match=r"returned the same .* more than once for num_envs=2"):
        make_vector_env(lambda: shared, 2, 1)
    with pytest.raises(ValueError, match=r"environment with the spaces .* expected equal ones"):
        make_vector_env(different, 2, 2)
    assert not multiprocessing.active_children()


# ---- how many -----------------------------------------------------------------------------------


class Timed(Lottery):
    """Take so many seconds for a step, and 0.01 for every 40th, by the clock of a test."""

    def __init__(self, seconds, clock):
        super().__init__()
        self.seconds, self.clock, self.resets, self.steps = seconds, clock, 0, 0

    def reset(self, **kwargs):
        self.resets += 1
        return super().reset(**kwargs)

    def step(self, action):
        self.steps += 1
        self.clock[0] += 0.01 if self.steps % 40 == 0 else self.seconds
        return super().step(action)


@pytest.fixture
def clock(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("worldloom.envs.workers.time", SimpleNamespace(perf_counter=lambda: now[0]))
    return now


def test_a_measurement_is_short_and_bears_interruptions(clock):
    for seconds, steps in ((1e-6, 201), (0.0039, 40), (0.02, 9), (0.2, 4)):
        env = Timed(seconds, clock)
        # Above 0.15 seconds it ends, but not before 3 steps; one more does not count.
        assert measure_step(env) == pytest.approx(seconds, rel=1e-6) and env.steps == steps
        assert env.resets > steps / 5  # episodes are 5 steps at most


def test_auto_gives_processes_only_to_what_is_slow(monkeypatch, caplog, clock):
    caplog.set_level(logging.INFO)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0, 1, 2}, raising=False)
    slow, quick = partial(Timed, 0.002, clock), partial(Timed, 0.0004, clock)
    assert [choose_workers(slow(), n) for n in (1, 2, 3, 8)] == [0, 2, 3, 3]
    assert choose_workers(quick(), 8) == 0
    assert caplog.messages[-1] == "env.workers=auto: 0 (a step takes 0.40 ms, 3 cores)"
    assert len(caplog.messages) == 4
    env = make_vector_env(slow, 2, workers="auto")
    assert len(env._workers) == 2
    env.close()
    assert isinstance(make_vector_env(quick, 2, workers="auto"), SyncVectorEnv)
    monkeypatch.setattr(os, "sched_getaffinity", lambda pid: {0}, raising=False)
    assert choose_workers(slow(), 8) == 0


def test_what_goes_wrong_while_measuring_is_told_as_it_is(tmp_path):
    with pytest.raises(ValueError, match="a simulated"):
        choose_workers(Mortal(tmp_path, {0: (3, "raise")}), 2)


# ---- what the replay gets -----------------------------------------------------------------------


def transitions_in(stream):
    """Read the transitions of a stream back out of its rows, checking its borders."""
    obs, first, last = stream["obs"], stream["is_first"], stream["is_last"]
    assert first[0] and (first[1:] == last[:-1]).all()
    assert (stream["actions"][last] == 0).all() and (stream["rewards"][first] == 0).all()
    results = [stream["rewards"][:, None], obs, stream["is_terminal"][:, None], last[:, None]]
    rows = np.concatenate([obs[:-1], stream["actions"][:-1], *(x[1:] for x in results)], axis=1)
    return rows[~last[:-1]].tolist()


def test_the_replay_holds_exactly_the_true_transitions(tmp_path):
    import torch

    from worldloom.replay.buffer import ReplayBuffer
    from worldloom.training.collector import Collector

    class Blind:
        model, device = None, torch.device("cpu")

        def observe(self, obs, is_first, memory):
            return None

    fates = {0: (9, "kill"), 1: (14, "raise"), 2: (26, "exit"), 4: (6, "kill"), 6: (8, "raise")}
    buffer = ReplayBuffer(3000, (4,), 1, num_envs=3)
    with mortals(tmp_path, 3, 2, fates) as env:
        collector = Collector(env, Blind(), buffer, **specs_of(env), random_steps=10**9)
        for _ in range(60):
            collector.step()
        restarts = collector.restarts
        assert restarts == env.restarts >= 3
    stored = {}
    for i in range(3):
        batch = buffer._reader.read(np.array([i]), np.array([0]), 60)
        for row in transitions_in({k: x[0].numpy() for k, x in batch.items() if k != "index"}):
            stored.setdefault(int(row[0]), []).append(row)
    pending = np.count_nonzero(~collector.rows.is_first)
    assert collector.env_steps == sum(map(len, stored.values())) + pending
    lost = -pending
    for life in range(len(list(tmp_path.glob("born*")))):
        truth = tmp_path / f"life{life}"
        lines = truth.read_text().splitlines() if truth.exists() else []
        true = [np.array(json.loads(line), np.float32).tolist() for line in lines]
        mine = stored.pop(life, [])
        if mine and mine[-1][-1] and not true[len(mine) - 1][-1]:
            mine[-1][-1] = 0.0  # the row at which the episode was abandoned
        assert mine == true[: len(mine)] and len(true) - len(mine) <= 1
        lost += len(true) - len(mine)
    # Only where the other environment of a worker crashed in the same step.
    assert not stored and 0 <= lost <= restarts
    assert all(episode["length"] == 4 for episode in collector.finished)


def test_cores_are_divided_among_ranks_and_among_jobs_of_a_sweep(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(16)), raising=False)
    monkeypatch.delenv("LOCAL_WORLD_SIZE", raising=False)
    counts = [count_cores()]
    monkeypatch.setenv("WORLDLOOM_JOBS", "2")
    counts.append(count_cores())
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    counts.append(count_cores())
    monkeypatch.setenv("WORLDLOOM_JOBS", "99")
    assert [*counts, count_cores()] == [16, 8, 2, 1]
