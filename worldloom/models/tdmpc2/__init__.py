"""TD-MPC2 (Hansen et al. 2024): planning with an implicit world model."""

from worldloom.models.tdmpc2.model import TDMPC2

__all__ = ["TDMPC2"]
