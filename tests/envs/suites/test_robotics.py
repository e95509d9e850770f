import sys

import numpy as np
import pytest

pytest.importorskip("gymnasium_robotics", reason="needs the extra robotics")

from worldloom.envs.spaces import ObsSpec
from worldloom.envs.suites.robotics import make_env
from worldloom.envs.vector import episode_length


@pytest.fixture(scope="module")
def reach():
    return make_env("FetchReach-v4")


def run(env, seed, act):
    """Play an episode; return its observations, and what came with the last."""
    obs, info = env.reset(seed=seed)
    seen, ended = [obs], False
    assert info == {}
    while not ended:
        obs, _, terminated, truncated, info = env.step(act(obs))
        seen.append(obs)
        ended = terminated or truncated
    return seen, terminated, truncated, info


def towards_goal(obs):
    way = 5 * (obs["desired_goal"] - obs["achieved_goal"])
    return np.float32([*np.clip(way, -1, 1), 0])


def stay(obs):
    return np.zeros(4, np.float32)


def test_observations_pass_through_whole(reach):
    obs, _ = reach.reset(seed=0)
    assert obs in reach.observation_space
    expected = {"observation": (10,), "achieved_goal": (3,), "desired_goal": (3,)}
    assert ObsSpec.from_space(reach.observation_space).shape == expected
    assert episode_length(reach) == 50


@pytest.mark.parametrize(("act", "success"), [(towards_goal, True), (stay, False)])
def test_success_is_to_be_at_the_goal_in_the_end(reach, act, success):
    seen, terminated, truncated, info = run(reach, 0, act)
    assert len(seen) == 51 and truncated and not terminated
    assert info == {"success": success}
    last = seen[-1]
    distance = np.linalg.norm(last["achieved_goal"] - last["desired_goal"])
    assert (distance < 0.05) == success  # the task's own bound


def test_other_families_name_it_themselves():
    env = make_env("PointMaze_UMaze-v3", time_limit=4, action_repeat=2)
    env.reset(seed=0)
    ends = [env.step(np.zeros(2, np.float32))[2:] for _ in range(2)]
    assert ends == [(False, False, {"success": False}), (False, True, {"success": False})]


def test_seeds_reproduce_and_differ(reach):
    goals = [tuple(reach.reset(seed=seed)[0]["desired_goal"]) for seed in (0, 1, 0)]
    assert goals[0] == goals[2] != goals[1]


def test_near_misses_are_suggested():
    with pytest.raises(ValueError, match=r"'FetchReech-v4' .* such as FetchReach-v4"):
        make_env("FetchReech-v4")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "gymnasium_robotics", None)
    with pytest.raises(ImportError, match=r"FetchReach-v4 .* pip install 'worldloom\[robotics\]'"):
        make_env("FetchReach-v4")
