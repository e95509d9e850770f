"""The contract between world models and everything else.

Letters used in shapes: B batch rows, T time steps, A = action_dim.

A batch holds one row per time step. Row t carries the observation at t, the action chosen after
seeing it, and the reward that arrived together with it; an episode of N actions is N + 1 rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, runtime_checkable

import torch
from torch import Tensor

Obs = Tensor | dict[str, Tensor]

REPLAY = "replay"  # key under which `compute_loss` returns new values of replay fields


@dataclass(frozen=True)
class ReplayField:
    """An array that the replay stores with every row on behalf of a model.

    The model provides its value when a row is collected (`replay_values`) and may replace it in
    every update that the row takes part in (key "replay" of the result of `compute_loss`).

    shape, dtype: of one row's value. Floating-point values are rounded to the dtype.
    every_row: whether batches contain the values of all rows, under "stored". By default they
        contain that of row 0 alone, under "context", and one row is sampled in addition for it.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    every_row: bool = False


class Batch(TypedDict, total=False):
    """Sequences as `ReplayBuffer.sample` returns them and `compute_loss` takes them.

    obs: [B, T, *obs_shape] float32, or uint8 for images (channels first); a dict of such tensors
        for dict observations.
    actions: [B, T, A] float32; the action taken at t after seeing obs[t]; one-hot for discrete
        spaces; zeros in an episode's last row.
    rewards: [B, T] float32; the reward that arrived with obs[t]; 0 in an episode's first row.
    is_first: [B, T] bool; an episode starts at this row.
    is_last: [B, T] bool; an episode ends at this row, for any reason.
    is_terminal: [B, T] bool; the environment terminated here (a time limit does not set it).
    task: [B] int64; which of its tasks each row belongs to, for a model of several tasks.
    context: {name: [B, ...]} values of the model's replay fields in row 0, as float32. A model
        may start from them and train on rows 1 to T - 1; without them every sequence starts from
        the model's initial state.
    stored: {name: [B, T, ...]} values of the replay fields with `every_row`, as float32.
    index: [B, 2] int64; stream and number of row 0 in the replay that the batch comes from.
    """

    obs: Obs
    actions: Tensor
    rewards: Tensor
    is_first: Tensor
    is_last: Tensor
    is_terminal: Tensor
    task: Tensor
    context: dict[str, Tensor]
    stored: dict[str, Tensor]
    index: Tensor


@dataclass
class LatentState:
    """A batch of latent states; every tensor has the batch axis first.

    deterministic: [B, deter_dim] history and context.
    stochastic: [B, stoch_dim] what is uncertain, or None for models without it (TD-MPC2).
    features: [B, total_dim] what decoders and heads read.
    extras: further tensors [B, ...] that a model carries from step to step.
    """

    deterministic: Tensor
    stochastic: Tensor | None
    features: Tensor
    extras: dict[str, Tensor] = field(default_factory=dict)

    def map(self, fn: Callable[[Tensor], Tensor]) -> "LatentState":
        """Apply a function to every tensor."""
        return LatentState(
            fn(self.deterministic),
            None if self.stochastic is None else fn(self.stochastic),
            fn(self.features),
            {key: fn(value) for key, value in self.extras.items()},
        )

    def to(self, *args: Any, **kwargs: Any) -> "LatentState":
        """Move or cast every tensor, with the arguments of `torch.Tensor.to`."""
        return self.map(lambda x: x.to(*args, **kwargs))

    def detach(self) -> "LatentState":
        """Cut every tensor from the graph."""
        return self.map(torch.Tensor.detach)

    def __getitem__(self, index: Any) -> "LatentState":
        """Index every tensor; an integer keeps the batch axis, with one row."""
        if isinstance(index, int):
            index = [index]
        return self.map(lambda x: x[index])

    def __len__(self) -> int:
        """Number of batch rows."""
        return len(self.features)

    @staticmethod
    def combine(fn: Callable[..., Tensor], states: Sequence["LatentState"]) -> "LatentState":
        """Apply `fn` to the list of all states' tensors, field by field."""
        first = states[0]
        return LatentState(
            fn([s.deterministic for s in states]),
            None if first.stochastic is None else fn([s.stochastic for s in states]),
            fn([s.features for s in states]),
            {key: fn([s.extras[key] for s in states]) for key in first.extras},
        )

    @staticmethod
    def stack(states: Sequence["LatentState"], dim: int = 0) -> "LatentState":
        """Stack states along a new axis, as `torch.stack`."""
        return LatentState.combine(lambda xs: torch.stack(xs, dim), states)

    @staticmethod
    def cat(states: Sequence["LatentState"], dim: int = 0) -> "LatentState":
        """Join states along an axis, as `torch.cat`."""
        return LatentState.combine(lambda xs: torch.cat(xs, dim), states)

    @staticmethod
    def where(mask: Tensor, yes: "LatentState", no: "LatentState") -> "LatentState":
        """Take rows of `yes` where mask [B] is true, else rows of `no`."""

        def pick(pair: list[Tensor]) -> Tensor:
            rows = mask.to(pair[0].device).reshape(-1, *[1] * (pair[0].ndim - 1))
            return torch.where(rows, pair[0], pair[1])

        return LatentState.combine(pick, [yes, no])


