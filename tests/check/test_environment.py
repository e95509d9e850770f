import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from tests.envs import misbehaving
from worldloom.check.environment import EnvProblems, check_env
from worldloom.envs.suites.catch import Catch
from worldloom.envs.suites.gymnasium import make_env


class Walk(gym.Env):
    """A random walk that is as it should be; tests break one thing each."""

    observation_space = spaces.Box(-100, 100, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.place = self.np_random.normal(size=2).astype(np.float32)
        return self.place.copy(), {}

    def step(self, action):
        self.place = self.place + action[0]
        return self.place.copy(), float(-abs(self.place).sum()), False, False, {}


def limited(env=None):
    return TimeLimit(env or Walk(), 40)


def problems_of(env):
    with pytest.raises(EnvProblems) as raised:
        check_env(env, steps=100)
    return raised.value.problems


def test_a_good_environment_gets_a_table_and_no_problem():
    report = check_env(lambda: make_env("worldloom/Catch-v0"), steps=50)
    assert report.problems == [] and report.remarks == []
    text = str(report)
    for word in (
        "Box(0, 255, (32, 32, 3), uint8)",
        "(3, 32, 32)     image encoder",
        "one-hot choices",
        "-1 to 0 per step, -0.1 on average",
        "5 terminated, 0 truncated after 9 to 9 steps",
        "another seed a different one",
        "eval/success",
        "steps/s",
        "no problems found",
    ):
        assert word in text, text


def test_time_limits_are_counted_as_such():
    report = check_env(limited(), steps=100)
    assert "0 terminated, 2 truncated after 40 to 40 steps; time limit 40" in str(report)


def test_what_may_be_meant_is_a_remark():
    class Endless(Walk):
        def reset(self, *, seed=None, options=None):
            super().reset(seed=0)
            self.place = np.zeros(2, np.float32)
            return self.place, {}

    first, second = check_env(Endless(), steps=60).remarks
    assert "another seed gives the same episode" in first
    assert "no episode ended in 60 steps, and there is no time limit" in second


def broken(**methods):
    return type("Broken", (Walk,), methods)()


def step_with(**changes):
    """A step that returns one thing else than it should."""

    def step(self, action):
        names = ("obs", "reward", "terminated", "truncated", "info")
        result = dict(zip(names, Walk.step(self, action), strict=True))
        return tuple((result | changes).values())

    return step


def raising(self, action):
    raise RuntimeError("motor 3 is hot")


def unseeded(self, *, seed=None, options=None):
    self.place = np.random.normal(size=2).astype(np.float32)
    return self.place.copy(), {}


CASES = {
    "old_reset": ({"reset": lambda self, **_: np.zeros(2)}, "reset returned a ndarray; expected"),
    "old_step": (
        {"step": lambda self, action: Walk.step(self, action)[:4]},
        r"step returned \(ndarray, float, bool, bool\); expected the tuple",
    ),
    "nan": ({"step": step_with(obs=np.full(2, np.nan, np.float32))}, "observation holds NaN"),
    "dtype": (
        {"step": step_with(obs=np.zeros(2))},
        "is float64, but its space float32",
    ),
    "shape": (
        {"step": step_with(obs=np.zeros(3, np.float32))},
        r"has shape \(3,\), but its space \(2,\)",
    ),
    "range": (
        {"step": step_with(obs=np.full(2, 200, np.float32))},
        r"has values from 200.0 to 200.0, outside its space",
    ),
    "keys": ({"step": step_with(obs={"a": np.zeros(2)})}, r"observation has the keys \['a'\], but"),
    "flag": ({"step": step_with(terminated=0)}, "terminated is 0; expected True or False"),
    "reward": ({"step": step_with(reward=float("inf"))}, "the reward is inf; expected a finite"),
    "rewards": ({"step": step_with(reward=np.zeros(2))}, "as the reward; expected a number"),
    "raises": ({"step": raising}, r"raised RuntimeError: motor 3 is hot in step \(\w+.py:\d+\)"),
    "seed": ({"reset": unseeded}, "and the same actions differ; expected equal ones"),
    "action": ({"action_space": spaces.Box(-np.inf, np.inf, (1,))}, "infinite bounds"),
    "text": ({"observation_space": spaces.Text(3)}, "which models cannot read"),
}


@pytest.mark.parametrize("case", CASES)
def test_what_is_wrong_is_said(case):
    methods, message = CASES[case]
    found = problems_of(broken(**methods))
    assert len(found) == 1, found
    with pytest.raises(ValueError, match=message):
        raise ValueError(found[0])


def test_what_is_no_environment_is_said():
    assert "the environment is a builtins.dict; expected a gymnasium.Env" in problems_of(dict)[0]


def test_choices_of_keys_show_in_the_table():
    robot = spaces.Dict({"a": spaces.Box(-1, 1, (3,)), "b": spaces.Discrete(4)})
    env = Catch()
    env.observation_space = robot
    env.render = lambda: {"a": np.zeros(3, np.float32), "b": np.int64(1)}
    text = str(check_env(env, steps=20, keep="b"))
    assert "nothing (left out)" in text and "(4,)            vector encoder" in text


BROKEN = """
import numpy as np
from worldloom.envs.suites.catch import Catch

class Broken(Catch):
    def step(self, action):
        obs, reward, *rest = super().step(action)
        return obs, float("nan"), *rest
"""


def command(*words, **kwargs):
    done = subprocess.run(
        [sys.executable, "-m", "worldloom.envs.check", *words],
        capture_output=True,
        text=True,
        **kwargs,
    )
    return done.returncode, done.stdout, done.stderr


def test_the_command_prints_the_table():
    code, out, err = command("env=gymnasium", "env.id=worldloom/Catch-v0", "steps=30")
    assert code == 0 and err == ""
    assert "image encoder" in out and "30 random steps" in out


def test_the_command_fails_where_something_is_wrong(tmp_path):
    (tmp_path / "mine.py").write_text(BROKEN)
    words = [
        "env=custom",
        "env._target_=mine.Broken",
        "+env.rows=5",
        "env.action_repeat=2",
        "steps=30",
    ]
    code, out, _ = command(*words, cwd=tmp_path)
    assert code == 1
    assert (
        "problem 1: the reward is nan; expected a finite number" in out and "problem 2" not in out
    )


@pytest.mark.parametrize("name", misbehaving.CASES)
def test_it_finds_what_would_end_or_disturb_a_run(name):
    space, _, outcome = misbehaving.CASES[name]
    wrong = isinstance(outcome, tuple) and (outcome[0] != "same without success" or outcome[1:])
    try:
        check_env(lambda: misbehaving.Odd(name, space), steps=30)
    except EnvProblems as found:
        assert found.problems and all("\n" not in problem for problem in found.problems)
    else:
        assert not wrong
