"""Hyperparameters of TD-MPC2: their ranges and the values derived from them."""

import inspect
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from worldloom.errors import require
from worldloom.models.spaces import ActSpaces, ObsSpaces


@dataclass(frozen=True, kw_only=True)
class Hyperparameters:
    """All hyperparameters of the model; `conf/model/tdmpc2_base.yaml` explains each of them.

    Raises:
        ValueError: a value is out of range, or does not fit another one.
    """

    enc_dim: int
    mlp_dim: int
    latent_dim: int
    num_enc_layers: int
    num_q: int
    num_channels: int
    obs_order: Sequence[str] | None = None
    simnorm_dim: int
    dropout: float
    num_bins: int
    vmin: float
    vmax: float
    log_std_min: float
    log_std_max: float
    entropy_coef: float
    consistency_coef: float
    reward_coef: float
    value_coef: float
    termination_coef: float
    loss_scales: Mapping[str, float] | None = None
    rho: float
    tau: float
    enc_lr_scale: float
    discount_denom: float
    discount_min: float
    discount_max: float
    episode_length: int | None
    episodic: bool | str | None
    task_dim: Any  # int after the checks
    action_dims: Sequence[int] | None
    episode_lengths: Sequence[int | None] | None
    mpc: bool
    horizon: int
    iterations: int
    num_samples: int
    num_elites: int
    num_pi_trajs: int
    min_std: float
    max_std: float
    temperature: float
    decoder: bool

    def __post_init__(self) -> None:
        """Check ranges; a task_dim of None becomes the official one."""
        if self.task_dim is None:
            object.__setattr__(self, "task_dim", 96 if self.action_dims else 0)
        require(self.num_q >= 2, "num_q", self.num_q, "at least 2: two of them make a target")
        groups = f"a multiple of simnorm_dim = {self.simnorm_dim}"
        require(self.latent_dim % self.simnorm_dim == 0, "latent_dim", self.latent_dim, groups)
        require(self.num_bins >= 2, "num_bins", self.num_bins, "at least 2")
        require(self.vmin < self.vmax, "vmin", self.vmin, f"a number below vmax = {self.vmax}")
        probability = "a probability from 0 to below 1"
        require(0 <= self.dropout < 1, "dropout", self.dropout, probability)
        require(0 < self.tau <= 1, "tau", self.tau, "above 0 and at most 1")
        require(self.discount_denom > 0, "discount_denom", self.discount_denom, "above 0")
        least, most = self.discount_min, self.discount_max
        limits = f"from 0 to discount_max = {most}, which is at most 1"
        require(0 <= least <= most <= 1, "discount_min", least, limits)
        extra = not {*self.loss_weights(), "policy", "reconstruction"} & {*self.extra_scales}
        rule = "extra terms only; the weight of TD-MPC2's own terms is consistency_coef and so on"
        require(extra, "loss_scales", self.loss_scales, rule)
        modes = (None, False, True, "auto")
        require(self.episodic in modes, "episodic", self.episodic, "true, false, auto or null")
        if not self.action_dims:
            several = "null for a single task; name several tasks with action_dims"
            require(self.episode_lengths is None, "episode_lengths", self.episode_lengths, several)
            require(self.task_dim == 0, "task_dim", self.task_dim, "0 for a single task")
        elif self.episode_lengths is not None:
            lengths, tasks = len(self.episode_lengths), len(self.action_dims)
            if lengths != tasks:
                raise ValueError(
                    f"episode_lengths has {lengths} entries and action_dims {tasks}; expected one "
                    "of each for every task"
                )

    @property
    def discounts(self) -> tuple[float, ...]:
        """The discount of each task."""
        lengths = self.episode_lengths or [self.episode_length] * len(self.action_dims or [0])
        limits = (self.discount_denom, self.discount_min, self.discount_max)
        return tuple(compute_discount(length, *limits) for length in lengths)

    def planner_settings(self, width: int) -> dict[str, Any]:
        """Return the planner's arguments for actions of a width."""
        sizes = ("horizon", "num_samples", "num_elites", "num_pi_trajs")
        names = (*sizes, "min_std", "max_std", "temperature")
        iterations = self.iterations + 2 * (width >= 20)  # as in the official code
        return {"iterations": iterations, **{name: getattr(self, name) for name in names}}

    @property
    def extra_scales(self) -> Mapping[str, float]:
        """The weights of loss terms that a subclass adds."""
        return self.loss_scales or {}

    def loss_weights(self) -> dict[str, float]:
        """Return the weight of each official loss term of the world model."""
        names = ("consistency", "reward", "value", "termination")
        return {name: getattr(self, f"{name}_coef") for name in names}


def compute_discount(length: int | None, denom: float, least: float, most: float) -> float:
    """Return the discount for episodes of `length` agent steps; None means endless episodes.

    (length / denom - 1) / (length / denom), clipped to [least, most] (Hansen et al. 2024,
    appendix).
    """
    if length is None:
        return most
    holds = isinstance(length, int) and length >= 1
    require(holds, "episode_length", length, "at least 1, or null for endless episodes")
    ratio = length / denom
    return min(max((ratio - 1) / ratio, least), most)


def list_hyperparameters(init: Callable[..., None]) -> Callable[..., None]:
    """Show every hyperparameter in the signature of a constructor that takes **hyperparameters.

    So `inspect.signature` and `help` list the names once they are declared above.
    """
    own = inspect.signature(init)
    first = [p for p in own.parameters.values() if p.kind is not p.VAR_KEYWORD]
    rest = inspect.signature(Hyperparameters).parameters.values()
    init.__signature__ = own.replace(parameters=[*first, *rest])  # type: ignore[attr-defined]
    return init


def read_obs_spaces(obs_shape: Any, several_tasks: bool) -> ObsSpaces:
    """Return the spaces of observations; with several tasks, "task" is not one of them."""
    if several_tasks and isinstance(obs_shape, Mapping):
        obs_shape = {key: shape for key, shape in obs_shape.items() if key != "task"}
    return ObsSpaces(obs_shape)


def read_act_spaces(action_dim: Any, discrete: Any, several_tasks: bool) -> ActSpaces:
    """Return the spaces of actions.

    Raises:
        ValueError: several actions at once, or discrete actions and several tasks.
    """
    spaces = ActSpaces(action_dim, discrete)
    is_discrete = any(space.classes for space in spaces.values())
    if len(spaces) > 1 or (several_tasks and is_discrete):
        given = f"{len(spaces)} actions at once" if len(spaces) > 1 else "discrete tasks"
        raise ValueError(
            f"TD-MPC2 cannot act with {given} (action_dim={action_dim}, discrete={discrete}); "
            "expected continuous actions, or one discrete action of a single task. Use dreamerv3, "
            "which supports several discrete actions, or train one model for each task"
        )
    return spaces
