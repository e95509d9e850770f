"""Real numbers as distributions over fixed bins, so that gradients do not depend on their scale.

DreamerV3 (eqs. 8-10) spaces its bins exponentially in the space of the number itself and takes the
mean there. TD-MPC2 (appendix) spaces them evenly in symlog space and takes the mean there, which
is what the functions named symlog_… do.
"""

import functools
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldloom.nn.layers import full, traced
from worldloom.nn.symlog import symexp, symlog


@functools.lru_cache
def symexp_bins(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `count` bins from symexp(-20) to symexp(20), mirrored exactly around zero."""
    if count < 2:
        raise ValueError(f"symexp bins need a count of at least 2, got {count}")
    with torch.inference_mode(False):  # or training could not use what acting made
        half = torch.linspace(-20, 0, (count + 1) // 2, dtype=torch.float64)
        half = symexp(half).to(dtype)
        mirror = -half.flip(0)
        return torch.cat([half, mirror[1:] if count % 2 else mirror]).to(device)


def twohot_mean(logits: Tensor) -> Tensor:
    """Return the expected value [...] of logits [..., bins]; exactly zero for uniform logits."""
    logits = full(logits)
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    probs = logits.softmax(-1)
    # Each pair of mirrored bins counts by the difference of its probabilities, so equal ones cancel
    # exactly: a plain sum over bins of up to 5e8 leaves rounding noise that an untrained critic
    # would report as value. The centre of an odd number of bins is zero.
    half = probs.shape[-1] // 2
    above, below = probs[..., -half:], probs[..., :half].flip(-1)
    # No matrix product: mixed precision would round it.
    if probs.requires_grad:
        return ((above - below) * bins[-half:]).sum(-1)
    return above.sub_(below).mul_(bins[-half:]).sum(-1)


def twohot_loss(logits: Tensor, *targets: Tensor, weights: Sequence[float] = (1.0,)) -> Tensor:
    """Cross entropy [...] of logits [..., bins] with the two-hot code of target [...].

    The target spreads its mass over the two nearest bins by linear distance; beyond the ends it
    goes to the end bin. No gradient reaches the target. Of several targets the losses are added,
    by `weights`.
    """
    logits = full(logits)
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    index, mass = [], []
    for target, weight in zip(targets, weights, strict=True):
        target = target.detach().to(logits.dtype)
        count = torch.searchsorted(bins, target.contiguous(), right=True)
        below, above = (count - 1).clamp(min=0), count.clamp(max=len(bins) - 1)
        low, high = bins[below], bins[above]
        at_an_end = (below == above) & ~target.isnan()  # no number stays none
        share = torch.where(at_an_end, 0.0, (target - low) / (high - low).clamp(min=1e-30))
        index += [below, above]
        mass += [weight * (1 - share), weight * share]
    return sparse_cross_entropy(logits, torch.stack(index, -1), torch.stack(mass, -1))


def sparse_cross_entropy(logits: Tensor, index: Tensor, mass: Tensor) -> Tensor:
    """Cross entropy [...] of logits [..., bins] with a code that is zero but for a few bins.

    index, mass: [..., K], the bins (one may come twice) and their weights, without gradient.
    """
    index, mass = index.expand(*logits.shape[:-1], -1), mass.expand(*logits.shape[:-1], -1)
    if torch.is_grad_enabled() and logits.requires_grad and not traced():
        return _SparseCrossEntropy.apply(logits, index, mass)
    return _cross_entropy(logits, index, mass)[0]


def _cross_entropy(logits: Tensor, index: Tensor, mass: Tensor) -> tuple[Tensor, Tensor]:
    """Return the loss [...] and the logarithm [..., 1] of the sum of exp(logits)."""
    log_total = logits.logsumexp(-1, keepdim=True)
    return (mass * (log_total - logits.gather(-1, index))).sum(-1), log_total


class _SparseCrossEntropy(torch.autograd.Function):
    """Makes one tensor as large as the logits; torch's parts make one for each bin of the code."""

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
    with torch.inference_mode(False):  # or training could not use what acting made
        return torch.linspace(low, high, count, dtype=dtype, device=device)


def symlog_twohot_mean(logits: Tensor, low: float, high: float) -> Tensor:
    """Return symexp of the mean [...] of logits [..., bins], bins from low to high in symlog."""
    logits = full(logits)
    bins = symlog_bins(logits.shape[-1], low, high, logits.dtype, logits.device)
    return symexp((logits.softmax(-1) * bins).sum(-1))


def symlog_twohot_loss(logits: Tensor, target: Tensor, low: float, high: float) -> Tensor:
    """Cross entropy [...] of logits [..., bins] with the two-hot code of symlog(target [...]).

    The code spreads its mass over the two nearest bins; beyond the ends it goes to the end bin.
    No gradient reaches the target.
    """
    logits = full(logits)
    last = logits.shape[-1] - 1
    scaled = symlog(target.detach().to(logits.dtype)).clamp(low, high)
    position = (scaled - low) / ((high - low) / last)
    # Rounding may carry the upper end a hair beyond the last bin.
    below = position.floor().clamp(max=last)
    share = position - below
    index = below.nan_to_num().long().unsqueeze(-1)  # share stays no number
    at_low = logits.gather(-1, index).squeeze(-1)
    at_high = logits.gather(-1, (index + 1).clamp(max=last)).squeeze(-1)
    return logits.logsumexp(-1) - (1 - share) * at_low - share * at_high
