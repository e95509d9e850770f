"""Random observations, actions and batches such as the replay would give."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom.protocol import Batch, Obs, ReplayField

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RandomData:
    """What a model is checked with.

    obs_shape: shape of an observation, or a dict of them; three axes mean uint8 images.
    groups: widths of the parts of an action; more than one for several discrete choices.
    discrete: each part is one-hot, instead of continuous in [-1, 1].
    rows, length: batch rows B and time steps T.
    device: where everything is drawn.
    """

    obs_shape: Shape | dict[str, Shape]
    groups: Shape
    discrete: bool
    rows: int
    length: int
    device: torch.device

    @classmethod
    def for_model(
        cls,
        model: nn.Module,
        obs_shape: Any,
        action_dim: Any,
        discrete: Any,
        rows: int,
        length: int,
    ) -> "RandomData":
        """Take what is None from the model's attributes, and the device from its parameters."""
        obs_shape = _given_or_attribute(model, "obs_shape", obs_shape)
        action_dim = _given_or_attribute(model, "action_dim", action_dim)
        discrete = getattr(model, "discrete", False) if discrete is None else discrete
        if isinstance(obs_shape, Mapping):
            obs_shape = {key: tuple(shape) for key, shape in obs_shape.items()}
        else:
            obs_shape = tuple(obs_shape)
        groups = tuple(action_dim) if isinstance(action_dim, Sequence) else (int(action_dim),)
        parameter = next(model.parameters(), None)
        device = torch.device("cpu") if parameter is None else parameter.device
        return cls(obs_shape, groups, bool(discrete), rows, length, device)

    def obs(self, *lead: int) -> Obs:
        """Draw observations [*lead, *obs_shape]."""
        if isinstance(self.obs_shape, dict):
            return {key: self._array(lead, shape) for key, shape in self.obs_shape.items()}
        return self._array(lead, self.obs_shape)

    def actions(self, *lead: int) -> Tensor:
        """Draw actions [*lead, A]."""
        if not self.discrete:
            return torch.rand(*lead, sum(self.groups), device=self.device) * 2 - 1
        chosen = [(torch.randint(size, lead, device=self.device), size) for size in self.groups]
        return torch.cat([F.one_hot(index, size) for index, size in chosen], -1).float()

    def batch(self) -> Batch:
        """Draw sequences [B, T]; in the second row one episode ends and another begins."""
        lead = (self.rows, self.length)
        is_first = torch.zeros(lead, dtype=torch.bool, device=self.device)
        is_last = is_first.clone()
        end = (self.length - 1) // 2
        is_first[0, 0] = is_first[1, end + 1] = is_last[1, end] = True
        return Batch(
            obs=self.obs(*lead),
            actions=self.actions(*lead).masked_fill(is_last[..., None], 0),
            rewards=torch.randn(lead, device=self.device).masked_fill(is_first, 0),
            is_first=is_first,
            is_last=is_last,
            is_terminal=is_last.clone(),
        )

    def replay_inputs(self, fields: Mapping[str, ReplayField], rows: int, length: int) -> Batch:
        """Return zeros for the replay fields of a model as a batch [rows, length] has them."""
        context = {k: (rows, *f.shape) for k, f in fields.items() if not f.every_row}
        stored = {k: (rows, length, *f.shape) for k, f in fields.items() if f.every_row}
        groups = {"context": context, "stored": stored}
        return cast(
            Batch,
            {
                name: {k: torch.zeros(shape, device=self.device) for k, shape in shapes.items()}
                for name, shapes in groups.items()
                if shapes
            },
        )

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Draw the same random numbers each time, and none from the generators outside."""
        with torch.random.fork_rng([self.device] if self.device.type == "cuda" else []):
            torch.manual_seed(0)
            yield

    def _array(self, lead: Shape, shape: Shape) -> Tensor:
        if len(shape) == 3:
            return torch.randint(256, lead + shape, dtype=torch.uint8, device=self.device)
        return torch.randn(lead + shape, device=self.device)


def _given_or_attribute(model: nn.Module, name: str, value: Any) -> Any:
    value = getattr(model, name, None) if value is None else value
    if value is None:
        raise ValueError(
            f"{name} is not known: it was not given, and {type(model).__name__} has no attribute "
            "of that name; expected it in order to draw random data. Pass it, as in "
            "check_world_model(model, obs_shape=(4,), action_dim=2)"
        )
    return value
