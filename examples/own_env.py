"""A custom environment: keep the level of a leaking tank at 1 with a pump of 0 to 5 litres.

Check it, then train on it (in this folder, so that own_env can be imported):

    python own_env.py
    python -m worldloom.run env._target_=own_env.Tank model=tdmpc2_tiny training.total_steps=2000

+env.leak=0.5 changes an argument. The last lines that the run prints score it and act with it, and
act.py plays episodes: python act.py RUN own_env.Tank
"""

import gymnasium as gym
import numpy as np

import worldloom


class Tank(gym.Env):
    """Observe the level and the rain; choose what the pump adds."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}
    observation_space = gym.spaces.Box(0, 10, (2,), np.float32)
    action_space = gym.spaces.Box(0, 5, (1,), np.float32)

    def __init__(self, leak=0.3, render_mode=None):
        self.leak, self.render_mode = leak, render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.level, self.steps = float(self.np_random.uniform(0, 4)), 0
        self.rain = float(self.np_random.uniform(0, 1))
        return self._observe(), {}

    def step(self, action):
        self.level += 0.1 * (float(action[0]) + self.rain - 5 * self.leak * self.level)
        self.level, self.steps = float(np.clip(self.level, 0, 10)), self.steps + 1
        return self._observe(), 1 - abs(self.level - 1), False, self.steps >= 40, {}

    def render(self):
        image = np.full((256, 128, 3), 255, np.uint8)
        image[256 - round(25.6 * self.level) :] = (60, 120, 220)
        image[256 - 26] = (220, 0, 0)  # the goal
        return image

    def _observe(self):
        return np.array([self.level, self.rain], np.float32)


if __name__ == "__main__":
    print(worldloom.check_env(Tank()))