@dataclass
class Trajectory:
    """What `imagine` returns for T actions.

    states: T + 1 latent states, the initial one first.
    rewards: [T, B, 1]; rewards[t] is predicted for arriving at states[t + 1].
    continues: [T, B, 1]; probability, in [0, 1], that the episode goes on after states[t + 1].
    """

    states: list[LatentState]
    rewards: Tensor
    continues: Tensor

    def __len__(self) -> int:
        """Number of imagined steps T."""
        return len(self.rewards)


@runtime_checkable
class WorldModel(Protocol):
    """What a module must offer to be trained, planned with and compared.

    Beyond it a model may have `policy(state, deterministic=False) -> action` [B, A], or -> (action,
    state) where the state carries a plan on (a model without a policy is planned with),
    `after_update()` called after each optimiser step, `parameter_groups()` for the optimiser, and
    `replay_fields` {name: ReplayField} that the replay stores with every row, together with
    `replay_values(state) -> {name: [B, ...]}`, their values in a row that is being collected.
    """

    def encode(self, obs: Obs) -> LatentState:
        """Start an episode: the state after seeing obs [B, *obs_shape] and nothing before it."""
        ...

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Predict the next state from action [B, A] without an observation."""
        ...

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Update the state with action [B, A] and the observation [B, *obs_shape] it led to."""
        ...

    def decode(self, state: LatentState) -> dict[str, Obs]:
        """Predict "obs" [B, *obs_shape] (if the model can), "reward" and "continue" [B, 1]."""
        ...

    def imagine(self, initial_state: LatentState, actions: Tensor) -> Trajectory:
        """Roll out actions [T, B, A] from a state [B]."""
        ...

    def compute_loss(self, batch: Batch) -> dict[str, Any]:
        """Return "loss" to be minimised, and every loss term and statistic by name (scalars).

        The batch is not modified. A model with `replay_fields` may add "replay" {name: [B, n, ...]}
        (without gradient): new values for the last n rows of the batch, which the replay stores
        unless the update is skipped. It is neither a loss nor logged.
        """
        ...


def context_rows(fields: Mapping[str, ReplayField]) -> int:
    """Return how many rows are sampled in front of those that a model with these fields trains on.

    One if any field is given for row 0 alone, else none.
    """
    return int(any(not field.every_row for field in fields.values()))


def split_result(result: Mapping[str, Any]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the result of `compute_loss` into its scalars and the new values for the replay."""
    scalars = dict(result)
    return scalars, scalars.pop(REPLAY, {})
