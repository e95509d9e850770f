"""Training sequences of DreamerV3, and the states that they start from.

Axes: B batch rows, T time steps, D deter, S stoch, C classes, A actions.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from worldloom.protocol import Batch


@dataclass
class Sequences:
    """A batch in which prev_actions[:, t] led to row t.

    obs: {key: [B, T, *shape]}; prev_actions: [B, T, A]; the next four: [B, T].
    deter [B, D], stoch [B, S * C]: the latent state before row 0.
    """

    obs: dict[str, Tensor]
    prev_actions: Tensor
    rewards: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    deter: Tensor
    stoch: Tensor


def start_from_zeros(
    batch: Batch, obs: dict[str, Tensor], deter: Tensor, stoch: Tensor
) -> Sequences:
    """Return all rows; each sequence starts like an episode, from the all-zero state given."""
    actions = batch["actions"].to(deter.dtype)
    first = batch["is_first"].clone()
    first[:, 0] = True
    return Sequences(
        obs,
        torch.cat([torch.zeros_like(actions[:, :1]), actions[:, :-1]], 1),
        batch["rewards"],
        first,
        batch["is_last"],
        batch["is_terminal"],
        deter,
        stoch,
    )


def start_from_context(batch: Batch, obs: dict[str, Tensor], dtype: torch.dtype) -> Sequences:
    """Return rows 1 to T - 1, starting from the stored latent state of row 0."""
    context = batch["context"]
    return Sequences(
        {key: value[:, 1:] for key, value in obs.items()},
        batch["actions"][:, :-1].to(dtype),
        batch["rewards"][:, 1:],
        batch["is_first"][:, 1:],
        batch["is_last"][:, 1:],
        batch["is_terminal"][:, 1:],
        context["deter"].flatten(1).to(dtype),
        context["stoch"].flatten(1).to(dtype),
    )
