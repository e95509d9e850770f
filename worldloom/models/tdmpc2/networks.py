"""Networks of TD-MPC2, and the functions of latents that they compute.

Axes: B rows, L = latent_dim, A = width of an action, Q number of Q-functions; `...` leading axes.
"""

import copy
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.models.spaces import ActSpaces, ObsSpaces
from worldloom.models.tdmpc2 import draws
from worldloom.models.tdmpc2.encoder import Decoder, Encoder
from worldloom.models.tdmpc2.hyperparameters import Hyperparameters
from worldloom.models.tdmpc2.layers import MLP, Ensemble, join_rows
from worldloom.models.tdmpc2.policy import (
    Categorical,
    PolicySample,
    RunningScale,
    SquashedNormal,
)
from worldloom.models.tdmpc2.tasks import Tasks
from worldloom.models.tdmpc2.vector_order import FIRST, require_same_order
from worldloom.nn.normalizer import make_constant
from worldloom.nn.simnorm import simnorm
from worldloom.nn.twohot import symlog_twohot_mean
from worldloom.protocol import Obs
from worldloom.ranks import gather_rows
from worldloom.saving import SavableModel


class Networks(SavableModel):
    """Everything of `TDMPC2` that has weights.

    Functions take latents [..., L], actions [..., A] and tasks [B], or None for a single task.
    Their leading axes broadcast: [B, 1] fits the N samples of [B, N].
    """

    def __init__(
        self, obs_spaces: ObsSpaces, act_spaces: ActSpaces, options: Hyperparameters
    ) -> None:
        super().__init__()
        self.obs_spaces, self.act_spaces, self.options = obs_spaces, act_spaces, options
        self.is_discrete = any(space.classes for space in act_spaces.values())
        self.value_range = {"low": options.vmin, "high": options.vmax}
        self.discounts = options.discounts
        width, hidden = act_spaces.width, 2 * [options.mlp_dim]
        inputs = options.latent_dim + options.task_dim

        self.tasks = None
        if options.action_dims:
            self.tasks = Tasks(options.action_dims, options.task_dim, width)
        self.encoder = Encoder(obs_spaces, options)
        self.dynamics = MLP(inputs + width, hidden, options.latent_dim, normed=True)
        self.reward = MLP(inputs + width, hidden, options.num_bins, zero=True)
        self.termination = MLP(inputs, hidden, 1) if options.episodic else None
        self.actor: SquashedNormal | Categorical
        if self.is_discrete:
            self.actor = Categorical(inputs, options.mlp_dim, width)
        else:
            limits = (options.log_std_min, options.log_std_max)
            self.actor = SquashedNormal(inputs, options.mlp_dim, width, *limits)
        self.critic = Ensemble(options.num_q, inputs + width, hidden, options.num_bins)
        self.target_critic = copy.deepcopy(self.critic).requires_grad_(False)
        self.scale = RunningScale(options.tau)
        if options.episodic:
            # Whether terminations are predicted: always, or with "auto" once one has been seen.
            self.register_buffer("terminates", torch.tensor(options.episodic is True))
            self.terminates: Tensor
        # Last, and with its own random state, so that it changes no other initial value.
        with torch.random.fork_rng(devices=[]):
            sizes = (options.latent_dim, options.mlp_dim)
            self.decoder = Decoder(obs_spaces, *sizes) if options.decoder else None

    def require_same_inputs(self, config: Any, tensors: Mapping[str, Tensor], source: Path) -> None:
        """Raise ValueError if another model's first layer expects the same vectors permuted.

        config, tensors: of the other model, as saved. source: its path.
        """
        arguments = config.get("arguments") if isinstance(config, Mapping) else None
        require_same_order(self, arguments, tensors.get(FIRST), source)

    # World model ----

    def encode_steps(self, obs: dict[str, Tensor], task: Tensor | None) -> Tensor:
        """Encode observations [T, B, *shape] of tasks [B] in one pass, as latents [T, B, L]."""
        steps, rows = next(iter(obs.values())).shape[:2]
        embedding = None
        if task is not None and self.tasks is not None:
            embedding = self.tasks.embedding(task).repeat(steps, 1)
        flat = {key: value.flatten(0, 1) for key, value in obs.items()}
        return self.encoder(flat, embedding, steps).unflatten(0, (steps, rows))

    def encode_rows(self, obs: dict[str, Tensor], task: Tensor | None) -> Tensor:
        """Encode observations [B, *shape] of tasks [B] as latents [B, L]."""
        return self.encode_steps({key: value.unsqueeze(0) for key, value in obs.items()}, task)[0]

    def predict_latent(self, z: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        """Return the latents [..., L] that follow after actions."""
        return simnorm(self.dynamics(*self.join(z, task, action)), self.options.simnorm_dim)

    def predict_reward(self, z: Tensor, action: Tensor, task: Tensor | None) -> Tensor:
        """Return the rewards [...] of actions."""
        return symlog_twohot_mean(self.reward(*self.join(z, task, action)), **self.value_range)

    def predict_continue(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Return the probabilities [..., 1] that the episode continues after latents."""
        if self.termination is None:
            return z.new_ones(*z.shape[:-1], 1)
        prob = torch.sigmoid(self.termination(*self.join(z, task)))
        return 1 - prob * self.terminates.to(prob.dtype)

    def is_terminal(self, z: Tensor, task: Tensor | None) -> Tensor:
        """Return 1.0 where latents are terminal with a probability above a half, else 0.0."""
        assert self.termination is not None
        logits = self.termination(*self.join(z, task)).squeeze(-1)
        return ((logits > 0) & self.terminates).to(z.dtype)

    # Policy prior and values ----

    def sample_prior(self, z: Tensor, task: Tensor | None) -> PolicySample:
        """Sample actions [..., A] of the policy prior."""
        return self.actor.sample(*self.join(z, task), mask=self.get_mask(task))

    def estimate_values(
        self, z: Tensor, action: Tensor, task: Tensor | None, target: bool = False
    ) -> Tensor:
        """Return the values [2, ...] of actions by two Q-functions drawn at random.

        target: use the target Q-functions, as only losses do; all ranks use the same two.
        """
        critic = self.target_critic if target else self.critic
        logits = critic(*self.join(z, task, action), members=self._draw_heads(in_loss=target))
        return symlog_twohot_mean(logits, **self.value_range)

    def estimate_policy_value(self, z: Tensor, sample: PolicySample, task: Tensor | None) -> Tensor:
        """Return the values [..., B] of a policy sample: the mean of two Q-functions.

        Only the policy gets a gradient. For discrete actions this is the expectation over all
        actions.
        """
        action = sample.action
        if sample.probs is not None:
            # Each action at each latent: [A, ..., A], the first axis by class.
            width = sample.probs.shape[-1]
            classes = torch.eye(width, dtype=z.dtype, device=z.device)
            action = classes.view(width, *[1] * (z.ndim - 1), width)
        frozen = {name: p.detach() for name, p in self.critic.named_parameters()}
        kwargs = {"members": self._draw_heads(in_loss=True), "dropout": self.dropout}
        parts = self.join(z, task, action)
        logits = torch.func.functional_call(self.critic, frozen, parts, kwargs)
        q = symlog_twohot_mean(logits, **self.value_range).mean(0)
        return q if sample.probs is None else (sample.probs * q.movedim(0, -1)).sum(-1)

    @torch.no_grad()
    def compute_td_target(
        self, next_z: Tensor, rewards: Tensor, terminated: Tensor, task: Tensor | None
    ) -> Tensor:
        """Return rewards + discount * (1 - terminated) * the lower of two values, all [H, B]."""
        action = self.sample_prior(next_z, task).action
        value = self.estimate_values(next_z, action, task, target=True).amin(0)
        return rewards + self.get_discount(task) * (1 - terminated) * value

    @property
    def dropout(self) -> float:
        """Dropout probability of the Q-functions: 0 outside training."""
        return self.options.dropout if self.training else 0.0

    def _draw_heads(self, in_loss: bool) -> Tensor | None:
        """Draw two Q-functions; None if there are only two.

        in_loss: in training, use those that the first rank has drawn. Not in acting, for which
            ranks do not wait for each other.
        """
        heads = draws.draw_two_heads(self.critic.count, self.scale.value.device)
        if self.critic.count == 2:
            return None
        return gather_rows(heads)[:2] if in_loss and self.training else heads

    # Tasks ----

    def get_discount(self, task: Tensor | None) -> Tensor | float:
        """Return the discount, or with several tasks that of each [B]."""
        if task is None:
            return self.discounts[0]
        return make_constant(self.discounts, self.scale.value.dtype, task.device)[task]

    def get_mask(self, task: Tensor | None) -> Tensor | None:
        """Return the action masks [B, A] of tasks, or None if all actions are real."""
        return None if task is None or self.tasks is None else self.tasks.masks[task]

    def join(
        self, z: Tensor, task: Tensor | None, action: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """Return latents, task embeddings and actions: parts of a network's input [..., width]."""
        embedding = () if task is None or self.tasks is None else (self.tasks.embedding(task),)
        return join_rows((z, *embedding) if action is None else (z, *embedding, action))

    def split_task(
        self, obs: Obs, task: Tensor | int | None, lead: int
    ) -> tuple[dict[str, Tensor], Tensor | None]:
        """Separate the task from observations with `lead` batch axes.

        Returns:
            The encoder's observations by key, and the task ids [B] (None for a single task).
        """
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
        return spaces, self.tasks.read_ids(task, steps[0])
