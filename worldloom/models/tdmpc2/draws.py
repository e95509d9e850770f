"""The random numbers that only TD-MPC2 draws; its normal noise is `nn.distributions`'.

In one place, so that tests can put the draws in that were recorded from the official code.
"""

import torch
from torch import Tensor


def two_heads(count: int, device: torch.device) -> Tensor:
    """Draw two of `count` Q-functions, [2] int64."""
    return torch.randperm(count, device=device)[:2]


def image_shifts(images: int, most: int, device: torch.device) -> Tensor:
    """Draw how far each image is shifted, x and then y, [images, 2] int64 from 0 to `most`."""
    return torch.randint(most + 1, (images, 2), device=device)


def dropped(count: int, probability: float) -> Tensor:
    """Draw which of `count` numbers a dropout on the CPU drops, ascending indices, int64.

    Each is dropped with the same probability, whatever happens to the others: so the gaps between
    those that are have a geometric distribution. Drawing the few gaps takes a tenth of the time of
    drawing for each number.
    """
    expected = count * probability
    some = int(expected + 6 * expected**0.5) + 1  # seldom too few
    indices = torch.empty(0, dtype=torch.int64)
    while not len(indices) or indices[-1] < count:
        before = indices[-1] if len(indices) else -1
        gaps = torch.empty(some, dtype=torch.int64).geometric_(probability)
        indices = torch.cat([indices, before + gaps.cumsum(0)])
    return indices[indices < count]


def exponential(like: Tensor) -> Tensor:
    """Draw exponentially distributed numbers in the shape of another tensor."""
    return torch.empty_like(like).exponential_()
