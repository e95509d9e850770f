"""worldloom: train, compare and use world models."""

import importlib
from typing import TYPE_CHECKING, Any

from worldloom import starting

if TYPE_CHECKING:
    from worldloom.app.saved_run import load_run as load_run
    from worldloom.check import check_world_model as check_world_model
    from worldloom.check.environment import check_env as check_env
    from worldloom.factory import create_world_model as create_world_model
    from worldloom.factory import list_models as list_models
    from worldloom.protocol import Batch as Batch
    from worldloom.protocol import LatentState as LatentState
    from worldloom.protocol import Trajectory as Trajectory
    from worldloom.protocol import WorldModel as WorldModel

if starting.is_command():
    starting.begin()

__version__ = "0.2.0"
# Loaded on first use, so that environment workers, which need no torch, start fast.
_HOME = {
    "Batch": "protocol",
    "LatentState": "protocol",
    "Trajectory": "protocol",
    "WorldModel": "protocol",
    "check_env": "check.environment",
    "check_world_model": "check",
    "create_world_model": "factory",
    "list_models": "factory",
    "load_run": "app.saved_run",
}
__all__ = sorted(_HOME)


def __getattr__(name: str) -> Any:
    """Import a public name from the module that defines it."""
    if name not in _HOME:
        raise AttributeError(f"module 'worldloom' has no attribute {name!r}")
    return getattr(importlib.import_module(f"worldloom.{_HOME[name]}"), name)


def __dir__() -> list[str]:
    """List the public names."""
    return [*globals(), *__all__]
