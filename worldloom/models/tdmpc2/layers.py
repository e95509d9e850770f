"""Layers of TD-MPC2: linear layers with layer norm, MLPs and an ensemble of MLPs.

Paper: Hansen et al. 2024, appendix A. Axes: N any number of rows, Q members of the ensemble.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.tdmpc2 import draws
from worldloom.nn.casts import cast, is_mixed_on_cpu
from worldloom.nn.layers import to_float32
from worldloom.nn.mish import mish
from worldloom.nn.norm_mish import norm_mish
from worldloom.nn.products import is_for_onednn, is_tracing, linear, multiply

Stacked = tuple[Tensor, ...]  # parameters of one layer of all members, [Q, ...]


class Linear(nn.Linear):
    """A linear layer with the official initial values."""

    def reset_parameters(self) -> None:
        """Initialise weight and bias."""
        super().reset_parameters()
        init_weight(self.weight)
        nn.init.zeros_(self.bias)

    def forward(self, x: Tensor) -> Tensor:
        """Map [..., inputs] to [..., outputs]."""
        return joint_linear((x,), self.weight, self.bias)


def init_weight(weight: Tensor) -> None:
    """Fill with a normal distribution of std 0.02, truncated at -2 and 2 (absolute values)."""
    nn.init.trunc_normal_(weight, std=0.02)


def joint_linear(parts: Sequence[Tensor], weight: Tensor, bias: Tensor | None) -> Tensor:
    """Apply a linear map to the concatenation of parts [..., width], without concatenating them.

    Leading axes broadcast, so rows that many others share are multiplied once, and a part without
    gradient costs no backward pass.
    """
    if is_mixed_on_cpu(parts[0]):
        parts, weight = join_rows(parts), cast(weight)
        bias = None if bias is None else cast(bias)
    first, *others = parts
    if not others:
        return linear(first, weight, bias)
    piece, *pieces = weight.split([part.shape[-1] for part in parts], -1)
    y = linear(first, piece, bias)
    for part, piece in zip(others, pieces, strict=True):
        if part.shape[:-1] == y.shape[:-1]:
            rows = multiply(part.flatten(0, -2), piece.t(), y.flatten(0, -2))
            y = rows.view(y.shape)
        else:
            y = y + linear(part, piece)
    return y


def join_rows(parts: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return parts [..., width] of a network's input in the form that is cheapest to multiply.

    In mixed precision on a CPU they are in bfloat16. There and for oneDNN, which copy slices of a
    weight, parts with the same rows are concatenated.
    """
    if is_mixed_on_cpu(parts[0]):
        parts = [part.bfloat16() for part in parts]
    elif not is_for_onednn(parts[0]):
        return tuple(parts)
    if len(parts) > 1 and len({part.shape[:-1] for part in parts}) == 1:
        parts = [torch.cat(list(parts), -1)]
    return tuple(parts)


def normed_mish(
    parts: Sequence[Tensor],
    weight: Tensor,
    bias: Tensor,
    scale: Tensor,
    shift: Tensor,
    dropout: float = 0.0,
) -> Tensor:
    """Apply a linear map to parts (see `joint_linear`), dropout, a layer norm and Mish."""
    if is_mixed_on_cpu(parts[0]) and not dropout:
        return norm_mish(joint_linear(parts, weight, None), bias, scale, shift)
    y = drop(joint_linear(parts, weight, bias), dropout)  # [..., units]
    if is_mixed_on_cpu(y):
        return norm_mish(y, torch.zeros_like(bias), scale, shift)
    return mish(F.layer_norm(y, scale.shape, scale, shift))


class NormedLinear(nn.Module):
    """Linear layer and layer norm, with Mish if `mishes`."""

    def __init__(self, inputs: int, units: int, *, mishes: bool) -> None:
        super().__init__()
        self.linear = Linear(inputs, units)
        self.norm = nn.LayerNorm(units)
        self.mishes = mishes

    def forward(self, *parts: Tensor) -> Tensor:
        """Map [..., inputs], or parts of that width (see `joint_linear`), to [..., units]."""
        weights = self.linear.weight, self.linear.bias
        if self.mishes:
            return normed_mish(parts, *weights, self.norm.weight, self.norm.bias)
        y = joint_linear(parts, *weights)
        return self.norm(to_float32(y) if is_mixed_on_cpu(y) else y)


class MLP(nn.Module):
    """Hidden layers (linear, layer norm, Mish) and a last linear layer.

    normed: add a layer norm to the last layer.
    zero: initialise the last weight with zeros.
    """

    def __init__(
        self,
        inputs: int,
        hidden: Sequence[int],
        outputs: int,
        *,
        normed: bool = False,
        zero: bool = False,
    ) -> None:
        super().__init__()
        widths = [inputs, *hidden]
        layers = [NormedLinear(a, b, mishes=True) for a, b in pairwise(widths)]
        sizes = widths[-1], outputs
        last = NormedLinear(*sizes, mishes=False) if normed else Linear(*sizes)
        if zero:
            nn.init.zeros_(last.weight)  # type: ignore[arg-type]
        self.layers = nn.ModuleList([*layers, last])

    def forward(self, *parts: Tensor) -> Tensor:
        """Map [..., inputs], or parts of that width (see `joint_linear`), to [..., outputs]."""
        for layer in self.layers:
            parts = (layer(*parts),)
        return parts[0]


