"""The parts of TD-MPC2 on single steps and on sequences, against funcs.npz of each agent."""

from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import ROOT, Recording, agent_folders, tensor
from tests.reference.tdmpc2_format import FAMILY, Agent, drawing, task_of
from worldloom.models.tdmpc2 import TDMPC2
from worldloom.models.tdmpc2.planner import LatentMPPI
from worldloom.nn.twohot import symlog_twohot_mean
from worldloom.protocol import LatentState


def test_tdmpc2_folder_is_not_empty() -> None:
    """The other tests run over what they find, so finding nothing must not pass."""
    assert agent_folders(FAMILY), f"no agent (config.json and params.npz) in {ROOT / FAMILY}"


@pytest.mark.parametrize("folder", agent_folders(FAMILY))
def test_tdmpc2_derived_options(folder: str) -> None:
    agent = Agent(folder)
    model, config = agent.build("float64"), agent.config
    discounts = config["discount"] if config["multitask"] else [config["discount"]]
    assert model.planning["iterations"] == config["iterations_effective"]
    assert model.discounts == pytest.approx(discounts, rel=1e-12)
    low, high = model.value_range.values()
    width = (high - low) / (model.reward.layers[-1].out_features - 1)
    assert width == pytest.approx(config["bin_size"], rel=1e-12)


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("folder", agent_folders(FAMILY))
@torch.no_grad()
def test_tdmpc2_functions(folder: str, precision: str) -> None:
    agent, recording = Agent(folder), Recording(folder, "funcs.npz", precision)
    model = agent.build(precision)
    arrays = recording.group("in")
    task = task_of(arrays)
    x = {k: tensor(v, recording.dtype) for k, v in arrays.items()}
    with drawing(recording):
        state = model.encode(agent.observation(arrays["obs"], recording.dtype), task)
        ours: dict[str, Any] = {
            "encode/z": state.deterministic,
            "next/z": model.predict_latent(x["z"], x["action"], task),
            "discount": torch.tensor(
                model.discounts if task is not None else model.discounts[0], dtype=recording.dtype
            ),
            **parts(model, x["z"], x["action"], task, "one"),
            **parts(model, x["zs"], x["actions"], task, "seq"),
        }
        rewards, terminated = x["reward"].squeeze(-1), x["terminated"].squeeze(-1)
        ours["td_target"] = model.compute_td_target(x["zs"], rewards, terminated, task).unsqueeze(
            -1
        )
        ours["estimate_value"] = plan_values(
            model, x["value_z"], x["value_actions"], task_of(arrays, "value_task")
        )
    if model.tasks is not None:
        ours["task_emb_after"] = model.tasks.embedding.weight
        ours["action_masks"] = model.tasks.masks

    def kind(name: str) -> str:
        return "logprob" if name.endswith("/entropy") else "forward"

    recording.compare(ours, kind, at_least=33)


def parts(
    model: TDMPC2, z: Tensor, action: Tensor, task: Tensor | None, case: str
) -> dict[str, Tensor]:
    """Return what all heads say of z [..., L] and action [..., A]; draws as officially ordered."""
    joint = joined(model, z, task, action)
    logits = {"reward": model.reward(joint), "q": model.critic(joint)}
    logits["qtarget"] = model.target_critic(joint)
    value = {k: symlog_twohot_mean(v, **model.value_range) for k, v in logits.items()}
    ours = {f"{name}_{case}/logits": each for name, each in logits.items()}
    ours |= {
        f"{name}_{case}/{what}": each.unsqueeze(-1)
        for name, what, each in (
            ("reward", "value", model.predict_reward(z, action, task)),
            ("q", "values", value["q"]),
            ("qtarget", "values", value["qtarget"]),
            ("q", "min", model.estimate_values(z, action, task).amin(0)),
            ("q", "avg", model.estimate_values(z, action, task).mean(0)),
            ("qtarget", "min", model.estimate_values(z, action, task, target=True).amin(0)),
        )
    }
    choice = model.sample_prior(z, task)
    assert choice.log_std is not None
    ours |= {
        f"pi_{case}/action": choice.action,
        f"pi_{case}/mean": choice.mode,
        f"pi_{case}/log_std": choice.log_std,
        f"pi_{case}/entropy": choice.entropy.unsqueeze(-1),
        f"pi_{case}/scaled_entropy": choice.scaled_entropy.unsqueeze(-1),
    }
    if model.termination is not None:
        logit = model.termination(joined(model, z, task))
        assert model.is_terminal(z, task).equal((logit.squeeze(-1) > 0).to(z.dtype))
        ours[f"termination_{case}/logit"] = logit
        ours[f"termination_{case}/prob"] = 1 - model.predict_continue(z, task)
    return ours


def joined(model: TDMPC2, z: Tensor, task: Tensor | None, action: Tensor | None = None) -> Tensor:
    """Concatenate the parts of a network's input, [..., width]."""
    parts = model.join(z, task, action)
    return torch.cat([part.expand(*z.shape[:-1], -1) for part in parts], -1)


def plan_values(model: TDMPC2, z: Tensor, actions: Tensor, task: Tensor | None) -> Tensor:
    """Return the value [N, 1] of one plan [H, N, A] for each of N states."""
    planner: LatentMPPI = model.make_planner()
    extras = {} if task is None else {"task": task.expand(len(z))}
    return planner.compute_returns(
        LatentState(z, None, z, extras), actions.transpose(0, 1).unsqueeze(1)
    )
