"""Plan with any world model through its `imagine` alone.

Letters used in shapes: B states planned for, N samples, K elites, H = horizon, A the width of an
action (for several discrete choices the sum of their sizes).
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from worldloom.nn import distributions
from worldloom.protocol import LatentState, WorldModel

# How much of a remembered categorical plan is forgotten when it is taken up again. Without it a
# plan that has become certain would never sample anything else.
RESTART_UNIFORM = 0.5
# Sequences that are imagined at once on a CPU: more leave its cache, and take longer each.
CPU_ROWS = 1024


@dataclass(frozen=True)
class GaussianPlan:
    """Independent normals per step and action, cut to [-1, 1].

    mean: [B, H, A], what is remembered from one call to the next.
    std: [B, H, A], kept within [min_std, max_std].
    mask: [B, 1, A], 1 for the actions that there are and 0 for padding; None if all are real.
    """

    mean: Tensor
    std: Tensor
    min_std: float
    max_std: float
    mask: Tensor | None = None

    def sample(self, num: int) -> Tensor:
        """Draw `num` action sequences [B, num, H, A]."""
        batch, *rest = self.mean.shape
        noise = distributions.standard_normal(self.mean, batch, num, *rest)
        samples = (self.mean[:, None] + self.std[:, None] * noise).clamp(-1, 1)
        return samples if self.mask is None else samples * self.mask[:, None]

    def update(self, elites: Tensor, weights: Tensor, keep: Tensor) -> "GaussianPlan":
        """Move to mean and spread of elites [B, K, H, A] under weights [B, K].

        `keep` [B, 1, 1] is the share of the old plan that stays.
        """
        weights = weights[:, :, None, None]
        total = weights.sum(1) + 1e-9  # the official TD-MPC2 guards its sum of one so
        mean = (weights * elites).sum(1) / total
        std = ((weights * (elites - mean[:, None]).square()).sum(1) / total).sqrt()
        std = std.lerp(self.std, keep).clamp(self.min_std, self.max_std)
        std = std if self.mask is None else std * self.mask
        return replace(self, mean=mean.lerp(self.mean, keep), std=std)

    def first_action(self, deterministic: bool) -> Tensor:
        """Return the mean of the first step, or a draw around it, [B, A]."""
        return self.mean[:, 0] if deterministic else self.sample(1)[:, 0, 0]

    def memory(self) -> Tensor:
        """Return what the next call may start from, [B, H, A]."""
        return self.mean


@dataclass(frozen=True)
class CategoricalPlan:
    """Independent choices per step, one for each size in `groups`.

    probs: [B, H, A]; the probabilities of each group sum to one.
    """

    probs: Tensor
    groups: tuple[int, ...]

    def sample(self, num: int) -> Tensor:
        """Draw `num` sequences of one-hot actions [B, num, H, A]."""
        groups = self.probs.split(self.groups, -1)
        return torch.cat([_sample_one_hot(probs, num) for probs in groups], -1)

    def update(self, elites: Tensor, weights: Tensor, keep: Tensor) -> "CategoricalPlan":
        """Move to how often elites [B, K, H, A] took each action under weights [B, K].

        `keep` [B, 1, 1] is the share of the old plan that stays.
        """
        frequency = (weights[:, :, None, None] * elites).sum(1)
        return replace(self, probs=frequency.lerp(self.probs, keep))

    def first_action(self, deterministic: bool) -> Tensor:
        """Return the likeliest choices of the first step, or a draw of them, one-hot [B, A]."""
        if not deterministic:
            return self.sample(1)[:, 0, 0]
        groups = self.probs[:, 0].split(self.groups, -1)
        best = [F.one_hot(probs.argmax(-1), probs.shape[-1]) for probs in groups]
        return torch.cat(best, -1).to(self.probs.dtype)

    def memory(self) -> Tensor:
        """Return what the next call may start from, [B, H, A]."""
        return self.probs


@dataclass(eq=False)
class SamplingPlanner:
    """Refine a distribution over action sequences by imagining samples of it.

    CEM and MPPI share all but `weights`. A planner remembers nothing: each call returns its plan,
    and the caller hands it in again at the next step.

    model: any world model; only its `imagine` is called.
    action_dim: width of an action; with `discrete`, a tuple of sizes means several choices.
    discrete: actions are one-hot instead of continuous in [-1, 1].
    horizon: steps that are planned.
    num_samples: sequences imagined per state and iteration.
    num_elites: the best of them, which the plan moves to.
    iterations: rounds of sampling and moving.
    discount: weight of a reward relative to one a step earlier.
    min_std, max_std: limits of the spread of continuous actions; every call begins with `max_std`.
    smoothing: share of the old distribution that each round keeps.
    terminal_value: worth [B * N] or [B * N, 1] of the last imagined states, for what lies beyond
        the horizon.
    """

    model: WorldModel = field(repr=False)
    action_dim: int | tuple[int, ...]
    discrete: bool = False
    _: KW_ONLY
    horizon: int = 12
    num_samples: int = 256
    num_elites: int = 32
    iterations: int = 5
    discount: float = 0.99
    min_std: float = 0.05
    max_std: float = 1.0
    smoothing: float = 0.1
    terminal_value: Callable[[LatentState], Tensor] | None = None

    def __post_init__(self) -> None:
        """Refuse settings that cannot plan."""
        if not callable(getattr(self.model, "imagine", None)):
            raise TypeError(
                f"cannot plan with {type(self.model).__name__}: it has no `imagine`; expected a "
                "WorldModel. Run worldloom.check_world_model on it to see what it lacks"
            )
        self.groups = _action_groups(self.action_dim, self.discrete)
        for name in ("horizon", "num_elites", "iterations"):
            _demand(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        limit = f"at most num_samples = {self.num_samples}"
        _demand(self.num_elites <= self.num_samples, "num_elites", self.num_elites, limit)
        _demand(0 <= self.discount <= 1, "discount", self.discount, "a number in [0, 1]")
        _demand(0 <= self.smoothing < 1, "smoothing", self.smoothing, "a number in [0, 1)")
        limit = f"above 0 and at most max_std = {self.max_std}"
        _demand(0 < self.min_std <= self.max_std, "min_std", self.min_std, limit)

    def weights(self, returns: Tensor) -> Tensor:
        """How much each elite counts, [B, K] with rows that sum to one, by its return [B, K].

        A return of minus infinity marks a sequence that must not count; where a row has no other,
        all its weights are zero.
        """
        raise NotImplementedError

    @torch.no_grad()
    def __call__(
        self,
        state: LatentState,
        plan: Tensor | None = None,
        is_first: Tensor | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Tensor]:
        """Choose actions for B states at once.

        Args:
            state: B latent states.
            plan: [B, H, A] as returned one step earlier; None begins afresh.
            is_first: [B] bool, the rows whose episode begins here: they forget their plan.
            deterministic: take the plan's own first action instead of drawing one around it.

        Returns:
            The action [B, A], and the plan [B, H, A] (means, or probabilities) for the next call.
        """
        distribution = self._start(state, plan, is_first)
        given = self.proposals(state)
        num = self.num_samples - (0 if given is None else given.shape[1])
        for _ in range(self.iterations):
            samples = distribution.sample(num)
            samples = samples if given is None else torch.cat([given, samples], 1)
            returns = self._returns_in_parts(state, samples)
            best, index = returns.topk(self.num_elites, dim=1)  # [B, K]
            elites = samples.take_along_dim(index[:, :, None, None], dim=1)  # [B, K, H, A]
            weights = self.weights(best)
            # A row without one finite return has nothing to move to, so it stays.
            lost = weights.sum(1)[:, None, None] == 0
            keep = torch.where(lost, 1.0, self.smoothing).to(samples)
            distribution = distribution.update(elites, weights, keep)
        action = self.first_action(distribution, elites, weights, deterministic)
        return action, distribution.memory()

    def _returns_in_parts(self, state: LatentState, samples: Tensor) -> Tensor:
        """Call `returns` for as many states at once as suit the device."""
        at_once = len(samples)
        if samples.device.type == "cpu":
            at_once = max(1, CPU_ROWS // samples.shape[1])
        starts = range(0, len(samples), at_once)
        parts = [slice(start, start + at_once) for start in starts]
        return torch.cat([self.returns(state[part], samples[part]) for part in parts])

    def proposals(self, state: LatentState) -> Tensor | None:
        """Return action sequences [B, P, H, A] that compete in every round, or None."""
        return None

    def first_action(
        self,
        plan: GaussianPlan | CategoricalPlan,
        elites: Tensor,
        weights: Tensor,
        deterministic: bool,
    ) -> Tensor:
        """Choose actions [B, A] from the last plan, its elites [B, K, H, A] and their weights."""
        return plan.first_action(deterministic)

    def returns(self, state: LatentState, actions: Tensor) -> Tensor:
        """Imagine what N action sequences per state earn.

        Args:
            state: B latent states.
            actions: [B, N, H, A].

        Returns:
            Discounted returns [B, N], up to where the episode ends; minus infinity where the model
            gave anything that is not finite, so that such a sequence is never preferred.
        """
        batch, num = actions.shape[:2]
        rows = state.map(lambda x: x.repeat_interleave(num, 0))
        trajectory = self.model.imagine(rows, actions.flatten(0, 1).transpose(0, 1))
        rewards = trajectory.rewards.squeeze(-1).to(actions)  # [H, B * N]
        continues = trajectory.continues.squeeze(-1).to(actions)
        # weight[t] = discount^t times the probability that the episode has not ended before t.
        weight = torch.cat([torch.ones_like(continues[:1]), self.discount * continues]).cumprod(0)
        total = (weight[:-1] * rewards).sum(0)
        if self.terminal_value is not None:
            value = self.terminal_value(trajectory.states[-1]).reshape(-1).to(actions)
            total = total + weight[-1] * value
        return total.masked_fill(~total.isfinite(), -torch.inf).reshape(batch, num)

    def _start(
        self, state: LatentState, plan: Tensor | None, is_first: Tensor | None
    ) -> GaussianPlan | CategoricalPlan:
        # A model in half precision is still planned with in float32.
        dtype = torch.promote_types(state.features.dtype, torch.float32)
        start = self.blank(state.features.to(dtype))
        if plan is not None:
            start = self._warm_start(start, plan, is_first)
        if self.discrete:
            return CategoricalPlan(start, self.groups)
        std = torch.full_like(start, self.max_std)
        return GaussianPlan(start, std, self.min_std, self.max_std)

    def blank(self, like: Tensor) -> Tensor:
        """Return the plan [B, H, A] of one who knows nothing: zeros, or uniform probabilities.

        It has the rows, dtype and device of `like` [B, ...].
        """
        if not self.discrete:
            return like.new_zeros(len(like), self.horizon, sum(self.groups))
        step = torch.cat([like.new_full((size,), 1 / size) for size in self.groups])
        return step.repeat(len(like), self.horizon, 1)

    def _warm_start(self, blank: Tensor, plan: Tensor, is_first: Tensor | None) -> Tensor:
        """Shift the plan [B, H, A] by the step that has passed; begin rows of is_first afresh."""
        if plan.shape != blank.shape:
            raise ValueError(
                f"the plan has shape {list(plan.shape)}; expected {list(blank.shape)} "
                "(states, horizon, action width). Pass the plan that the last call returned, "
                "or None where the number of states has changed"
            )
        shifted = torch.cat([plan[:, 1:].to(blank), blank[:, -1:]], 1)
        if self.discrete:
            shifted = shifted.lerp(blank, RESTART_UNIFORM)
        if is_first is None:
            return shifted
        return torch.where(is_first.to(blank.device)[:, None, None], blank, shifted)


@dataclass(eq=False)
class CEM(SamplingPlanner):
    """Plan by the cross-entropy method: move to the elites, each counting the same.

    Rubinstein 1999, "The Cross-Entropy Method for Combinatorial and Continuous Optimization"; in
    the latent space of a world model as PlaNet, Hafner et al. 2019, "Learning Latent Dynamics for
    Planning from Pixels", algorithm 2. `smoothing` is Rubinstein's: without it a discrete action
    that no elite took could not come back within a call.
    """

    def weights(self, returns: Tensor) -> Tensor:
        """Count every finite elite the same; returns [B, K] -> weights [B, K]."""
        finite = returns.isfinite().to(returns)
        return finite / finite.sum(1, keepdim=True).clamp(min=1)


@dataclass(eq=False, kw_only=True)
class MPPI(SamplingPlanner):
    """Plan by model predictive path integrals: elites count by the exponential of their return.

    Williams et al. 2015, "Model Predictive Path Integral Control using Covariance Variable
    Importance Sampling". The weights exp(temperature * (return - best return)) among the elites,
    and a spread re-estimated with them, are those of TD-MPC2, Hansen et al. 2024, "TD-MPC2:
    Scalable, Robust World Models for Continuous Control", as is the start with `max_std` = 2.

    temperature: multiplies returns, as there; at 0 all elites count the same, and the higher it
        is, the more the best one alone decides.
    """

    max_std: float = 2.0
    smoothing: float = 0.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Refuse settings that cannot plan."""
        super().__post_init__()
        _demand(self.temperature >= 0, "temperature", self.temperature, "at least 0")

    def weights(self, returns: Tensor) -> Tensor:
        """Weigh elites by their return; returns [B, K] -> weights [B, K]."""
        # 0 * inf is not a number, so lost sequences are masked after the product.
        scores = (self.temperature * returns).masked_fill(returns.isinf(), -torch.inf)
        return scores.softmax(1).nan_to_num(0.0)  # a row of nothing but -inf has no softmax


def _sample_one_hot(probs: Tensor, num: int) -> Tensor:
    """Draw one-hot actions [B, num, H, size] from probs [B, H, size]."""
    batch, horizon, size = probs.shape
    chosen = torch.multinomial(probs.reshape(-1, size), num, replacement=True)  # [B * H, num]
    chosen = chosen.reshape(batch, horizon, num).transpose(1, 2)
    return F.one_hot(chosen, size).to(probs.dtype)


def _action_groups(action_dim: int | tuple[int, ...], discrete: bool) -> tuple[int, ...]:
    groups = tuple(action_dim) if isinstance(action_dim, Sequence) else (int(action_dim),)
    if len(groups) > 1 and not discrete:
        raise ValueError(
            f"action_dim is {groups}; expected one width for continuous actions. Pass their sum, "
            "or discrete=True if these are the sizes of several choices"
        )
    if not groups or min(groups) < 1:
        raise ValueError(f"action_dim is {action_dim}; expected sizes of at least 1")
    return groups


def _demand(holds: bool, name: str, value: float, expected: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; expected {expected}")
