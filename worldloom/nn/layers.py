"""Linear, block-diagonal and convolutional layers with RMS norm and SiLU.

Layers and initial values equal the official DreamerV3 code. Weights use torch's layout (out, in),
except in `BlockLinear`.
"""

import math
from collections.abc import Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from worldloom.nn import products
from worldloom.nn.products import is_tracing, product_type

EPS = 1e-4  # added to the mean square
HALF = (torch.bfloat16, torch.float16)
CACHED_VALUES = 1 << 18  # values of a tensor that several passes in a row find in the cache


def init_kernel(weight: Tensor, fan_in: int, scale: float = 1.0) -> None:
    """Fill weight from a normal truncated at two standard deviations, variance scale^2 / fan_in."""
    # Truncation reduces the standard deviation by a factor of 1.1368.
    with torch.no_grad():
        nn.init.trunc_normal_(weight, a=-2.0, b=2.0)
        weight.mul_(1.1368 * scale / math.sqrt(fan_in))


def to_float32(x: Tensor) -> Tensor:
    """Convert half precision to float32; return other dtypes unchanged.

    Norms, distributions and losses are computed in float32, as in the official code.
    """
    return x.float() if x.dtype in HALF else x


def rms_norm(x: Tensor, scale: Tensor, dims: int | tuple[int, ...] = -1) -> Tensor:
    """Divide by the root mean square over `dims`, multiply by `scale`; at least in float32."""
    exact = to_float32(x)
    inverse = torch.rsqrt(exact.square().mean(dims, keepdim=True) + EPS)
    return (exact * inverse * scale).to(x.dtype)


def norm_silu(x: Tensor, scale: Tensor) -> Tensor:
    """Return silu(rms_norm(x, scale)) with fewer passes over memory.

    x is [..., units] with scale [units], or [blocks, N, units / blocks] with scale
    [blocks, 1, units / blocks]; the norm is taken over all units (of all blocks). x is overwritten:
    its memory holds the result or the values saved for the backward pass. In mixed precision x and
    the result are in half precision, and everything between them is computed in that of scale.
    """
    same = scale.dtype == x.dtype or x.dtype in HALF
    if is_tracing() or scale.dtype in HALF or not same:
        return F.silu(rms_norm(x, scale, -1 if scale.ndim == 1 else (0, 2)))
    x = x.contiguous()
    if torch.is_grad_enabled() and (x.requires_grad or scale.requires_grad):
        return _NormSiLU.apply(x, scale)
    for (rows,) in _pieces(scale, x):
        normed = normalize_(rows.to(scale.dtype), scale)[0].mul_(scale)
        F.silu(normed, inplace=True)
        if normed is not rows:
            rows.copy_(normed)
    return x


