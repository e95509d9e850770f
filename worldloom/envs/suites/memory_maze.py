"""Memory Maze: remember where in a maze the coloured things are; behind gymnasium's API."""

import importlib
import importlib.util
import logging
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.extras import naming_the_extra
from worldloom.envs.wrappers import wrap

# Settings of a generator of mazes; the package leaves all others as they are.
KEPT = (
    *("height", "width", "max_rooms", "room_min_size", "room_max_size", "max_variations"),
    *("spawns_per_room", "objects_per_room", "spawn_token", "object_token"),
)
LENGTHS = {"9x9": 1000, "11x11": 2000, "13x13": 3000, "15x15": 4000}  # steps, four to a second


def make_env(
    task: str,
    *,
    image_size: int | None = None,
    pixels: bool = True,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
) -> gym.Env:
    """Make a maze of a size, such as 9x9 (memory_maze_9x9, MemoryMaze-9x9).

    image_size: side of the picture in pixels, 64 by default, and no less.
    pixels: must be true, for nothing else is observed.
    action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`.
    time_limit: steps after which an episode is truncated; at most the maze's own limit.
    """
    if not pixels:
        raise ValueError(
            "env.pixels is false, but mazes are observed from pictures only; leave env.pixels out"
        )
    name = task.lower().replace("-", "_").rpartition("_")[2]
    if name not in LENGTHS:
        raise ValueError(
            f"env.task is '{task}', which is no size of a Memory Maze; expected one of "
            f"{', '.join(LENGTHS)}; set env.task to one of them"
        )
    if image_size is not None and image_size < 64:
        # The package's border is then 0 pixels wide, and img[-0:] is the whole picture.
        raise ValueError(
            f"env.image_size is {image_size}, at which Memory Maze paints its border over the "
            "whole picture; expected 64 or more; set env.image_size=64"
        )
    limit = LENGTHS[name] if time_limit is None else time_limit
    if limit > LENGTHS[name]:
        raise ValueError(
            f"env.time_limit is {limit}, but a maze of {name} ends after {LENGTHS[name]} steps; "
            f"set env.time_limit={LENGTHS[name]} or less"
        )
    with naming_the_extra(f"memory_maze {task}"):
        use_renderer("memory_maze")
        make = getattr(_tasks(), f"memory_maze_{name}")
    return wrap(
        TimeLimit(MemoryMaze(make, name, image_size or 64), limit),
        action_repeat=action_repeat,
        frame_stack=frame_stack,
    )


class MemoryMaze(gym.Env):
    """A maze; observations are pictures [size, size, 3] uint8 with the wanted colour as a border.

    Actions are: stay, forward, left, right, forward and left, forward and right. An episode never
    terminates. Each has a maze of its own.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as in gym.Env)
    render_mode = "rgb_array"

    def __init__(self, make: Any, name: str, size: int) -> None:
        self.make, self.name, self.size = make, name, size
        self.env: Any = None  # made in the first reset, for that takes seconds
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Discrete(6)
        self._picture = np.zeros((size, size, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start in a new maze; a seed fixes this maze and all that follow."""
        super().reset(seed=seed)
        if self.env is None:
            self.env = self.make(seed=1, image_only_obs=True, camera_resolution=self.size)
            self._seed()
        elif seed is not None:
            self._seed()
        self._picture = self.env.reset().observation.copy()  # it draws into the same array again
        return self._picture, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for a quarter of a second."""
        step = self.env.step(int(action))
        self._picture = step.observation.copy()
        return self._picture, float(step.reward), False, step.last(), {}

    def render(self) -> np.ndarray:
        """Return the newest picture, [size, size, 3] uint8."""
        return self._picture

    def close(self) -> None:
        """Free the simulator and its renderer."""
        if self.env is not None:
            self.env.close()

    def __str__(self) -> str:
        return f"<memory_maze {self.name}>"

    def _seed(self) -> None:
        """Let the next maze and all that is drawn in it follow from `np_random`.

        The package takes a seed only where it makes a simulator, which is twice as slow as a reset.
        """
        inner = self.env
        while (wrapped := getattr(inner, "env", None)) is not None:
            inner = wrapped
        inner.random_state.seed(int(self.np_random.integers(2**31)))
        maze = inner.task._maze_arena._maze
        settings = {name: getattr(maze, name) for name in KEPT}
        labmaze: Any = importlib.import_module("labmaze")
        drawn = int(self.np_random.integers(1, 2**31))
        # What it holds draws the mazes, and can be seeded only here.
        maze._native_maze = labmaze.RandomMaze(**settings, random_seed=drawn)._native_maze


def _tasks() -> Any:
    """Import the package's tasks but not the package, which wants the old gym to register them."""
    if "memory_maze" not in sys.modules:
        spec = importlib.util.find_spec("memory_maze")
        if spec is None:
            raise ModuleNotFoundError("No module named 'memory_maze'", name="memory_maze")
        sys.modules["memory_maze"] = importlib.util.module_from_spec(spec)
        # It would say so at the start of every episode.
        logging.getLogger("absl").addFilter(lambda line: "no free joint" not in line.getMessage())
    return importlib.import_module("memory_maze.tasks")
