"""Plans of each decision of an actor: the distribution that a planner arrives at, and its elites.

Letters used in shapes: H = horizon of the planner, A = width of an action, K elites.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from worldloom.acting import Actor
from worldloom.planning import GaussianPlan, Plan, SamplingPlanner

ELITES = 24  # best sequences that are kept of each decision


@dataclass
class PlannedStep:
    """The last iteration of a planner, for a single state.

    mean: [H, A] of the actions, or the probabilities of discrete actions.
    std: [H, A]; None for discrete actions.
    elites: [K, H, A], the best sequences first. weights: [K], which sum to one.
    returns: [K], as the model predicts them.
    """

    mean: np.ndarray
    std: np.ndarray | None
    elites: np.ndarray
    weights: np.ndarray
    returns: np.ndarray


@contextmanager
def watch_plans(actor: Actor) -> Iterator[list[PlannedStep]]:
    """Record a `PlannedStep` of each decision in a block; the decisions do not change.

    Covers the planner of the actor and that of a model with `make_planner` (TD-MPC2), if it is a
    `SamplingPlanner`. With anything else the list stays empty. One environment at a time.
    """
    found: list[PlannedStep] = []
    model: Any = actor.model
    make, planner = getattr(model, "make_planner", None), actor.planner
    undo: list[Callable[[], Any]] = []
    if isinstance(planner, SamplingPlanner):
        undo = _watch(planner, found)
    elif planner is None and callable(make):

        def make_watched() -> Any:
            planner = make()
            if isinstance(planner, SamplingPlanner):
                _watch(planner, found)
            return planner

        model.make_planner = make_watched
        undo = [lambda: vars(model).pop("make_planner")]
    try:
        yield found
    finally:
        for action in undo:
            action()


def _watch(planner: SamplingPlanner, found: list[PlannedStep]) -> list[Callable[[], Any]]:
    """Let a planner add to `found` whenever it selects an action; return what undoes that."""
    weigh, select = planner.compute_weights, planner.select_action
    last: list[Tensor] = []  # returns of the elites of the latest iteration

    def compute_weights(returns: Tensor) -> Tensor:
        last[:] = [returns]
        return weigh(returns)

    def select_action(plan: Plan, elites: Tensor, weights: Tensor, deterministic: bool) -> Tensor:
        best = weights[0].argsort(descending=True, stable=True)[:ELITES]
        kept = [_to_numpy(x[0][best]) for x in (elites, weights, last[0])]
        if isinstance(plan, GaussianPlan):
            found.append(PlannedStep(_to_numpy(plan.mean[0]), _to_numpy(plan.std[0]), *kept))
        else:
            found.append(PlannedStep(_to_numpy(plan.probs[0]), None, *kept))
        return select(plan, elites, weights, deterministic)

    planner.compute_weights = compute_weights  # type: ignore[method-assign]
    planner.select_action = select_action  # type: ignore[method-assign]
    names = ("compute_weights", "select_action")
    return [lambda name=name: vars(planner).pop(name) for name in names]  # type: ignore[misc]


def _to_numpy(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().numpy()
