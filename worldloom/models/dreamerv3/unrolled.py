"""`RSSM.observe` over a whole sequence, with its backward pass written out.

Autograd would make the gradient of every weight anew at each of T steps of B rows and add them up,
which reads and writes far more memory than the products need, and it takes longer over finding out
what to do than over doing it. Here the backward pass through time notes what each product saw; when
it has passed the first step, one product over all T * B rows makes each gradient.

The layers below keep what they were given at each step t. Axes as in `RSSM`: N rows, G blocks.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldloom.nn.distributions import one_hot, sample_classes, softmax
from worldloom.nn.layers import Dense, norm_silu_backward, normalize_

if TYPE_CHECKING:
    from worldloom.models.dreamerv3.rssm import RSSM


class Layer:
    """One layer at all steps.

    saved: what the backward pass of each step needs, `width` tensors.
    """

    width = 1

    def __init__(self) -> None:
        self.saved: list[tuple[Tensor, ...]] = []

    def hand_over(self) -> list[Tensor]:
        """Return what was saved, and forget it."""
        saved, self.saved = self.saved, []
        return [tensor for step in saved for tensor in step]

    def take_back(self, tensors: Iterator[Tensor], steps: int) -> None:
        """Take what `hand_over` returned from the front of `tensors`."""
        self.saved = [tuple(islice(tensors, self.width)) for _ in range(steps)]


class Product(Layer):
    """x @ kernel + bias; kernel [inputs, outputs] and bias [outputs], or both with blocks first."""

    def __init__(self, kernel: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.kernel, self.bias = kernel, bias
        self.grads: list[Tensor] = []

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Multiply, and add to `onto` or to the bias; all blocks may share one x [N, inputs]."""
        self.saved.append((x,))
        base = self.bias if onto is None else onto
        assert base is not None
        if self.kernel.ndim == 2:
            return torch.addmm(base, x, self.kernel)
        return torch.baddbmm(base, x.expand(len(self.kernel), *x.shape[-2:]), self.kernel)

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of x; the last step comes first."""
        self.grads.append(grad)
        by_x = grad @ self.kernel.mT
        return by_x.sum(0) if by_x.ndim > self.saved[0][0].ndim else by_x

    def tensors(self) -> list[Tensor]:
        """Return what the layer learns."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of `tensors`, over all steps."""
        x = torch.cat([x for (x,) in self.saved], -2)
        grad = torch.cat(self.grads[::-1], -2)
        self.grads = []
        # Laid out as torch.nn.Linear has its weight, which is the kernel transposed.
        kernel = x.mT @ grad if grad.ndim == 3 else (grad.mT @ x).mT
        return [kernel] if self.bias is None else [kernel, grad.sum(-2, keepdim=grad.ndim == 3)]


class NormSiLU(Layer):
    """`nn.layers.norm_silu`."""

    width = 2

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.grad: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Normalise; x is used up."""
        self.saved.append(normalize_(x, self.scale))
        return F.silu(self.saved[-1][0] * self.scale, inplace=True)

    def backward(self, t: int, grad: Tensor) -> Tensor:
        """Return the gradient of x at step t."""
        normed, inverse = self.saved[t]
        grad, by_scale = norm_silu_backward(grad, normed, inverse, self.scale)
        self.grad = by_scale if self.grad is None else self.grad.add_(by_scale)
        return grad

    def tensors(self) -> list[Tensor]:
        """Return what the layer learns."""
        return [self.scale]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of `tensors`, over all steps."""
        assert self.grad is not None
        total, self.grad = self.grad.sum_to_size(self.scale.shape), None
        return [total]


