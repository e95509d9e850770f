"""DeepMind Control tasks, from the state or from pixels."""

import importlib
import logging
import math
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.extras import suggest_extra
from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.settings import find_task
from worldloom.envs.suites.simulator import SimulatorEnv
from worldloom.envs.wrappers import wrap

LENGTH = 1000  # control steps of an episode, the same in all tasks of the benchmark
SHORT_DOMAINS = {"cup": "ball_in_cup", "pointmass": "point_mass"}
CAMERAS = {"quadruped": 2}  # domains in which camera 0 does not show the robot


def make_env(
    task: str,
    *,
    pixels: bool = False,
    image_size: int | None = None,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
    camera: int | None = None,
    render_mode: str | None = None,
) -> gym.Env:
    """Make a task of the suite, such as walker-walk (walker_walk, dmc_walker_walk).

    pixels, image_size, action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`. With
        pixels or render_mode="rgb_array" a renderer that works is chosen; otherwise none is loaded.
    time_limit: control steps after which an episode is truncated, 1000 by default.
    camera: number of the camera; None for the one that follows the robot.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # it logs every import
    # The robot of the tasks called escape senses the rendered terrain.
    renders = pixels or render_mode is not None or "escape" in task
    with suggest_extra(f"dmc task {task}"):
        if renders:
            use_renderer("dm_control")
        with _import_renderer(renders):
            from dm_control import suite
    if not hasattr(np, "in1d"):
        # Removed in numpy 2.4, but called by the quadrupeds of dm_control 1.0.28, the newest
        # version that Meta-World's mujoco allows.
        setattr(np, "in1d", np.isin)  # noqa: B010 (mypy rejects the assignment)
    domain, name = _find(task, suite.ALL_TASKS)
    # The wrapper's limit replaces the suite's, so that it can be longer, too.
    simulator = suite.load(domain, name, task_kwargs={"time_limit": math.inf})
    view = CAMERAS.get(domain, 0) if camera is None else camera
    env = ControlTask(simulator, f"{domain}-{name}", image_size or (64 if pixels else 240), view)
    limit = LENGTH if time_limit is None else time_limit
    return wrap(env, limit, action_repeat, frame_stack, pixels, image_size)


class ControlTask(SimulatorEnv):
    """A dm_control environment; observations are a dict of vectors (scalars get one axis).

    size, camera: of the images that `render` returns, [size, size, 3] uint8.
    obs_order: the keys in dm_control's order; gymnasium's Dict sorts them.
    """

    def __init__(self, simulator: Any, task: str, size: int, camera: int) -> None:
        self.simulator, self.name, self.size, self.camera = simulator, f"dmc {task}", size, camera
        self.render_fps = 1 / simulator.control_timestep()
        specs = simulator.observation_spec()
        self.obs_order = tuple(specs)
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(-np.inf, np.inf, spec.shape or (1,), np.float32)
                for key, spec in specs.items()
            }
        )
        action = simulator.action_spec()
        if np.abs([action.minimum, action.maximum]).max() > 1e6:
            raise ValueError(
                f"env.task is '{task}', whose actions are practically unbounded; expected a task "
                "with actions in [-1, 1]; set env.task to another one"
            )
        self.action_space = spaces.Box(
            np.broadcast_to(action.minimum, action.shape).astype(np.float32),
            np.broadcast_to(action.maximum, action.shape).astype(np.float32),
            dtype=np.float32,
        )

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode."""
        super().reset(seed=seed)
        if seed is not None:
            self.simulator.task.random.seed(seed % 2**32)
        return self._obs(self.simulator.reset()), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one control step; terminated means a discount of 0, which few tasks have."""
        step = self.simulator.step(action)
        ended = step.last()
        terminated = ended and step.discount == 0
        return self._obs(step), float(step.reward), terminated, ended and not terminated, {}

    def render(self) -> np.ndarray:
        """Return the camera's image, [size, size, 3] uint8."""
        return self.simulator.physics.render(self.size, self.size, camera_id=self.camera)

    def _obs(self, step: Any) -> dict[str, np.ndarray]:
        return {
            key: np.atleast_1d(np.asarray(value, np.float32))
            for key, value in step.observation.items()
        }


@contextmanager
def _import_renderer(renders: bool) -> Iterator[None]:
    """Let the import of dm_control in this block load a renderer, or keep it from doing so.

    dm_control loads the renderer named by MUJOCO_GL when it is imported and never again; if the
    variable is not set, it loads the first library that it finds.
    """
    if not renders:
        chosen = os.environ.get("MUJOCO_GL")
        os.environ["MUJOCO_GL"] = "disable"
        try:
            yield
        finally:
            del os.environ["MUJOCO_GL"]
            if chosen is not None:
                os.environ["MUJOCO_GL"] = chosen
        return
    yield
    loaded: Any = sys.modules["dm_control._render"]
    if loaded.BACKEND in loaded.constants.NO_RENDERER:
        importlib.reload(loaded)


def _find(task: str, known: Any) -> tuple[str, str]:
    """Return the domain and the name of a task in any of its spellings."""
    tasks = {f"{domain}_{name}".lower(): f"{domain}-{name}" for domain, name in known}
    wanted = task.lower().replace("-", "_").removeprefix("dmc_")
    first = wanted.split("_")[0]
    if wanted not in tasks and first in SHORT_DOMAINS:
        wanted = SHORT_DOMAINS[first] + wanted.removeprefix(first)
    examples = ("walker_walk", "cheetah_run")
    found = find_task(tasks, wanted, given=task, suite="DeepMind Control", examples=examples)
    domain, _, name = found.partition("-")
    return domain, name
