"""TD-MPC2: an implicit world model that predicts its own latents, rewards and values.

Equal to the official code (nicklashansen/tdmpc2, commit e9f5932) number for number; see
tests/reference. Paper: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous
Control", ICLR 2024 (arXiv:2310.16828). Axes: B rows, T steps, H = T - 1 transitions, L =
latent_dim, A = width of an action, Q number of Q-functions. In the losses time comes first:
[T, B, ...].
"""

import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldloom.models.extra_losses import ExtraLosses, name_extra, warn_unused
from worldloom.models.spaces import require_keys
from worldloom.models.tdmpc2.hyperparameters import (
    Hyperparameters,
    list_hyperparameters,
    read_act_spaces,
    read_obs_spaces,
)
from worldloom.models.tdmpc2.losses import (
    Transitions,
    discounted_mean,
    mean_over,
    termination_loss,
    termination_stats,
)
from worldloom.models.tdmpc2.networks import Networks
from worldloom.models.tdmpc2.planner import LatentMPPI
from worldloom.nn.casts import cast_once
from worldloom.nn.twohot import symlog_twohot_loss
from worldloom.protocol import Batch, LatentState, Obs, Trajectory
from worldloom.ranks import sum_counts, world_size
from worldloom.timing import phase

Losses = dict[str, Tensor]


@dataclass
class Rollout:
    """Predictions along a batch's actions, and the value targets.

    z: [H + 1, B, L] predicted latents; q_logits: [Q, H, B, bins]; target: [H, B] target values.
    """

    z: Tensor
    q_logits: Tensor
    target: Tensor


