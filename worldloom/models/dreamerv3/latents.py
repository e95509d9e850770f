"""Latent states of DreamerV3 as the two parts of a `LatentState`.

Axes: B batch rows, D deter, S stoch, C classes.
"""

import torch
from torch import Tensor

from worldloom.protocol import LatentState


def join_state(deter: Tensor, stoch: Tensor) -> LatentState:
    """Return the state with deter [B, D] and stoch [B, S * C]; its features are both."""
    return LatentState(deter, stoch, torch.cat([deter, stoch], -1))


def split_state(state: LatentState) -> tuple[Tensor, Tensor]:
    """Return deter [B, D] and stoch [B, S * C] of a state.

    Raises:
        ValueError: the state has no stochastic part.
    """
    if state.stochastic is None:
        raise ValueError("the state has no stochastic part; it comes from another kind of model")
    return state.deterministic, state.stochastic
