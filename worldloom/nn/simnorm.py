"""Simplicial normalisation (Lavoie et al. 2022, arXiv:2204.00616), the latents of TD-MPC2."""

from torch import Tensor

from worldloom.nn.layers import full


def simnorm(x: Tensor, group: int) -> Tensor:
    """Apply a softmax to every `group` neighbours of the last axis, in float32 or better.

    x: [..., width], `group` divides the width. Each group of the result sums to one; it stays in
    float32 where x is in half precision, for latents are compared with each other.
    """
    groups = full(x).unflatten(-1, (-1, group))
    if x.device.type != "cpu":
        return groups.softmax(-1).flatten(-2)
    # A CPU takes a softmax over a few neighbours number by number, but one across rows by vector
    # instructions: a fifth of the time, both transpositions included.
    return groups.mT.softmax(-2).mT.flatten(-2)
