"""TD-MPC2: an implicit world model, trained to predict its own latents, rewards and values.

Follows the official code (nicklashansen/tdmpc2, commit e9f5932) number for number; see
tests/reference. Paper: Hansen, Su, Wang, "TD-MPC2: Scalable, Robust World Models for Continuous
Control", ICLR 2024 (arXiv:2310.16828). Axes: B rows, T steps, H = T - 1 transitions, L the latent's
width, A that of an action, Q number of Q-functions. Inside the loss time comes first: [T, B, ...].
"""

import warnings
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.models.spaces import require_keys
from worldloom.models.tdmpc2.latent import LatentModel
from worldloom.models.tdmpc2.losses import (
    Transitions,
    discounted_mean,
    mean_over,
    termination_loss,
    termination_stats,
)
from worldloom.nn.twohot import symlog_twohot_loss
from worldloom.protocol import Batch, LatentState, Obs, Trajectory
from worldloom.timing import phase


@dataclass
class Rollout:
    """What the model predicts along a batch's actions, and what it should have predicted.

    z: [H + 1, B, L]; next_z: [H, B, L] encoded; q_logits: [Q, H, B, bins]; target: [H, B] values.
    """

    z: Tensor
    next_z: Tensor
    q_logits: Tensor
    target: Tensor