class GRU(Layer):
    """The gates of `RSSM.core`."""

    width = 3

    def forward(self, old: Tensor, gates: Tensor) -> Tensor:
        """Return the state after an old one [G, N, d] for gates [G, N, 3 d], which are used up."""
        reset, cand, update = gates.chunk(3, -1)
        reset.sigmoid_()
        update.sub_(1).sigmoid_()
        new = torch.tanh(reset * cand)
        self.saved.append((old, gates, new))
        return torch.lerp(old, new, update)

    def backward(self, t: int, grad: Tensor) -> tuple[Tensor, Tensor]:
        """Return the gradients of the old state and of the gates at step t."""
        old, gates, new = self.saved[t]
        reset, cand, update = gates.chunk(3, -1)
        ops = torch.ops.aten
        by_new = grad * update
        by_product = ops.tanh_backward(by_new, new)
        parts = [
            ops.sigmoid_backward(by_product * cand, reset),
            by_product * reset,
            ops.sigmoid_backward(grad * (new - old), update),
        ]
        return grad - by_new, torch.cat(parts, -1)


class Sample(Layer):
    """`RSSM.sample`: one-hot, with the gradient of the mixed probabilities."""

    def __init__(self, unimix: float) -> None:
        super().__init__()
        self.unimix = unimix

    def forward(self, logits: Tensor) -> Tensor:
        """Draw [N, S, C] from logits [N, S, C]."""
        probs = softmax(logits)
        self.saved.append((probs,))
        mixed = (1 - self.unimix) * probs + self.unimix / probs.shape[-1]
        return one_hot(sample_classes(mixed), probs.shape[-1], probs.dtype)

    def backward(self, t: int, grad: Tensor) -> Tensor:
        """Return the gradient of the logits at step t."""
        (probs,) = self.saved[t]
        by_softmax = (grad * probs).mul_(1 - self.unimix)
        return by_softmax.addcmul_(probs, by_softmax.sum(-1, keepdim=True), value=-1)


