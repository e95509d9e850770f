"""Matrix products of all layers: their dtype, and the faster of torch's libraries for float32.

On a CPU torch gives float32 products to MKL, which takes a slow path on AMD processors. oneDNN,
which torch contains too, is more than twice as fast there (experiments/speed has figures), but
torch uses it for float32 only through a private operator. This module is the only user of that
operator, and can be removed once torch chooses by itself (torch.backends.mkldnn.matmul only lowers
the precision). Results of the two libraries agree to float32 rounding.
"""

import functools
import os
from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldloom.devices import processor_field

SETTING = "WORLDLOOM_PRODUCTS"  # environment variable: auto, torch or onednn
# Multiplications below which the operator's own cost, 8 microseconds, exceeds its gain.
FEWEST = 1 << 20
_traced: ContextVar[bool] = ContextVar("traced", default=False)
BLOCK_ROWS = 64  # rows per block from which on one product per block beats a batched product


def product_type(x: Tensor) -> torch.dtype:
    """Return the dtype of matrix products with x: that of autocast where it is enabled."""
    device = x.device.type
    mixed = torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)
    return torch.get_autocast_dtype(device) if mixed else x.dtype


def is_tracing() -> bool:
    """Return True under torch.compile, torch.export or torch.func: use native operations only."""
    tracing = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
    return tracing or _traced.get()


@contextmanager
def as_traced() -> Iterator[None]:
    """Compute in a block as a traced function does; `is_tracing` returns True."""
    token = _traced.set(True)
    try:
        yield
    finally:
        _traced.reset(token)


def linear(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """Return x [..., inputs] @ weight [outputs, inputs] transposed + bias [outputs]."""
    if not _is_fast(x, weight):
        return F.linear(x, weight, bias)
    y = multiply(x.reshape(-1, x.shape[-1]), weight.t(), bias)
    return y.view(*x.shape[:-1], len(weight))


def multiply(x: Tensor, kernel: Tensor, base: Tensor | None = None) -> Tensor:
    """Return x @ kernel, plus `base`, which broadcasts to the result.

    x is [N, inputs] with kernel [inputs, outputs], or [G, N, inputs] with kernel
    [G, inputs, outputs].
    """
    if not _is_fast(x, kernel):
        if base is None:
            return x @ kernel
        return (torch.addmm if x.ndim == 2 else torch.baddbmm)(base, x, kernel)
    tensors = (x, kernel) if base is None else (x, kernel, base)
    if torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors):
        return _Product.apply(x, kernel, base)
    return _multiply(x, kernel, base)


def chosen_library() -> tuple[str, str]:
    """Return the library of float32 products on the CPU, "torch" or "onednn", and the reason."""
    wanted = os.environ.get(SETTING) or "auto"
    if wanted == "torch":
        return "torch", f"{SETTING}=torch"
    if wanted not in ("auto", "onednn"):
        raise ValueError(f"{SETTING} is {wanted!r}; expected auto, torch or onednn")
    vendor = processor_field("vendor_id")  # of x86 processors only
    if wanted == "auto" and not (torch.backends.mkl.is_available() and vendor == "AuthenticAMD"):
        return "torch", vendor or "unknown processor"
    if not _is_right():
        return "torch", "this torch lacks the operator of oneDNN, or it is wrong here"
    return "onednn", f"{SETTING}=onednn" if wanted == "onednn" else "MKL is slow on AuthenticAMD"


@functools.cache
def uses_onednn() -> bool:
    """Return whether oneDNN computes large float32 products on the CPU in this process."""
    return chosen_library()[0] == "onednn"


def _is_right() -> bool:
    """Return whether the operator exists and gives MKL's products, in all layouts that are used."""
    if not torch.backends.mkldnn.is_available():
        return False
    generator = torch.Generator().manual_seed(0)
    x, kernel = (torch.randn(shape, generator=generator) for shape in ((40, 33), (33, 50)))
    base = torch.randn(50, generator=generator)
    expected = torch.addmm(base, x, kernel)
    try:
        for left in (x, x.t().contiguous().t()):
            for right in (kernel, kernel.t().contiguous().t()):
                if not torch.allclose(_multiply(left, right, base), expected, atol=1e-4):
                    return False
    except (AttributeError, RuntimeError, NotImplementedError):
        return False
    return True


def is_for_onednn(x: Tensor) -> bool:
    """Return whether oneDNN computes large products with x; it copies slices of a matrix."""
    if is_tracing() or x.dtype != torch.float32 or x.device.type != "cpu":
        return False
    return uses_onednn() and not torch.is_autocast_enabled("cpu")


def _is_fast(x: Tensor, kernel: Tensor) -> bool:
    """Return whether oneDNN computes this product faster than torch's choice."""
    if not is_for_onednn(x) or kernel.dtype != x.dtype:
        return False
    if x.numel() * kernel.shape[-1] < FEWEST:
        return False
    return kernel.ndim == 2 or x.shape[1] >= BLOCK_ROWS


def _multiply(x: Tensor, kernel: Tensor, base: Tensor | None) -> Tensor:
    if x.ndim == 3:
        bases = [None] * len(x) if base is None else base.expand(len(x), *base.shape[1:])
        return torch.stack([_multiply(*block) for block in zip(x, kernel, bases, strict=True)])
    bias = base if base is not None and base.ndim == 1 else None
    operator = torch.ops.mkldnn._linear_pointwise
    product = operator(_dense(x), _dense(kernel.t()), bias, "none", [], "")
    return product if bias is not None or base is None else product.add_(base)


def _dense(x: Tensor) -> Tensor:
    """Copy a matrix that is neither contiguous nor a transposed one: oneDNN is very slow on it."""
    return x if x.is_contiguous() or x.t().is_contiguous() else x.contiguous()


class _Product(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, kernel: Tensor, base: Tensor | None) -> Tensor:
        ctx.save_for_backward(x, kernel)
        ctx.base = None if base is None else base.shape
        return _multiply(x, kernel, base)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        x, kernel = ctx.saved_tensors
        by_x, by_kernel, by_base = ctx.needs_input_grad
        return (
            multiply(grad, kernel.mT) if by_x else None,
            weight_gradient(x, grad) if by_kernel else None,
            grad.sum_to_size(ctx.base) if by_base else None,
        )


def weight_gradient(x: Tensor, grad: Tensor) -> Tensor:
    """Return x.mT @ grad, the gradient of a kernel.

    That of a matrix is laid out as the weight of an nn.Linear, the transposed kernel, is.
    """
    return multiply(x.mT, grad) if x.ndim == 3 else multiply(grad.mT, x).mT
