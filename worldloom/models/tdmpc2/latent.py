"""The networks of TD-MPC2 put together, as functions of its latents.

Axes: B rows, L = latent_dim, A = width of an action, Q number of Q-functions; `...` leading axes.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.models.spaces import ActSpaces, ObsSpaces
from worldloom.models.tdmpc2 import draws
from worldloom.models.tdmpc2.networks import MLP, Decoder, Encoder, Ensemble
from worldloom.models.tdmpc2.planner import LatentMPPI
from worldloom.models.tdmpc2.policy import Categorical, Choice, RunningScale, SquashedNormal
from worldloom.models.tdmpc2.tasks import Tasks, discount_from, tensor_of
from worldloom.nn.simnorm import simnorm
from worldloom.nn.twohot import symlog_twohot_mean
from worldloom.protocol import Obs


class LatentModel(nn.Module):
    """Everything of `TDMPC2` that has weights; see there for the arguments."""

    takes = ("vectors, 64x64 images, dicts of both", "continuous, discrete")

    def __init__(
        self,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
        action_dim: int | Sequence[int] | Mapping[str, int],
        discrete: bool | Mapping[str, bool] = False,
        *,
        enc_dim: int,
        mlp_dim: int,
        latent_dim: int,
        num_enc_layers: int,
        num_q: int,
        num_channels: int,
        simnorm_dim: int,
        dropout: float,
        num_bins: int,
        vmin: float,
        vmax: float,
        log_std_min: float,
        log_std_max: float,
        entropy_coef: float,
        consistency_coef: float,
        reward_coef: float,
        value_coef: float,
        termination_coef: float,
        rho: float,
        tau: float,
        enc_lr_scale: float,
        discount_denom: float,
        discount_min: float,
        discount_max: float,
        episode_length: int | None,
        episodic: bool | str | None,
        task_dim: int,
        action_dims: Sequence[int] | None,
        episode_lengths: Sequence[int] | None,
        mpc: bool,
        horizon: int,
        iterations: int,
        num_samples: int,
        num_elites: int,
        num_pi_trajs: int,
        min_std: float,
        max_std: float,
        temperature: float,
        decoder: bool,
    ) -> None:
        arguments = {k: v for k, v in locals().items() if k not in ("self", "__class__")}
        super().__init__()
        self.config = {"model": "tdmpc2", **copy.deepcopy(arguments)}
        self.obs_shape, self.action_dim, self.discrete = obs_shape, action_dim, discrete
        self.act_spaces = _act_spaces(action_dim, discrete, bool(action_dims))
        self.chooses = any(space.classes for space in self.act_spaces.values())
        self.obs_spaces = ObsSpaces(_without_task(obs_shape) if action_dims else obs_shape)
        _require(num_q >= 2, "num_q", num_q, "at least 2: two of them make a target")
        groups = f"a multiple of simnorm_dim = {simnorm_dim}"
        _require(latent_dim % simnorm_dim == 0, "latent_dim", latent_dim, groups)
        _require(num_bins >= 2, "num_bins", num_bins, "at least 2")
        _require(vmin < vmax, "vmin", vmin, f"a number below vmax = {vmax}")
        _require(0 <= dropout < 1, "dropout", dropout, "a probability from 0 to below 1")
        _require(0 < tau <= 1, "tau", tau, "above 0 and at most 1")
        _require(discount_denom > 0, "discount_denom", discount_denom, "above 0")
        least = f"from 0 to discount_max = {discount_max}, which is at most 1"
        _require(0 <= discount_min <= discount_max <= 1, "discount_min", discount_min, least)
        if not action_dims:
            several = "null for a single task; several tasks are named by action_dims"
            _require(episode_lengths is None, "episode_lengths", episode_lengths, several)
            _require(task_dim == 0, "task_dim", task_dim, "0 for a single task")
        modes = (None, False, True, "auto")
        _require(episodic in modes, "episodic", episodic, "true, false, auto or null")
        self.latent_dim, self.simnorm_dim = latent_dim, simnorm_dim
        self.value_range = {"low": vmin, "high": vmax}
        self.dropout, self.rho, self.tau = dropout, rho, tau
        self.entropy_coef, self.enc_lr_scale = entropy_coef, enc_lr_scale
        self.coefs = {
            "consistency": consistency_coef,
            "reward": reward_coef,
            "value": value_coef,
            "termination": termination_coef,
        }
        self.mpc = mpc
        self.planning: dict[str, Any] = {
            "horizon": horizon,
            "iterations": iterations + 2 * (self.act_spaces.width >= 20),  # as officially
            "num_samples": num_samples,
            "num_elites": num_elites,
            "num_pi_trajs": num_pi_trajs,
            "min_std": min_std,
            "max_std": max_std,
            "temperature": temperature,
        }
        limits = (discount_denom, discount_min, discount_max)
        self.discounts = tuple(
            discount_from(length, *limits)
            for length in _lengths(episode_length, episode_lengths, action_dims)
        )

        width = self.act_spaces.width
        self.tasks = Tasks(action_dims, task_dim, width) if action_dims else None
        seen = latent_dim + (task_dim if action_dims else 0)
        hidden = 2 * [mlp_dim]
        self.encoder = Encoder(
            self.obs_spaces,
            seen - latent_dim,
            latent_dim=latent_dim,
            num_enc_layers=num_enc_layers,
            enc_dim=enc_dim,
            num_channels=num_channels,
            simnorm_dim=simnorm_dim,
        )
        self.dynamics = MLP(seen + width, hidden, latent_dim, normed=True)
        self.reward = MLP(seen + width, hidden, num_bins, zero=True)
        self.termination = MLP(seen, hidden, 1) if episodic else None
        self.actor: SquashedNormal | Categorical = (
            Categorical(seen, mlp_dim, width)
            if self.chooses
            else SquashedNormal(seen, mlp_dim, width, log_std_min, log_std_max)
        )
        self.critic = Ensemble(num_q, seen + width, hidden, num_bins)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.scale = RunningScale(tau)
        if episodic:
            # Whether terminations take part: always, or with "auto" from the first one seen on.
            self.register_buffer("terminates", torch.tensor(episodic is True))
            self.terminates: Tensor
        # Last, and with random numbers of its own, so that asking for it changes no other number.
        with torch.random.fork_rng(devices=[]):
            self.decoder = Decoder(self.obs_spaces, latent_dim, mlp_dim) if decoder else None
        self.planner()  # for its complaints, before anything is trained

    def planner(self) -> LatentMPPI:
        """Make the planner, which remembers nothing; the plan is in the states."""
        actions: dict[str, Any] = {"action_dim": self.act_spaces.width, "discrete": self.chooses}
        return LatentMPPI(model=self, **actions, **self.planning)

    # Functions of latents [..., B, L] and tasks [B] or None -------------------------------------
    # Leading axes of latents, actions and tasks broadcast: [B, 1] fits the N samples of [B, N].

    def next(self, z: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        """Return the next latent [..., L] after action [..., A]."""
        return simnorm(self.dynamics(*self._parts(z, task, action)), self.simnorm_dim)

    def reward_of(self, z: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        """Return the reward [...] that action [..., A] earns."""
        return symlog_twohot_mean(self.reward(*self._parts(z, task, action)), **self.value_range)

    def is_terminal(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Return 1.0 where z [..., L] is more likely terminal than not, else 0.0, [...]."""
        assert self.termination is not None
        logits = self.termination(*self._parts(z, task)).squeeze(-1)
        return ((logits > 0) & self.terminates).to(z.dtype)

    def prior(self, z: Tensor, task: Tensor | None) -> Choice:
        """Let the policy prior choose actions [..., A]."""
        return self.actor.choose(*self._parts(z, task), mask=self.mask_of(task))

    def value(self, z: Tensor, action: Tensor, task: Tensor | None, target: bool = False) -> Tensor:
        """Return the values [2, ...] of action [..., A] by two Q-functions drawn at random."""
        critic = self.target_critic if target else self.critic
        logits = critic(*self._parts(z, task, action), members=self._two_heads())
        return symlog_twohot_mean(logits, **self.value_range)

    def discount_of(self, task: Tensor | None) -> Tensor | float:
        """Return the discount, of each task [B] if there are several."""
        if task is None:
            return self.discounts[0]
        like = self.scale.value
        return tensor_of(self.discounts, like.dtype, task.device)[task]

    def mask_of(self, task: Tensor | None) -> Tensor | None:
        """Return which actions the tasks have, [B, A], or None if all are real."""
        return None if task is None or self.tasks is None else self.tasks.masks[task]

    def policy_value(self, z: Tensor, choice: Choice, task: Tensor | None) -> Tensor:
        """Return the mean value [..., B] of two Q-functions for what the prior chose at z.

        With gradient to the prior alone. Of discrete actions it is the expectation over all.
        """
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        kwargs = {"members": self._two_heads(), "dropout": self.dropout if self.training else 0.0}
        action = choice.action
        if choice.probs is not None:
            # Every choice at every latent: [A, ..., A], first axis by choice.
            width = choice.probs.shape[-1]
            every = torch.eye(width, dtype=z.dtype, device=z.device)
            action = every.view(width, *[1] * (z.ndim - 1), width)
        parts = self._parts(z, task, action)
        logits = torch.func.functional_call(self.critic, frozen, parts, kwargs)
        q = symlog_twohot_mean(logits, **self.value_range).mean(0)
        return q if choice.probs is None else (choice.probs * q.movedim(0, -1)).sum(-1)

    @torch.no_grad()
    def td_target(
        self, next_z: Tensor, rewards: Tensor, terminated: Tensor, task: Tensor | None
    ) -> Tensor:
        """Return rewards + discount * (1 - terminated) * the lesser of two values, all [H, B]."""
        action = self.prior(next_z, task).action
        value = self.value(next_z, action, task, target=True).amin(0)
        return rewards + self.discount_of(task) * (1 - terminated) * value

    def _two_heads(self) -> Tensor | None:
        """Draw two Q-functions; None if there are no others."""
        heads = draws.two_heads(self.critic.count, self.scale.value.device)
        return None if self.critic.count == 2 else heads

    def _join(self, z: Tensor, task: Tensor | None, action: Tensor | None = None) -> Tensor:
        """Append the task's embedding and then the action, [..., B, L + task_dim + A]."""
        parts = self._parts(z, task, action)
        return torch.cat([part.expand(*z.shape[:-1], -1) for part in parts], -1)

    def _parts(
        self, z: Tensor, task: Tensor | None, action: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return what `_join` would concatenate, with axes that broadcast."""
        embedding = () if task is None or self.tasks is None else (self.tasks.embedding(task),)
        return (z, *embedding) if action is None else (z, *embedding, action)

    def _continue(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Return the probability [..., 1] that the episode goes on after z [..., L]."""
        if self.termination is None:
            return z.new_ones(*z.shape[:-1], 1)
        prob = torch.sigmoid(self.termination(*self._parts(z, task)))
        return 1 - prob * self.terminates.to(prob.dtype)

    # Encoding ----

    def _split(
        self, obs: Obs, task: Tensor | int | None, lead: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Take the tasks out of the observations; return what the encoder reads, and ids [B]."""
        if self.tasks is None:
            return self.obs_spaces.split(obs, lead), None
        if isinstance(obs, dict) and "task" in obs:
            if task is None:  # [B, …] or [B, T, …]; a sequence belongs to one task
                task = obs["task"] if lead == 1 else obs["task"][:, 0]
            obs = {key: value for key, value in obs.items() if key != "task"}
        spaces = self.obs_spaces.split(obs, lead)
        steps = next(iter(spaces.values())).shape[:lead]
        if isinstance(task, Tensor) and task.shape == steps and not task.is_floating_point():
            task = task[:, 0] if lead == 2 else task
        return spaces, self.tasks.ids(task, steps[0])

    def _encode(self, obs: dict[str, Tensor], task: Tensor | None) -> Tensor:
        """Encode observations [B, *shape]."""
        rows = len(next(iter(obs.values())))
        embedding = None if task is None or self.tasks is None else self.tasks.embedding(task)
        return self.encoder(obs, embedding, self.encoder.draw_shifts(rows))

    def _encode_steps(self, obs: dict[str, Tensor], first: int, task: Tensor | None) -> Tensor:
        """Encode step 0 as [B, L], or steps 1 to H in one go, as [H, B, L]."""
        if first == 0:
            return self._encode({key: value[0] for key, value in obs.items()}, task)
        steps = {key: value[first:] for key, value in obs.items()}
        length, rows = next(iter(steps.values())).shape[:2]
        embedding = None
        if task is not None and self.tasks is not None:
            embedding = self.tasks.embedding(task).repeat(length, 1)
        shifts = [self.encoder.draw_shifts(rows) for _ in range(length)]
        joined = None if shifts[0] is None else torch.cat(shifts)  # type: ignore[arg-type]
        flat = {key: value.flatten(0, 1) for key, value in steps.items()}
        return self.encoder(flat, embedding, joined).unflatten(0, (length, rows))


def _act_spaces(action_dim: Any, discrete: Any, several_tasks: bool) -> ActSpaces:
    spaces = ActSpaces(action_dim, discrete)
    chooses = any(space.classes for space in spaces.values())
    if len(spaces) > 1 or (several_tasks and chooses):
        what = f"{len(spaces)} actions at once" if len(spaces) > 1 else "discrete tasks"
        raise ValueError(
            f"TD-MPC2 cannot act with {what} (action_dim={action_dim}, discrete={discrete}); it "
            "takes continuous actions, or one discrete choice of a single task. Take dreamerv3, "
            "which has several discrete actions, or train one model for each task"
        )
    return spaces


def _without_task(
    obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
    if not isinstance(obs_shape, Mapping):
        return obs_shape
    return {key: shape for key, shape in obs_shape.items() if key != "task"}


def _lengths(
    one: int | None, several: Sequence[int] | None, action_dims: Sequence[int] | None
) -> list[int | None]:
    """Return the episode length of each task."""
    if not action_dims:
        return [one]
    if several is not None and len(several) != len(action_dims):
        raise ValueError(
            f"episode_lengths has {len(several)} entries and action_dims {len(action_dims)}; "
            "expected one of each for every task"
        )
    return list(several) if several is not None else [one] * len(action_dims)


def _require(holds: bool, name: str, value: object, wanted: str) -> None:
    if not holds:
        raise ValueError(f"{name} is {value}; expected {wanted}")
