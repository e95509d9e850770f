import sys

import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.suites.memory_maze import make_env
from worldloom.envs.vector import episode_length


@pytest.fixture
def simulator(renderer):
    pytest.importorskip("labmaze", reason="needs the extra memory-maze")
    pytest.importorskip("dm_control", reason="needs the extra memory-maze")


def pictures(env, seed):
    """The start of an episode and of the one that follows."""
    return np.stack([env.reset(seed=seed)[0], env.reset()[0]])


@pytest.mark.slow
def test_mazes_follow_from_the_seed(simulator):
    env = make_env("9x9")
    assert env.observation_space == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert env.action_space == spaces.Discrete(6)
    start = pictures(env, seed=0)
    assert start[0] in env.observation_space and (start[0] != start[1]).any()
    assert (pictures(env, seed=0) == start).all()
    assert (env.reset(seed=1)[0] != start[0]).any()
    env.close()


def test_the_time_limit_truncates(simulator):
    env = make_env("9x9", time_limit=4, action_repeat=2)
    assert episode_length(env) == 2
    env.reset(seed=0)
    assert [env.step(1)[2:4] for _ in range(2)] == [(False, False), (False, True)]
    env.close()


@pytest.mark.parametrize("task", ["9x9", "memory_maze_9x9", "MemoryMaze-9x9"])
def test_spellings(simulator, task):
    assert str(make_env(task).unwrapped) == "<memory_maze 9x9>"


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(task="8x8"), r"env.task is '8x8'; expected one of 9x9, 11x11"),
        (
            dict(task="9x9", time_limit=1001),
            r"time_limit is 1001; expected at most 1000 for 9x9",
        ),
        (dict(task="9x9", image_size=32), r"env.image_size is 32; expected at least 64"),
        (dict(task="9x9", pixels=False), r"Memory Maze can be observed from images only"),
    ],
)
def test_errors_say_what_is_possible(settings, message):
    with pytest.raises(ValueError, match=message):
        make_env(**settings)


def test_a_missing_package_is_named(simulator, monkeypatch):
    monkeypatch.setitem(sys.modules, "memory_maze", None)
    monkeypatch.delitem(sys.modules, "memory_maze.tasks", raising=False)
    with pytest.raises(ImportError, match=r"9x9 needs .* pip install 'worldloom\[memory-maze\]'"):
        make_env("9x9")
