"""Training sequences of DreamerV3.

Axes: B batch rows, T time steps, D deter, S stoch, C classes, A actions.
"""

from dataclasses import dataclass

import torch.nn.functional as F
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


def align_batch(
    batch: Batch, obs: dict[str, Tensor], deter: Tensor, stoch: Tensor, context: bool
) -> Sequences:
    """Pair each row with the action that led to it, starting from a latent state.

    With `context` the state is that of row 0, and rows 1 to T - 1 remain. Otherwise it is the
    initial state of episodes: row 0 becomes a first row without previous action.
    """
    skip = 1 if context else 0
    first = batch["is_first"][:, skip:]
    if not context:
        first = first.clone()
        first[:, 0] = True
    prev_actions = batch["actions"][:, :-1].to(deter.dtype)
    return Sequences(
        {key: value[:, skip:] for key, value in obs.items()},
        prev_actions if context else F.pad(prev_actions, (0, 0, 1, 0)),
        batch["rewards"][:, skip:],
        first,
        batch["is_last"][:, skip:],
        batch["is_terminal"][:, skip:],
        deter,
        stoch,
    )
