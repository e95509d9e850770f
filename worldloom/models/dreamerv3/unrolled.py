"""`RSSM.observe` over a whole sequence with a hand-written backward pass.

Autograd computes the gradient of each weight at each of T steps of B rows and sums the results,
which reads and writes far more memory than necessary, and its overhead exceeds the arithmetic. Here
the backward pass through time only propagates the gradients of activations. It collects the
gradients at each product; one product over all T * B rows then gives each weight gradient.

Axes as in `RSSM`: N batch rows, G blocks, D deter, S stoch, C classes, H hidden. d = D / G.
"""

from collections.abc import Iterator
from itertools import islice
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from worldloom.nn.distributions import one_hot, sample_classes, softmax
from worldloom.nn.layers import (
    HALF,
    Dense,
    norm_silu_backward,
    normalize_,
    to_float32,
)
from worldloom.nn.products import multiply, product_type, weight_gradient

if TYPE_CHECKING:
    from worldloom.models.dreamerv3.rssm import RSSM


class Layer:
    """One layer at all time steps.

    saved: for each step the `saved_per_step` tensors that the backward pass needs.
    """

    saved_per_step = 1

    def __init__(self) -> None:
        self.saved: list[tuple[Tensor, ...]] = []

    def pop_saved(self) -> list[Tensor]:
        """Return the saved tensors of all steps in order, and drop them."""
        saved, self.saved = self.saved, []
        return [tensor for step in saved for tensor in step]

    def restore_saved(self, tensors: Iterator[Tensor], steps: int) -> None:
        """Consume from `tensors` what `pop_saved` returned."""
        self.saved = [tuple(islice(tensors, self.saved_per_step)) for _ in range(steps)]


