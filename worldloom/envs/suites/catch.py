"""Catch: a paddle has to catch a falling ball; the smallest task for a world model.

It needs neither a simulator nor a renderer, so examples and tests train on it.
"""

from typing import Any

import gymnasium as gym
import numpy as np

BALL = (255, 208, 64)
PADDLE = (64, 160, 255)


class Catch(gym.Env):
    """Move left, stay or move right (actions 0, 1, 2) to be under the ball when it lands.

    The ball starts in a random column and falls one row per step, so an episode has `rows - 1`
    steps. The last step gives a reward of +1 for a catch or -1 for a miss, all others 0.
    Observations are images [image_size, image_size, 3] uint8.
    """

    metadata = {"render_modes": ["rgb_array"], "render_fps": 10}  # noqa: RUF012 (as in gym.Env)

    def __init__(
        self, rows: int = 10, columns: int = 5, image_size: int = 32, render_mode: str | None = None
    ) -> None:
        if not (2 <= rows <= image_size and 2 <= columns <= image_size):
            raise ValueError(
                f"Catch got rows={rows}, columns={columns}, image_size={image_size}; expected at "
                "least 2 rows and columns, and at most one per pixel; lower env.rows and "
                "env.columns or raise env.image_size"
            )
        if image_size % 16:
            raise ValueError(
                f"Catch got image_size={image_size}; expected a multiple of 16; for example "
                "env.image_size=32"
            )
        self.rows, self.columns, self.size = rows, columns, image_size
        self.render_mode = render_mode
        self.observation_space = gym.spaces.Box(0, 255, (image_size, image_size, 3), np.uint8)
        self.action_space = gym.spaces.Discrete(3)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Drop a new ball; the paddle starts in the middle."""
        super().reset(seed=seed)
        self.row = 0
        self.column = int(self.np_random.integers(self.columns))
        self.paddle = self.columns // 2
        return self.render(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Move the paddle, then let the ball fall one row."""
        self.paddle = int(np.clip(self.paddle + int(action) - 1, 0, self.columns - 1))
        self.row += 1
        if self.row < self.rows - 1:
            return self.render(), 0.0, False, False, {}
        caught = self.paddle == self.column
        return self.render(), 1.0 if caught else -1.0, True, False, {"success": caught}

    def render(self) -> np.ndarray:
        """Paint ball and paddle as rectangles, [image_size, image_size, 3] uint8."""
        image = np.zeros((self.size, self.size, 3), np.uint8)
        image[self._cell(self.rows - 1, self.paddle)] = PADDLE
        image[self._cell(self.row, self.column)] = BALL
        return image

    def _cell(self, row: int, column: int) -> tuple[slice, slice]:
        """Return the pixels of a cell; their sizes may differ by one pixel."""
        return (
            slice(row * self.size // self.rows, (row + 1) * self.size // self.rows),
            slice(column * self.size // self.columns, (column + 1) * self.size // self.columns),
        )


gym.register(id="worldloom/Catch-v0", entry_point="worldloom.envs.suites.catch:Catch")
