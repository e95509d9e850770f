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


def exponential(like: Tensor) -> Tensor:
    """Draw exponentially distributed numbers in the shape of another tensor."""
    return torch.empty_like(like).exponential_()
