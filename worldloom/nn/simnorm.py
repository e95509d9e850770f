"""Simplicial normalisation (Lavoie et al. 2022, arXiv:2204.00616), the latents of TD-MPC2."""

from torch import Tensor

from worldloom.nn.layers import full


def simnorm(x: Tensor, group: int) -> Tensor:
    """Apply a softmax to every `group` neighbours of the last axis, in float32 or better.

    x: [..., width], `group` divides the width. Each group of the result sums to one; it stays in
    float32 where x is in half precision, for latents are compared with each other.
    """
    return full(x).unflatten(-1, (-1, group)).softmax(-1).flatten(-2)
