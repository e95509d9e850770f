"""Observation and action spaces as models see them, and checks of their inputs."""

import math
import operator
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldloom.protocol import Batch, Obs

Shape = tuple[int, ...]

# Keys that every batch must contain; all but the first two have shape [B, T].
BATCH_KEYS = ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal")


@dataclass(frozen=True)
class ObsSpace:
    """Shape of one observation and its number of classes, which is 0 unless integer-coded.

    Three axes (channels, height, width) are an image, fewer axes a vector.
    """

    shape: Shape
    classes: int = 0

    @property
    def is_image(self) -> bool:
        """Whether the observation is an image."""
        return len(self.shape) == 3

    @property
    def width(self) -> int:
        """Number of inputs of a vector encoder."""
        return math.prod(self.shape) * max(1, self.classes)


@dataclass(frozen=True)
class ActSpace:
    """Shape of one action and its number of choices, which is 0 for continuous actions."""

    shape: Shape
    classes: int = 0

    @property
    def event(self) -> Shape:
        """Shape of one action in the model, where choices are one-hot."""
        return (*self.shape, self.classes) if self.classes else self.shape

    @property
    def width(self) -> int:
        """Number of entries in action vectors."""
        return math.prod(self.event)


class ObsSpaces(dict[str, ObsSpace]):
    """Observations by key, in declared order; `single` if the user gave one shape, not a dict."""

    single: bool

    def __init__(
        self, shape: Shape | Mapping[str, Shape], classes: Mapping[str, int] | None = None
    ) -> None:
        self.single = not isinstance(shape, Mapping)
        shapes = shape if isinstance(shape, Mapping) else {"obs": shape}
        if not isinstance(classes or {}, Mapping):
            raise ValueError(f"obs_classes is {classes!r}; expected {{key: number of classes}}")
        classes = dict(classes or {})
        if unknown := set(classes) - set(shapes):
            raise ValueError(f"obs_classes names {sorted(unknown)}; obs_shape has {list(shapes)}")
        if not shapes:
            raise ValueError("obs_shape is empty; give a shape or a dict with at least one key")
        super().__init__(
            {k: ObsSpace(_check_shape(k, s), int(classes.get(k, 0))) for k, s in shapes.items()}
        )

    def images(self) -> dict[str, ObsSpace]:
        """Return the observations that are images."""
        return {k: s for k, s in self.items() if s.is_image}

    def vectors(self) -> dict[str, ObsSpace]:
        """Return the observations that are vectors."""
        return {k: s for k, s in self.items() if not s.is_image}

    def split(self, obs: Obs, lead: int) -> dict[str, Tensor]:
        """Return observations with `lead` batch axes by key; raise ValueError for wrong ones."""
        if self.single != (not isinstance(obs, Mapping)):
            wanted = "a tensor" if self.single else f"a dict with the keys {sorted(self)}"
            raise ValueError(f"obs is a {type(obs).__name__}; this model expects {wanted}")
        tensors: Any = {"obs": obs} if self.single else dict(obs)
        if set(tensors) != set(self):
            raise ValueError(f"obs has the keys {sorted(tensors)}; expected {sorted(self)}")
        for key, value in tensors.items():
            self._check(key, value, lead)
        return tensors

    def join(self, tensors: dict[str, Tensor]) -> Obs:
        """Return observations in the user's form: a dict, or a tensor if `single`."""
        return tensors["obs"] if self.single else tensors

    def _check(self, key: str, value: Tensor, lead: int) -> None:
        name = "obs" if self.single else f"obs[{key!r}]"
        if tuple(value.shape[lead:]) != self[key].shape or value.ndim < lead:
            axes = ["B", "T"][:lead]
            raise ValueError(
                f"{name} has shape {tuple(value.shape)}; expected "
                f"[{', '.join([*axes, *map(str, self[key].shape)])}]"
            )
        if self[key].is_image and value.dtype != torch.uint8:
            raise ValueError(
                f"{name} is an image of dtype {value.dtype}; expected torch.uint8 from 0 to 255"
            )