class TDMPC2(ExtraLosses, Networks):
    """World model, policy prior, Q-functions and planner; see `conf/model/tdmpc2_base.yaml`.

    One backward pass and one optimiser step train all parts. The official code first updates the
    model and then the policy, so here the policy loss uses the Q-functions before their update
    instead of after it (experiments/tdmpc2_order compares the curves), and its gradient on the task
    embeddings takes effect in the same update, not in the next one. Rows of a batch may continue
    beyond the end of an episode; the rest is masked.

    Discrete actions are not part of the paper. Their prior is a categorical, and the policy loss is
    the exact expectation of the Q-functions over all actions (a one-hot sample has no gradient),
    with the categorical's entropy as bonus, as in discrete soft actor-critic (Christodoulou 2019).
    The planner samples one-hot sequences from a categorical for each step, fits it to the weighted
    frequencies of the elites, and starts each call half-way between the last plan and uniform;
    exploration samples from it with 5 % of uniform actions.

    Args:
        obs_shape: shape of one observation, or a dict of shapes; three axes (channels, 64, 64) make
            an image, fewer a vector. With several tasks "task" may be one of the keys.
        action_dim: number of continuous actions (the largest of all tasks), or of classes.
        discrete: whether the action is discrete (one-hot).
        hyperparameters: all fields of `Hyperparameters`; the YAML explains them.

    feature_dim: width L of `state.features`, for layers of subclasses.

    Raises:
        ValueError: a shape that no encoder supports, several discrete actions at once, or
            hyperparameters out of range.
    """

    takes = ("vectors, 64x64 images, dicts of both", "continuous, discrete")

    @list_hyperparameters
    def __init__(
        self,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
        action_dim: int | Sequence[int] | Mapping[str, int],
        discrete: bool | Mapping[str, bool] = False,
        **hyperparameters: Any,
    ) -> None:
        options = Hyperparameters(**hyperparameters)
        act_spaces = read_act_spaces(action_dim, discrete, bool(options.action_dims))
        obs_spaces = read_obs_spaces(obs_shape, bool(options.action_dims))
        super().__init__(obs_spaces, act_spaces, options)
        self.obs_shape, self.action_dim, self.discrete = obs_shape, action_dim, discrete
        self.feature_dim = options.latent_dim
        self.planning = options.planner_settings(act_spaces.width)
        self.make_planner()  # raises for settings that cannot plan, before any training

    # Acting and imagining -------------------------------------------------------------------

    def encode(self, obs: Obs, task: Tensor | int | None = None) -> LatentState:
        """Start an episode: the latents of obs [B, *obs_shape], without a plan or a reward.

        task: ids [B] for a model of several tasks, unless obs contains them under "task".
        """
        spaces, ids = self.split_task(obs, task, lead=1)
        z = self.encode_rows(spaces, ids)
        state = LatentState(z, None, z, {"reward": z.new_zeros(len(z), 1)})
        if self.options.mpc:
            state.extras["plan"] = self.make_planner().make_blank_plan(z)
        if ids is not None:
            state.extras["task"] = ids
        return state

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Predict the next state for actions [B, A], and the reward for arriving there."""
        self.act_spaces.check(action, ("B",))
        z, task = state.deterministic, self.get_task(state)
        action = action.to(z.dtype)
        next_z = self.predict_latent(z, action, task)
        return _arrive(state, next_z, self.predict_reward(z, action, task))

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Encode obs [B, *obs_shape] reached by actions [B, A]; keep the plan and the task."""
        self.act_spaces.check(action, ("B",))
        z, task = state.deterministic, self.get_task(state)
        spaces, ids = self.split_task(obs, task, lead=1)
        reward = self.predict_reward(z, action.to(z.dtype), task)
        return _arrive(state, self.encode_rows(spaces, ids), reward)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Return "reward" [B, 1] for arriving at the state and "continue" [B, 1].

        With `decoder=True` also "obs" [B, *obs_shape] in the units of the observations (images as
        float32 from 0 to 255). Without a termination head, or before it has seen a termination with
        episodic="auto", "continue" is one.
        """
        out: dict[str, Any] = {
            "reward": state.extras["reward"],
            "continue": self.predict_continue(state.deterministic, self.get_task(state)),
        }
        if self.decoder is not None:
            out["obs"] = self.obs_spaces.join(self.decoder(state.deterministic))
        return out

    def imagine(self, initial_state: LatentState, actions: Tensor) -> Trajectory:
        """Roll out actions [T, B, A]."""
        self.act_spaces.check(actions, ("T", "B"))
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        rewards = torch.stack([state.extras["reward"] for state in states[1:]])
        latents = torch.stack([state.deterministic for state in states[1:]])
        continues = self.predict_continue(latents, self.get_task(initial_state))
        return Trajectory(states, rewards, continues)

    @property
    def plans_in_bfloat16(self) -> bool:
        """Whether acting is faster in mixed bfloat16 on a CPU; see `acting.Actor`."""
        return self.options.mpc

    @torch.no_grad()
    @cast_once()
    def policy(self, state: LatentState, deterministic: bool = False) -> tuple[Tensor, LatentState]:
        """Plan actions [B, A] for all B states at once; with mpc=False sample the policy prior.

        Returns the actions and the state with the plan, which the next call starts from; pass this
        state to `observe`. `deterministic` adds no exploration noise; as in the official code the
        action is still sampled among the elites.
        """
        if not self.options.mpc:
            sample = self.sample_prior(state.deterministic, self.get_task(state))
            return sample.mode if deterministic else sample.action, state
        plan = state.extras["plan"]
        action, plan = self.make_planner()(state, plan, deterministic=deterministic)
        return action, replace(state, extras={**state.extras, "plan": plan})

    def use_prior(self) -> None:
        """Choose actions with the policy prior from now on, instead of planning."""
        self.options = replace(self.options, mpc=False)

    def value(self, state: LatentState) -> Tensor:
        """Return the discounted return of the policy prior after a state, [B, 1].

        It is the mean of two Q-functions, for a sampled action.
        """
        z, task = state.deterministic, self.get_task(state)
        return self.estimate_policy_value(z, self.sample_prior(z, task), task).unsqueeze(-1)

    def discount(self, state: LatentState) -> Tensor | float:
        """Return the discount of `value`; with several tasks that of each state, [B, 1]."""
        discount = self.get_discount(self.get_task(state))
        return discount.unsqueeze(-1) if isinstance(discount, Tensor) else discount

    def latent_probs(self, state: LatentState, action: Tensor, obs: Obs) -> tuple[Tensor, Tensor]:
        """Return the groups [B, S, C] of the predicted and of the encoded latents.

        SimNorm makes each group of C = simnorm_dim latents a probability distribution.
        """
        states = self.predict(state, action), self.observe(state, action, obs)
        predicted, encoded = (
            s.deterministic.unflatten(-1, (-1, self.options.simnorm_dim)) for s in states
        )
        return predicted, encoded

    def make_planner(self) -> LatentMPPI:
        """Return a planner; it has no memory, because plans are part of the states."""
        actions: dict[str, Any] = {
            "action_dim": self.act_spaces.width,
            "discrete": self.is_discrete,
        }
        return LatentMPPI(model=self, **actions, **self.planning)

    @staticmethod
    def get_task(state: LatentState) -> Tensor | None:
        """Return the task ids [B] of a state, or None for a model of a single task."""
        return state.extras.get("task")

    # Training -------------------------------------------------------------------------------

    @cast_once()
    def compute_loss(self, batch: Batch) -> Losses:
        """Return "loss" and every term and statistic by name, all scalars.

        The batch has rows [B, T] with T - 1 transitions, which count up to the end of their
        episode. A model of several tasks needs the ids `batch["task"]`, [B] (or "task" among its
        observations). Terms are unweighted; "loss" is their sum with the official weights. In
        training mode the running scale of the Q-values is updated, as in the official code.

        Extra terms, from `auxiliary_losses` (with the predicted latents as features) or from an
        overridden `compute_model_losses`, are weighted by `loss_scales[NAME]` (default 1) and
        returned as "NAME_loss".
        """
        # Each rank reads other embeddings, in acting as well.
        if self.training and self.tasks is not None and world_size() > 1:
            self.tasks.rescale()
        # Time first; rows beyond the end of an episode are marked.
        data = self.read_transitions(batch)
        if self.termination is None:
            _warn_of_terminations(data)
        elif self.training:
            self.terminates |= sum_counts(data.terminated.sum()) > 0
        # World model and Q-functions (eq. 3).
        with phase("world_model"):
            terms, stats, rollout = self.compute_model_losses(data)
        weights = self.options.loss_weights()
        extra = {name: term for name, term in terms.items() if name not in weights}
        terms = {name: term for name, term in terms.items() if name in weights}
        total = torch.stack([weights[name] * term for name, term in terms.items()]).sum()
        # Policy prior on the predicted latents (eq. 4).
        z = rollout.z.detach()  # [H + 1, B, L]
        with phase("heads"):
            terms["policy"], more = self.compute_policy_loss(z, data)
        total = total + terms["policy"]
        # Decoder, if there is one.
        if self.decoder is not None:
            obs = {key: value.flatten(0, 1) for key, value in data.obs.items()}
            each = self.decoder.compute_loss(z.flatten(0, 1), obs).unflatten(0, z.shape[:2])
            terms["reconstruction"] = mean_over(each, data.states_alive, data.counts).mean()
            total = total + terms["reconstruction"]
        losses = {f"{name}_loss": term.detach() for name, term in terms.items()}
        # Terms that a subclass adds.
        if self.has_auxiliary_losses:
            with phase("auxiliary"):
                extra |= self.compute_auxiliary(batch, rollout.z.transpose(0, 1), terms | extra)
        if extra or self.options.extra_scales:
            extra, scales = {k: v.mean() for k, v in extra.items()}, self.options.extra_scales
            warn_unused(scales, extra)
            total = total + sum(scales.get(name, 1.0) * term for name, term in extra.items())
            losses |= name_extra(losses, extra)
        return {"loss": total, **losses, **{k: v.detach() for k, v in (stats | more).items()}}

    def read_transitions(self, batch: Batch) -> Transitions:
        """Check a batch and return its transitions, time first.

        Raises:
            ValueError: a key is missing or an array has another shape.
        """
        if "obs" not in batch:
            raise ValueError("the batch lacks 'obs'; compute_loss needs it")
        require_keys(batch)
        obs, task = self.split_task(batch["obs"], batch.get("task"), lead=2)
        dtype = self.scale.value.dtype
        return Transitions.from_batch(batch, obs, self.act_spaces, task, dtype, self.training)

    def compute_model_losses(self, data: Transitions) -> tuple[Losses, Losses, Rollout]:
        """Return the unweighted losses of all but the policy (eq. 3), statistics and predictions.

        The values of terminated transitions are not bootstrapped; those of truncated ones are.
        """
        # Targets: the encodings of the observed next states, and their bootstrapped values.
        with torch.no_grad():
            next_z = self.encode_steps({k: v[1:] for k, v in data.obs.items()}, data.task)
            target = self.compute_td_target(next_z, data.rewards, data.terminated, data.task)
        # Roll out the actions from the first observation.
        latents = [self.encode_rows({k: v[0] for k, v in data.obs.items()}, data.task)]
        for action in data.actions:
            latents.append(self.predict_latent(latents[-1], action, data.task))
        z = torch.stack(latents)  # [H + 1, B, L]
        # Errors of latents, rewards and values, [H, B] each.
        parts = self.join(z[:-1], data.task, data.actions)
        q_logits = self.critic(*parts, dropout=self.dropout)  # [Q, H, B, bins]
        rewards = symlog_twohot_loss(self.reward(*parts), data.rewards, **self.value_range)
        targets = target.expand(q_logits.shape[:-1])
        values = symlog_twohot_loss(q_logits, targets, **self.value_range).mean(0)
        errors = {
            "consistency": (z[1:] - next_z).square().mean(-1),
            "reward": rewards,
            "value": values,
        }
        count = data.counts[1:]
        terms = {
            name: discounted_mean(mean_over(error, data.alive, count), self.options.rho)
            for name, error in errors.items()
        }
        # Terminations.
        stats: Losses = {}
        if self.termination is not None:
            logits = self.termination(*self.join(z[1:], data.task)).squeeze(-1)  # [H, B]
            loss = termination_loss(logits, data.terminated, data.alive, count)
            terms["termination"] = loss * self.terminates.to(loss.dtype)
            last = (torch.sigmoid(logits[-1]), data.terminated[-1], data.alive[-1])
            stats = termination_stats(*last)
        return terms, stats, Rollout(z, q_logits, target)

    def compute_policy_loss(self, z: Tensor, data: Transitions) -> tuple[Tensor, Losses]:
        """Return the policy loss (eq. 4) on latents z [H + 1, B, L], and statistics.

        The Q-functions and the latents get no gradient.
        """
        sample = self.sample_prior(z, data.task)
        q = self.estimate_policy_value(z, sample, data.task)  # [H + 1, B]
        alive = data.states_alive
        # The scale of the Q-values is estimated from the first states.
        if self.training:
            self.scale.update(q[0].masked_fill(alive[0] == 0, torch.nan))
        scale = self.scale.value.clone()  # the next update changes the buffer in place
        gain = self.options.entropy_coef * sample.scaled_entropy + q / scale
        loss = discounted_mean(mean_over(-gain, alive, data.counts), self.options.rho)
        stats = {
            "policy_entropy": sample.entropy,
            "policy_scaled_entropy": sample.scaled_entropy,
        }
        means = {name: mean_over(value, alive, data.counts).mean() for name, value in stats.items()}
        return loss, means | {"policy_scale": scale}

    def after_update(self) -> None:
        """Move the target Q-functions towards the Q-functions; called after each update."""
        with torch.no_grad():
            slow: list[Tensor] = list(self.target_critic.parameters())
            fast: list[Tensor] = list(self.critic.parameters())
            torch._foreach_lerp_(slow, fast, self.options.tau)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters grouped as in the official optimisers.

        "lr_scale" multiplies the learning rate; gradients of groups with the same "clip" are
        clipped together (`training.optimizers.Adam` reads both); "eps" is Adam's.
        """
        encoder, actor = list(self.encoder.parameters()), list(self.actor.parameters())
        decoder = [] if self.decoder is None else list(self.decoder.parameters())
        grouped = {id(p) for p in (*encoder, *actor, *decoder)}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in grouped]
        groups: list[dict[str, Any]] = [
            {"params": encoder, "lr_scale": self.options.enc_lr_scale, "clip": "model"},
            {"params": rest, "clip": "model"},
            {"params": actor, "eps": 1e-5, "clip": "policy"},
        ]
        return groups + ([{"params": decoder, "clip": "decoder"}] if decoder else [])


def _arrive(before: LatentState, z: Tensor, reward: Tensor) -> LatentState:
    """Return the state with latents [B, L] and the reward [B] for arriving there."""
    return LatentState(z, None, z, {**before.extras, "reward": reward.unsqueeze(-1)})


def _warn_of_terminations(data: Transitions) -> None:
    """Warn that a batch contains terminations, on a CPU only: a GPU would have to synchronise."""
    if data.alive.device.type == "cpu" and data.terminated.any():
        warnings.warn(
            "a batch contains terminations, but this model has no head to predict them in "
            "planning; create it with episodic=True (value targets are correct in any case)",
            stacklevel=4,
        )