class Product(Layer):
    """x @ kernel + bias.

    kernel [inputs, outputs] and bias [outputs], or kernel [G, inputs, outputs] and bias
    [G, 1, outputs]. In mixed precision both are cast once, before the loop.
    """

    def __init__(self, kernel: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        dtype = product_type(kernel)
        self.kernel, self.bias = kernel.to(dtype), None if bias is None else bias.to(dtype)
        self.grads: list[Tensor] = []
        self.transposed = kernel

    def forward(self, x: Tensor, onto: Tensor | None = None) -> Tensor:
        """Return x @ kernel + `onto` (by default the bias)."""
        x = x.to(self.kernel.dtype)
        self.saved.append((x,))
        base = self.bias if onto is None else onto
        assert base is not None
        return multiply(x, self.kernel, base)

    def backward(self, grad: Tensor) -> Tensor:
        """Return the gradient of x; steps are processed from last to first."""
        grad = grad.to(self.kernel.dtype)
        if not self.grads:
            # Batched products in bfloat16 would copy a transposed kernel at every step.
            copy = self.kernel.ndim == 3 and self.kernel.dtype in HALF
            self.transposed = self.kernel.mT.contiguous() if copy else self.kernel.mT
        self.grads.append(grad)
        return multiply(grad, self.transposed)

    def parameters(self) -> list[Tensor]:
        """Return the parameters."""
        return [self.kernel] if self.bias is None else [self.kernel, self.bias]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of `parameters`, summed over all steps."""
        x = torch.cat([x for (x,) in self.saved], -2)  # [T * N, inputs]
        grad = torch.cat(self.grads[::-1], -2)  # [T * N, outputs]
        self.grads = []
        kernel = weight_gradient(x, grad)
        return [kernel] if self.bias is None else [kernel, grad.sum(-2, keepdim=grad.ndim == 3)]


class NormSiLU(Layer):
    """`nn.layers.norm_silu`."""

    saved_per_step = 2

    def __init__(self, scale: Tensor) -> None:
        super().__init__()
        self.scale = scale
        self.grad: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        """Return silu(rms_norm(x) * scale); x is overwritten."""
        self.saved.append(normalize_(x.to(self.scale.dtype), self.scale))
        return F.silu(self.saved[-1][0] * self.scale, inplace=True)

    def backward(self, t: int, grad: Tensor) -> Tensor:
        """Return the gradient of x at step t."""
        normed, inverse = self.saved[t]
        grad = grad.to(self.scale.dtype)
        grad, grad_scale = norm_silu_backward(grad, normed, inverse, self.scale)
        self.grad = grad_scale if self.grad is None else self.grad.add_(grad_scale)
        return grad

    def parameters(self) -> list[Tensor]:
        """Return the parameters."""
        return [self.scale]

    def gradients(self) -> list[Tensor]:
        """Return the gradients of `parameters`, summed over all steps."""
        assert self.grad is not None
        total, self.grad = self.grad.sum_to_size(self.scale.shape), None
        return [total]


class GRU(Layer):
    """The gated state update of `RSSM.core`."""

    saved_per_step = 3

    def forward(self, old: Tensor, gates: Tensor) -> Tensor:
        """Return the next state for state `old` [G, N, d]; gates [G, N, 3 d] are overwritten."""
        gates = gates.to(old.dtype)
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
        # state = old + update * (new - old), new = tanh(reset * cand)
        grad_new = grad * update
        grad_product = ops.tanh_backward(grad_new, new)
        parts = [
            ops.sigmoid_backward(grad_product * cand, reset),
            grad_product * reset,
            ops.sigmoid_backward(grad * (new - old), update),
        ]
        return grad - grad_new, torch.cat(parts, -1)


class Sample(Layer):
    """`RSSM.sample`: one-hot samples with the gradient of the mixed probabilities."""

    def __init__(self, unimix: float) -> None:
        super().__init__()
        self.unimix = unimix

    def forward(self, logits: Tensor) -> Tensor:
        """Draw one-hot samples [N, S, C] from logits [N, S, C]."""
        probs = softmax(logits)
        self.saved.append((probs,))
        mixed = (1 - self.unimix) * probs + self.unimix / probs.shape[-1]
        return one_hot(sample_classes(mixed), probs.shape[-1], probs.dtype)

    def backward(self, t: int, grad: Tensor) -> Tensor:
        """Return the gradient of the logits at step t."""
        (probs,) = self.saved[t]
        grad_softmax = (grad * probs).mul_(1 - self.unimix)
        return grad_softmax.addcmul_(probs, grad_softmax.sum(-1, keepdim=True), value=-1)


DensePair = tuple[Product, NormSiLU]


class Unrolled:
    """The loop over time; each layer object serves all steps."""

    def __init__(self, rssm: "RSSM") -> None:
        def dense(layer: Dense) -> DensePair:
            return Product(layer.linear.weight.t(), layer.linear.bias), NormSiLU(layer.norm.scale)

        def by_block(x: Tensor) -> Tensor:
            return x.view(rssm.blocks, 1, -1)

        self.blocks, self.groups = rssm.blocks, (rssm.stoch, rssm.classes)
        kernels = rssm.kernels()
        self.deter_in, self.stoch_in = dense(rssm.deter_in), dense(rssm.stoch_in)
        self.hidden: list[DensePair] = []
        for layer, (kernel, shared) in zip(rssm.hidden_layers(), kernels.hidden, strict=True):
            bias: Tensor | None = layer.linear.bias
            if not self.hidden:  # its bias is added to the product with the shared input
                self.shared, bias = Product(shared, bias), None
            product = Product(kernel, None if bias is None else by_block(bias))
            self.hidden.append((product, NormSiLU(by_block(layer.norm.scale))))
        self.gates, self.gru = Product(rssm.gru.weight, by_block(rssm.gru.bias)), GRU()
        first, *others = [layer for layer in rssm.posterior if isinstance(layer, Dense)]
        self.posterior = [(Product(kernels.posterior), NormSiLU(first.norm.scale))]
        self.posterior += [dense(layer) for layer in others]
        self.logits = Product(rssm.posterior_logits.weight.t(), rssm.posterior_logits.bias)
        self.sample = Sample(rssm.unimix)

    def trainable_layers(self) -> list[Product | NormSiLU]:
        """Return the layers with parameters."""
        pairs = [self.deter_in, self.stoch_in, *self.hidden, *self.posterior]
        return [*(layer for pair in pairs for layer in pair), self.shared, self.gates, self.logits]

    def layers(self) -> list[Layer]:
        """Return all layers."""
        return [*self.trainable_layers(), self.gru, self.sample]

    def forward(
        self, deter: Tensor, stoch: Tensor, embedded: Tensor, projected: Tensor, keep: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return deter [B, T, D], stoch [B, T, S * C] and logits [B, T, S, C].

        deter [B, D] and stoch [B, S * C] precede the first step. embedded and projected [B, T, H]
        come from actions and tokens. keep [B, T, 1] is 0 where the state is reset.
        """
        deters, stochs, logits = [], [], []
        for action, token, mask in zip(
            *(x.unbind(1) for x in (embedded, projected, keep)), strict=True
        ):
            # Inputs of the core: all blocks share [N, 3 H], each reads its slice of deter.
            deter, stoch = deter * mask, stoch * mask
            inputs = [_forward(self.deter_in, deter), _forward(self.stoch_in, stoch), action]
            old = self.by_block(deter)  # [G, N, d]
            product, norm = self.hidden[0]
            shared = self.shared.forward(torch.cat(inputs, -1))  # [N, D]
            x = norm.forward(product.forward(old, self.by_block(shared)))
            for layer in self.hidden[1:]:
                x = _forward(layer, x)
            deter = self.gru.forward(old, self.gates.forward(x)).transpose(0, 1).flatten(1)
            # Posterior.
            product, norm = self.posterior[0]
            x = norm.forward(product.forward(deter, token))
            for layer in self.posterior[1:]:
                x = _forward(layer, x)
            logit = to_float32(self.logits.forward(x)).unflatten(-1, self.groups)
            stoch = self.sample.forward(logit).flatten(1)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1)

    def backward(
        self, grad_deter: Tensor, grad_stoch: Tensor, grad_logits: Tensor, keep: Tensor
    ) -> list[Tensor]:
        """Return the gradients of deter, stoch, embedded and projected from those of the results.

        Local variables hold gradients and are named after the values in `forward`.
        """
        deter, stoch = torch.zeros_like(grad_deter[:, 0]), torch.zeros_like(grad_stoch[:, 0])
        actions, tokens = [], []
        for t in reversed(range(grad_deter.shape[1])):
            # Posterior.
            stoch = (stoch + grad_stoch[:, t]).unflatten(-1, self.groups)
            logit = self.sample.backward(t, stoch).add_(grad_logits[:, t])
            grad = self.logits.backward(logit.flatten(1))
            for layer in self.posterior[:0:-1]:
                grad = _backward(layer, t, grad)
            product, norm = self.posterior[0]
            tokens.append(norm.backward(t, grad))
            # State gradients are summed in their own precision.
            deter = (product.backward(tokens[-1]) + deter).add_(grad_deter[:, t])
            # Core.
            old, grad = self.gru.backward(t, self.by_block(deter))
            grad = self.gates.backward(grad)
            for layer in self.hidden[:0:-1]:
                grad = _backward(layer, t, grad)
            product, norm = self.hidden[0]
            grad = norm.backward(t, grad)
            deter = (product.backward(grad) + old).transpose(0, 1).flatten(1)
            # Inputs of the core.
            grad = grad.transpose(0, 1).flatten(1)
            deter_in, stoch_in, action = self.shared.backward(grad).chunk(3, -1)
            actions.append(action)
            deter = deter.add_(_backward(self.deter_in, t, deter_in)).mul_(keep[:, t])
            stoch = _backward(self.stoch_in, t, stoch_in) * keep[:, t]
        return [deter, stoch, torch.stack(actions[::-1], 1), torch.stack(tokens[::-1], 1)]

    def by_block(self, x: Tensor) -> Tensor:
        """View x [N, G * d] as [G, N, d]."""
        return x.view(len(x), self.blocks, -1).transpose(0, 1)