class TDMPC2(LatentModel):
    """World model, policy prior, Q-functions and planner; see `conf/model/tdmpc2_base.yaml`.

    One backward pass and one optimiser step train it all, where the official code first steps the
    model and then the policy: the policy's loss here reads the Q-functions before their update, not
    after it (experiments/tdmpc2_order compares the curves), and its gradient on the task embedding
    counts in the same step, not in the next. Batches may run on past the end of an episode; what
    lies beyond is masked.

    Discrete actions are not part of the paper. Here the prior is a categorical, and its loss is the
    exact expectation of the Q-functions over all choices, with the categorical's own entropy as the
    bonus (as in discrete soft actor-critic, Christodoulou 2019), for a one-hot sample has no
    gradient. The planner samples one-hot sequences from a categorical for each step, moves it to
    the weighted frequencies of the elites, and begins each call half way back to uniform; exploring
    draws from it with 5 % of uniform choices.

    Args:
        obs_shape: shape of one observation, or a dict of shapes; three axes (channels, 64, 64) make
            an image, fewer a vector. With several tasks "task" may be among the keys.
        action_dim: number of continuous actions, or of choices (the most that a task has).
        discrete: whether actions are choices (one-hot).
        Everything else is a hyperparameter; its meaning and its value stand in the YAML.

    Raises:
        ValueError: a shape that no encoder takes, several discrete actions at once, or tasks that
            do not fit the other arguments.
    """

    # Acting and imagining -------------------------------------------------------------------

    def encode(self, obs: Obs, task: Tensor | int | None = None) -> LatentState:
        """Start an episode: the latent of obs [B, *obs_shape], with no plan and no reward yet.

        task: ids [B] of a model for several tasks, unless obs has them under "task".
        """
        spaces, ids = self._split(obs, task, lead=1)
        z = self._encode(spaces, ids)
        state = LatentState(z, None, z, {"reward": z.new_zeros(len(z), 1)})
        if self.mpc:
            state.extras["plan"] = self.planner().blank(z)
        if ids is not None:
            state.extras["task"] = ids
        return state

    def predict(self, state: LatentState, action: Tensor) -> LatentState:
        """Predict the next state for action [B, A], and the reward for arriving there."""
        self.act_spaces.check(action, ("B",))
        z, task = state.deterministic, self.task_of(state)
        action = action.to(z.dtype)
        return self._arrive(state, self.next(z, action, task), self.reward_of(z, action, task))

    def observe(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        """Encode obs [B, *obs_shape] that action [B, A] led to; plan and task carry on."""
        self.act_spaces.check(action, ("B",))
        z, task = state.deterministic, self.task_of(state)
        spaces, ids = self._split(obs, task, lead=1)
        reward = self.reward_of(z, action.to(z.dtype), task)
        return self._arrive(state, self._encode(spaces, ids), reward)

    def decode(self, state: LatentState) -> dict[str, Any]:
        """Predict "reward" [B, 1] for arriving at the state and "continue" [B, 1].

        Also "obs" [B, *obs_shape] in its own units (images as float32 from 0 to 255), if the model
        was made with `decoder`. Without a termination head, or before it takes part, "continue" is
        one.
        """
        out: dict[str, Any] = {
            "reward": state.extras["reward"],
            "continue": self._continue(state.deterministic, self.task_of(state)),
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
        return Trajectory(states, rewards, self._continue(latents, self.task_of(initial_state)))

    @torch.no_grad()
    def policy(self, state: LatentState, deterministic: bool = False) -> tuple[Tensor, LatentState]:
        """Plan actions [B, A] for all B states at once (or ask the prior alone, without `mpc`).

        Returns the actions and the state with the plan in it, to be handed to `observe`: the next
        call starts from it. `deterministic` adds no noise to the action; as in the official code it
        is still drawn among the elites.
        """
        if not self.mpc:
            choice = self.prior(state.deterministic, self.task_of(state))
            return choice.mode if deterministic else choice.action, state
        plan = state.extras["plan"]
        action, plan = self.planner()(state, plan, deterministic=deterministic)
        return action, replace(state, extras={**state.extras, "plan": plan})

    @staticmethod
    def task_of(state: LatentState) -> Tensor | None:
        """Return the tasks [B] of a state, or None for a model with a single one."""
        return state.extras.get("task")

    # Training -------------------------------------------------------------------------------

    def compute_loss(self, batch: Batch) -> dict[str, Tensor]:
        """Return "loss" and every term and statistic by name, all scalars.

        The batch's rows are [B, T] with T - 1 transitions; a row is followed up to where its
        episode ends. A model for several tasks needs batch["task"] [B] (or "task" among its
        observations). Terms are unweighted; "loss" is their sum, weighted as officially. In
        training mode it moves the running scale of the Q-values, as the official code does.
        """
        data = self.transitions(batch)
        if self.termination is None:
            self._warn_of_terminations(data)
        elif self.training:
            self.terminates |= data.terminated.any()
        with phase("world_model"):
            terms, stats, rollout = self.model_terms(data)
        total = torch.stack([self.coefs[name] * term for name, term in terms.items()]).sum()
        z = rollout.z.detach()
        with phase("heads"):
            terms["policy"], more = self.policy_terms(z, data)
        total = total + terms["policy"]
        if self.decoder is not None:
            obs = {key: value.flatten(0, 1) for key, value in data.obs.items()}
            each = self.decoder.loss(z.flatten(0, 1), obs).unflatten(0, z.shape[:2])
            terms["reconstruction"] = mean_over(each, data.states_alive).mean()
            total = total + terms["reconstruction"]
        losses = {f"{name}_loss": term.detach() for name, term in terms.items()}
        return {"loss": total, **losses, **{k: v.detach() for k, v in (stats | more).items()}}

    def after_update(self) -> None:
        """Move the target Q-functions towards the Q-functions; call it after each step."""
        with torch.no_grad():
            slow: list[Tensor] = list(self.target_critic.parameters())
            fast: list[Tensor] = list(self.critic.parameters())
            torch._foreach_lerp_(slow, fast, self.tau)

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Return the parameters as the official optimisers divide them.

        "lr_scale" multiplies the learning rate; gradients of groups with the same "clip" are
        clipped together (`training.optimizers.Adam` reads both); "eps" is Adam's.
        """
        encoder, actor = list(self.encoder.parameters()), list(self.actor.parameters())
        decoder = [] if self.decoder is None else list(self.decoder.parameters())
        own = {id(p) for p in (*encoder, *actor, *decoder)}
        rest = [p for p in self.parameters() if p.requires_grad and id(p) not in own]
        groups: list[dict[str, Any]] = [
            {"params": encoder, "lr_scale": self.enc_lr_scale, "clip": "model"},
            {"params": rest, "clip": "model"},
            {"params": actor, "eps": 1e-5, "clip": "policy"},
        ]
        return groups + ([{"params": decoder, "clip": "decoder"}] if decoder else [])

    def save_pretrained(self, folder: str | Path) -> None:
        """Write model.safetensors and config.yaml; `create_world_model(folder)` reads them."""
        from worldloom.saving import save_model

        save_model(self, folder)

    def transitions(self, batch: Batch) -> Transitions:
        """Check a batch and put time first."""
        if "obs" not in batch:
            raise ValueError("the batch lacks 'obs'; compute_loss needs it")
        require_keys(batch)
        obs, task = self._split(batch["obs"], batch.get("task"), lead=2)
        return Transitions.from_batch(batch, obs, self.act_spaces, task, self.scale.value.dtype)

    def model_terms(
        self, data: Transitions
    ) -> tuple[dict[str, Tensor], dict[str, Tensor], Rollout]:
        """Return the unweighted losses of all but the policy (eq. 3), statistics and predictions.

        The values of terminated transitions are not bootstrapped; those of truncated ones are.
        """
        with torch.no_grad():
            next_z = self._encode_steps(data.obs, 1, data.task)
            target = self.td_target(next_z, data.rewards, data.terminated, data.task)
        latents = [self._encode_steps(data.obs, 0, data.task)]
        for action in data.actions:
            latents.append(self.next(latents[-1], action, data.task))
        z = torch.stack(latents)

        parts = self._parts(z[:-1], data.task, data.actions)
        q_logits = self.critic(*parts, dropout=self.dropout if self.training else 0.0)
        rewards = symlog_twohot_loss(self.reward(*parts), data.rewards, **self.value_range)
        targets = target.expand(q_logits.shape[:-1])
        values = symlog_twohot_loss(q_logits, targets, **self.value_range)
        errors = (z[1:] - next_z).square().mean(-1)
        terms = {
            name: discounted_mean(mean_over(each, data.alive), self.rho)
            for name, each in (
                ("consistency", errors),
                ("reward", rewards),
                ("value", values.mean(0)),
            )
        }
        stats: dict[str, Tensor] = {}
        if self.termination is not None:
            logits = self.termination(*self._parts(z[1:], data.task)).squeeze(-1)
            loss = termination_loss(logits, data.terminated, data.alive)
            terms["termination"] = loss * self.terminates.to(loss.dtype)
            last = (torch.sigmoid(logits[-1]), data.terminated[-1], data.alive[-1])
            stats = termination_stats(*last)
        return terms, stats, Rollout(z, next_z, q_logits, target)

    def policy_terms(self, z: Tensor, data: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Return the policy's loss (eq. 4) on latents z [H + 1, B, L], and statistics.

        No gradient reaches the Q-functions or the latents.
        """
        choice = self.prior(z, data.task)
        q = self.policy_value(z, choice, data.task)
        alive = data.states_alive
        if self.training:
            self.scale.update(q[0].masked_fill(alive[0] == 0, torch.nan))
        scale = self.scale.value.clone()  # the next batch moves it in place
        gain = self.entropy_coef * choice.scaled_entropy + q / scale
        loss = discounted_mean(mean_over(-gain, alive), self.rho)
        stats = {
            "policy_entropy": choice.entropy,
            "policy_scaled_entropy": choice.scaled_entropy,
        }
        means = {name: mean_over(value, alive).mean() for name, value in stats.items()}
        return loss, means | {"policy_scale": scale}

    # Small things ---------------------------------------------------------------------------

    def _warn_of_terminations(self, data: Transitions) -> None:
        # Asked on a CPU only: a GPU would have to be waited for.
        if data.alive.device.type == "cpu" and data.terminated.any():
            warnings.warn(
                "a batch holds terminations, but this model has no head to foresee them in "
                "planning; create it with episodic=True (values are right all the same)",
                stacklevel=3,
            )

    def _arrive(self, before: LatentState, z: Tensor, reward: Tensor) -> LatentState:
        return LatentState(z, None, z, {**before.extras, "reward": reward.unsqueeze(-1)})
