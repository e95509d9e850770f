"""TD-MPC2 (Hansen et al. 2024): an implicit world model that is planned with."""

from worldloom.models.tdmpc2.model import TDMPC2

__all__ = ["TDMPC2"]
