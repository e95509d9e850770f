"""Transitions of a batch, and the losses of TD-MPC2 over them.

Axes: B rows, H transitions, A = width of an action. Time comes first: [H, B, ...].
"""

import functools
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloom.models.spaces import ActSpaces, check_rows
from worldloom.protocol import Batch
from worldloom.ranks import sum_counts, world_size


@dataclass
class Transitions:
    """A batch with time first: actions[t] at obs[t] earned rewards[t] and led to obs[t + 1].

    obs: {key: [H + 1, B, *shape]}; actions: [H, B, A]; rewards, terminated: [H, B] float.
    alive: [H, B] float, 0 from the first transition on that would leave the row's episode.
    task: [B] int64, or None for a single task.
    acts: [B] float, 0 where the row starts in a terminal state, in which no action is taken; None
        if no row does. (As in the official code, the policy loss includes terminal states that a
        transition leads to.)
    all_ranks: whether means are those over the rows of all ranks, which then all compute them.
    """

    obs: dict[str, Tensor]
    actions: Tensor
    rewards: Tensor
    terminated: Tensor
    alive: Tensor
    task: Tensor | None
    acts: Tensor | None = None
    all_ranks: bool = False

    @property
    def states_alive(self) -> Tensor:
        """States [H + 1, B] in the policy loss: the first, and those reached within the episode."""
        first = torch.ones_like(self.alive[0]) if self.acts is None else self.acts
        return torch.cat([first.unsqueeze(0), self.alive])

    @functools.cached_property
    def counts(self) -> Tensor:
        """Numbers of rows [H + 1] in `states_alive`; with `all_ranks` the mean over the ranks."""
        count = self.states_alive.sum(1)
        if self.all_ranks and (size := world_size()) > 1:
            return sum_counts(count) / size
        return count

    @classmethod
    def from_batch(
        cls,
        batch: Batch,
        obs: dict[str, Tensor],
        spaces: ActSpaces,
        task: Tensor | None,
        dtype: torch.dtype,
        all_ranks: bool = False,
    ) -> "Transitions":
        """Check a batch [B, T, ...] and return its T - 1 transitions.

        Truncated episodes are not terminated.
        """
        steps = check_rows(batch, obs, spaces)[1]
        if steps < 2:
            raise ValueError(
                f"sequences have {steps} row; a transition needs 2. Use training.sequence_length "
                "of at least 2"
            )
        leaves = batch["is_last"][:, :-1] | batch["is_first"][:, 1:]  # [B, H]
        return cls(
            {key: value.transpose(0, 1) for key, value in obs.items()},
            batch["actions"][:, :-1].transpose(0, 1).to(dtype),
            batch["rewards"][:, 1:].t().to(dtype),
            batch["is_terminal"][:, 1:].t().to(dtype),
            (~leaves).cumprod(1).t().to(dtype),
            task,
            (~batch["is_terminal"][:, 0]).to(dtype),
            all_ranks,
        )


def mean_over(x: Tensor, alive: Tensor, count: Tensor) -> Tensor:
    """Return the means [T] of x [T, B] over the rows with alive [T, B]; 0 if there are none.

    count: number of these rows, [T], as in `Transitions.counts`. DDP averages over the ranks what
        each of them returns, so that the means are those over all rows.
    """
    return (x * alive).sum(1) / count.clamp(min=1 / world_size())


def discounted_mean(per_step: Tensor, rho: float) -> Tensor:
    """Return the mean of per_step [T] weighted by rho^t."""
    powers = rho ** torch.arange(len(per_step), dtype=per_step.dtype, device=per_step.device)
    return (per_step * powers).mean()


def termination_loss(logits: Tensor, terminated: Tensor, alive: Tensor, count: Tensor) -> Tensor:
    """Return the mean binary cross entropy of logits [H, B], not weighted by rho^t.

    count: number of rows alive at each step, [H], as in `mean_over`.
    """
    each = F.binary_cross_entropy_with_logits(logits, terminated, reduction="none")
    return (each * alive).sum() / count.sum().clamp(min=1 / world_size())


def termination_stats(prob: Tensor, terminated: Tensor, alive: Tensor) -> dict[str, Tensor]:
    """Return the rate of terminal rows [B], and the F1 score of predictions with prob > 0.5."""
    predicted, true = (prob > 0.5) * alive, terminated * alive
    hits = (predicted * true).sum()
    recall = hits / (true.sum() + 1e-9)
    precision = hits / (predicted.sum() + 1e-9)
    f1 = 2 * (precision * recall) / (recall + precision + 1e-9)
    return {
        "termination_rate": true.sum() / alive.sum().clamp(min=1),
        "termination_f1": f1,
    }
