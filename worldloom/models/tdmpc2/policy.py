"""Policy prior: a squashed normal distribution, or a categorical one for discrete actions.

Axes: A = width of an action; `*batch` any leading axes.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from worldloom.models.tdmpc2.layers import MLP
from worldloom.nn import distributions
from worldloom.nn.distributions import one_hot
from worldloom.nn.layers import to_float32
from worldloom.nn.normalizer import make_constant
from worldloom.ranks import gather_rows

# log(2 pi) / 2, rounded to single precision as in the official code.
HALF_LOG_TAU = 0.9189385175704956


@dataclass
class PolicySample:
    """An action sampled from the policy prior, and the values that its loss needs.

    action: [*batch, A], sampled; with gradient for continuous actions.
    mode: [*batch, A], the squashed mean, or the most probable class.
    entropy: [*batch], minus the log-probability of the sample, or that of the categorical.
    scaled_entropy: [*batch], the bonus in the policy loss.
    log_std: [*batch, A] of the normal before squashing; None for discrete actions.
    probs: [*batch, A] of discrete actions; None for continuous ones.
    """

    action: Tensor
    mode: Tensor
    entropy: Tensor
    scaled_entropy: Tensor
    log_std: Tensor | None = None
    probs: Tensor | None = None


class SquashedNormal(MLP):
    """Continuous actions in [-1, 1]: tanh of a normal (Hansen et al. 2024, section 3.1)."""

    def __init__(
        self, inputs: int, units: int, action_dim: int, log_std_min: float, log_std_max: float
    ) -> None:
        super().__init__(inputs, 2 * [units], 2 * action_dim)
        self.log_std_min, self.log_std_max = log_std_min, log_std_max

    def sample(self, *parts: Tensor, mask: Tensor | None = None) -> PolicySample:
        """Sample for [*batch, inputs] or its parts; mask [*batch, A] is 1 for a task's actions."""
        mean, raw = to_float32(self(*parts)).chunk(2, -1)  # [*batch, A] each
        log_std = self.bound(raw)
        eps = distributions.standard_normal(mean)
        if mask is not None:
            mean, log_std, eps = mean * mask, log_std * mask, eps * mask
        return squash(mean, log_std, eps, mean.shape[-1] if mask is None else mask.sum(-1))

    def bound(self, raw: Tensor) -> Tensor:
        """Map network outputs to log stds between log_std_min and log_std_max."""
        spread = self.log_std_max - self.log_std_min
        return self.log_std_min + 0.5 * spread * (torch.tanh(raw) + 1)


def squash(mean: Tensor, log_std: Tensor, eps: Tensor, dims: Tensor | int) -> PolicySample:
    """Squash mean + eps * exp(log_std), all [*batch, A]; `dims` counts the actions of the task.

    The log-probability includes the correction for tanh; the entropy bonus of the official code
    does not. It is -dims times the log-probability of the normal, apart from a guard against
    division by zero.
    """
    gaussian = (-0.5 * eps.square() - log_std - HALF_LOG_TAU).sum(-1)  # [*batch]
    action = torch.tanh(mean + eps * log_std.exp())  # [*batch, A]
    log_prob = gaussian - torch.log((1 - action.square()).relu() + 1e-6).sum(-1)
    scaled = -log_prob * (gaussian * dims / (log_prob + 1e-8))
    return PolicySample(action, torch.tanh(mean), -log_prob, scaled, log_std)


class Categorical(MLP):
    """Discrete actions, one-hot; not part of the official model (see `TDMPC2`)."""

    def __init__(self, inputs: int, units: int, action_dim: int) -> None:
        super().__init__(inputs, 2 * [units], action_dim)

    def sample(self, *parts: Tensor, mask: Tensor | None = None) -> PolicySample:
        """Sample for [*batch, inputs] or its parts; discrete actions have no mask."""
        logits = to_float32(self(*parts))  # [*batch, A]
        log_probs = logits.log_softmax(-1)
        probs = log_probs.exp()
        classes = logits.shape[-1]
        index = distributions.sample_classes(probs.detach())
        entropy = -(probs * log_probs).sum(-1)
        action = one_hot(index, classes, probs.dtype)
        mode = one_hot(logits.argmax(-1), classes, probs.dtype)
        return PolicySample(action, mode, entropy, entropy, probs=probs)


class RunningScale(nn.Module):
    """Running average of the range of values between the 5th and 95th percentile, at least 1.

    value <- value + tau * (max(1, p95 - p5) - value), initially 1.
    """

    def __init__(self, tau: float) -> None:
        super().__init__()
        self.tau = tau
        self.register_buffer("value", torch.ones(()))
        self.value: Tensor

    @torch.no_grad()
    def update(self, x: Tensor) -> None:
        """Update the average with values [B] of all ranks; NaN entries are ignored.

        All ranks have to call this, with the same number of rows.
        """
        values = gather_rows(to_float32(x.detach().to(self.value.dtype)))
        levels = make_constant((0.05, 0.95), values.dtype, values.device)
        low, high = values.nanquantile(levels).unbind()
        width = (high - low).nan_to_num(1.0).clamp(min=1.0)
        self.value.lerp_(width.to(self.value.dtype), self.tau)
