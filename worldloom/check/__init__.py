"""Checks of world models and environments, to run before training.

`check_env` is in `worldloom.check.environment`, so that checking a model does not import gymnasium.
"""

from worldloom.check.model import check_world_model
from worldloom.check.report import ProtocolError

__all__ = ["ProtocolError", "check_world_model"]