def _pieces(scale: Tensor, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """Yield views of the same rows of [..., units] or [blocks, N, units / blocks].

    On a CPU the values of a piece stay in the cache from one pass to the next.
    """
    flat = [x.flatten(0, -2) if scale.ndim == 1 else x for x in tensors]
    rows = flat[0].shape[-2]
    if tensors[0].device.type == "cpu":
        rows = max(1, CACHED_VALUES // scale.numel())
    return zip(*(x.split(rows, -2) for x in flat), strict=True)


def _over_blocks(per_row: Tensor, scale: Tensor) -> Tensor:
    """Sum [blocks, N, 1] over the blocks if scale has a block axis; else return it unchanged."""
    return per_row if scale.ndim == 1 else per_row.sum(0, keepdim=True)


def normalize_(x: Tensor, scale: Tensor) -> tuple[Tensor, Tensor]:
    """Divide x in place by its root mean square; return x and the factor [..., 1].

    Only the shape of `scale` is used; see `norm_silu`.
    """
    squares = (x * x).sum(-1, keepdim=True)  # squaring a vector_norm would lose digits
    inverse = _over_blocks(squares, scale).div_(scale.numel()).add_(EPS).rsqrt_()
    return x.mul_(inverse), inverse


def norm_silu_backward(
    grad: Tensor, normed: Tensor, inverse: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Return the gradient of x, and the gradient of scale before the sum over rows.

    normed, inverse: the results of `normalize_`. `grad` of the output may be overwritten.
    """
    grad = torch.ops.aten.silu_backward(grad, normed * scale)
    by_scale = grad * normed
    sums = _over_blocks((by_scale * scale).sum(-1, keepdim=True), scale)
    grad = grad.mul_(scale).addcmul_(normed, sums, value=-1 / scale.numel())
    return grad.mul_(inverse), by_scale


class _NormSiLU(torch.autograd.Function):
    """`norm_silu` in half the memory passes and a third of the memory of separate operations."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, scale: Tensor) -> Tensor:
        x, out, inverses = x.detach(), torch.empty_like(x), []
        for rows, result in _pieces(scale, x, out):
            normed, inverse = normalize_(rows.to(scale.dtype), scale)
            if normed is rows:  # x holds the normalised values from here on
                F.silu(torch.mul(normed, scale, out=result), inplace=True)
            else:
                result.copy_(F.silu(normed.mul_(scale), inplace=True))
            inverses.append(inverse)
        ctx.save_for_backward(x, scale, *inverses)
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor]:
        x, scale, *inverses = ctx.saved_tensors
        grad, total = grad.contiguous(), torch.zeros_like(scale)
        out = torch.empty_like(grad)
        for (rows, given, result), inverse in zip(
            _pieces(scale, x, grad, out), inverses, strict=True
        ):
            normed = rows
            if rows.dtype != scale.dtype:
                normed = rows.to(scale.dtype).mul_(inverse)
            by_x, by_scale = norm_silu_backward(given.to(scale.dtype), normed, inverse, scale)
            result.copy_(by_x)
            total += by_scale.sum_to_size(scale.shape)
        return out, total


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis (Zhang & Sennrich 2019), eps 1e-4, no bias."""

    def __init__(self, units: int) -> None:
        super().__init__()
        self.scale = nn.Parameter(torch.ones(units))

    def forward(self, x: Tensor) -> Tensor:
        """Normalise [..., units]."""
        return rms_norm(x, self.scale)


class Linear(nn.Linear):
    """A linear layer; the kernel starts truncated normal times `outscale`, the bias at zero."""

    def __init__(self, inputs: int, outputs: int, outscale: float = 1.0) -> None:
        self.outscale = outscale
        super().__init__(inputs, outputs)

    def reset_parameters(self) -> None:
        """Initialise kernel and bias."""
        init_kernel(self.weight, self.in_features, self.outscale)
        nn.init.zeros_(self.bias)

    def forward(self, input: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        return products.linear(input, self.weight, self.bias)


class Dense(nn.Module):
    """Linear, RMS norm, SiLU.

    The output of `linear` is overwritten; a forward hook that keeps this output must copy it.
    """

    def __init__(self, inputs: int, units: int) -> None:
        super().__init__()
        self.linear = Linear(inputs, units)
        self.norm = RMSNorm(units)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., units]."""
        return norm_silu(self.linear(x), self.norm.scale)


class MLP(nn.Sequential):
    """A stack of `Dense` layers."""

    def __init__(self, inputs: int, units: int, layers: int) -> None:
        super().__init__(*[Dense(units if i else inputs, units) for i in range(layers)])

    @property
    def first(self) -> Dense:
        """The first layer."""
        layer = self[0]
        assert isinstance(layer, Dense)
        return layer


class BlockLinear(nn.Module):
    """A block-diagonal linear layer: kernel g is applied to slice g of the input.

    weight is [blocks, inputs / blocks, outputs / blocks]. Inputs and outputs have the block axis
    first, as torch.baddbmm requires.
    """

    def __init__(self, inputs: int, outputs: int, blocks: int) -> None:
        super().__init__()
        if inputs % blocks or outputs % blocks:
            raise ValueError(
                f"a block-diagonal layer got {inputs} inputs, {outputs} outputs and {blocks} "
                "blocks; blocks must divide both: change blocks or the layer sizes"
            )
        self.blocks = blocks
        self.weight = nn.Parameter(torch.empty(blocks, inputs // blocks, outputs // blocks))
        self.bias = nn.Parameter(torch.zeros(outputs))
        init_kernel(self.weight, inputs)

    def forward(self, x: Tensor) -> Tensor:
        """Map [blocks, N, inputs / blocks] to [blocks, N, outputs / blocks]."""
        return products.multiply(x, self.weight, self.bias.view(self.blocks, 1, -1))


class BlockDense(nn.Module):
    """Block-diagonal linear, RMS norm over all units of all blocks, SiLU.

    Each block reads its slice of the first input and all of a second, shared input.
    """

    def __init__(self, inputs: int, shared: int, units: int, blocks: int) -> None:
        super().__init__()
        self.slice_width = inputs // blocks
        self.linear = BlockLinear(inputs + blocks * shared, units, blocks)
        self.norm = RMSNorm(units)

    def kernels(self) -> tuple[Tensor, Tensor]:
        """Split the kernel into [blocks, inputs / blocks, units / blocks] and [shared, units].

        The first is for the sliced input and the second for the shared one. A loop over time calls
        this once, because the backward pass of each slice allocates a zero-filled copy of the
        whole kernel, and mixed precision casts it.
        """
        weight = self.linear.weight.to(product_type(self.linear.weight))
        shared = weight[:, self.slice_width :].transpose(0, 1).flatten(1)
        return weight[:, : self.slice_width], shared

    def forward(self, x: Tensor, shared: Tensor, kernels: tuple[Tensor, Tensor]) -> Tensor:
        """Map [blocks, N, inputs / blocks] and [N, shared] to [blocks, N, units / blocks]."""
        # Two products instead of a concatenation, which would copy the shared input per block.
        blocks = len(x)
        base: Tensor = self.linear.bias
        if shared.shape[-1]:
            base = products.multiply(shared, kernels[1], base)  # [N, units]
        base = base.view(-1, blocks, base.shape[-1] // blocks).transpose(0, 1)
        y = products.multiply(x, kernels[0], base)
        return norm_silu(y, self.norm.scale.view(blocks, 1, -1))


class Conv(nn.Conv2d):
    """A size-preserving convolution with stride 1 on channels-last images [N, H, W, C]."""

    def __init__(self, inputs: int, outputs: int, kernel: int) -> None:
        if kernel % 2 == 0:
            raise ValueError(f"kernel is {kernel}; expected an odd size, which keeps image sizes")
        super().__init__(inputs, outputs, kernel, padding=kernel // 2)

    def reset_parameters(self) -> None:
        """Initialise kernel and bias."""
        init_kernel(self.weight, self.weight[0].numel())
        assert self.bias is not None
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [N, H, W, inputs] to [N, H, W, outputs]."""
        # The permuted view has channels_last strides, so no copy is made.
        return super().forward(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def max_pool(x: Tensor) -> Tensor:
    """Apply 2x2 max pooling to images [N, H, W, C]; return [N, H / 2, W / 2, C].

    Equal maxima share the gradient evenly, as in the official DreamerV3 code.
    """
    if is_tracing():
        n, h, w, c = x.shape
        return x.reshape(n, h // 2, 2, w // 2, 2, c).amax((2, 4))
    if torch.is_grad_enabled() and x.requires_grad:
        return _MaxPool.apply(x)
    return _greatest(x)


def _corners(x: Tensor) -> list[Tensor]:
    """Return views of the four pixels of each 2x2 square, each [N, H / 2, W / 2, C]."""
    return [x[:, i::2, j::2] for i in (0, 1) for j in (0, 1)]


def _greatest(x: Tensor) -> Tensor:
    a, b, c, d = _corners(x)
    return torch.maximum(torch.maximum(a, b), torch.maximum(c, d))


class _MaxPool(torch.autograd.Function):
    """Max pooling that saves one byte per pixel instead of the floating-point input."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        n, h, w, c = x.shape
        greatest = x.new_empty(n, h // 2, w // 2, c)
        is_greatest = torch.empty(4, *greatest.shape, dtype=torch.bool, device=x.device)
        for images, result, marks in _images_of(x, greatest, is_greatest):
            result.copy_(_greatest(images))
            for mark, corner in zip(marks, _corners(images), strict=True):
                torch.eq(corner, result, out=mark)
        ctx.save_for_backward(is_greatest)
        return greatest

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (is_greatest,) = ctx.saved_tensors
        n, h, w, c = grad.shape
        out, zero = grad.new_empty(n, 2 * h, 2 * w, c), grad.new_zeros(())
        for images, given, marks in _images_of(out, grad, is_greatest):
            share = given / marks.sum(0, dtype=grad.dtype)
            for mark, corner in zip(marks, _corners(images), strict=True):
                torch.where(mark, share, zero, out=corner)
        return out


def _images_of(
    images: Tensor, halves: Tensor, marks: Tensor
) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
    """Split into groups of images; see `_pieces`."""
    count = len(images)
    if images.device.type == "cpu":
        count = max(1, CACHED_VALUES // images[0].numel())
    return zip(images.split(count), halves.split(count), marks.split(count, 1), strict=True)
