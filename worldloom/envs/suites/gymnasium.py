"""Environments registered with gymnasium, by their ids."""

import importlib
from typing import Any

import gymnasium as gym

import worldloom.envs.suites.catch  # noqa: F401  (registers worldloom/Catch-v0)
from worldloom.envs.extras import suggest_extra
from worldloom.envs.renderer import use_renderer
from worldloom.envs.wrappers import wrap
from worldloom.errors import find_similar

# Packages that register their ids when they are imported -> prefixes of these ids.
PACKAGES = {
    "ale_py": ("ALE/",),
    "minigrid": ("MiniGrid-", "BabyAI-"),
    "metaworld": ("Meta-World/",),
    "gymnasium_robotics": ("Fetch", "Hand", "Adroit", "AntMaze", "PointMaze", "Franka"),
}
MUJOCO = ("gymnasium.envs.mujoco", "gymnasium_robotics", "metaworld")


def make_env(
    id: str,
    *,
    image_size: int | None = None,
    pixels: bool = False,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
    **kwargs: Any,
) -> gym.Env:
    """Make the environment that is registered under a gymnasium id.

    image_size, pixels, action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`. No
        renderer is loaded without pixels or render_mode.
    time_limit: simulator steps after which an episode is truncated, instead of the limit that is
        registered with the id.
    kwargs: passed to the environment, such as render_mode.
    """
    if time_limit is not None:
        kwargs["max_episode_steps"] = time_limit
    with suggest_extra(id):
        spec = _find_spec(id)
        mujoco = str(spec.entry_point).startswith(MUJOCO)
        if pixels:
            kwargs["render_mode"] = "rgb_array"
            if mujoco:
                # At the default of 480 pixels a side, software takes two to six times as long.
                kwargs = {"width": image_size or 64, "height": image_size or 64, **kwargs}
        if mujoco and kwargs.get("render_mode") == "rgb_array":
            use_renderer("mujoco")
        env = gym.make(spec, **kwargs)
    return wrap(env, None, action_repeat, frame_stack, pixels, image_size)


def _find_spec(id: str) -> Any:
    """Return the specification of an id; first import the package that registers it."""
    package = next((name for name, starts in PACKAGES.items() if id.startswith(starts)), None)
    module, _, name = id.rpartition(":")
    if package or module:
        importlib.import_module(package or module)
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        similar = find_similar(name, gym.registry, 3, 0.4) or list(gym.registry)[:3]
        raise ValueError(
            f"There is no environment '{id}' ({error}); expected a registered id, such as "
            f"{', '.join(similar)}; set env.id to one, or to 'module:id' if importing a module "
            "registers yours"
        ) from error