def _forward(layer: DensePair, x: Tensor) -> Tensor:
    return layer[1].forward(layer[0].forward(x))


def _backward(layer: DensePair, t: int, grad: Tensor) -> Tensor:
    return layer[0].backward(layer[1].backward(t, grad))


class _Unroll(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, unrolled: Unrolled, keep: Tensor, *tensors: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        deter, stoch, embedded, projected, *parameters = tensors
        out = unrolled.forward(deter, stoch, embedded, projected, keep)
        # Autograd frees what it saves, and detects parameters that change before the backward pass.
        saved = [tensor for layer in unrolled.layers() for tensor in layer.pop_saved()]
        ctx.save_for_backward(keep, *saved, *parameters)
        ctx.unrolled = unrolled
        return out

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        keep, *rest = ctx.saved_tensors
        unrolled, saved = ctx.unrolled, iter(rest)
        for layer in unrolled.layers():
            layer.restore_saved(saved, keep.shape[1])
        inputs = unrolled.backward(*grads, keep)
        parameters = [grad for layer in unrolled.trainable_layers() for grad in layer.gradients()]
        for layer in unrolled.layers():
            layer.pop_saved()
        return None, None, *inputs, *parameters


def unroll(
    rssm: "RSSM", deter: Tensor, stoch: Tensor, embedded: Tensor, projected: Tensor, keep: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Return the results of `Unrolled.forward`, differentiable in all arguments but keep."""
    unrolled = Unrolled(rssm)
    parameters = [tensor for layer in unrolled.trainable_layers() for tensor in layer.parameters()]
    return _Unroll.apply(unrolled, keep, deter, stoch, embedded, projected, *parameters)
