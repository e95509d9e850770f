"""Real numbers as distributions over fixed bins, so that gradients do not depend on their scale.

DreamerV3 (eqs. 8-10) spaces its bins exponentially in the space of the number itself and takes the
mean there. TD-MPC2 (appendix) spaces them evenly in symlog space and takes the mean there, which
is what the functions named symlog_… do.
"""

import functools

import torch
from torch import Tensor

from worldloom.nn.layers import full
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
    # No matrix product: mixed precision would round it.
    return ((probs[..., -half:] - probs[..., :half].flip(-1)) * bins[-half:]).sum(-1)


def twohot_loss(logits: Tensor, target: Tensor, log_total: Tensor | None = None) -> Tensor:
    """Cross entropy [...] of logits [..., bins] with the two-hot code of target [...].

    The target spreads its mass over the two nearest bins by linear distance; beyond the ends it
    goes to the end bin. No gradient reaches the target. `log_total` may pass in
    logits.logsumexp(-1), where several targets share the logits.
    """
    logits = full(logits)
    target = target.detach().to(logits.dtype)
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    count = torch.searchsorted(bins, target.contiguous(), right=True)
    below, above = (count - 1).clamp(min=0), count.clamp(max=len(bins) - 1)
    low, high = bins[below], bins[above]
    at_an_end = (below == above) & ~target.isnan()  # no number stays none
    share = torch.where(at_an_end, 0.0, (target - low) / (high - low).clamp(min=1e-30))
    at_low = logits.gather(-1, below.unsqueeze(-1)).squeeze(-1)
    at_high = logits.gather(-1, above.unsqueeze(-1)).squeeze(-1)
    log_total = logits.logsumexp(-1) if log_total is None else log_total
    return log_total - (1 - share) * at_low - share * at_high


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
