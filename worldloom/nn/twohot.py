"""Real numbers as distributions over fixed bins (DreamerV3, eqs. 8-10).

The bins are spaced exponentially in the space of the number itself, so one head covers rewards of
any scale, and its gradients do not depend on that scale.
"""

import functools

import torch
from torch import Tensor

from worldloom.nn.layers import full
from worldloom.nn.symlog import symexp


@functools.lru_cache
def symexp_bins(count: int, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return `count` bins from symexp(-20) to symexp(20), mirrored exactly around zero."""
    if count < 2:
        raise ValueError(f"symexp bins need a count of at least 2, got {count}")
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
    share = torch.where(below == above, 0.0, (target - low) / (high - low).clamp(min=1e-30))
    at_low = logits.gather(-1, below.unsqueeze(-1)).squeeze(-1)
    at_high = logits.gather(-1, above.unsqueeze(-1)).squeeze(-1)
    log_total = logits.logsumexp(-1) if log_total is None else log_total
    return log_total - (1 - share) * at_low - share * at_high
