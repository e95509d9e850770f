"""Choice and repair of MuJoCo's offscreen renderers."""

import functools
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from typing import Any

import numpy as np

from worldloom.envs.extras import suggest_extra

# In order of preference: the graphics card (or its software substitute), then software only.
RENDERERS = ("egl", "osmesa")
PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"


class RendererError(ValueError):
    """No renderer works on this machine; the message says what to install."""


def make_current(env: Any) -> None:
    """Make the OpenGL contexts of an environment's MuJoCo renderers current.

    Gymnasium assumes that a context stays current. Where several environments render in one
    process, the newest one replaces it, and closing an environment leaves none: images are black.
    """
    for renderer in _find_renderers(env):
        renderer.viewer.make_context_current()


def render_rgb(env: Any) -> np.ndarray:
    """Return an environment's rendered image, [H, W, 3] uint8.

    Raises:
        ImportError: a package that renders is missing; the message names the extra.
        TypeError: the environment returned anything else.
    """
    name = str(env.unwrapped)
    with suggest_extra(name):
        make_current(env)
        frame: Any = env.render()
    if not isinstance(frame, np.ndarray) or frame.shape[2:] != (3,) or frame.dtype != np.uint8:
        held = getattr(frame, "shape", type(frame).__name__)
        raise TypeError(
            f"{name} rendered {held}; expected an RGB image [H, W, 3] of uint8; create it with "
            "render_mode='rgb_array', and leave env.pixels and video out if it cannot"
        )
    return frame


def place_camera(env: Any) -> None:
    """Point gymnasium's free camera at the model in its rest position.

    Gymnasium points it at the first state of the first episode, so later images would not depend
    on the seed of their episode alone. Call this once, after the first render.
    """
    for renderer in _find_renderers(env):
        if "lookat" in (getattr(renderer, "default_cam_config", None) or {}):
            continue
        mujoco: Any = importlib.import_module("mujoco")
        model = renderer.viewer.model
        rest = mujoco.MjData(model)
        mujoco.mj_forward(model, rest)
        renderer.viewer.cam.lookat[:] = np.median(rest.geom_xpos, axis=0)


def _find_renderers(env: Any) -> list[Any]:
    """Return gymnasium's MuJoCo renderers of an environment that have rendered before."""
    inner = env.unwrapped
    owners = (inner, getattr(inner, "simulator", None))
    found = (getattr(owner, "mujoco_renderer", None) for owner in owners)
    return [renderer for renderer in found if getattr(renderer, "viewer", None) is not None]


def use_renderer(package: str) -> None:
    """Set MUJOCO_GL to a renderer that works on this machine, unless the user has set it.

    Call this before MuJoCo is imported, and only for tasks that render.

    package: package that renders with MuJoCo.

    Raises:
        ModuleNotFoundError: the package is not installed.
        RendererError: no renderer works.
    """
    for name in (package, "mujoco"):
        if not _is_installed(name):
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
    for name in ("OpenGL.acceleratesupport", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they log every import
    if not sys.platform.startswith("linux") or os.environ.get("MUJOCO_GL"):
        return
    working = next((name for name in RENDERERS if probe(name) is None), None)
    if working is None:
        errors = "; ".join(f"{name}: {probe(name)}" for name in RENDERERS)
        raise RendererError(
            f"images are rendered, but none of MuJoCo's renderers works ({errors}); install one "
            "with apt install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6), or set "
            "MUJOCO_GL=glfw on a machine with a screen"
        )
    os.environ["MUJOCO_GL"] = working


def _is_installed(package: str) -> bool:
    return importlib.util.find_spec(package) is not None


@functools.cache
def probe(name: str) -> str | None:
    """Return the error of a renderer, or None if it works.

    It is tried in a new process, because MuJoCo chooses its renderer when it is imported.
    """
    command, env = [sys.executable, "-c", PROBE], {**os.environ, "MUJOCO_GL": name}
    try:
        done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    except subprocess.TimeoutExpired:
        return "no answer within a minute"
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
