"""Categorical and normal distributions.

Only `sample_classes` and `standard_normal` draw random numbers.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloom.nn.layers import to_float32
from worldloom.nn.products import is_tracing

# Up to this number of classes, `softmax` composed of elementwise operations is faster.
FEW_CLASSES = 8


def sample_classes(probs: Tensor) -> Tensor:
    """Draw class indices [...] from probabilities [..., classes].

    Inverse transform sampling draws one uniform number per variable. The Gumbel-max trick draws
    one per class and takes ten times as long with 16 classes on a CPU.
    """
    cumulative = probs.cumsum(-1)
    level = torch.rand_like(cumulative[..., -1:]) * cumulative[..., -1:]
    return (cumulative <= level).sum(-1).clamp_(max=probs.shape[-1] - 1)


def standard_normal(like: Tensor, *shape: int) -> Tensor:
    """Draw standard normal numbers with dtype and device of `like`; its shape is the default."""
    return torch.randn(shape or like.shape, dtype=like.dtype, device=like.device)


def sample_normal(mean: Tensor, stddev: Tensor) -> Tensor:
    """Draw mean + stddev * eps with standard normal eps."""
    return mean + stddev * standard_normal(mean)


def one_hot(index: Tensor, classes: int, dtype: torch.dtype) -> Tensor:
    """Encode indices [...] as one-hot vectors [..., classes]."""
    zeros = torch.zeros(*index.shape, classes, dtype=dtype, device=index.device)
    return zeros.scatter_(-1, index.unsqueeze(-1), 1.0)


def softmax(logits: Tensor) -> Tensor:
    """Return probabilities over the last axis, at least in float32.

    On a CPU torch.softmax works row by row and takes four times as long for a few classes.
    """
    logits = to_float32(logits)
    if logits.shape[-1] > FEW_CLASSES or logits.device.type != "cpu" or is_tracing():
        return logits.softmax(-1)
    odds = (logits - logits.detach().amax(-1, keepdim=True)).exp()
    return odds / odds.sum(-1, keepdim=True)


def unimix_probs(logits: Tensor, unimix: float) -> Tensor:
    """Mix softmax(logits) with a fraction `unimix` of the uniform distribution."""
    probs = softmax(logits)
    return (1 - unimix) * probs + unimix / logits.shape[-1] if unimix else probs


def unimix_log_probs(logits: Tensor, unimix: float) -> Tensor:
    """Return the logarithm of `unimix_probs`."""
    return unimix_probs(logits, unimix).log() if unimix else to_float32(logits).log_softmax(-1)


class _StraightThrough(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, sample: Tensor, probs: Tensor) -> Tensor:
        return sample

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, Tensor]:
        return None, grad


def sample_straight_through(probs: Tensor) -> Tensor:
    """Draw one-hot samples [..., classes] whose gradient is that of probs (Bengio et al. 2013)."""
    sample = one_hot(sample_classes(probs.detach()), probs.shape[-1], probs.dtype)
    return _StraightThrough.apply(sample, probs) if probs.requires_grad else sample


@dataclass
class Classes:
    """Independent categorical variables with one-hot events.

    logits: [..., *shape, classes]; the last `dims` axes (classes included) form one event.
    """

    logits: Tensor
    dims: int

    @staticmethod
    def stack(dists: Sequence["Classes"]) -> "Classes":
        """Stack distributions along a new second axis."""
        return replace(dists[0], logits=torch.stack([dist.logits for dist in dists], 1))

    def mode(self) -> Tensor:
        """Return the most likely event, one-hot."""
        classes = self.logits.shape[-1]
        return one_hot(self.logits.argmax(-1), classes, self.logits.dtype)

    def sample(self) -> Tensor:
        """Draw an event, one-hot."""
        index = sample_classes(self.logits.softmax(-1))
        return one_hot(index, self.logits.shape[-1], self.logits.dtype)

    def log_prob(self, event: Tensor) -> Tensor:
        """Return the log-probability [...] of a one-hot event."""
        return (self.logits.log_softmax(-1) * event).sum(self._axes)

    def entropy(self) -> Tensor:
        """Return the entropy [...], summed over the variables."""
        logp = self.logits.log_softmax(-1)
        return -(logp.exp() * logp).sum(self._axes)

    def entropy_bounds(self) -> tuple[float, float]:
        """Return the minimum and maximum entropy of one event."""
        variables = math.prod(self.logits.shape[-self.dims : -1])
        return 0.0, variables * math.log(self.logits.shape[-1])

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.dims, 0))


@dataclass
class BoundedNormal:
    """A diagonal normal with mean in (-1, 1) and bounded standard deviation.

    Log-probability and entropy have no tanh correction, as in the official DreamerV3.
    mean, stddev: [..., *shape]; the last `dims` axes form one event.
    """

    mean: Tensor
    stddev: Tensor
    dims: int
    minstd: float
    maxstd: float

    @classmethod
    def from_raw(
        cls, mean: Tensor, stddev: Tensor, dims: int, minstd: float, maxstd: float
    ) -> "BoundedNormal":
        """Bound raw network outputs by a tanh (mean) and a shifted sigmoid (deviation)."""
        spread = (maxstd - minstd) * torch.sigmoid(stddev + 2.0) + minstd
        return cls(torch.tanh(mean), spread, dims, minstd, maxstd)

    @staticmethod
    def stack(dists: Sequence["BoundedNormal"]) -> "BoundedNormal":
        """Stack distributions along a new second axis."""
        mean, stddev = torch.stack([d.mean for d in dists], 1), [d.stddev for d in dists]
        return replace(dists[0], mean=mean, stddev=torch.stack(stddev, 1))

    def mode(self) -> Tensor:
        """Return the mean."""
        return self.mean

    def sample(self) -> Tensor:
        """Draw an event, which may be outside [-1, 1]."""
        return sample_normal(self.mean, self.stddev)

    def log_prob(self, event: Tensor) -> Tensor:
        """Return the log-density [...] of an event."""
        z = (event - self.mean) / self.stddev
        return (-0.5 * z * z - self.stddev.log() - 0.5 * math.log(2 * math.pi)).sum(self._axes)

    def entropy(self) -> Tensor:
        """Return the entropy [...], summed over the dimensions."""
        return (self.stddev.log() + 0.5 * math.log(2 * math.pi * math.e)).sum(self._axes)

    def entropy_bounds(self) -> tuple[float, float]:
        """Return the entropies at the minimum and maximum deviation."""
        count = math.prod(self.mean.shape[-self.dims :])
        base = 0.5 * math.log(2 * math.pi * math.e)
        return count * (math.log(self.minstd) + base), count * (math.log(self.maxstd) + base)

    @property
    def _axes(self) -> tuple[int, ...]:
        return tuple(range(-self.dims, 0))


def kl_divergence(p_logits: Tensor, q_logits: Tensor, unimix: float) -> tuple[Tensor, Tensor]:
    """Return KL(sg(p) || q) and KL(p || sg(q)) of mixed categoricals, summed over `stoch`.

    p_logits, q_logits: [..., stoch, classes]; each result is [...]. Both have the same value; the
    first trains q, the second trains p (KL balancing, DreamerV2 eq. 2, DreamerV3 eq. 3).
    """
    p = unimix_probs(p_logits, unimix)
    log_p, log_q = unimix_log_probs(p_logits, unimix), unimix_log_probs(q_logits, unimix)
    train_q = (p.detach() * (log_p.detach() - log_q)).sum((-2, -1))
    train_p = (p * (log_p - log_q.detach())).sum((-2, -1))
    return train_q, train_p


def class_entropy(logits: Tensor, unimix: float) -> Tensor:
    """Return the entropy [...] of mixed categoricals [..., stoch, classes], summed over `stoch`."""
    return -(unimix_probs(logits, unimix) * unimix_log_probs(logits, unimix)).sum((-2, -1))


def binary_cross_entropy(logits: Tensor, target: Tensor) -> Tensor:
    """Return the elementwise cross-entropy with soft targets in [0, 1]."""
    return F.binary_cross_entropy_with_logits(logits, target, reduction="none")
