import os
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.suites.catch import Catch
from worldloom.envs.suites.gymnasium import make_env
from worldloom.envs.wrappers import resize_image


class Counter(gym.Env):
    """Reward k in the k-th step; ends at `length`."""

    observation_space = spaces.Box(0, 100, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, length=100, render_mode=None):
        self.length, self.render_mode = length, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count = 0
        return self.observation_space.sample(), {}

    def step(self, action):
        self.count += 1
        return self.observation_space.sample(), self.count, self.count >= self.length, False, {}


@pytest.fixture(autouse=True)
def test_ids():
    gym.register("Test/Counter-v0", entry_point=Counter)
    yield
    del gym.registry["Test/Counter-v0"]


def run(env):
    """Rewards of an episode, and whether it was terminated or truncated."""
    env.reset(seed=0)
    rewards = []
    while True:
        _, reward, terminated, truncated, _ = env.step(env.action_space.sample())
        rewards.append(reward)
        if terminated or truncated:
            return rewards, terminated, truncated


def test_makes_ids_with_their_options():
    assert make_env("CartPole-v1", sutton_barto_reward=True).unwrapped._sutton_barto_reward
    assert isinstance(make_env("worldloom/Catch-v0", rows=6).unwrapped, Catch)


def test_repeat_sums_rewards_and_stops_at_the_end():
    assert run(make_env("Test/Counter-v0", length=5, action_repeat=2)) == ([3, 7, 5], True, False)


def test_time_limit_counts_simulator_steps_and_truncates():
    env = make_env("Test/Counter-v0", action_repeat=2, time_limit=5)
    assert run(env) == ([3, 7, 5], False, True)


def test_time_limit_replaces_the_registered_one():
    assert make_env("CartPole-v1").spec.max_episode_steps == 500
    assert make_env("CartPole-v1", time_limit=7).spec.max_episode_steps == 7


def test_without_pixels_nothing_is_rendered(monkeypatch):
    monkeypatch.setitem(sys.modules, "pygame", None)  # importing it would raise
    monkeypatch.delenv("MUJOCO_GL", raising=False)
    assert len(run(make_env("CartPole-v1"))[0]) > 3
    assert "MUJOCO_GL" not in os.environ


def test_pixels_are_the_rendered_picture(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "osmesa")
    env = make_env("worldloom/Catch-v0", pixels=True, image_size=48)
    obs, _ = env.reset(seed=0)
    assert env.observation_space == spaces.Box(0, 255, (48, 48, 3), np.uint8)
    assert obs in env.observation_space
    assert (obs == resize_image(env.render(), 48)).all()
    assert (env.step(0)[0] != obs).any()
    assert os.environ["MUJOCO_GL"] == "osmesa"  # the user's choice stays


def test_pixels_are_64_by_default(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    assert make_env("worldloom/Catch-v0", pixels=True).reset()[0].shape == (64, 64, 3)


def test_repeat_renders_once_per_action(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    env = make_env("worldloom/Catch-v0", pixels=True, action_repeat=3, image_size=32)
    env.reset(seed=0)
    obs, *_ = env.step(1)
    assert env.unwrapped.row == 3
    assert (obs == env.unwrapped.render()).all()


def test_unknown_ids_name_near_ones():
    with pytest.raises(ValueError, match=r"no environment 'cartpole-v1'.*CartPole-v1.*env\.id"):
        make_env("cartpole-v1")
    with pytest.raises(
        ValueError, match=r"no environment 'worldloom/Ketch-v0'.*worldloom/Catch-v0"
    ):
        make_env("worldloom/Ketch-v0")
    with pytest.raises(ValueError, match=r"no environment 'Acrobot-v99'.*Acrobot-v1"):
        make_env("Acrobot-v99")
    with pytest.raises(ValueError, match=r"no environment '\?\?\?'"):
        make_env("???")


def test_ids_may_name_the_module_that_registers_them():
    assert isinstance(make_env("worldloom.envs.suites.catch:worldloom/Catch-v0").unwrapped, Catch)
    with pytest.raises(ImportError, match=r"mine:My-v0 needs .*No module named 'mine'"):
        make_env("mine:My-v0")


def raising(error):
    def make():
        raise error

    return make


@pytest.mark.parametrize(
    ("error", "remedy"),
    [
        (gym.error.DependencyNotInstalled("MuJoCo is not installed"), r"'worldloom\[mujoco\]'"),
        (ModuleNotFoundError("No module named 'Box2D'"), r"'worldloom\[box2d\]'"),
        (
            gym.error.DependencyNotInstalled('pygame is missing: pip install "gymnasium[box2d]"'),
            r"'worldloom\[pixels\]'",
        ),
        (ModuleNotFoundError("No module named 'ale_py'"), r"'worldloom\[atari\]'"),
        (ModuleNotFoundError("No module named 'mine'"), "install the package named above"),
    ],
)
def test_missing_packages_name_our_extra(error, remedy):
    gym.register("Test/Missing-v0", entry_point=raising(error))
    try:
        with pytest.raises(ImportError, match=rf"Test/Missing-v0 needs a package .*{remedy}"):
            make_env("Test/Missing-v0")
    finally:
        del gym.registry["Test/Missing-v0"]


def test_atari_ids_ask_for_their_package(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match=r"ALE/Pong-v5 needs .*worldloom\[atari\]"):
        make_env("ALE/Pong-v5")


def test_a_missing_renderer_names_our_extra(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setitem(sys.modules, "pygame", None)
    env = make_env("CartPole-v1", pixels=True)
    with pytest.raises(ImportError, match=r"CartPole-v1.*needs .*worldloom\[pixels\]"):
        env.reset()


@pytest.mark.filterwarnings("ignore:.*RGB-array rendering")  # gymnasium's own word on it
def test_environments_that_render_nothing_are_refused(monkeypatch):
    monkeypatch.setenv("MUJOCO_GL", "egl")
    monkeypatch.setattr(Counter, "metadata", {"render_modes": ["rgb_array"], "render_fps": 1})
    monkeypatch.setattr(Counter, "render", lambda self: None)
    env = make_env("Test/Counter-v0", pixels=True)
    with pytest.raises(TypeError, match=r"rendered NoneType; expected an RGB image"):
        env.reset()
