"""Simplicial normalisation (SimNorm, Lavoie et al. 2022, arXiv:2204.00616) of TD-MPC2."""

from torch import Tensor

from worldloom.nn.layers import to_float32


def simnorm(x: Tensor, group: int) -> Tensor:
    """Apply a softmax to each group of `group` entries of x [..., width]; `group` divides width.

    The result is at least float32, also for x in half precision, because the consistency loss
    compares latents with each other.
    """
    groups = to_float32(x).unflatten(-1, (-1, group))
    if x.device.type != "cpu":
        return groups.softmax(-1).flatten(-2)
    # On a CPU torch vectorises a softmax over the second-to-last axis but not one over a short last
    # axis: this takes a fifth of the time, both transpositions included.
    return groups.mT.softmax(-2).mT.flatten(-2)
