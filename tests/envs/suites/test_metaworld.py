"""Meta-World against its own environment driven by hand."""

import os
import sys

import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.suites.metaworld import make_env
from worldloom.envs.vector import episode_length

metaworld = pytest.importorskip("metaworld", reason="needs the extra metaworld")

REST = np.zeros(4, np.float32)


@pytest.fixture(scope="module")
def env():
    return make_env("reach")


def goal(env, seed=None):
    return tuple(env.reset(seed=seed)[0][-3:])


def simulator(env):
    """Meta-World's own environment, with the goal that ours has drawn."""
    by_hand = metaworld.ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE["reach-v3-goal-observable"](seed=1)
    by_hand._last_rand_vec = env.unwrapped.simulator._last_rand_vec
    by_hand.reset()
    return by_hand


def test_spaces(env):
    assert env.observation_space == spaces.Box(-np.inf, np.inf, (39,), np.float32)
    assert env.action_space == spaces.Box(-1, 1, (4,), np.float32)
    assert env.reset(seed=0)[0] in env.observation_space
    assert episode_length(env) == 100


def test_without_pixels_no_renderer_is_chosen(monkeypatch):
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    make_env("reach")
    assert "MUJOCO_GL" not in os.environ


def test_a_decision_is_two_steps_of_the_simulator(env):
    env.reset(seed=0)
    by_hand = simulator(env)
    actions = np.random.default_rng(0).uniform(-1, 1, (20, 4)).astype(np.float32)
    for action in actions:
        obs, reward, terminated, truncated, info = env.step(action)
        rewards = []
        for _ in range(2):
            expected, part, _, _, truth = by_hand.step(action)
            rewards.append(part)
        # Both run the same simulation, from a state that two resets reach with rounding noise.
        np.testing.assert_allclose(obs, expected, atol=1e-4)
        assert reward == pytest.approx(sum(rewards), abs=1e-3)
        assert not (terminated or truncated) and info == {"success": bool(truth["success"])}


@pytest.mark.filterwarnings("ignore:Constant")  # the policy's own, for actions that are clipped
def test_success_stays_once_the_goal_was_reached(env):
    from metaworld.policies import SawyerReachV3Policy

    obs, _ = env.reset(seed=0)
    policy, told, ended = SawyerReachV3Policy(), [], False
    while not ended:
        if not any(told):
            action = np.clip(policy.get_action(obs), -1, 1)
        else:
            action = np.array([0, -1, 1, 0])  # away from it
        obs, _, terminated, ended, info = env.step(action.astype(np.float32))
        assert not terminated
        told.append(info["success"])
    assert len(told) == 100 and told == sorted(told) and not told[0] and told[-1]
    assert np.linalg.norm(obs[:3] - obs[-3:]) > 0.05  # Meta-World's bound for success: it is gone
    env.reset()
    assert not env.step(REST)[4]["success"]


def test_each_episode_has_a_goal_that_follows_from_the_seed(env):
    first = [goal(env, seed=3), goal(env), goal(env)]
    np.random.seed(7)  # numpy's global numbers have no say
    assert [goal(env, seed=3), goal(env), goal(env)] == first
    assert len({*first, goal(env, seed=4)}) == 4


def test_copies_without_a_seed_have_goals_of_their_own(env):
    assert goal(make_env("reach")) != goal(make_env("reach"))


def test_a_goal_can_be_fixed():
    fixed = [goal(make_env("reach", fixed_goal=0), seed=seed) for seed in (3, 4, None)]
    assert len(set(fixed)) == 1
    env = make_env("reach", fixed_goal=1)
    assert goal(env, seed=3) == goal(env) == goal(env, seed=4) != fixed[0]
    for wrong in (True, -1, "first"):
        with pytest.raises(ValueError, match=rf"env.fixed_goal is {wrong!r}; expected false, or a"):
            make_env("reach", fixed_goal=wrong)


def test_the_time_limit_truncates_and_may_exceed_meta_worlds():
    env = make_env("reach", time_limit=600, action_repeat=100)
    env.reset(seed=0)
    assert [env.step(REST)[2:4] for _ in range(6)] == [(False, False)] * 5 + [(False, True)]


@pytest.mark.parametrize("task", ["push-back", "push-back-v3", "mw-push-back", "Push_Back"])
def test_spellings(task):
    assert str(make_env(task).unwrapped) == "<metaworld PushBackV3GoalObservable>"


def test_errors_say_what_is_possible():
    with pytest.raises(ValueError, match=r"'reech', which .* such as reach, .* set env.task"):
        make_env("reech")
    with pytest.raises(ValueError, match=r"env.camera is 'top'; expected one of topview, corner"):
        make_env("reach", camera="top")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "metaworld", None)
    with pytest.raises(ImportError, match=r"task reach .* pip install 'worldloom\[metaworld\]'"):
        make_env("reach")
