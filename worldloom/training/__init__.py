"""Collection, replay and training for any `WorldModel`.

Names are imported on first use: importing Lightning takes seconds, and a replay buffer does not
need it.
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from worldloom.replay.buffer import ReplayBuffer
    from worldloom.training.collector import Collector
    from worldloom.training.config import TrainingConfig
    from worldloom.training.datamodule import ReplayDataModule
    from worldloom.training.module import WorldModelModule
    from worldloom.training.optimizers import LaProp

__all__ = [
    "Collector",
    "LaProp",
    "ReplayBuffer",
    "ReplayDataModule",
    "TrainingConfig",
    "WorldModelModule",
]

_MODULES = {
    "Collector": "worldloom.training.collector",
    "LaProp": "worldloom.training.optimizers",
    "ReplayBuffer": "worldloom.replay.buffer",
    "ReplayDataModule": "worldloom.training.datamodule",
    "TrainingConfig": "worldloom.training.config",
    "WorldModelModule": "worldloom.training.module",
}


def __getattr__(name: str) -> Any:
    """Import a name from its module on first use."""
    if name not in _MODULES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}; it has {__all__}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """List the names that can be imported."""
    return __all__
