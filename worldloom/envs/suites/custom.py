"""A user's own environment, with what the configuration may put around any environment."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym
from gymnasium.wrappers import TimeLimit

from worldloom.envs.wrappers import wrap

AROUND = ("action_repeat", "pixels", "image_size", "frame_stack", "time_limit")


def split_options(
    make: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Tell the options that `make` takes from those of the wrappers around it.

    An option that both know goes to `make`, as in the adapters of the suites. Of these options,
    those that are None are left out, for a default of its own that `make` may have.
    """
    takes = inspect.signature(make).parameters
    given = {k: v for k, v in options.items() if v is not None or k not in AROUND}
    around = {k: v for k, v in given.items() if k in AROUND and k not in takes}
    return {k: v for k, v in given.items() if k not in around}, around


def make_env(
    make: Callable[..., gym.Env],
    options: Mapping[str, Any],
    *,
    time_limit: int | None = None,
    **around: Any,
) -> gym.Env:
    """Make an environment with `make(**options)` and put wrappers around it.

    time_limit: simulator steps (not of `action_repeat`) after which an episode is truncated.
    around: action_repeat, pixels, image_size and frame_stack, as in `worldloom.envs.wrappers.wrap`.
    """
    env = make(**options)
    if not isinstance(env, gym.Env):
        return env  # whoever uses it says what is wrong with it
    if time_limit is not None:
        env = TimeLimit(env, time_limit)
    return wrap(env, **around)
