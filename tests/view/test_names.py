"""Names of the dimensions of observations and actions."""

import enum
from types import SimpleNamespace

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

import worldloom.envs.suites.gymnasium as suite
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.view.names import find_names

BOX = spaces.Box(-1, 1, (2,))


def find(obs=BOX, action=BOX, **attributes):
    env = SimpleNamespace(unwrapped=SimpleNamespace(**attributes))
    return find_names(env, ObsSpec.from_space(obs), ActionSpec.from_space(action))


def test_an_environment_that_names_its_dimensions():
    names = find(obs_names=["hip", "knee"], action_names=("push", "pull"))
    assert names.obs == {"": ["hip", "knee"]} and names.actions == ["push", "pull"]
    both = spaces.Dict({"arm": BOX, "leg": BOX})
    names = find(both, obs_names={"leg": ["hip", "knee"]})
    assert names.obs == {"arm": ["arm[0]", "arm[1]"], "leg": ["hip", "knee"]}


@pytest.mark.parametrize("given", [["one"], "ab", [1, 2], None, ["a", ""]])
def test_names_that_do_not_fit_are_not_used(given):
    names = find(obs_names=given, action_names=given)
    assert names.obs == {"": ["obs[0]", "obs[1]"]} and names.actions == ["action[0]", "action[1]"]


def test_names_of_discrete_spaces():
    keys = spaces.Dict({"room": spaces.Discrete(2, start=3), "speed": spaces.Box(0, 1, (1,))})
    names = find(keys, spaces.MultiDiscrete([2, 3]))
    assert names.obs == {"room": ["room = 3", "room = 4"], "speed": ["speed"]}
    assert names.actions == [
        *(f"action 0 = {i}" for i in range(2)),
        *(f"action 1 = {i}" for i in range(3)),
    ]
    moves = enum.IntEnum("Moves", ["left", "right"])
    assert find(action=spaces.Discrete(2), actions=moves).actions == ["left", "right"]
    meanings = lambda: ["NOOP", "FIRE"]  # noqa: E731
    assert find(action=spaces.Discrete(2), get_action_meanings=meanings).actions == ["NOOP", "FIRE"]
    assert find(action=spaces.Discrete(2)).actions == ["action 0", "action 1"]


def test_names_are_short_and_show_control_characters():
    (name, _) = find(obs_names=["\u202eevil\n" + "x" * 100, "b"]).obs[""]
    assert name.startswith(r"\u202eevil\n") and len(name) == 40


def test_names_that_gymnasium_documents():
    env = suite.make_env("CartPole-v1")
    names = find_names(
        env, ObsSpec.from_space(env.observation_space), ActionSpec.from_space(env.action_space)
    )
    assert names.obs[""][2] == "pole angle"


def test_names_of_joints_in_mujoco():
    pytest.importorskip("mujoco")
    env = gym.make("Hopper-v5")
    spec = ObsSpec.from_space(env.observation_space)
    names = find_names(env, spec, ActionSpec.from_space(env.action_space))
    assert names.obs[""][:3] == ["rootz", "rooty", "thigh_joint"]
    assert names.obs[""][5:7] == ["rootx velocity", "rootz velocity"]
    assert names.actions == ["thigh_joint", "leg_joint", "foot_joint"]
    # The names are in the order of the observation.
    env.reset(seed=0)
    place = names.obs[""].index("foot_joint velocity")
    env.unwrapped.data.qvel[-1] = 7.0
    assert np.argmax(env.unwrapped._get_obs()) == place
