"""Collect, replay and train: everything that any `WorldModel` shares.

Names are looked up on first use, because Lightning takes seconds to import and a replay buffer in
a notebook needs none of it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom.training.collector import Collector
    from worldloom.training.config import TrainingConfig
    from worldloom.training.data import ReplayDataModule
    from worldloom.training.module import WorldModelModule
    from worldloom.training.optimizers import LaProp
    from worldloom.training.replay import ReplayBuffer

__all__ = [
    "Collector",
    "LaProp",
    "ReplayBuffer",
    "ReplayDataModule",
    "TrainingConfig",
    "WorldModelModule",
]

_FILES = {
    "Collector": "collector",
    "LaProp": "optimizers",
    "ReplayBuffer": "replay",
    "ReplayDataModule": "data",
    "TrainingConfig": "config",
    "WorldModelModule": "module",
}


def __getattr__(name: str) -> Any:
    """Import a name from its file when it is first asked for."""
    if name not in _FILES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(f"{__name__}.{_FILES[name]}"), name)


def __dir__() -> list[str]:
    """List the names that can be imported."""
    return __all__
