"""Planned actions and every iteration that led to them, against plan.npz of each agent."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import (
    Recording,
    agent_folders,
    array,
)
from tests.reference.tdmpc2_format import FAMILY, Agent, drawing, task_of, watching
from worldloom.models.tdmpc2 import TDMPC2
from worldloom.models.tdmpc2.planner import LatentMPPI

# The three recorded calls: which observation, whether an episode begins, whether it is evaluation.
CALLS = [(0, False, False), (1, False, True), (0, True, False)]


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("folder", agent_folders(FAMILY))
def test_tdmpc2_planning(folder: str, precision: str) -> None:
    agent, recording = Agent(folder), Recording(folder, "plan.npz", precision)
    model = agent.build(precision)
    arrays = recording.group("in")
    plan = array(arrays["prev_mean"]).to(recording.dtype).unsqueeze(0)
    ours: dict[str, Any] = {}
    with drawing(recording) as feed:
        for n, (index, is_first, evaluate) in enumerate(CALLS):
            ours[f"call{n}/first_draw"] = feed.position
            obs = agent.observation(arrays["obs"][index], recording.dtype)
            task = task_of({k: v[index : index + 1] for k, v in arrays.items()})
            out, plan = planned(model, obs, task, None if is_first else plan, evaluate)
            ours |= {f"call{n}/{name}": value for name, value in out.items()}
    recording.compare(ours, kind, at_least=24)


def kind(name: str) -> str:
    return "forward" if name.endswith(("/choice", "/first_draw")) else "planning"


def planned(
    model: TDMPC2,
    obs: dict[str, Tensor],
    task: Tensor | None,
    plan: Tensor | None,
    evaluate: bool,
) -> tuple[dict[str, Tensor], Tensor]:
    """Act once, from a plan or afresh; return what went on and the new plan [1, H, A]."""
    state = model.encode(obs, task)
    if plan is not None:
        state.extras["plan"] = plan
    with watching(LatentMPPI, "compute_returns", "compute_weights", "sample_elite") as calls:
        action, state = model.policy(state, deterministic=evaluate)
    candidates = [args[1][0].transpose(0, 1) for args, _ in calls["compute_returns"]]
    return {
        "action": action[0],
        "prev_mean": state.extras["plan"][0],
        "values": torch.stack([values[0].unsqueeze(-1) for _, values in calls["compute_returns"]]),
        "actions_first": candidates[0],
        "actions_last": candidates[-1],
        "score": calls["compute_weights"][-1][1][0],
        "choice": calls["sample_elite"][0][1][0],
    }, state.extras["plan"]
