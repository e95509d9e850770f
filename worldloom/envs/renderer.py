"""Choose a renderer for MuJoCo's pictures that needs no screen."""

import functools
import importlib
import importlib.util
import logging
import os
import subprocess
import sys
from typing import Any

import numpy as np

# The first that works: the graphics card (or its software stand-in), then plain software.
CANDIDATES = ("egl", "osmesa")
PROBE = "import mujoco; context = mujoco.GLContext(16, 16); context.make_current(); context.free()"


class RendererError(ValueError):
    """No renderer works on this machine; says what to install."""


def make_current(env: Any) -> None:
    """Make gymnasium's MuJoCo renderer of an environment draw into its own picture again.

    It believes that it always does, but where several environments render in one process the
    newest has taken its place, or, if that was closed, none: pictures would be black.
    """
    for renderer in _renderers(env):
        renderer.viewer.make_context_current()


def place_camera(env: Any) -> None:
    """Turn gymnasium's free camera of an environment to where its model stands at rest.

    It is turned to where the first episode began, so later pictures would not follow from their
    own episode's seed. To be called once, after the first picture.
    """
    for renderer in _renderers(env):
        if "lookat" in (getattr(renderer, "default_cam_config", None) or {}):
            continue
        mujoco: Any = importlib.import_module("mujoco")
        model = renderer.viewer.model
        rest = mujoco.MjData(model)
        mujoco.mj_forward(model, rest)
        renderer.viewer.cam.lookat[:] = np.median(rest.geom_xpos, axis=0)


def _renderers(env: Any) -> list[Any]:
    """Return gymnasium's MuJoCo renderers of an environment that have drawn before."""
    inner = env.unwrapped
    owners = (inner, getattr(inner, "env", None))
    found = (getattr(owner, "mujoco_renderer", None) for owner in owners)
    return [renderer for renderer in found if getattr(renderer, "viewer", None) is not None]


def use_renderer(package: str) -> None:
    """Set MUJOCO_GL to a renderer that works here, unless the user has set it.

    To be called before MuJoCo is imported, and only for tasks that render.

    package: what renders with MuJoCo.

    Raises:
        ModuleNotFoundError: the package is not installed.
        RendererError: no renderer works.
    """
    for name in (package, "mujoco"):
        if importlib.util.find_spec(name) is None:
            raise ModuleNotFoundError(f"No module named '{package}'", name=package)
    for name in ("OpenGL.acceleratesupport", "absl"):
        logging.getLogger(name).setLevel(logging.WARNING)  # they tell of every import
    if not sys.platform.startswith("linux") or os.environ.get("MUJOCO_GL"):
        return
    working = next((name for name in CANDIDATES if _failure(name) is None), None)
    if working is None:
        tried = "; ".join(f"{name}: {_failure(name)}" for name in CANDIDATES)
        raise RendererError(
            f"pixels were asked for but MuJoCo can render with neither of them ({tried}); install "
            "one with apt install libegl1 libegl-mesa0 libgl1-mesa-dri (or libosmesa6), or set "
            "MUJOCO_GL=glfw where there is a screen"
        )
    os.environ["MUJOCO_GL"] = working


@functools.cache
def _failure(name: str) -> str | None:
    """Return why a renderer does not work, or None if it does.

    Asked in a process of its own, for MuJoCo decides when it is imported and never again.
    """
    done = subprocess.run(
        [sys.executable, "-c", PROBE],
        env={**os.environ, "MUJOCO_GL": name},
        capture_output=True,
        text=True,
    )
    if done.returncode == 0:
        return None
    lines = done.stderr.strip().splitlines()
    return lines[-1] if lines else f"exit code {done.returncode}"
