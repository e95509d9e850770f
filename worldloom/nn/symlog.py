"""Symmetric logarithm (DreamerV3, eq. 9), which compresses large magnitudes."""

import torch
from torch import Tensor


def symlog(x: Tensor) -> Tensor:
    """Return sign(x) log(1 + |x|)."""
    return torch.sign(x) * torch.log1p(x.abs())


def symexp(x: Tensor) -> Tensor:
    """Return sign(x) (exp|x| - 1), the inverse of `symlog`."""
    return torch.sign(x) * torch.expm1(x.abs())
