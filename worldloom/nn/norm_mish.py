"""Bias, layer norm and Mish in one function, for bfloat16 on a CPU.

Elementwise bfloat16 kernels are slower than float32 ones there (Mish five times). These work on
pieces of rows that fit the cache: to float32, norm and activation, back to bfloat16.

With p = 1 + exp(n) and q = 1 + p^2, mish(n) = n - 2 n / q. This form takes half the passes of
`mish` but cancels for very negative n, where its error is a rounding of n in float32.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldloom.nn.layers import CACHED_VALUES

EPS = 1e-5  # added to the variance, as in nn.LayerNorm


def norm_mish(x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
    """Return mish(layer_norm(x + bias)) of x [..., units], in the dtype of x.

    bias, and scale and shift of the norm: [units], float32 for x in bfloat16. x is overwritten if
    no gradient is needed.
    """
    parameters = bias, scale, shift
    if torch.is_grad_enabled() and any(each.requires_grad for each in (x, *parameters)):
        return _NormMish.apply(x, *parameters)
    for piece in _pieces(x):
        n = F.layer_norm(piece + bias, scale.shape, scale, shift, EPS)
        p = n.exp().add_(1)
        piece.copy_(n.addcdiv_(n, torch.addcmul(n.new_ones(()), p, p, out=p), value=-2))
    return x


def _pieces(x: Tensor) -> tuple[Tensor, ...]:
    """Return x [..., units] as views [N, units] of a suitable size."""
    return x.view(-1, x.shape[-1]).split(max(1, CACHED_VALUES // x.shape[-1]))


class _NormMish(torch.autograd.Function):
    """Save the input and the derivative of Mish."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        y, one = torch.empty_like(x), scale.new_ones(())
        saved = []
        for piece, out in zip(_pieces(x), _pieces(y), strict=True):
            n, *moments = torch.native_layer_norm(piece + bias, scale.shape, scale, shift, EPS)
            p = n.exp().add_(1)
            c = torch.div(-2, torch.addcmul(one, p, p))  # tanh(softplus(n)) - 1
            mished = torch.addcmul(n, n, c)
            out.copy_(mished)
            # The derivative is 1 + c (1 - sigmoid(n) (n + mish(n))); sigmoid(n) = 1 - 1 / p.
            minus_sigmoid = p.reciprocal_().sub_(1)
            inner = torch.addcmul(one, mished.add_(n), minus_sigmoid, out=minus_sigmoid)
            saved += [torch.addcmul(one, c, inner, out=c), *moments]
        ctx.save_for_backward(x, bias, scale, shift, *saved)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, ...]:
        x, bias, scale, shift, *saved = ctx.saved_tensors
        by_x = torch.empty_like(x)
        by_parameters = [torch.zeros_like(bias) for _ in range(3)]
        pieces = zip(_pieces(x), _pieces(grad.contiguous()), _pieces(by_x), strict=True)
        for i, (piece, above, out) in enumerate(pieces):
            slope, *moments = saved[3 * i : 3 * i + 3]
            by_sum, *by_norm = torch.ops.aten.native_layer_norm_backward(
                above * slope, piece + bias, scale.shape, *moments, scale, shift, [True] * 3
            )
            out.copy_(by_sum)
            for total, part in zip(by_parameters, (by_sum.sum(0), *by_norm), strict=True):
                total += part
        return by_x, *by_parameters
