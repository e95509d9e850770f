import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.suites.catch import Catch
from worldloom.envs.suites.gymnasium import make_env
from worldloom.envs.wrappers import ActionRepeat, ResizedImages, StackedImages, resize_image


class Sampled(gym.Env):
    """Observe samples of a space."""

    action_space = spaces.Discrete(2)

    def __init__(self, space):
        self.observation_space = space

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


def test_size_resizes_images():
    env = make_env("worldloom/Catch-v0", image_size=64)
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and obs.shape == (64, 64, 3)
    assert (obs[::2, ::2] == env.unwrapped.render()).all()


def test_size_resizes_every_image_of_a_dict_and_nothing_else():
    vector = spaces.Box(-1, 1, (3,))
    stack = spaces.Box(0, 255, (4, 84, 84), np.uint8)
    inner = spaces.Dict({"stack": stack, "joints": vector})
    space = spaces.Dict({"camera": spaces.Box(0, 255, (96, 80, 3), np.uint8), "arm": inner})
    env = ResizedImages(Sampled(space), 32)
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


def test_size_without_images_is_refused():
    with pytest.raises(ValueError, match=r"image_size=64 was given.*CartPole.*env\.pixels=true"):
        make_env("CartPole-v1", image_size=64)


def test_repeat_below_one_is_refused():
    with pytest.raises(ValueError, match="repeat is 0; expected at least 1"):
        make_env("CartPole-v1", action_repeat=0)


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
    env = make_env("worldloom/Catch-v0", image_size=32, frame_stack=3)
    assert env.observation_space.shape == (32, 32, 9)
    with pytest.raises(ValueError, match=r"frame_stack=2 was given, but .* has no images"):
        make_env("CartPole-v1", frame_stack=2)
    with pytest.raises(
        ValueError, match=r"frame_stack is 0; expected at least 1; set env\.frame_stack=1"
    ):
        make_env("CartPole-v1", frame_stack=0)
