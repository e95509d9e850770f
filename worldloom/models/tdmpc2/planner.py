"""The planner of TD-MPC2: MPPI that knows the policy prior, the value function and the tasks.

Hansen et al. 2024, section 3.2. It shares the core of `worldloom.planning`. Axes as there: B
states, N samples, K elites, H = horizon, A = width of an action.
"""

from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from worldloom.models.tdmpc2 import draws
from worldloom.nn import distributions
from worldloom.planning import MPPI, CategoricalPlan, GaussianPlan
from worldloom.protocol import LatentState

# Share of uniform choices among explored discrete actions: what min_std is to continuous ones.
EXPLORE_UNIFORM = 0.05


@dataclass(eq=False, kw_only=True)
class LatentMPPI(MPPI):
    """Plan with a `TDMPC2` model.

    The policy prior proposes some of the sequences, the Q-functions say what lies beyond the
    horizon, and the action is drawn among the elites by their weight, in evaluation too; exploring
    adds the plan's own spread to it. One call plans for B states, each of which may be of another
    task. Where the model gives a value that is not finite, the sequence is not preferred (the
    official code takes such a value for zero).

    num_pi_trajs: sequences that the policy prior proposes.
    discount, terminal_value: not used; the model knows its own.
    """

    model: Any
    num_pi_trajs: int = 24

    def __post_init__(self) -> None:
        """Refuse settings that cannot plan."""
        super().__post_init__()
        if not 0 <= self.num_pi_trajs < self.num_samples:
            raise ValueError(
                f"num_pi_trajs is {self.num_pi_trajs}; expected from 0 to below num_samples = "
                f"{self.num_samples}"
            )

    def proposals(self, state: LatentState) -> Tensor | None:
        """Let the policy prior act in imagination, [B, P, H, A]."""
        if not self.num_pi_trajs:
            return None
        batch, model = len(state), self.model
        z = state.deterministic.repeat_interleave(self.num_pi_trajs, 0)
        task = _repeated(model.task_of(state), self.num_pi_trajs)
        actions = []
        for t in range(self.horizon):
            actions.append(model.prior(z, task).action)
            if t + 1 < self.horizon:
                z = model.next(z, actions[-1], task)
        return torch.stack(actions, 1).unflatten(0, (batch, self.num_pi_trajs))

    def returns(self, state: LatentState, actions: Tensor) -> Tensor:
        """Return the value [B, N] of action sequences [B, N, H, A]: rewards, then Q-functions.

        A state that is predicted to be terminal earns nothing after the step that led to it.
        """
        model, task = self.model, self.model.task_of(state)
        every = _repeated(task, actions.shape[1])  # [B * N]
        task = None if task is None else task.unsqueeze(1)
        # All samples share their first latent, and what the networks first make of it.
        z = state.deterministic.unsqueeze(1)  # [B, 1, L], and [B, N, L] after the first step
        discount = model.discount_of(task)
        total = z.new_zeros(actions.shape[:2])
        weight, dead = torch.ones_like(total), torch.zeros_like(total)
        for action in actions.to(z.dtype).unbind(2):
            total = total + weight * (1 - dead) * model.reward_of(z, action, task)
            z = model.next(z, action, task)
            weight = weight * discount
            if model.termination is not None:
                dead = (dead + model.is_terminal(z, task)).clamp(max=1.0)
        z = z.flatten(0, 1)
        value = model.value(z, model.prior(z, every).action, every).mean(0).view_as(total)
        total = total + weight * (1 - dead) * value
        return total.masked_fill(~total.isfinite(), -torch.inf)

    def first_action(
        self,
        plan: GaussianPlan | CategoricalPlan,
        elites: Tensor,
        weights: Tensor,
        deterministic: bool,
    ) -> Tensor:
        """Draw an elite by its weight and take its first action, [B, A]; explore around it."""
        choice = self.pick(weights)
        action = elites[:, :, 0].take_along_dim(choice[:, None, None], 1).squeeze(1)
        if deterministic:
            return action
        if isinstance(plan, GaussianPlan):
            noise = distributions.standard_normal(action)
            return (action + plan.std[:, 0] * noise).clamp(-1, 1)
        uniform = torch.full_like(plan.probs, 1 / plan.probs.shape[-1])
        return replace(plan, probs=plan.probs.lerp(uniform, EXPLORE_UNIFORM)).first_action(False)

    def pick(self, weights: Tensor) -> Tensor:
        """Draw one of K elites by weight, [B, K] -> [B] (by the Gumbel-max trick)."""
        return (weights.log() - draws.exponential(weights).log()).argmax(1)

    def _start(
        self, state: LatentState, plan: Tensor | None, is_first: Tensor | None
    ) -> GaussianPlan | CategoricalPlan:
        start = super()._start(state, plan, is_first)
        mask = self.model.mask_of(self.model.task_of(state))  # [B, A], or None for a single task
        if mask is None or isinstance(start, CategoricalPlan):
            return start
        return replace(start, mask=mask.unsqueeze(1))


def _repeated(task: Tensor | None, num: int) -> Tensor | None:
    """Return tasks [B], if there are several, with each row so many times."""
    return None if task is None else task.repeat_interleave(num)
