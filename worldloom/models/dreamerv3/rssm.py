"""The recurrent state-space model of DreamerV3, with a block-diagonal GRU.

Axes: N batch rows, G blocks, D deter, S stoch, C classes, H hidden. Inside the core the
deterministic state is laid out by block, [G, N, D/G].
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from worldloom.models.dreamerv3.unrolled import unroll
from worldloom.nn.distributions import sample_straight_through, unimix_probs
from worldloom.nn.layers import (
    MLP,
    BlockDense,
    BlockLinear,
    Dense,
    Linear,
    RMSNorm,
    is_tracing,
    to_float32,
)


class Kernels(NamedTuple):
    """Parts of kernels, taken once per loop over time."""

    hidden: list[tuple[Tensor, Tensor]]
    posterior: Tensor
    tokens: Tensor


class RSSM(nn.Module):
    """Latent dynamics: deter [N, D] follows a GRU, stoch [N, S * C] holds S one-hot variables."""

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
        """Return deter [N, D] and stoch [N, S * C] of zeros."""
        zeros = self.gru.bias.new_zeros
        return zeros(rows, self.deter), zeros(rows, self.stoch * self.classes)

    def embed_action(self, action: Tensor) -> Tensor:
        """Map action vectors [..., A] to [..., H]; large ones are scaled back to [-1, 1]."""
        return self.action_in(action / action.abs().clamp(min=1).detach())

    def kernels(self) -> Kernels:
        """Cut the kernels that read two inputs into their parts."""
        weight = self.posterior.first.linear.weight
        skip = 0 if self.absolute else self.deter
        parts = [layer.kernels() for layer in self.hidden_layers()]
        return Kernels(parts, weight[:, :skip].t(), weight[:, skip:])

    def core(self, deter: Tensor, stoch: Tensor, action_emb: Tensor, kernels: Kernels) -> Tensor:
        """Advance the deterministic state one step: [N, D], [N, S * C], [N, H] -> [N, D]."""
        rows = len(deter)
        shared = torch.cat([self.deter_in(deter), self.stoch_in(stoch), action_emb], -1)
        old = deter.view(rows, self.blocks, -1).transpose(0, 1)
        x = old
        for layer, parts in zip(self.hidden_layers(), kernels.hidden, strict=True):
            x = layer(x, shared, parts)
            shared = shared[:, :0]  # only the first layer reads it
        new = _gru(old, self.gru(x))
        return new.transpose(0, 1).reshape(rows, self.deter)

    def prior_of(self, deter: Tensor) -> Tensor:
        """Return prior logits [..., S, C] of deter [..., D]."""
        return self._groups(self.prior_logits(self.prior(deter)))

    def project_tokens(self, tokens: Tensor, kernels: Kernels) -> Tensor:
        """Return the share [..., H] of the tokens in the posterior's first layer."""
        return F.linear(tokens, kernels.tokens, self.posterior.first.linear.bias)

    def posterior_of(self, deter: Tensor, projected: Tensor, kernels: Kernels) -> Tensor:
        """Return posterior logits [N, S, C] of deter [N, D] and `project_tokens` [N, H]."""
        x = projected
        if not self.absolute:
            x = torch.addmm(projected, deter, kernels.posterior)
        x = F.silu(self.posterior.first.norm(x))
        for layer in list(self.posterior)[1:]:
            x = layer(x)
        return self._groups(self.posterior_logits(x))

    def sample(self, logits: Tensor) -> Tensor:
        """Draw stoch [..., S * C] from logits [..., S, C], straight-through."""
        return sample_straight_through(unimix_probs(logits, self.unimix)).flatten(-2)

    def imagine_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, kernels: Kernels | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Predict one step without an observation; return deter, stoch and prior logits."""
        deter = self.core(deter, stoch, self.embed_action(action), kernels or self.kernels())
        logits = self.prior_of(deter)
        return deter, self.sample(logits), logits

    def observe_step(
        self, deter: Tensor, stoch: Tensor, action: Tensor, tokens: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Advance one step and correct it by tokens [N, token_width]; return also the logits."""
        kernels = self.kernels()
        deter = self.core(deter, stoch, self.embed_action(action), kernels)
        logits = self.posterior_of(deter, self.project_tokens(tokens, kernels), kernels)
        return deter, self.sample(logits), logits

    def observe(
        self, deter: Tensor, stoch: Tensor, tokens: Tensor, actions: Tensor, is_first: Tensor
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Filter a sequence, starting from deter [B, D] and stoch [B, S * C].

        tokens [B, T, E]; actions [B, T, A], each the one that led to the row; is_first [B, T]
        resets state and action to zero. Returns deter [B, T, D], stoch [B, T, S * C] and
        posterior logits [B, T, S, C]. Only the recurrence itself runs step by step.
        """
        keep = (~is_first).to(deter.dtype).unsqueeze(-1)
        embedded = self.embed_action(actions * keep)
        kernels = self.kernels()
        projected = self.project_tokens(tokens, kernels)
        if self._unrolls(embedded):
            return unroll(self, deter, stoch, embedded, projected, keep)
        deters, stochs, logits = [], [], []
        steps = (x.unbind(1) for x in (keep, embedded, projected))
        for mask, action, token in zip(*steps, strict=True):
            deter = self.core(deter * mask, stoch * mask, action, kernels)
            logit = self.posterior_of(deter, token, kernels)
            stoch = self.sample(logit)
            deters.append(deter)
            stochs.append(stoch)
            logits.append(logit)
        return torch.stack(deters, 1), torch.stack(stochs, 1), torch.stack(logits, 1)

    def hidden_layers(self) -> list[BlockDense]:
        """Return the layers between the inputs and the GRU."""
        return [layer for layer in self.hidden if isinstance(layer, BlockDense)]

    def _unrolls(self, embedded: Tensor) -> bool:
        """Whether the backward pass by hand serves.

        It does not in mixed precision, under torch.compile or torch.func, or where something was
        put into the layers: a hook, another kind of layer, a method of a subclass.
        """
        if not embedded.requires_grad or self.absolute or is_tracing():
            return False
        if torch.is_autocast_enabled(embedded.device.type) or to_float32(embedded) is not embedded:
            return False
        return all(
            type(m) in KNOWN and not (m._forward_hooks or m._forward_pre_hooks or m._backward_hooks)
            for m in self.modules()
        )

    def _groups(self, logits: Tensor) -> Tensor:
        return logits.unflatten(-1, (self.stoch, self.classes))


def _gru(old: Tensor, gates: Tensor) -> Tensor:
    """Return the next state of the old one [G, N, D/G] and gates [G, N, 3 D/G], which are used up.

    The reset gate acts on the candidate inside the tanh; -1 keeps the state by default.
    """
    reset, cand, update = gates.chunk(3, -1)
    if (
        torch.is_grad_enabled()
        or is_tracing()
        or to_float32(gates) is not gates
        or gates.device.type != "cpu"
    ):
        cand = torch.tanh(torch.sigmoid(reset) * cand)
        # In mixed precision the state itself stays in float32.
        return torch.lerp(old, cand.to(old), torch.sigmoid(update - 1).to(old))
    # tanh(x) = 2 sigmoid(2 x) - 1, in a third of the time on a CPU.
    cand = cand.mul_(reset.sigmoid_()).mul_(2).sigmoid_().mul_(2).sub_(1)
    return torch.lerp(old, cand, update.sub_(1).sigmoid_())


# The layers that `unroll` knows.
KNOWN = (RSSM, MLP, Dense, Linear, RMSNorm, BlockDense, BlockLinear, nn.ModuleList)
