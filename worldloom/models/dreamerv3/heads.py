"""Heads of DreamerV3: reward, continuation, critic and policy (official heads.py).

Axes: features [..., F] are concat(deter, stoch); A is the width of the action vector.
"""

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.models.dreamerv3.networks import module_name
from worldloom.models.spaces import ActSpaces
from worldloom.nn.distributions import BoundedNormal, Classes
from worldloom.nn.layers import MLP, Linear, to_float32

Dist = Classes | BoundedNormal


class Head(nn.Module):
    """An MLP and a linear output: two-hot logits of a number, or one logit of a probability."""

    def __init__(
        self, inputs: int, *, units: int, layers: int, outscale: float, bins: int = 1
    ) -> None:
        super().__init__()
        self.mlp = MLP(inputs, units, layers)
        self.out = Linear(units, bins, outscale)

    def forward(self, features: Tensor) -> Tensor:
        """Map features [..., F] to logits [..., bins]."""
        return to_float32(self.out(self.mlp(features)))


class ActionOutput(nn.Module):
    """The output layers of the policy for one action."""

    def __init__(self, units: int, shape: tuple[int, ...], classes: int, outscale: float) -> None:
        super().__init__()
        self.event = (*shape, classes) if classes else shape
        names = ["logits"] if classes else ["mean", "stddev"]
        size = math.prod(self.event)
        self.layers = nn.ModuleDict({name: Linear(units, size, outscale) for name in names})

    def forward(self, x: Tensor) -> list[Tensor]:
        """Map [..., units] to logits, or to raw mean and stddev; each is [..., *event]."""
        return [to_float32(layer(x)).unflatten(-1, self.event) for layer in self.layers.values()]


class Policy:
    """The distributions of all actions; an event is the whole action vector [..., A]."""

    def __init__(self, spaces: ActSpaces, dists: dict[str, Dist]) -> None:
        self.spaces, self.dists = spaces, dists

    @classmethod
    def stack(cls, policies: Sequence["Policy"]) -> "Policy":
        """Stack policies along a new second axis."""

        def stack(key: str) -> Dist:
            dists: list[Any] = [policy.dists[key] for policy in policies]
            return dists[0].stack(dists)

        return cls(policies[0].spaces, {key: stack(key) for key in policies[0].dists})

    def sample(self, deterministic: bool = False) -> Tensor:
        """Draw an action vector [..., A], or return the mode if `deterministic`."""
        events = []
        for key, dist in self.dists.items():
            event = dist.mode() if deterministic else dist.sample()
            events.append(event.flatten(-len(self.spaces[key].event)))
        return torch.cat(events, -1)

    def log_prob(self, action: Tensor) -> Tensor:
        """Return the log-probability [...] of an action vector."""
        logps = [self.dists[key].log_prob(event) for key, event in self.spaces.split(action)]
        return torch.stack(logps).sum(0)

    def entropy(self) -> dict[str, Tensor]:
        """Return the entropy [...] of each action."""
        return {key: dist.entropy() for key, dist in self.dists.items()}


class Actor(nn.Module):
    """The policy network."""

    def __init__(
        self,
        inputs: int,
        spaces: ActSpaces,
        *,
        units: int,
        layers: int,
        minstd: float,
        maxstd: float,
        outscale: float,
    ) -> None:
        super().__init__()
        self.spaces = spaces
        self.bounds = (minstd, maxstd)
        self.mlp = MLP(inputs, units, layers)
        self.out = nn.ModuleDict(
            {
                module_name(k): ActionOutput(units, s.shape, s.classes, outscale)
                for k, s in spaces.items()
            }
        )

    def forward(self, features: Tensor) -> Policy:
        """Return the policy for features [..., F]."""
        x = self.mlp(features)
        dists: dict[str, Dist] = {}
        for key, space in self.spaces.items():
            raw = self.out[module_name(key)](x)
            dims = len(space.event)
            if space.classes:
                dists[key] = Classes(raw[0], dims)
            else:
                dists[key] = BoundedNormal.from_raw(raw[0], raw[1], dims, *self.bounds)
        return Policy(self.spaces, dists)
