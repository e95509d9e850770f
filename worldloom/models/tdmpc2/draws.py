"""Random numbers of TD-MPC2, except normal noise, which comes from `nn.distributions`.

They are drawn in one place so that tests can replace them by those recorded from the official code.
"""

import torch
from torch import Tensor

from worldloom.nn.shifts import draw_shifts

__all__ = ["draw_dropped", "draw_exponential", "draw_shifts", "draw_two_heads"]


def draw_two_heads(count: int, device: torch.device) -> Tensor:
    """Draw the indices of two of `count` Q-functions, [2] int64."""
    return torch.randperm(count, device=device)[:2]


def draw_dropped(count: int, probability: float) -> Tensor:
    """Draw the entries, out of `count`, that dropout on a CPU sets to zero: ascending indices.

    Each entry is dropped independently with the same probability, so the gaps between dropped
    entries have a geometric distribution. Drawing only the gaps takes a tenth of the time of one
    random number per entry.
    """
    expected = count * probability
    chunk = int(expected + 6 * expected**0.5) + 1  # rarely too few: six standard deviations
    indices = torch.empty(0, dtype=torch.int64)
    while not len(indices) or indices[-1] < count:
        last = indices[-1] if len(indices) else -1
        gaps = torch.empty(chunk, dtype=torch.int64).geometric_(probability)
        indices = torch.cat([indices, last + gaps.cumsum(0)])
    return indices[indices < count]


def draw_exponential(like: Tensor) -> Tensor:
    """Draw exponentially distributed numbers with the shape, dtype and device of `like`."""
    return torch.empty_like(like).exponential_()
