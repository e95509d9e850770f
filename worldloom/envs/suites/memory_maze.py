"""Memory Maze: remember where coloured objects are in a maze, and find them repeatedly."""

import importlib
import importlib.util
import logging
import sys
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.extras import suggest_extra
from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.settings import require_pixels
from worldloom.envs.suites.simulator import SimulatorEnv
from worldloom.envs.wrappers import wrap
from worldloom.errors import require

# Settings of the maze generator that the package changes from their defaults.
MAZE_SETTINGS = (
    *("height", "width", "max_rooms", "room_min_size", "room_max_size", "max_variations"),
    *("spawns_per_room", "objects_per_room", "spawn_token", "object_token"),
)
LENGTHS = {"9x9": 1000, "11x11": 2000, "13x13": 3000, "15x15": 4000}  # steps, four per second


def make_env(
    task: str,
    *,
    image_size: int | None = None,
    pixels: bool = True,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
) -> gym.Env:
    """Make mazes of a size, such as 9x9 (memory_maze_9x9, MemoryMaze-9x9).

    image_size: side of the image in pixels, at least 64, which is the default.
    pixels: must be true, because there are no other observations.
    action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`.
    time_limit: steps after which an episode is truncated; at most the maze's limit.
    """
    require_pixels(pixels, "Memory Maze")
    maze = task.lower().replace("-", "_").rpartition("_")[2]
    require(maze in LENGTHS, "env.task", task, f"one of {', '.join(LENGTHS)}")
    size, limit = image_size or 64, time_limit or LENGTHS[maze]
    # In smaller images the package's border is 0 pixels wide, and img[-0:] is the whole image.
    require(size >= 64, "env.image_size", size, "at least 64")
    most = LENGTHS[maze]
    require(limit <= most, "env.time_limit", limit, f"at most {most} for {maze}")
    with suggest_extra(f"memory_maze {task}"):
        use_renderer("memory_maze")
        make = getattr(_import_tasks(), f"memory_maze_{maze}")
    return wrap(MemoryMaze(make, maze, size), limit, action_repeat, frame_stack)


class MemoryMaze(SimulatorEnv):
    """A maze; observations are images [size, size, 3] uint8 framed in the colour to look for.

    Actions are: stay, forward, left, right, forward and left, forward and right. Each episode has
    a new maze and never terminates.
    """

    render_fps = 4

    def __init__(self, make: Any, maze: str, size: int) -> None:
        self.make, self.name, self.size = make, f"memory_maze {maze}", size
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Discrete(6)
        self._image = np.zeros((size, size, 3), np.uint8)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start in a new maze; a seed determines this maze and all that follow."""
        super().reset(seed=seed)
        if self.simulator is None:  # made here, because it takes seconds
            self.simulator = self.make(seed=1, image_only_obs=True, camera_resolution=self.size)
            self._seed()
        elif seed is not None:
            self._seed()
        self._image = self.simulator.reset().observation.copy()  # the simulator reuses the array
        return self._image, {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for a quarter of a second."""
        step = self.simulator.step(int(action))
        self._image = step.observation.copy()
        return self._image, float(step.reward), False, step.last(), {}

    def render(self) -> np.ndarray:
        """Return the newest image, [size, size, 3] uint8."""
        return self._image

    def _seed(self) -> None:
        """Seed the next maze and everything that is drawn at random in it from `np_random`.

        The package accepts a seed only for a new simulator, which is twice as slow as a reset.
        """
        inner = self.simulator
        while (wrapped := getattr(inner, "env", None)) is not None:
            inner = wrapped
        inner.random_state.seed(int(self.np_random.integers(2**31)))
        maze = inner.task._maze_arena._maze
        settings = {name: getattr(maze, name) for name in MAZE_SETTINGS}
        labmaze: Any = importlib.import_module("labmaze")
        drawn = int(self.np_random.integers(1, 2**31))
        # The native generator draws the mazes, and takes a seed only when it is made.
        maze._native_maze = labmaze.RandomMaze(**settings, random_seed=drawn)._native_maze


def _import_tasks() -> Any:
    """Import the package's tasks without the package, which would register them with old gym."""
    if "memory_maze" not in sys.modules:
        spec = importlib.util.find_spec("memory_maze")
        if spec is None:
            raise ModuleNotFoundError("No module named 'memory_maze'", name="memory_maze")
        sys.modules["memory_maze"] = importlib.util.module_from_spec(spec)
        # This line would be logged at the start of every episode.
        logging.getLogger("absl").addFilter(lambda line: "no free joint" not in line.getMessage())
    return importlib.import_module("memory_maze.tasks")
