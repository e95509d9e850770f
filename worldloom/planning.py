"""Planning with any world model through its `imagine` alone.

Axes in shapes: B states to plan for, N samples, K elites, H = horizon, A = width of an action (for
several discrete actions the sum of their numbers of classes).
"""

from collections.abc import Callable, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace

import torch
from torch import Tensor
from torch.nn import functional as F

from worldloom.errors import require
from worldloom.memory import require_memory
from worldloom.nn import distributions
from worldloom.protocol import LatentState, WorldModel

# A warm start mixes categorical plans with this share of the uniform distribution. Otherwise a plan
# whose probabilities have reached 0 and 1 would sample the same actions for ever.
RESTART_UNIFORM = 0.5
# Sequences imagined at once on a CPU: larger batches do not fit its cache and take longer per row.
CPU_ROWS = 1024


@dataclass(frozen=True)
class GaussianPlan:
    """Independent normal distributions per step and action, clipped to [-1, 1].

    mean: [B, H, A].
    std: [B, H, A], within [min_std, max_std].
    mask: [B, 1, A], 1 for real actions and 0 for padding; None if all actions are real.
    """

    mean: Tensor
    std: Tensor
    min_std: float
    max_std: float
    mask: Tensor | None = None

    @property
    def memory(self) -> Tensor:
        """The part that the next call starts from, [B, H, A]."""
        return self.mean

    def sample(self, num: int) -> Tensor:
        """Draw `num` action sequences [B, num, H, A]."""
        batch, *rest = self.mean.shape
        noise = distributions.standard_normal(self.mean, batch, num, *rest)
        samples = (self.mean[:, None] + self.std[:, None] * noise).clamp(-1, 1)
        return samples if self.mask is None else samples * self.mask[:, None]

    def update(self, elites: Tensor, weights: Tensor, keep: Tensor) -> "GaussianPlan":
        """Fit mean and std to elites [B, K, H, A] with weights [B, K].

        keep: [B, 1, 1], share of the old plan in the new one.
        """
        weights = weights[:, :, None, None]
        total = weights.sum(1) + 1e-9  # the official TD-MPC2 adds this to the sum of one
        mean = (weights * elites).sum(1) / total
        std = ((weights * (elites - mean[:, None]).square()).sum(1) / total).sqrt()
        std = std.lerp(self.std, keep).clamp(self.min_std, self.max_std)
        std = std if self.mask is None else std * self.mask
        return replace(self, mean=mean.lerp(self.mean, keep), std=std)

    def select_action(self, deterministic: bool) -> Tensor:
        """Return the mean of the first step, or a sample of it, [B, A]."""
        return self.mean[:, 0] if deterministic else self.sample(1)[:, 0, 0]


@dataclass(frozen=True)
class CategoricalPlan:
    """Independent categorical distributions per step, one for each entry of `groups`.

    probs: [B, H, A]; the probabilities of each group sum to one.
    groups: numbers of classes, which sum to A.
    """

    probs: Tensor
    groups: tuple[int, ...]

    @property
    def memory(self) -> Tensor:
        """The part that the next call starts from, [B, H, A]."""
        return self.probs

    def sample(self, num: int) -> Tensor:
        """Draw `num` sequences of one-hot actions [B, num, H, A]."""
        groups = self.probs.split(self.groups, -1)
        return torch.cat([_sample_one_hot(probs, num) for probs in groups], -1)

    def update(self, elites: Tensor, weights: Tensor, keep: Tensor) -> "CategoricalPlan":
        """Set the probabilities to the frequencies in elites [B, K, H, A] with weights [B, K].

        keep: [B, 1, 1], share of the old plan in the new one.
        """
        frequency = (weights[:, :, None, None] * elites).sum(1)
        return replace(self, probs=frequency.lerp(self.probs, keep))

    def select_action(self, deterministic: bool) -> Tensor:
        """Return the most probable classes of the first step, or a sample, one-hot [B, A]."""
        if not deterministic:
            return self.sample(1)[:, 0, 0]
        groups = self.probs[:, 0].split(self.groups, -1)
        best = [F.one_hot(probs.argmax(-1), probs.shape[-1]) for probs in groups]
        return torch.cat(best, -1).to(self.probs.dtype)


Plan = GaussianPlan | CategoricalPlan


