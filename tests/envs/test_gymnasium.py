import os
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.catch import Catch
from worldloom.envs.gymnasium import (
    ActionRepeat,
    ResizedImages,
    StackedImages,
    make_env,
    resize_image,
)


class Counter(gym.Env):
    """Reward k in the k-th step; ends at `length`."""

    observation_space = spaces.Box(0, 100, (1,))
    action_space = spaces.Discrete(2)

    def __init__(self, length=100, render_mode=None, observation_space=None):
        self.length, self.render_mode = length, render_mode
        self.observation_space = observation_space or self.observation_space

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
    assert run(make_env("Test/Counter-v0", length=5, repeat=2)) == ([3, 7, 5], True, False)


def test_time_limit_counts_simulator_steps_and_truncates():
    env = make_env("Test/Counter-v0", repeat=2, time_limit=5)
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
    env = make_env("worldloom/Catch-v0", pixels=True, size=48)
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
    env = make_env("worldloom/Catch-v0", pixels=True, repeat=3, size=32)
    env.reset(seed=0)
    obs, *_ = env.step(1)
    assert env.unwrapped.row == 3
    assert (obs == env.unwrapped.render()).all()


def test_size_resizes_images():
    env = make_env("worldloom/Catch-v0", size=64)
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and obs.shape == (64, 64, 3)
    assert (obs[::2, ::2] == env.unwrapped.render()).all()


def test_size_resizes_every_image_of_a_dict_and_nothing_else():
    vector = spaces.Box(-1, 1, (3,))
    stack = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    inner = spaces.Dict({"stack": stack, "joints": vector})
    space = spaces.Dict({"camera": spaces.Box(0, 255, (96, 80, 3), np.uint8), "arm": inner})
    env = ResizedImages(Counter(observation_space=space), 32)
    shapes = {"stack": (4, 32, 32), "joints": (3,)}
    assert {key: value.shape for key, value in env.observation_space["arm"].items()} == shapes
    assert env.observation_space["camera"].shape == (32, 32, 3)
    assert env.observation_space["arm"]["joints"] == vector
    assert env.reset()[0] in env.observation_space


def test_resizing_averages_areas():
    image = np.random.default_rng(0).integers(0, 256, (64, 96, 9), np.uint8)
    small = resize_image(image, 32)
    mean = image.reshape(32, 2, 32, 3, 9).mean((1, 3))
    # Half a level of rounding, in each of the two passes (rows, then columns).
    assert np.abs(small - mean).max() <= 1.0
    assert resize_image(small, 32) is small


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
    assert isinstance(make_env("worldloom.envs.catch:worldloom/Catch-v0").unwrapped, Catch)
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
        (ModuleNotFoundError("No module named 'mine'"), "install what the message names"),
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
    with pytest.raises(TypeError, match=r"rendered NoneType; expected an RGB picture"):
        env.reset()


def test_size_without_images_is_refused():
    with pytest.raises(ValueError, match=r"size=64 was given.*CartPole.*env\.pixels=true"):
        make_env("CartPole-v1", size=64)


def test_repeat_below_one_is_refused():
    with pytest.raises(ValueError, match="repeat is 0; expected at least 1"):
        make_env("CartPole-v1", repeat=0)


def test_action_repeat_keeps_the_last_info():
    env = ActionRepeat(Catch(), 20)
    env.reset(seed=0)
    assert "success" in env.step(1)[4]


class Clock(gym.Env):
    """Observe images filled with 10 * episode + step, and the step as a vector."""

    action_space = spaces.Discrete(2)

    def __init__(self, channels_last=True):
        shape = (16, 16, 3) if channels_last else (3, 16, 16)
        image = spaces.Box(0, 255, shape, np.uint8)
        self.observation_space = spaces.Dict({"cam": image, "t": spaces.Box(0, 99, (1,))})
        self.image = np.zeros(shape, np.uint8)
        self.episode = -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.count = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        return self._obs(), 0.0, False, False, {}

    def _obs(self):
        self.image[:] = 10 * self.episode + self.count  # always the same array
        return {"cam": self.image, "t": np.array([self.count], np.float32)}


@pytest.mark.parametrize("channels_last", [True, False])
def test_stacked_images_hold_the_newest_frames_oldest_first(channels_last):
    env = StackedImages(Clock(channels_last), 3)
    axis = 2 if channels_last else 0
    assert env.observation_space["cam"].shape[axis] == 9
    for episode in range(2):
        seen = [env.reset()[0]] + [env.step(0)[0] for _ in range(4)]
        for step, obs in enumerate(seen):
            assert obs in env.observation_space
            assert obs["t"] == step  # vectors stay as they are
            frames = np.split(obs["cam"], 3, axis=axis)
            wanted = [10 * episode + max(0, step - back) for back in (2, 1, 0)]
            assert [int(frame.min()) for frame in frames] == wanted
            assert [int(frame.max()) for frame in frames] == wanted


def test_stacks_are_made_of_images_alone():
    assert make_env("worldloom/Catch-v0", size=32, stack=3).observation_space.shape == (32, 32, 9)
    with pytest.raises(ValueError, match=r"stack=2 was given, but .* observes no image"):
        make_env("CartPole-v1", stack=2)
    with pytest.raises(ValueError, match=r"stack is 0; expected at least 1; set env\.stack=1"):
        make_env("CartPole-v1", stack=0)