class Unrolled:
    """The loop over time, with one object for all steps of a layer."""

    def __init__(self, rssm: "RSSM") -> None:
        def dense(layer: Dense) -> tuple[Product, NormSiLU]:
            return Product(layer.linear.weight.t(), layer.linear.bias), NormSiLU(layer.norm.scale)

        def by_block(x: Tensor) -> Tensor:
            return x.view(rssm.blocks, 1, -1)

        self.blocks, self.groups = rssm.blocks, (rssm.stoch, rssm.classes)
        kernels = rssm.kernels()
        self.deter_in, self.stoch_in = dense(rssm.deter_in), dense(rssm.stoch_in)
        self.hidden, self.shared = [], Product(kernels.hidden[0][1])
        for layer, (own, _) in zip(rssm.hidden_layers(), kernels.hidden, strict=True):
            bias, scale = by_block(layer.linear.bias), by_block(layer.norm.scale)
            self.hidden.append((Product(own, bias), NormSiLU(scale)))
        self.gates, self.gru = Product(rssm.gru.weight, by_block(rssm.gru.bias)), GRU()
        first, *others = [layer for layer in rssm.posterior if isinstance(layer, Dense)]
        self.posterior = [(Product(kernels.posterior), NormSiLU(first.norm.scale))]
        self.posterior += [dense(layer) for layer in others]
        self.logits = Product(rssm.posterior_logits.weight.t(), rssm.posterior_logits.bias)
        self.sample = Sample(rssm.unimix)

    def learning(self) -> list[Product | NormSiLU]:
        """Return the layers that learn."""
        pairs = [self.deter_in, self.stoch_in, *self.hidden, *self.posterior]
        return [*(layer for pair in pairs for layer in pair), self.shared, self.gates, self.logits]

    def layers(self) -> list[Layer]:
        """Return all layers."""
        return [*self.learning(), self.gru, self.sample]

    def forward(
        self, deter: Tensor, stoch: Tensor, embedded: Tensor, projected: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return deter [B, T, D], stoch [B, T, S * C] and logits [B, T, S, C].

        embedded, projected: [B, T, H] of actions and tokens; keep: [B, T, 1], 0 where states reset.
        """
        deters, stochs, logits = [], [], []
        for action, token, mask in zip(
            *(x.unbind(1) for x in (embedded, projected, keep)), strict=True
        ):
            deter, stoch = deter * mask, stoch * mask
            inputs = [_forward(self.deter_in, deter), _forward(self.stoch_in, stoch), action]
            old = deter.view(len(deter), self.blocks, -1).transpose(0, 1)
            product, norm = self.hidden[0]
            x = norm.forward(self.shared.forward(torch.cat(inputs, -1), product.forward(old)))
            for layer in self.hidden[1:]:
                x = _forward(layer, x)
            deter = self.gru.forward(old, self.gates.forward(x)).transpose(0, 1).flatten(1)
            product, norm = self.posterior[0]
            x = norm.forward(product.forward(deter, token))
            for layer in self.posterior[1:]:
                x = _forward(layer, x)
            logit = self.logits.forward(x).unflatten(-1, self.groups)
            stoch = self.sample.forward(logit).flatten(1)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1)

    def backward(
        self, by_deter: Tensor, by_stoch: Tensor, by_logits: Tensor, keep: Tensor
    ) -> list[Tensor]:
        """Turn gradients of the results into those of deter, stoch, embedded and projected."""
        deter, stoch = torch.zeros_like(by_deter[:, 0]), torch.zeros_like(by_stoch[:, 0])
        actions, tokens = [], []
        for t in reversed(range(by_deter.shape[1])):
            stoch = (stoch + by_stoch[:, t]).unflatten(-1, self.groups)
            logit = self.sample.backward(t, stoch).add_(by_logits[:, t])
            grad = self.logits.backward(logit.flatten(1))
            for layer in self.posterior[:0:-1]:
                grad = _backward(layer, t, grad)
            product, norm = self.posterior[0]
            tokens.append(norm.backward(t, grad))
            deter = product.backward(tokens[-1]).add_(deter).add_(by_deter[:, t])
            new = deter.view(len(deter), self.blocks, -1).transpose(0, 1)
            old, grad = self.gru.backward(t, new)
            grad = self.gates.backward(grad)
            for layer in self.hidden[:0:-1]:
                grad = _backward(layer, t, grad)
            product, norm = self.hidden[0]
            grad = norm.backward(t, grad)
            deter = (product.backward(grad) + old).transpose(0, 1).flatten(1)
            of_deter, of_stoch, action = self.shared.backward(grad).chunk(3, -1)
            actions.append(action)
            deter = deter.add_(_backward(self.deter_in, t, of_deter)).mul_(keep[:, t])
            stoch = _backward(self.stoch_in, t, of_stoch).mul_(keep[:, t])
        return [deter, stoch, torch.stack(actions[::-1], 1), torch.stack(tokens[::-1], 1)]


def _forward(layer: tuple[Product, NormSiLU], x: Tensor) -> Tensor:
    return layer[1].forward(layer[0].forward(x))


def _backward(layer: tuple[Product, NormSiLU], t: int, grad: Tensor) -> Tensor:
    return layer[0].backward(layer[1].backward(t, grad))


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unrolled: Unrolled, keep: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        deter, stoch, embedded, projected, *learnt = tensors
        out = unrolled.forward(deter, stoch, embedded, projected, keep)
        # To torch, which frees it in time, and complains about a weight that changed in between.
        saved = [tensor for layer in unrolled.layers() for tensor in layer.hand_over()]
        ctx.save_for_backward(keep, *saved, *learnt)
        ctx.unrolled = unrolled
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, *rest = ctx.saved_tensors
        unrolled, saved = ctx.unrolled, iter(rest)
        for layer in unrolled.layers():
            layer.take_back(saved, keep.shape[1])
        inputs = unrolled.backward(*grads, keep)
        learnt = [grad for layer in unrolled.learning() for grad in layer.gradients()]
        for layer in unrolled.layers():
            layer.hand_over()
        return None, None, *inputs, *learnt


def unroll(
    rssm: "RSSM", deter: Tensor, stoch: Tensor, embedded: Tensor, projected: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return what `Unrolled.forward` does, with gradient to all but keep."""
    unrolled = Unrolled(rssm)
    learnt = [tensor for layer in unrolled.learning() for tensor in layer.tensors()]
    return _Unroll.apply(unrolled, keep, deter, stoch, embedded, projected, *learnt)