@dataclass(eq=False)
class SamplingPlanner:
    """Refine a distribution over action sequences by imagining samples of it.

    CEM and MPPI differ in `compute_weights` only. A planner has no memory: each call returns its
    plan, and the caller passes it to the call for the next step.

    model: any world model; only its `imagine` is called.
    action_dim: width of an action; with `discrete`, a number of classes, or a tuple of them for
        several actions.
    discrete: whether actions are one-hot; otherwise they are continuous in [-1, 1].
    horizon: number of planned steps.
    num_samples: sequences imagined per state and iteration.
    num_elites: number of best sequences that the plan is fitted to.
    iterations: rounds of sampling and fitting.
    discount: weight of a reward relative to one a step earlier.
    min_std, max_std: limits of the std of continuous actions; each call starts with `max_std`.
    smoothing: share of the old distribution that each iteration keeps.
    terminal_value: function that returns the values [B * N] or [B * N, 1] of the last imagined
        states, which stand for all rewards beyond the horizon.
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
        """Check the settings.

        Raises:
            TypeError: the model has no `imagine`.
            ValueError: a setting is out of range.
        """
        if not callable(getattr(self.model, "imagine", None)):
            raise TypeError(
                f"cannot plan with {type(self.model).__name__}: it has no `imagine`; expected a "
                "WorldModel. Run worldloom.check_world_model on it to see what is missing"
            )
        self.groups = _split_groups(self.action_dim, self.discrete)
        for name in ("horizon", "num_elites", "iterations"):
            require(getattr(self, name) >= 1, name, getattr(self, name), "at least 1")
        size = 4 * self.num_samples * self.horizon  # bytes of one number of each action
        require_memory(size, f"num_samples={self.num_samples}, horizon={self.horizon}")
        limit = f"at most num_samples = {self.num_samples}"
        require(self.num_elites <= self.num_samples, "num_elites", self.num_elites, limit)
        require(0 <= self.discount <= 1, "discount", self.discount, "a number in [0, 1]")
        require(0 <= self.smoothing < 1, "smoothing", self.smoothing, "a number in [0, 1)")
        limit = f"above 0 and at most max_std = {self.max_std}"
        require(0 < self.min_std <= self.max_std, "min_std", self.min_std, limit)

    def compute_weights(self, returns: Tensor) -> Tensor:
        """Return the elites' weights [B, K] by their returns [B, K]; each row sums to one.

        Sequences with a return of minus infinity get weight 0; a row without any other is all
        zeros.
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
            plan: [B, H, A] as returned for the previous step; None starts without a plan.
            is_first: [B] bool, rows whose episode starts here; their plan is discarded.
            deterministic: take the mean or mode of the plan instead of a sample.

        Returns:
            The actions [B, A], and the plan [B, H, A] (means, or probabilities) for the next call.
        """
        # Start from the previous plan, shifted by one step.
        distribution = self._start(state, plan, is_first)
        proposals = self.propose(state)  # [B, P, H, A] or None
        num = self.num_samples - (0 if proposals is None else proposals.shape[1])
        for _ in range(self.iterations):
            # Sample sequences and imagine their returns.
            samples = distribution.sample(num)
            samples = samples if proposals is None else torch.cat([proposals, samples], 1)
            returns = self._compute_returns_in_parts(state, samples)  # [B, N]
            # Fit the distribution to the best sequences.
            best, index = returns.topk(self.num_elites, dim=1)  # [B, K]
            elites = samples.take_along_dim(index[:, :, None, None], dim=1)  # [B, K, H, A]
            weights = self.compute_weights(best)
            # Rows without any finite return keep their distribution.
            lost = weights.sum(1)[:, None, None] == 0
            keep = torch.where(lost, 1.0, self.smoothing).to(samples)
            distribution = distribution.update(elites, weights, keep)
        action = self.select_action(distribution, elites, weights, deterministic)
        return action, distribution.memory

    def propose(self, state: LatentState) -> Tensor | None:
        """Return action sequences [B, P, H, A] that compete in every iteration, or None."""
        return None

    def select_action(
        self, plan: Plan, elites: Tensor, weights: Tensor, deterministic: bool
    ) -> Tensor:
        """Return actions [B, A] from the last plan, its elites [B, K, H, A] and their weights."""
        return plan.select_action(deterministic)

    def compute_returns(self, state: LatentState, actions: Tensor) -> Tensor:
        """Imagine N action sequences per state and return their discounted returns.

        Args:
            state: B latent states.
            actions: [B, N, H, A].

        Returns:
            Returns [B, N] up to the predicted end of the episode; minus infinity where the model
            predicts NaN or infinity, so that no such sequence is preferred.
        """
        batch, num = actions.shape[:2]
        rows = state.map(lambda x: x.repeat_interleave(num, 0))  # [B * N, ...]
        trajectory = self.model.imagine(rows, actions.flatten(0, 1).transpose(0, 1))
        rewards = trajectory.rewards.squeeze(-1).to(actions)  # [H, B * N]
        continues = trajectory.continues.squeeze(-1).to(actions)  # [H, B * N]
        # weight[t] = discount^t times the probability that the episode has not ended before t.
        weight = torch.cat([torch.ones_like(continues[:1]), self.discount * continues]).cumprod(0)
        total = (weight[:-1] * rewards).sum(0)
        if self.terminal_value is not None:
            value = self.terminal_value(trajectory.states[-1]).reshape(-1).to(actions)
            total = total + weight[-1] * value
        return total.masked_fill(~total.isfinite(), -torch.inf).reshape(batch, num)

    def _compute_returns_in_parts(self, state: LatentState, samples: Tensor) -> Tensor:
        """Call `compute_returns` for as many states at once as suits the device."""
        at_once = len(samples)
        if samples.device.type == "cpu":
            at_once = max(1, CPU_ROWS // samples.shape[1])
        starts = range(0, len(samples), at_once)
        parts = [slice(start, start + at_once) for start in starts]
        return torch.cat([self.compute_returns(state[part], samples[part]) for part in parts])

    def make_blank_plan(self, like: Tensor) -> Tensor:
        """Return the plan [B, H, A] to start without a previous one: zeros, or uniform.

        It has the rows, dtype and device of `like` [B, ...].
        """
        if not self.discrete:
            return like.new_zeros(len(like), self.horizon, sum(self.groups))
        step = torch.cat([like.new_full((size,), 1 / size) for size in self.groups])
        return step.repeat(len(like), self.horizon, 1)

    def _start(self, state: LatentState, plan: Tensor | None, is_first: Tensor | None) -> Plan:
        """Return the distribution of the first iteration."""
        # Plans are float32 even if the model is in half precision.
        dtype = torch.promote_types(state.features.dtype, torch.float32)
        start = self.make_blank_plan(state.features.to(dtype))
        if plan is not None:
            start = self._shift(start, plan, is_first)
        if self.discrete:
            return CategoricalPlan(start, self.groups)
        std = torch.full_like(start, self.max_std)
        return GaussianPlan(start, std, self.min_std, self.max_std)

    def _shift(self, blank: Tensor, plan: Tensor, is_first: Tensor | None) -> Tensor:
        """Drop the first step of a plan [B, H, A]; rows of is_first become blank."""
        if plan.shape != blank.shape:
            raise ValueError(
                f"the plan has shape {list(plan.shape)}; expected {list(blank.shape)} "
                "(states, horizon, action width). Pass the plan that the previous call returned, "
                "or None after a change of the number of states"
            )
        shifted = torch.cat([plan[:, 1:].to(blank), blank[:, -1:]], 1)
        if self.discrete:
            shifted = shifted.lerp(blank, RESTART_UNIFORM)
        if is_first is None:
            return shifted
        return torch.where(is_first.to(blank.device)[:, None, None], blank, shifted)


@dataclass(eq=False)
class CEM(SamplingPlanner):
    """Plan with the cross-entropy method, in which all elites have the same weight.

    Rubinstein 1999, "The Cross-Entropy Method for Combinatorial and Continuous Optimization"; in
    the latent space of a world model as PlaNet, Hafner et al. 2019, "Learning Latent Dynamics for
    Planning from Pixels", algorithm 2. `smoothing` is Rubinstein's: without it a discrete action
    that is absent from the elites could not return within a call.
    """

    def compute_weights(self, returns: Tensor) -> Tensor:
        """Return equal weights [B, K] for all elites with finite returns [B, K]."""
        finite = returns.isfinite().to(returns)
        return finite / finite.sum(1, keepdim=True).clamp(min=1)


@dataclass(eq=False, kw_only=True)
class MPPI(SamplingPlanner):
    """Plan with model predictive path integrals, which weight elites by exponentiated returns.

    Williams et al. 2015, "Model Predictive Path Integral Control using Covariance Variable
    Importance Sampling". As in TD-MPC2 (Hansen et al. 2024, "TD-MPC2: Scalable, Robust World Models
    for Continuous Control"), the weights are exp(temperature * (return - best return)) among the
    elites, the std is fitted with the same weights, and `max_std` is 2.

    temperature: factor of the returns; with 0 all elites have the same weight, and the larger it
        is, the more the best one dominates.
    """

    max_std: float = 2.0
    smoothing: float = 0.0
    temperature: float = 0.5

    def __post_init__(self) -> None:
        """Check the settings; see `SamplingPlanner`."""
        super().__post_init__()
        require(self.temperature >= 0, "temperature", self.temperature, "at least 0")

    def compute_weights(self, returns: Tensor) -> Tensor:
        """Return softmax weights [B, K] for returns [B, K]."""
        # 0 * inf is NaN, so infinite returns are masked after the product.
        scores = (self.temperature * returns).masked_fill(returns.isinf(), -torch.inf)
        return scores.softmax(1).nan_to_num(0.0)  # a row of -inf alone has a softmax of NaN


def _sample_one_hot(probs: Tensor, num: int) -> Tensor:
    """Draw one-hot actions [B, num, H, classes] from probs [B, H, classes]."""
    batch, horizon, size = probs.shape
    index = torch.multinomial(probs.reshape(-1, size), num, replacement=True)  # [B * H, num]
    index = index.reshape(batch, horizon, num).transpose(1, 2)
    return F.one_hot(index, size).to(probs.dtype)


def _split_groups(action_dim: int | tuple[int, ...], discrete: bool) -> tuple[int, ...]:
    """Return the widths of the actions: one, or the numbers of classes of several."""
    groups = tuple(action_dim) if isinstance(action_dim, Sequence) else (int(action_dim),)
    if len(groups) > 1 and not discrete:
        raise ValueError(
            f"action_dim is {groups}; expected one width for continuous actions. Pass their sum, "
            "or discrete=True if these are numbers of classes"
        )
    if not groups or min(groups) < 1:
        raise ValueError(f"action_dim is {action_dim}; expected sizes of at least 1")
    return groups