def drop(x: Tensor, probability: float) -> Tensor:
    """Apply dropout: set entries to zero and divide the others by 1 - probability."""
    if not probability:
        return x
    if x.device.type != "cpu":
        return F.dropout(x, probability)
    dropped = draws.draw_dropped(x.numel(), probability)
    return (x / (1 - probability)).flatten().index_fill(0, dropped, 0.0).view_as(x)


class EnsembleLinear(nn.Module):
    """Parameters of Q linear layers, each with a layer norm if `normed`.

    weight: [Q, outputs, inputs]; bias, and scale and shift of the norm: [Q, outputs].
    """

    def __init__(self, count: int, inputs: int, outputs: int, *, normed: bool) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(count, outputs, inputs))
        self.bias = nn.Parameter(torch.zeros(count, outputs))
        self.normed = normed
        if normed:
            self.scale = nn.Parameter(torch.ones(count, outputs))
            self.shift = nn.Parameter(torch.zeros(count, outputs))
            for weight in self.weight:
                init_weight(weight)
        else:
            nn.init.zeros_(self.weight)

    @property
    def stacked(self) -> Stacked:
        """Weight and bias, and scale and shift of a normed layer."""
        norm = (self.scale, self.shift) if self.normed else ()
        return (self.weight, self.bias, *norm)


class Ensemble(nn.Module):
    """Q MLPs of the same shape; their last weights are initialised with zeros."""

    def __init__(self, count: int, inputs: int, hidden: Sequence[int], outputs: int) -> None:
        super().__init__()
        pairs = enumerate(pairwise([inputs, *hidden, outputs]))
        self.count = count
        self.layers = nn.ModuleList(
            [EnsembleLinear(count, *pair, normed=i < len(hidden)) for i, pair in pairs]
        )

    def forward(
        self, *parts: Tensor, members: Tensor | None = None, dropout: float = 0.0
    ) -> Tensor:
        """Map [..., inputs], or parts of that width, to [Q, ..., outputs].

        members: indices of the members to compute; None for all.
        dropout: probability of dropout between the first linear map and its norm.
        """
        layers: list[Stacked] = [layer.stacked for layer in self.layers]  # type: ignore[misc]
        on_cpu = parts[0].device.type == "cpu"
        unknown = members is not None and is_tracing()  # a graph has no numbers to loop over
        apply = apply_one_by_one if on_cpu and not unknown else apply_all_at_once
        return apply(parts, layers, members, dropout)


def apply_one_by_one(
    parts: Sequence[Tensor], layers: Sequence[Stacked], members: Tensor | None, dropout: float
) -> Tensor:
    """Compute an `Ensemble` member by member, which is faster on a CPU.

    All cores share each product (in a batched product each core takes whole ones), and the
    activations between two products stay in the cache.
    """
    if is_mixed_on_cpu(parts[0]):
        layers = [(cast(weight), *others) for weight, *others in layers]
        parts = join_rows(parts)
    split = [[p.unbind() for p in layer] for layer in layers]
    outputs = []
    for i in range(len(layers[0][0])) if members is None else members.tolist():
        inputs = parts
        for number, layer in enumerate(split):
            weight, bias, *norm = (p[i] for p in layer)
            if norm:
                dropped = 0.0 if number else dropout
                y = normed_mish(inputs, weight, bias, norm[0], norm[1], dropped)
            else:
                y = joint_linear(inputs, weight, bias)
            inputs = (y,)
        outputs.append(y)
    return torch.stack(outputs)


def apply_all_at_once(
    parts: Sequence[Tensor], layers: Sequence[Stacked], members: Tensor | None, dropout: float
) -> Tensor:
    """Compute an `Ensemble` with batched products, which takes the fewest kernels on a GPU."""
    layers = [tuple(p if members is None else p[members] for p in layer) for layer in layers]
    weight, bias = layers[0][:2]
    y = joint_linear(parts, weight.flatten(0, 1), bias.flatten())  # [..., Q * units]
    rows = y.shape[:-1]
    y = y.reshape(-1, *bias.shape).transpose(0, 1)  # [Q, N, units]
    for number, (weight, bias, *norm) in enumerate(layers):
        y = torch.baddbmm(bias.unsqueeze(1), y, weight.mT) if number else drop(y, dropout)
        if norm:
            scale, shift = (p.unsqueeze(1) for p in norm)
            y = mish(torch.addcmul(shift, F.layer_norm(y, y.shape[-1:]), scale))
    return y.unflatten(1, rows)
