"""Storage and sampling of environment steps."""

from worldloom.replay.buffer import ReplayBuffer

__all__ = ["ReplayBuffer"]
