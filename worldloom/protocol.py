"""Protocol of world models, and the data that they exchange with the rest of worldloom.

Axes: B batch rows, T time steps, A width of the action vector.

A batch has one row per time step. Row t contains the observation at t, the action taken after this
observation, and the reward received together with the observation. An episode of N actions has
N + 1 rows.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, TypedDict, runtime_checkable

import numpy as np
import torch
from torch import Tensor, nn

Obs = Tensor | dict[str, Tensor]

REPLAY = "replay"  # key under which `compute_loss` returns new values of replay fields


@dataclass(frozen=True)
class ReplayField:
    """An array that the replay stores with every row for a model.

    `replay_values` of the model returns its value when a row is collected. Each update that
    includes the row may replace the value (key "replay" of the result of `compute_loss`).

    shape, dtype: of the value in one row. Floating-point values are rounded to the dtype.
    every_row: True: batches contain the values of all rows, under "stored". False: they contain
        the value of row 0, under "context", and sequences are one row longer.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    every_row: bool = False


class Batch(TypedDict, total=False):
    """Sequences returned by `ReplayBuffer.sample` and passed to `compute_loss`.

    obs: [B, T, *obs_shape] float32, or uint8 for images (channels first); a dict of such tensors
        for dict observations.
    actions: [B, T, A] float32; the action taken at t after observing obs[t]; one-hot for discrete
        spaces; zeros in the last row of an episode.
    rewards: [B, T] float32; the reward received with obs[t]; 0 in the first row of an episode.
    is_first: [B, T] bool; an episode starts at this row.
    is_last: [B, T] bool; an episode ends at this row, for any reason.
    is_terminal: [B, T] bool; the environment terminated here (a time limit does not set it).
    task: [B] int64; index of the task of each sequence, for multi-task models.
    context: {name: [B, ...]} values of the model's replay fields in row 0, as float32. A model
        may start from these values and train on rows 1 to T - 1; without them every sequence
        starts from the model's initial state.
    stored: {name: [B, T, ...]} values of the replay fields with `every_row`, as float32.
    index: [B, 2] int64; stream and row number of row 0 in the replay.
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

    deterministic: [B, deter_dim] deterministic part of the state.
    stochastic: [B, stoch_dim] sampled part, or None for models without it (TD-MPC2).
    features: [B, total_dim] input of decoders and heads; by default the deterministic and the
        stochastic part, concatenated.
    extras: further tensors [B, ...] that a model passes from step to step.
    """

    deterministic: Tensor
    stochastic: Tensor | None = None
    features: Tensor = None  # type: ignore[assignment]
    extras: dict[str, Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        """Set the features if they were not given."""
        if self.features is None:
            parts = [self.deterministic, self.stochastic]
            given = [part for part in parts if part is not None]
            self.features = given[0] if len(given) == 1 else torch.cat(given, -1)

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
        """Detach every tensor from the autograd graph."""
        return self.map(torch.Tensor.detach)

    def __getitem__(self, index: Any) -> "LatentState":
        """Index every tensor; an integer index keeps the batch axis, with one row."""
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
    """The result of `imagine` for T actions.

    states: T + 1 latent states, starting with the initial one.
    rewards: [T, B, 1]; rewards[t] is predicted for arriving at states[t + 1].
    continues: [T, B, 1]; probability that the episode continues after states[t + 1].
    """

    states: list[LatentState]
    rewards: Tensor
    continues: Tensor

    def __len__(self) -> int:
        """Number of imagined steps T."""
        return len(self.rewards)


@runtime_checkable
class WorldModel(Protocol):
    """Methods that a torch module must implement to be trained, planned with and compared.

    Optional members:
        policy(state, deterministic=False): returns actions [B, A], or (actions, state) if acting
            changes the state, as a planner's plan does. Without `policy` worldloom plans with
            `imagine`.
        plans_in_bfloat16: whether `policy` is faster in mixed bfloat16 on a CPU (`acting.Actor`).
        after_update(): called after each optimiser step.
        parameter_groups(): parameter groups for the optimiser.
        replay_fields: {name: ReplayField} that the replay stores with every row.
        replay_values(state): values {name: [B, ...]} of these fields for collected rows.
        value(state): [B, 1], the return that the policy is expected to collect after the state, as
            the sum of discounted rewards.
        discount(state): the discount of `value`, a number or [B, 1].
        latent_probs(state, action, obs): probabilities [B, S, C] of S latent variables with C
            classes after action [B, A]: as predicted, and as inferred from the observation.
    """

    def encode(self, obs: Obs) -> LatentState:
        """Start an episode: return the state after the first observation [B, *obs_shape]."""
        ...

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Predict the next state for action [B, A] without an observation."""
        ...

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Return the state after action [B, A] and the following observation [B, *obs_shape]."""
        ...

    def decode(self, state: LatentState) -> dict[str, Obs]:
        """Predict "obs" [B, *obs_shape] if the model can, "reward" [B, 1] and "continue" [B, 1]."""
        ...

    def imagine(self, initial_state: LatentState, actions: Tensor) -> Trajectory:
        """Roll out actions [T, B, A] from a state [B]."""
        ...

    def compute_loss(self, batch: Batch) -> dict[str, Any]:
        """Return "loss", the scalar to minimise, and each loss term and statistic as a scalar.

        Terms and statistics may also be numbers of Python or NumPy.

        The batch must not be modified. A model with `replay_fields` may add "replay"
        {name: [B, n, ...]} without gradient: new values for the last n rows of the batch. The
        replay stores them unless the update is skipped. "replay" is never logged.
        """
        ...


# Arguments and result of each method of a world model. Those in OPTIONAL may be missing.
SIGNATURES: dict[str, tuple[tuple[str, ...], str]] = {
    "encode": (("obs",), "LatentState"),
    "predict": (("state", "action"), "LatentState"),
    "observe": (("state", "action", "obs"), "LatentState"),
    "decode": (("state",), "dict"),
    "imagine": (("initial_state", "actions"), "Trajectory"),
    "compute_loss": (("batch",), "dict"),
    "policy": (("state", "deterministic"), "Tensor"),
    "after_update": ((), "None"),
    "replay_values": (("state",), "dict"),
    "value": (("state",), "Tensor"),
    "discount": (("state",), "Tensor"),
    "latent_probs": (("state", "action", "obs"), "tuple"),
}
OPTIONAL = ("policy", "after_update", "replay_values", "value", "discount", "latent_probs")
REQUIRED = tuple(name for name in SIGNATURES if name not in OPTIONAL)


def find_missing_methods(model: Any) -> list[str]:
    """Return the names of the required methods that a model does not have."""
    return [name for name in REQUIRED if not callable(getattr(model, name, None))]


def count_parameters(model: nn.Module) -> int:
    """Return the number of trained values; slow targets and frozen parts do not count."""
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def format_signature(method: str) -> str:
    """Return a method's signature as in its class, "name(self, ...) -> result"."""
    arguments, result = SIGNATURES[method]
    return f"{method}({', '.join(['self', *arguments])}) -> {result}"


def context_rows(fields: Mapping[str, ReplayField]) -> int:
    """Return how many rows are sampled in front of those that a model with these fields trains on.

    One if any field is given for row 0 alone, else none.
    """
    return int(any(not field.every_row for field in fields.values()))


def is_scalar(value: Any) -> bool:
    """Return whether a value is a real number, or a tensor or array of one real number."""
    if isinstance(value, Tensor):
        return value.numel() == 1 and not value.is_complex()
    item = value.item() if isinstance(value, np.ndarray) and value.size == 1 else value
    return isinstance(item, bool | int | float | np.bool_ | np.integer | np.floating)


def split_result(result: Any) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Split the result of `compute_loss` into its scalars [] and the new values for the replay.

    Numbers of Python and NumPy become tensors on the CPU.

    Raises:
        ValueError: the result is not a dict with "loss", or a value in it is not a scalar.
    """
    if not isinstance(result, dict) or "loss" not in result:
        keys = ", ".join(map(repr, result)) if isinstance(result, dict) else ""
        held = f"a dict with {keys}" if keys else "a dict without keys" if result == {} else ""
        raise ValueError(
            f"compute_loss returned {held or _describe(result)}; expected a dict with 'loss', the "
            "scalar to minimise"
        )
    scalars = {}
    for name, value in result.items():
        if type(value) is Tensor and not (value.ndim or value.is_complex()) and type(name) is str:
            scalars[name] = value
            continue
        if name == REPLAY:
            continue
        if not isinstance(name, str):
            raise ValueError(f"compute_loss returned the name {name!r}; expected a string")
        if not is_scalar(value):
            raise ValueError(
                f"compute_loss returned {name!r}, {_describe(value)}; expected a scalar: a number, "
                "or a tensor with one element, such as its mean"
            )
        if not isinstance(value, Tensor):
            number = value.item() if isinstance(value, np.ndarray) else value
            value = torch.tensor(float(number), dtype=torch.float64)
        scalars[name] = value.reshape(()) if value.ndim else value
    return scalars, result.get(REPLAY, {})


def _describe(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        return f"{type(value).__name__} of shape {list(value.shape)} and type {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__} ({str(value)[:40]})"
