"""DeepMind Control tasks, from the state or from pixels, behind gymnasium's API."""

import difflib
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
from gymnasium.wrappers import TimeLimit

from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.extras import naming_the_extra
from worldloom.envs.wrappers import wrap

LENGTH = 1000  # control steps of an episode, the same in all tasks of the benchmark
SHORT = {"cup": "ball_in_cup", "pointmass": "point_mass"}
CAMERAS = {"quadruped": 2}  # where camera 0 does not look at the robot


def make_env(
    task: str,
    *,
    pixels: bool = False,
    image_size: int | None = None,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
    camera: int | None = None,
) -> gym.Env:
    """Make a task of the suite, such as walker-walk (walker_walk, dmc_walker_walk).

    pixels, image_size, action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`. Without
        pixels no renderer is touched; with them one is chosen that works.
    time_limit: control steps (not of `action_repeat`) after which an episode is truncated.
    camera: number of the camera; None for the one that follows the robot.
    """
    logging.getLogger("absl").setLevel(logging.WARNING)  # it tells of every import
    draws = pixels or "escape" in task  # whose ground is drawn to be sensed
    with naming_the_extra(f"dmc task {task}"):
        if draws:
            use_renderer("dm_control")
        with _rendering(draws):
            from dm_control import suite
    if not hasattr(np, "in1d"):
        # Gone in numpy 2.4, but the quadrupeds of dm_control 1.0.28 call it, the newest that
        # Meta-World's mujoco allows.
        setattr(np, "in1d", np.isin)  # noqa: B010 (mypy knows that it is gone)
    domain, name = _find(task, suite.ALL_TASKS)
    # The limit below takes the place of the suite's own, so that it can be raised too.
    loaded = suite.load(domain, name, task_kwargs={"time_limit": math.inf})
    view = CAMERAS.get(domain, 0) if camera is None else camera
    env: gym.Env = ControlTask(loaded, f"{domain}-{name}", image_size or 64, view)
    env = TimeLimit(env, LENGTH if time_limit is None else time_limit)
    return wrap(
        env,
        action_repeat=action_repeat,
        pixels=pixels,
        image_size=image_size,
        frame_stack=frame_stack,
    )


class ControlTask(gym.Env):
    """A dm_control environment; observations are a dict of vectors (single numbers have one axis).

    size, camera: of the pictures that `render` returns, [size, size, 3] uint8.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as in gym.Env)
    render_mode = "rgb_array"

    def __init__(self, env: Any, name: str, size: int, camera: int) -> None:
        self.env, self.name, self.size, self.camera = env, name, size, camera
        self.observation_space = spaces.Dict(
            {
                key: spaces.Box(-np.inf, np.inf, spec.shape or (1,), np.float32)
                for key, spec in env.observation_spec().items()
            }
        )
        action = env.action_spec()
        if np.abs([action.minimum, action.maximum]).max() > 1e6:
            raise ValueError(
                f"env.task is '{name}', whose actions have no bounds to speak of; expected a task "
                "whose actions lie in [-1, 1]; set env.task to another one"
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
            self.env.task.random.seed(seed % 2**32)
        return self._obs(self.env.reset()), {}

    def step(
        self, action: np.ndarray
    ) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Act for one control step; terminated is a discount of 0, which few tasks have."""
        step = self.env.step(action)
        ended = step.last()
        terminated = ended and step.discount == 0
        return self._obs(step), float(step.reward), terminated, ended and not terminated, {}

    def render(self) -> np.ndarray:
        """Return the camera's picture, [size, size, 3] uint8."""
        return self.env.physics.render(self.size, self.size, camera_id=self.camera)

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self.env.close()

    def __str__(self) -> str:
        return f"<dmc {self.name}>"

    def _obs(self, step: Any) -> dict[str, np.ndarray]:
        return {
            key: np.atleast_1d(np.asarray(value, np.float32))
            for key, value in step.observation.items()
        }


@contextmanager
def _rendering(pixels: bool) -> Iterator[None]:
    """Keep dm_control from loading a renderer in its import, or make it load one after all.

    It takes the one that MUJOCO_GL names, in its import and never again; unset, it would load
    whatever library it finds first.
    """
    if not pixels:
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
    names = {f"{domain}_{name}".lower(): (domain, name) for domain, name in known}
    wanted = task.lower().replace("-", "_").removeprefix("dmc_")
    first = wanted.split("_")[0]
    if wanted not in names and first in SHORT:
        wanted = SHORT[first] + wanted.removeprefix(first)
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or sorted(names)[:3]
    examples = ", ".join("-".join(names[name]) for name in near)
    raise ValueError(
        f"env.task is '{task}', which is no DeepMind Control task; expected one such as "
        f"{examples}; set env.task to one of them"
    )
