"""Recurrent state-space model (RSSM) of DreamerV3, with a block-diagonal GRU (eq. 1).

Axes: N batch rows, G blocks, D deter, S stoch, C classes, H hidden, E tokens, A actions. Inside
`core` activations are laid out by block, [G, N, D / G].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.dreamerv3.unrolled import unroll
from worldloom.nn import products
from worldloom.nn.distributions import sample_straight_through, unimix_probs
from worldloom.nn.layers import (
    CACHED_VALUES,
    HALF,
    MLP,
    BlockDense,
    BlockLinear,
    Dense,
    Linear,
    RMSNorm,
)
from worldloom.nn.products import is_tracing, product_type

# Hyperparameters of the RSSM.
RSSM_OPTIONS = (
    *("deter", "hidden", "stoch", "classes", "blocks", "dyn_layers", "img_layers", "obs_layers"),
    *("unimix", "absolute"),
)


class Kernels(NamedTuple):
    """Slices of kernels that read two inputs, taken once per loop over time.

    hidden: for each hidden layer the slices for deter and for the shared input, see `BlockDense`.
    posterior: [D, H], deter's slice of the first posterior layer; tokens: [H, E], the rest.
    """

    hidden: list[tuple[Tensor, Tensor]]
    posterior: Tensor
    tokens: Tensor


class RSSM(nn.Module):
    """Latent dynamics with a GRU state deter [N, D] and S one-hot variables stoch [N, S * C]."""

    def __init__(
        self,
        action_width: int,
        token_width: int,
        *,
        deter: int,
        hidden: int,
        stoch: int,
        classes: int,
        blocks: int,
        dyn_layers: int,
        img_layers: int,
        obs_layers: int,
        unimix: float,
        absolute: bool,
    ) -> None:
        super().__init__()
        if min(dyn_layers, obs_layers) < 1:
            raise ValueError(
                f"dyn_layers={dyn_layers} and obs_layers={obs_layers}; both must be at least 1"
            )
        self.deter, self.stoch, self.classes, self.blocks = deter, stoch, classes, blocks
        self.unimix, self.absolute = unimix, absolute
        self.deter_in = Dense(deter, hidden)
        self.stoch_in = Dense(stoch * classes, hidden)
        self.action_in = Dense(action_width, hidden)
        shared = [3 * hidden] + [0] * (dyn_layers - 1)
        self.hidden = nn.ModuleList(BlockDense(deter, s, deter, blocks) for s in shared)
        self.gru = BlockLinear(deter, 3 * deter, blocks)
        self.prior = MLP(deter, hidden, img_layers)
        self.prior_logits = Linear(hidden if img_layers else deter, stoch * classes)
        self.posterior = MLP(token_width + (0 if absolute else deter), hidden, obs_layers)
        self.posterior_logits = Linear(hidden, stoch * classes)

    def initial(self, rows: int) -> tuple[Tensor, Tensor]:
        """Return an all-zero deter [N, D] and stoch [N, S * C]."""
        zeros = self.gru.bias.new_zeros
        return zeros(rows, self.deter), zeros(rows, self.stoch * self.classes)

    def embed_action(self, action: Tensor) -> Tensor:
        """Map actions [..., A] to [..., H]; entries outside [-1, 1] are scaled back first."""
        return self.action_in(action / action.abs().clamp(min=1).detach())

    def kernels(self) -> Kernels:
        """Slice the kernels that read two inputs, in the dtype of products."""
        weight = self.posterior.first.linear.weight
        weight = weight.to(product_type(weight))
        skip = 0 if self.absolute else self.deter
        parts = [layer.kernels() for layer in self.hidden_layers()]
        return Kernels(parts, weight[:, :skip].t(), weight[:, skip:])

    def core(self, deter: Tensor, stoch: Tensor, action_emb: Tensor, kernels: Kernels) -> Tensor:
        """Return the next deter [N, D] for deter [N, D], stoch [N, S * C], action_emb [N, H]."""
        old, deter = deter, deter.to(product_type(deter))
        shared = torch.cat([self.deter_in(deter), self.stoch_in(stoch), action_emb], -1)  # [N, 3 H]
        x = deter.view(len(deter), self.blocks, -1).transpose(0, 1)  # [G, N, D / G]
        for layer, parts in zip(self.hidden_layers(), kernels.hidden, strict=True):
            x = layer(x, shared, parts)
            shared = shared[:, :0]  # only the first layer reads it
        return _update_gru(old, self.gru(x))  # gates [G, N, 3 D / G]

    def predict_prior(self, deter: Tensor) -> Tensor:
        """Return prior logits [..., S, C] for deter [..., D]."""
        return self._group(self.prior_logits(self.prior(deter)))

    def project_tokens(self, tokens: Tensor, kernels: Kernels) -> Tensor:
        """Return the contribution [..., H] of tokens [..., E] to the first posterior layer."""
        return products.linear(tokens, kernels.tokens, self.posterior.first.linear.bias)

    def predict_posterior(self, deter: Tensor, projected: Tensor, kernels: Kernels) -> Tensor:
        """Return posterior logits [N, S, C] for deter [N, D] and projected tokens [N, H]."""
        x = projected
        if not self.absolute:
            x = products.multiply(deter, kernels.posterior, projected)
        x = F.silu(self.posterior.first.norm(x))
        for layer in list(self.posterior)[1:]:
            x = layer(x)
        return self._group(self.posterior_logits(x))

    def sample(self, logits: Tensor) -> Tensor:
        """Draw stoch [..., S * C] from logits [..., S, C] with straight-through gradient."""
        return sample_straight_through(unimix_probs(logits, self.unimix)).flatten(-2)

    def imagine_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, kernels: Kernels | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance one step without observation; return deter, stoch and prior logits."""
        deter = self.core(deter, stoch, self.embed_action(action), kernels or self.kernels())
        logits = self.predict_prior(deter)
        return deter, self.sample(logits), logits

    def observe_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance one step with tokens [N, E]; return deter, stoch and posterior logits."""
        kernels = self.kernels()
        deter = self.core(deter, stoch, self.embed_action(action), kernels)
        logits = self.predict_posterior(deter, self.project_tokens(tokens, kernels), kernels)
        return deter, self.sample(logits), logits

    def compare(
        self, deter: Tensor, stoch: Tensor, action: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Return the probabilities [N, S, C] of prior and posterior after an action."""
        kernels = self.kernels()
        deter = self.core(deter, stoch, self.embed_action(action), kernels)
        posterior = self.predict_posterior(deter, self.project_tokens(tokens, kernels), kernels)
        prior = self.predict_prior(deter)
        return unimix_probs(prior, self.unimix), unimix_probs(posterior, self.unimix)

    def observe(
        self, deter: Tensor, stoch: Tensor, tokens: Tensor, actions: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Infer the latent states of a sequence, starting from deter [B, D] and stoch [B, S * C].

        tokens are [B, T, E]. actions [B, T, A] led to their rows. is_first [B, T] resets state and
        action to zero. Returns deter [B, T, D], stoch [B, T, S * C] and posterior logits
        [B, T, S, C].
        """
        # Everything that does not depend on the recurrent state is computed for all steps at once.
        keep = (~is_first).to(deter.dtype).unsqueeze(-1)  # [B, T, 1]
        embedded = self.embed_action(actions * keep)  # [B, T, H]
        kernels = self.kernels()
        projected = self.project_tokens(tokens, kernels)  # [B, T, H]
        if self._can_unroll(embedded):
            return unroll(self, deter, stoch, embedded, projected, keep)
        deters, stochs, logits = [], [], []
        steps = (x.unbind(1) for x in (keep, embedded, projected))
        for mask, action, token in zip(*steps, strict=True):
            deter = self.core(deter * mask, stoch * mask, action, kernels)
            logit = self.predict_posterior(deter, token, kernels)
            stoch = self.sample(logit)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1)

    def hidden_layers(self) -> list[BlockDense]:
        """Return the layers between the inputs and the GRU."""
        return [layer for layer in self.hidden if isinstance(layer, BlockDense)]

    def _can_unroll(self, embedded: Tensor) -> bool:
        """Return whether the hand-written backward pass applies.

        It does not apply to weights in half precision, under torch.compile or torch.func, or if the
        user changed a layer by a hook, another layer class or a subclass.
        """
        if not embedded.requires_grad or self.absolute or is_tracing():
            return False
        if self.gru.bias.dtype in HALF:
            return False
        return all(
            type(m) in UNROLLABLE
            and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
            for m in self.modules()
        )

    def _group(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.stoch, self.classes))


def _update_gru(old: Tensor, gates: Tensor) -> Tensor:
    """Return the next state [N, D] for `old` [N, D]; gates [G, N, 3 D / G] may be overwritten.

    The reset gate multiplies the candidate inside the tanh. The update gate is biased by -1, so
    that an untrained GRU mostly keeps its state. In mixed precision the state stays in float32.
    """
    blocks = len(gates)
    states = old.unflatten(1, (blocks, -1)).transpose(0, 1)  # [G, N, D / G]
    if torch.is_grad_enabled() or is_tracing() or old.dtype in HALF or gates.device.type != "cpu":
        reset, cand, update = gates.to(old.dtype).chunk(3, -1)
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        return torch.lerp(states, cand, torch.sigmoid(update - 1)).transpose(0, 1).flatten(1)
    new = torch.empty_like(old)
    rows = max(1, CACHED_VALUES // old.shape[1])
    parts = (states, new.unflatten(1, (blocks, -1)).transpose(0, 1), gates)
    for state, result, gate in zip(*(x.split(rows, 1) for x in parts), strict=True):
        reset, cand, update = gate.to(old.dtype).chunk(3, -1)
        # tanh(x) = 2 sigmoid(2 x) - 1 takes a third of the time of torch.tanh on a CPU.
        cand = cand.mul_(reset.sigmoid_()).mul_(2).sigmoid_().mul_(2).sub_(1)
        torch.lerp(state, cand, update.sub_(1).sigmoid_(), out=result)
    return new


# The layers that `unroll` implements.
UNROLLABLE = (RSSM, MLP, Dense, Linear, RMSNorm, BlockDense, BlockLinear, nn.ModuleList)
