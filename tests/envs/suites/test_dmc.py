import os
import subprocess
import sys

import numpy as np
import pytest

pytest.importorskip("dm_control", reason="needs the extra dmc")

from dm_control import suite

from worldloom.envs.suites.dmc import _find, make_env
from worldloom.envs.vector import episode_length

PIXELS = "from worldloom.envs.renderer import use_renderer; use_renderer('mujoco')"


@pytest.fixture(scope="module")
def can_render():
    done = subprocess.run([sys.executable, "-c", PIXELS], capture_output=True, text=True)
    if done.returncode:
        pytest.skip(f"no renderer works here: {done.stderr.strip().splitlines()[-1]}")


@pytest.mark.parametrize(
    ("spelling", "task"),
    [
        ("walker-walk", ("walker", "walk")),
        ("walker_walk", ("walker", "walk")),
        ("dmc_walker_walk", ("walker", "walk")),
        ("DMC_Walker-Walk", ("walker", "walk")),
        ("cup-catch", ("ball_in_cup", "catch")),
        ("dmc_cup_catch", ("ball_in_cup", "catch")),
        ("ball_in_cup-catch", ("ball_in_cup", "catch")),
        ("pointmass-easy", ("point_mass", "easy")),
        ("cartpole-swingup-sparse", ("cartpole", "swingup_sparse")),
        ("humanoid_CMU-run", ("humanoid_CMU", "run")),
    ],
)
def test_tasks_are_known_by_all_their_spellings(spelling, task):
    assert _find(spelling, suite.ALL_TASKS) == task


def test_every_task_is_found_under_its_own_name():
    for domain, name in suite.ALL_TASKS:
        assert _find(f"{domain}-{name}", suite.ALL_TASKS) == (domain, name)
        assert _find(f"dmc_{domain}_{name}", suite.ALL_TASKS) == (domain, name)


def step_once(task):
    env = make_env(task)
    env.reset(seed=0)
    obs, reward, *_ = env.step(env.action_space.sample())
    env.close()
    assert obs in env.observation_space and np.isfinite(reward)


def test_quadrupeds_walk_with_any_numpy():
    step_once("quadruped-walk")


@pytest.mark.slow
def test_every_task_of_the_benchmark_can_be_stepped():
    for domain, name in suite.BENCHMARKING:
        step_once(f"{domain}-{name}")


def test_unknown_tasks_name_near_ones():
    with pytest.raises(ValueError, match=r"env\.task is 'walker-wolk'.*walker-walk"):
        make_env("walker-wolk")


@pytest.mark.parametrize("task", ["cup-catch", "reacher-easy"])
def test_steps_are_those_of_the_suite(task):
    """Two decisions of two control steps each are four of a suite driven by hand."""
    env = make_env(task, action_repeat=2)
    obs, _ = env.reset(seed=5)
    domain, name = _find(task, suite.ALL_TASKS)
    theirs = suite.load(domain, name, task_kwargs={"random": np.random.RandomState(5)})
    step = theirs.reset()
    for _ in range(4):
        assert set(obs) == set(step.observation)
        for key, value in step.observation.items():
            np.testing.assert_array_equal(obs[key], np.atleast_1d(np.float32(value)))
        assert obs in env.observation_space
        action = env.action_space.sample()
        obs, reward, terminated, truncated, _ = env.step(action)
        first, step = theirs.step(action), theirs.step(action)
        assert reward == first.reward + step.reward
        assert not terminated and not truncated


def test_an_episode_is_truncated_after_1000_control_steps():
    env = make_env("cartpole-balance", action_repeat=4)
    assert episode_length(env) == 250
    env.reset(seed=0)
    for step in range(1, 251):
        _, _, terminated, truncated, _ = env.step(env.action_space.sample())
        assert (terminated, truncated) == (False, step == 250)


@pytest.mark.parametrize(("limit", "repeat", "decisions"), [(10, 3, 4), (1500, 500, 3)])
def test_the_time_limit_may_be_any(limit, repeat, decisions):
    env = make_env("cartpole-balance", time_limit=limit, action_repeat=repeat)
    env.reset(seed=0)
    ends = [env.step(env.action_space.sample())[3] for _ in range(decisions)]
    assert ends == [False] * (decisions - 1) + [True]


def test_seeds_reproduce_and_differ():
    env = make_env("cup-catch")
    runs = [[env.reset(seed=seed)[0]["position"] for _ in range(2)] for seed in (1, 1, 2)]
    np.testing.assert_array_equal(runs[0][0], runs[1][0])
    assert (runs[0][0] != runs[2][0]).any()


def test_a_discount_of_zero_terminates():
    env = make_env("cartpole-balance")
    env.reset(seed=0)
    task = env.unwrapped.simulator.task
    task.get_termination = lambda physics: 0.0
    *_, terminated, truncated, _ = env.step(env.action_space.sample())
    assert (terminated, truncated) == (True, False)


def test_a_state_task_loads_no_renderer():
    code = (
        "import sys; from worldloom.envs.suites.dmc import make_env; env = make_env('walker-walk');"
        "env.reset(seed=0); env.step(env.action_space.sample());"
        "print([m for m in sys.modules if m.startswith(('OpenGL', 'glfw', 'mujoco.egl'))])"
    )
    clean = {key: value for key, value in os.environ.items() if key != "MUJOCO_GL"}
    done = subprocess.run([sys.executable, "-c", code], env=clean, capture_output=True, text=True)
    assert done.stdout.strip() == "[]", done.stderr


def test_a_state_task_loads_none_though_one_is_named():
    code = (
        "import os, sys; from worldloom.envs.suites.dmc import make_env; make_env('walker-walk');"
        "print([m for m in sys.modules if m.startswith('OpenGL')], os.environ['MUJOCO_GL'])"
    )
    env = {**os.environ, "MUJOCO_GL": "egl"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout.strip() == "[] egl", done.stderr


def test_tasks_without_bounds_are_refused():
    with pytest.raises(ValueError, match=r"'lqr-lqr_2_1', whose actions are practically unbounded"):
        make_env("lqr-lqr_2_1")


def test_pixels_come_after_states_in_the_same_process(can_render):
    make_env("cup-catch").reset(seed=0)
    env = make_env("cup-catch", pixels=True, image_size=32, frame_stack=3)
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and obs.shape == (32, 32, 9)
    assert obs[..., :3].std() > 5  # a picture, not a blank
    assert (obs[..., :3] == obs[..., 3:6]).all()
    for _ in range(5):
        obs, *_ = env.step(env.action_space.high)
    assert (obs[..., :3] != obs[..., 6:]).any()
    env.close()


def test_a_missing_package_names_its_extra(monkeypatch):
    monkeypatch.setitem(sys.modules, "dm_control", None)
    with pytest.raises(ImportError, match=r"dmc task walker-walk needs .*worldloom\[dmc\]"):
        make_env("walker-walk")
