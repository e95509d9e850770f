"""Custom environments, with the wrappers that their settings require."""

import inspect
from collections.abc import Callable, Mapping
from typing import Any

import gymnasium as gym

from worldloom.envs.wrappers import wrap

WRAPPER_SETTINGS = ("action_repeat", "pixels", "image_size", "frame_stack", "time_limit")


def split_options(
    make: Callable[..., Any], options: Mapping[str, Any]
) -> tuple[dict[str, Any], dict[str, Any]]:
    """Split options into those that `make` takes and those of the wrappers around it.

    An option of both goes to `make`, as in the adapters of the suites. Wrapper settings that are
    None are left out, so that `make` uses its own defaults.
    """
    takes = inspect.signature(make).parameters
    given = {k: v for k, v in options.items() if v is not None or k not in WRAPPER_SETTINGS}
    wrappers = {k: v for k, v in given.items() if k in WRAPPER_SETTINGS and k not in takes}
    return {k: v for k, v in given.items() if k not in wrappers}, wrappers


def make_env(make: Callable[..., gym.Env], options: Mapping[str, Any], **wrappers: Any) -> gym.Env:
    """Make an environment with `make(**options)` and put wrappers around it.

    wrappers: settings of `worldloom.envs.wrappers.wrap`.
    """
    env = make(**options)
    # The caller reports anything that is not an environment.
    return wrap(env, **wrappers) if isinstance(env, gym.Env) else env
