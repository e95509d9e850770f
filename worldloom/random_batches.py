"""Random observations, actions and batches in the layout of the replay, for checks and timing."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from worldloom.protocol import Batch, Obs, ReplayField

Shape = tuple[int, ...]


@dataclass(frozen=True)
class RandomData:
    """Random data for a model with these spaces.

    obs_shape: shape of an observation, or a dict of shapes; three axes mean uint8 images.
    groups: widths of the parts of an action; more than one for several discrete choices.
    discrete: whether each part is one-hot instead of continuous in [-1, 1].
    rows, length: batch rows B and time steps T.
    device: device of all tensors.
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
        """Create data for a model; its attributes replace arguments that are None."""
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

    def batch(self, ends: bool = True) -> Batch:
        """Draw sequences [B, T].

        ends: in the first row an episode begins, in the second one ends and the next one begins;
            without, all sequences are from the middle of episodes.
        """
        lead = (self.rows, self.length)
        is_first = torch.zeros(lead, dtype=torch.bool, device=self.device)
        is_last = is_first.clone()
        if ends:
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
        """Return zeros for the replay fields of a model, in the layout of a batch [B, T]."""
        zeros = partial(torch.zeros, device=self.device)
        batch = Batch()
        if context := {k: f for k, f in fields.items() if not f.every_row}:
            batch["context"] = {k: zeros(rows, *f.shape) for k, f in context.items()}
        if stored := {k: f for k, f in fields.items() if f.every_row}:
            batch["stored"] = {k: zeros(rows, length, *f.shape) for k, f in stored.items()}
        return batch

    @contextmanager
    def seeded(self) -> Iterator[None]:
        """Use a fixed seed inside the block and leave torch's generators outside unchanged."""
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
            "of that name, so no random data can be drawn. Pass it, as in "
            "check_world_model(model, obs_shape=(4,), action_dim=2)"
        )
    return value