class ActSpaces(dict[str, ActSpace]):
    """Actions by key; action vectors concatenate them, sorted by key."""

    def __init__(
        self,
        action_dim: int | Sequence[int] | Mapping[str, int],
        discrete: bool | Mapping[str, bool] = False,
    ) -> None:
        if isinstance(action_dim, Mapping):
            if not isinstance(discrete, Mapping):
                discrete = dict.fromkeys(action_dim, discrete)
            spaces = {k: _action_space(k, n, discrete.get(k, False)) for k, n in action_dim.items()}
        elif isinstance(action_dim, Sequence) and not isinstance(action_dim, str):
            if not discrete:
                raise ValueError(
                    f"action_dim={tuple(action_dim)} lists several choices, which needs "
                    "discrete=True; for continuous actions pass their number as one integer"
                )
            digits = len(str(len(action_dim)))
            names = [f"action{i:0{digits}}" for i in range(len(action_dim))]
            sizes = zip(names, action_dim, strict=True)
            spaces = {name: _action_space("action_dim", n, True) for name, n in sizes}
        else:
            spaces = {"action": _action_space("action_dim", action_dim, bool(discrete))}
        if not spaces:
            raise ValueError("action_dim is empty; give at least one action")
        super().__init__(sorted(spaces.items()))

    @property
    def width(self) -> int:
        """Length A of the action vector."""
        return sum(space.width for space in self.values())

    def split(self, action: Tensor) -> Iterator[tuple[str, Tensor]]:
        """Yield key and action [..., *event] for each part of action vectors [..., A]."""
        parts = action.split([space.width for space in self.values()], -1)
        for (key, space), part in zip(self.items(), parts, strict=True):
            yield key, part.unflatten(-1, space.event)

    def check(self, action: Tensor, lead: tuple[str, ...]) -> None:
        """Raise ValueError unless action vectors have shape [*lead, A]."""
        if action.ndim != len(lead) + 1 or action.shape[-1] != self.width:
            raise ValueError(
                f"action has shape {tuple(action.shape)}; expected "
                f"[{', '.join([*lead, str(self.width)])}], discrete actions one-hot"
            )


def require_keys(batch: Batch) -> None:
    """Raise ValueError if a batch lacks any of BATCH_KEYS."""
    if missing := [key for key in BATCH_KEYS if key not in batch]:
        raise ValueError(
            f"the batch lacks {missing}; compute_loss needs {list(BATCH_KEYS)}, as returned by "
            "ReplayBuffer.sample"
        )


def check_rows(batch: Batch, obs: Mapping[str, Tensor], act_spaces: ActSpaces) -> tuple[int, int]:
    """Return (B, T) of a batch and its split observations; raise ValueError if shapes differ."""
    act_spaces.check(batch["actions"], ("B", "T"))
    rows, steps = batch["actions"].shape[:2]
    for key in BATCH_KEYS[2:]:
        value: Tensor = batch[key]  # type: ignore[literal-required]
        if tuple(value.shape) != (rows, steps):
            raise ValueError(
                f"batch[{key!r}] has shape {tuple(value.shape)}; expected {(rows, steps)}"
            )
        if key != "rewards" and value.dtype != torch.bool:
            raise ValueError(f"batch[{key!r}] has dtype {value.dtype}; expected torch.bool")
    for key, value in obs.items():
        if tuple(value.shape[:2]) != (rows, steps):
            raise ValueError(
                f"obs {key!r} starts with {tuple(value.shape[:2])}; expected [B, T] = "
                f"{(rows, steps)}"
            )
    return rows, steps


def _check_shape(key: str, shape: Shape) -> Shape:
    try:
        result = tuple(operator.index(n) for n in shape)
    except TypeError:
        raise ValueError(
            f"obs_shape of {key!r} is {shape!r}; expected a tuple such as (4,) or (3, 64, 64)"
        ) from None
    if not 0 <= len(result) <= 3 or any(n < 1 for n in result):
        raise ValueError(
            f"observation {key!r} has shape {result}; expected a vector of up to 2 axes such as "
            "(4,) or an image of 3 axes such as (3, 64, 64), all positive"
        )
    return result


def _action_space(key: str, count: int, discrete: bool) -> ActSpace:
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise ValueError(f"{key} is {count!r}; expected a positive integer number of actions")
    if discrete and count < 2:
        raise ValueError(f"{key} is {count}; a discrete action needs at least 2 choices")
    return ActSpace((), count) if discrete else ActSpace((count,))
