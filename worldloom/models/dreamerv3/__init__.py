"""DreamerV3 (Hafner et al. 2023, 2025), equal to the official implementation in numbers."""

from worldloom.models.dreamerv3.model import DreamerV3

__all__ = ["DreamerV3"]
