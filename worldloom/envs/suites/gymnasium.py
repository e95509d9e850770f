"""Any gymnasium id as an environment that models can learn."""

import difflib
import importlib
from typing import Any

import gymnasium as gym

import worldloom.envs.suites.catch  # noqa: F401  (registers worldloom/Catch-v0)
from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.extras import naming_the_extra
from worldloom.envs.wrappers import wrap

# Packages whose ids gymnasium knows only after their import -> how those ids begin.
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

    pixels, image_size, action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`. Without
        pixels no renderer is touched.
    time_limit: steps of the simulator (not of `action_repeat`) after which an episode is truncated,
        instead of the limit that is registered with the id.
    kwargs: go to the environment.
    """
    if time_limit is not None:
        kwargs["max_episode_steps"] = time_limit
    with naming_the_extra(id):
        spec = _registered(id)
        if pixels:
            kwargs["render_mode"] = "rgb_array"
            if str(spec.entry_point).startswith(MUJOCO):
                use_renderer("mujoco")
                # Drawn at this size: 480 pixels a side take two to six times as long in software.
                kwargs = {"width": image_size or 64, "height": image_size or 64, **kwargs}
        env = gym.make(spec, **kwargs)
    return wrap(
        env,
        action_repeat=action_repeat,
        pixels=pixels,
        image_size=image_size,
        frame_stack=frame_stack,
    )


def _registered(id: str) -> Any:
    """Return what gymnasium knows of an id, importing the package that registers it first."""
    package = next((name for name, starts in PACKAGES.items() if id.startswith(starts)), None)
    module, _, name = id.rpartition(":")
    if package or module:
        importlib.import_module(package or module)
    try:
        return gym.spec(name)
    except gym.error.Error as error:
        names = {known.lower(): known for known in gym.registry}
        near = [names[name] for name in difflib.get_close_matches(name.lower(), names, cutoff=0.4)]
        raise ValueError(
            f"There is no environment '{id}' ({error}); expected an id that gymnasium knows, "
            f"such as {', '.join(near or sorted(names.values())[:3])}; set env.id to one, or to "
            "'module:id' if importing a module registers yours"
        ) from error
