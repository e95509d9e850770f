"""Planner of TD-MPC2: MPPI with the policy prior, the Q-functions and several tasks.

Hansen et al. 2024, section 3.2; the core is `worldloom.planning`. Axes: B states, N samples, P
proposals, K elites, H = horizon, A = width of an action, L = latent_dim.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldloom.errors import require
from worldloom.models.tdmpc2 import draws
from worldloom.nn import distributions
from worldloom.planning import MPPI, CategoricalPlan, GaussianPlan, Plan
from worldloom.protocol import LatentState

# Share of the uniform distribution in discrete exploration, as min_std for continuous actions.
EXPLORE_UNIFORM = 0.05


@dataclass(eq=False, kw_only=True)
class LatentMPPI(MPPI):
    """Plan with a `TDMPC2` model.

    The policy prior proposes some of the sequences, the Q-functions estimate the value beyond the
    horizon, and the action is sampled among the elites by weight, during evaluation too;
    exploration adds noise with the plan's std. One call plans for B states, which may belong to
    different tasks. A sequence with a value of NaN or infinity is not preferred (the official code
    counts such values as zero).

    num_pi_trajs: number of sequences that the policy prior proposes.
    discount, terminal_value: not used; the model has its own.
    """

    model: Any
    num_pi_trajs: int = 24

    def __post_init__(self) -> None:
        """Check the settings; see `SamplingPlanner`."""
        super().__post_init__()
        limit = f"from 0 to below num_samples = {self.num_samples}"
        proposed = self.num_pi_trajs
        require(0 <= proposed < self.num_samples, "num_pi_trajs", proposed, limit)

    def propose(self, state: LatentState) -> Tensor | None:
        """Return sequences [B, P, H, A] of the policy prior acting in imagination."""
        if not self.num_pi_trajs:
            return None
        batch, model = len(state), self.model
        z = state.deterministic.repeat_interleave(self.num_pi_trajs, 0)  # [B * P, L]
        task = _repeat(model.get_task(state), self.num_pi_trajs)
        actions = []
        for t in range(self.horizon):
            actions.append(model.sample_prior(z, task).action)
            if t + 1 < self.horizon:
                z = model.predict_latent(z, actions[-1], task)
        return torch.stack(actions, 1).unflatten(0, (batch, self.num_pi_trajs))

    def compute_returns(self, state: LatentState, actions: Tensor) -> Tensor:
        """Return the values [B, N] of sequences [B, N, H, A]: rewards, then Q-functions.

        After a state that is predicted to be terminal there are no rewards.
        """
        model, task = self.model, self.model.get_task(state)
        task_of_rows = _repeat(task, actions.shape[1])  # [B * N]
        task = None if task is None else task.unsqueeze(1)
        # z is [B, 1, L] for the first step, so that the networks multiply the shared latent once,
        # and [B, N, L] after it.
        z = state.deterministic.unsqueeze(1)
        discount = model.get_discount(task)
        total = z.new_zeros(actions.shape[:2])  # [B, N]
        weight, dead = torch.ones_like(total), torch.zeros_like(total)
        for action in actions.to(z.dtype).unbind(2):  # [B, N, A]
            total = total + weight * (1 - dead) * model.predict_reward(z, action, task)
            z = model.predict_latent(z, action, task)
            weight = weight * discount
            if model.termination is not None:
                dead = (dead + model.is_terminal(z, task)).clamp(max=1.0)
        # Beyond the horizon: the mean of two Q-functions for an action of the prior.
        z = z.flatten(0, 1)  # [B * N, L]
        action = model.sample_prior(z, task_of_rows).action
        value = model.estimate_values(z, action, task_of_rows).mean(0).view_as(total)
        total = total + weight * (1 - dead) * value
        return total.masked_fill(~total.isfinite(), -torch.inf)

    def select_action(
        self, plan: Plan, elites: Tensor, weights: Tensor, deterministic: bool
    ) -> Tensor:
        """Sample an elite by weight and return its first action [B, A], with exploration noise."""
        index = self.sample_elite(weights)
        action = elites[:, :, 0].take_along_dim(index[:, None, None], 1).squeeze(1)
        if deterministic:
            return action
        if isinstance(plan, GaussianPlan):
            noise = distributions.standard_normal(action)
            return (action + plan.std[:, 0] * noise).clamp(-1, 1)
        uniform = torch.full_like(plan.probs, 1 / plan.probs.shape[-1])
        return replace(plan, probs=plan.probs.lerp(uniform, EXPLORE_UNIFORM)).select_action(False)

    def sample_elite(self, weights: Tensor) -> Tensor:
        """Sample one of K elites by weight, [B, K] -> [B] (Gumbel-max trick)."""
        return (weights.log() - draws.draw_exponential(weights).log()).argmax(1)

    def _start(self, state: LatentState, plan: Tensor | None, is_first: Tensor | None) -> Plan:
        """Add the task's action mask to the plan."""
        start = super()._start(state, plan, is_first)
        mask = self.model.get_mask(self.model.get_task(state))  # [B, A], None for a single task
        if mask is None or isinstance(start, CategoricalPlan):
            return start
        return replace(start, mask=mask.unsqueeze(1))


def _repeat(task: Tensor | None, num: int) -> Tensor | None:
    """Repeat each task id of [B] `num` times; None stays None."""
    return None if task is None else task.repeat_interleave(num)
