"""Two-hot regression: real numbers as categorical distributions over fixed bins.

The gradient does not depend on the scale of the targets. DreamerV3 (eqs. 10-11) uses exponentially
spaced bins and takes the mean over the bins. TD-MPC2 (appendix) uses evenly spaced bins in symlog
space, takes the mean there and applies symexp: functions named symlog_twohot_….
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldloom.nn.layers import to_float32
from worldloom.nn.products import is_tracing
from worldloom.nn.symlog import symexp, symlog


@functools.lru_cache
def symexp_bins(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `count` bins from symexp(-20) to symexp(20), exactly symmetric around zero."""
    if count < 2:
        raise ValueError(f"bins is {count}; two-hot regression needs at least 2 bins")
    with torch.inference_mode(False):  # the cached bins are used in training too
        half = torch.linspace(-20, 0, (count + 1) // 2, dtype=torch.float64)
        half = symexp(half).to(dtype)
        mirror = -half.flip(0)
        return torch.cat([half, mirror[1:] if count % 2 else mirror]).to(device)


def twohot_mean(logits: Tensor) -> Tensor:
    """Return the expected value [...] of logits [..., bins]; exactly 0 for uniform logits."""
    logits = to_float32(logits)
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    probs = logits.softmax(-1)
    # Weight each positive bin by the difference between its probability and that of its mirror
    # image, so that symmetric distributions cancel exactly. Bins reach 5e8: a plain sum leaves
    # rounding noise, which an untrained critic would report as value. A central bin is zero.
    half = probs.shape[-1] // 2
    above, below = probs[..., -half:], probs[..., :half].flip(-1)
    # Not a matrix product, which mixed precision would round.
    if probs.requires_grad:
        return ((above - below) * bins[-half:]).sum(-1)
    return above.sub_(below).mul_(bins[-half:]).sum(-1)


def twohot_loss(logits: Tensor, *targets: Tensor, weights: Sequence[float] = (1.0,)) -> Tensor:
    """Return the cross-entropy [...] of logits [..., bins] and the two-hot code of target [...].

    The code distributes its mass between the two nearest bins by linear distance; a target outside
    the range falls into the first or last bin. Targets receive no gradient. With several targets
    the result is the sum of their losses, weighted by `weights`.
    """
    logits = to_float32(logits)
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    index, mass = [], []
    for target, weight in zip(targets, weights, strict=True):
        target = target.detach().to(logits.dtype)
        count = torch.searchsorted(bins, target.contiguous(), right=True)
        below, above = (count - 1).clamp(min=0), count.clamp(max=len(bins) - 1)
        low, high = bins[below], bins[above]
        at_an_end = (below == above) & ~target.isnan()  # NaN targets stay NaN
        share = torch.where(at_an_end, 0.0, (target - low) / (high - low).clamp(min=1e-30))
        index += [below, above]
        mass += [weight * (1 - share), weight * share]
    return sparse_cross_entropy(logits, torch.stack(index, -1), torch.stack(mass, -1))


def sparse_cross_entropy(logits: Tensor, index: Tensor, mass: Tensor) -> Tensor:
    """Return the cross-entropy [...] of logits [..., bins] and a code with K nonzero bins.

    index, mass: [..., K], the bins (repetitions allowed) and their weights, without gradient.
    """
    index, mass = index.expand(*logits.shape[:-1], -1), mass.expand(*logits.shape[:-1], -1)
    if torch.is_grad_enabled() and logits.requires_grad and not is_tracing():
        return _SparseCrossEntropy.apply(logits, index, mass)
    return _cross_entropy(logits, index, mass)[0]


def _cross_entropy(logits: Tensor, index: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss [...] and log(sum(exp(logits))) [..., 1]."""
    log_total = logits.logsumexp(-1, keepdim=True)
    return (mass * (log_total - logits.gather(-1, index))).sum(-1), log_total


class _SparseCrossEntropy(torch.autograd.Function):
    """Allocate one tensor of the size of the logits in the backward pass, not one per bin."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, index: Tensor, mass: Tensor) -> Tensor:
        loss, log_total = _cross_entropy(logits, index, mass)
        ctx.save_for_backward(logits, log_total, index, mass)
        return loss

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        logits, log_total, index, mass = ctx.saved_tensors
        mass = grad.unsqueeze(-1) * mass
        slope = (logits - log_total).exp_().mul_(mass.sum(-1, keepdim=True))
        return slope.scatter_add_(-1, index, -mass), None, None


@functools.lru_cache
def symlog_bins(
    count: int, low: float, high: float, dtype: torch.dtype, device: torch.device
) -> Tensor:
    """Return `count` evenly spaced bins from low to high."""
    with torch.inference_mode(False):  # the cached bins are used in training too
        return torch.linspace(low, high, count, dtype=dtype, device=device)


def symlog_twohot_mean(logits: Tensor, low: float, high: float) -> Tensor:
    """Return symexp of the mean [...] of logits [..., bins] over bins from low to high."""
    logits = to_float32(logits)
    bins = symlog_bins(logits.shape[-1], low, high, logits.dtype, logits.device)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def symlog_twohot_loss(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Return the cross-entropy [...] of logits [..., bins] and the code of symlog(target [...]).

    The code distributes its mass between the two nearest bins; a target outside the range falls
    into the first or last bin. The target receives no gradient.
    """
    logits = to_float32(logits)
    last = logits.shape[-1] - 1
    scaled = symlog(target.detach().to(logits.dtype)).clamp(low, high)
    position = (scaled - low) / ((high - low) / last)
    # Rounding may place the upper end slightly beyond the last bin.
    below = position.floor().clamp(max=last)
    share = position - below
    index = below.nan_to_num().long().unsqueeze(-1)  # share stays NaN
    at_low = logits.gather(-1, index).squeeze(-1)
    at_high = logits.gather(-1, (index + 1).clamp(max=last)).squeeze(-1)
    return logits.logsumexp(-1) - (1 - share) * at_low - share * at_high
