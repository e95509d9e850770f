"""Environments whose image and reward follow from the step and the action, for films of them."""

import os

import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Clock(gym.Env):
    """The image is 10 times the step; the reward is the step before plus the action.

    fault: what is wrong with the rendering: "raises", "dies", or "differs", an episode that depends
        on more than its seed.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 5}  # noqa: RUF012

    def __init__(self, sees, fault="", render_mode=None):
        self.sees, self.fault, self.render_mode = sees, fault, render_mode
        box = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        self.observation_space = box if sees == "image" else spaces.Box(-9, 99, (1,))
        self.action_space = spaces.Box(-1, 1, (1,))

    def _observe(self):
        image = np.full((16, 16, 3), 10 * self.time, np.uint8)
        return image if self.sees == "image" else np.array([self.time], np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.time, self.length = 0, int(self.np_random.integers(4, 9))
        return self._observe(), {}

    def step(self, action):
        reward = self.time + float(action[0])
        if self.fault == "differs":
            reward += os.getpid()
        self.time += 1
        return self._observe(), reward, False, self.time >= self.length, {}

    def render(self):
        if self.fault == "raises":
            raise RuntimeError("no\nscreen")
        if self.fault == "dies":
            os._exit(3)
        return np.full((32, 64, 3), (0, 10 * self.time, 200), np.uint8)


def make_clock(sees="image", fault="", render_mode=None):
    return Clock(sees, fault, render_mode)
