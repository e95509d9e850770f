"""TD-MPC2 in the official order: step the model, then the policy on the Q-functions just stepped.

Run from this folder, so that the class is found:
    python -m worldloom.run experiment=tdmpc2_pendulum model._target_=two_step.TwoStep seed=0
"""

from typing import Any

import torch
from torch import Tensor

from worldloom.models.tdmpc2 import TDMPC2
from worldloom.models.tdmpc2.losses import Transitions


class TwoStep(TDMPC2):
    """The policy has an optimiser of its own, which steps after that of the model."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        group = super().parameter_groups()[2]
        self._actor_optimizer = torch.optim.Adam(group["params"], lr=3e-4, eps=group["eps"])
        self._pending: tuple[Tensor, Transitions] | None = None

    def parameter_groups(self) -> list[dict[str, Any]]:
        """Leave the policy out of the common optimiser."""
        return [group for group in super().parameter_groups() if group.get("clip") != "policy"]

    def compute_policy_loss(self, z: Tensor, data: Transitions) -> tuple[Tensor, dict[str, Tensor]]:
        """Wait until the model has stepped."""
        self._pending = (z, data)
        return z.new_zeros(()), {}

    def after_update(self) -> None:
        """Step the policy, then move the targets."""
        assert self._pending is not None
        loss, _ = super().compute_policy_loss(*self._pending)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.actor.parameters(), 20.0)
        self._actor_optimizer.step()
        self._actor_optimizer.zero_grad()
        super().after_update()
