"""Three updates of TD-MPC2 in the official order of its two halves, against update.npz."""

import copy
from collections.abc import Mapping
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from tests.reference.reference_format import (
    TOLERANCES,
    Recording,
    agent_folders,
    below,
    compare,
    deviation,
    norm,
)
from tests.reference.tdmpc2_format import (
    FAMILY,
    Agent,
    drawing,
    gradients,
    official_state,
    watching,
)
from worldloom.models.tdmpc2 import TDMPC2
from worldloom.models.tdmpc2.losses import Transitions
from worldloom.protocol import Batch
from worldloom.training.optimizers import Adam

# SimNorm does not see what is added to a whole channel, so its gradient is rounding noise, and
# Adam turns noise into a whole step.
NO_GRADIENT = "_encoder.rgb.8.bias"
LEFT_OUT = {f"step*/param/{NO_GRADIENT}": "a step of Adam by a gradient that is rounding noise"}


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("folder", agent_folders(FAMILY))
def test_tdmpc2_updates(folder: str, precision: str) -> None:
    agent, recording = Agent(folder), Recording(folder, "update.npz", precision)
    model = agent.build(precision).train()
    optimizers = adams(agent, model)
    ours: dict[str, Any] = {}
    with drawing(recording):
        for step, arrays in batches(recording).items():
            data = agent.transitions(arrays, recording.dtype)
            out = update(model, data, *optimizers)
            out |= {f"param/{name}": value for name, value in official_state(model).items()}
            ours |= {f"{step}/{k}": v for k, v in out.items() if k != f"param/{NO_GRADIENT}"}
    zero = {f"{step}/grad/{NO_GRADIENT}" for step in batches(recording)}
    recording.compare(ours, kind, zero.__contains__, LEFT_OUT, at_least=100)


def batches(recording: Recording) -> dict[str, dict[str, np.ndarray]]:
    """Return the inputs of each update, in their order."""
    inputs = recording.group("in")
    steps = sorted(
        {name.split("/")[0] for name in inputs}, key=lambda s: int(s.removeprefix("step"))
    )
    return {step: below(inputs, step) for step in steps}


def kind(name: str) -> str:
    step, name = name.split("/", 1)
    if name == "info/pi_entropy":
        return "logprob after a step"
    before = step == "step0" and not name.startswith(
        ("param/", "pigrad/", "pi_", "info/pi_", "scale")
    )
    if not before:
        return "state"  # the policy's half reads Q-functions that the model's half has moved
    return "gradient" if name.startswith(("grad/", "info/grad_norm")) else "forward"


def adams(agent: Agent, model: TDMPC2) -> tuple[Adam, Adam]:
    """Return the optimisers of the model and of the policy, made of the groups that users have."""
    options = {"lr": agent.config["lr"], "max_norm": agent.config["grad_clip_norm"]}
    groups = model.parameter_groups()
    assert {group["clip"] for group in groups} == {"model", "policy"}
    mine = [group for group in groups if group["clip"] == "model"]
    return Adam(mine, **options), Adam([g for g in groups if g["clip"] == "policy"], **options)


def update(
    model: TDMPC2, data: Transitions, model_adam: Adam, policy_adam: Adam
) -> dict[str, Tensor]:
    """Take one step with the model, then one with the policy; return all that is recorded.

    The policy's loss leaves a gradient on the embedding of the tasks. As officially it stays there,
    and the next update adds to it.
    """
    with watching(TDMPC2, "estimate_values", "estimate_policy_value") as calls:
        terms, stats, rollout = model.compute_model_losses(data)
        total = weighted(model, terms)
        total.backward()
        grads = gradients(model)
        model_adam.step()
        model_adam.zero_grad()
        policy_loss, policy_stats = model.compute_policy_loss(rollout.z.detach(), data)
    policy_loss.backward()
    policy_grads = {k: g for k, g in gradients(model).items() if k.startswith("_pi.")}
    policy_adam.step()
    policy_adam.zero_grad()
    model.after_update()

    info = {f"{name}_loss": term for name, term in terms.items()} | stats
    info |= {name.replace("policy", "pi"): value for name, value in policy_stats.items()}
    info |= {"total_loss": total, "pi_loss": policy_loss}
    info |= {"grad_norm": norm(grads), "pi_grad_norm": norm(policy_grads)}
    info.setdefault("termination_loss", torch.zeros(()))
    (_, td_q), (_, pi_q) = calls["estimate_values"][0], calls["estimate_policy_value"][0]
    return {
        **{f"info/{name}": value for name, value in info.items()},
        **{f"grad/{name}": value for name, value in grads.items()},
        **{f"pigrad/{name}": value for name, value in policy_grads.items()},
        "zs": rollout.z,
        "q_logits": rollout.q_logits,
        "td_q": td_q.amin(0).unsqueeze(-1),
        "td_target": rollout.target.unsqueeze(-1),
        "pi_q": pi_q.unsqueeze(-1),
        "scale": policy_stats["policy_scale"].reshape(1),
    }


def weighted(model: TDMPC2, terms: Mapping[str, Tensor]) -> Tensor:
    """Return the loss of all but the policy."""
    weights = model.options.loss_weights()
    return torch.stack([weights[name] * term for name, term in terms.items()]).sum()


@pytest.mark.filterwarnings("ignore:a batch contains terminations")
@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("folder", agent_folders(FAMILY))
def test_tdmpc2_compute_loss(folder: str, precision: str) -> None:
    """What users call has the recorded terms of the first update, and the gradients of both halves.

    Its policy term reads the Q-functions before their update, so that is compared with our own.
    """
    agent = Agent(folder)
    recording = first_update(Recording(folder, "update.npz", precision))
    arrays = recording.group("in/step0")
    model = agent.build(precision).train()
    with drawing(recording):
        out = model.compute_loss(as_batch(agent, arrays, recording.dtype))
    out["loss"].backward()
    joint = gradients(model)

    model = agent.build(precision).train()
    with drawing(recording):
        data = agent.transitions(arrays, recording.dtype)
        _, _, rollout = model.compute_model_losses(data)
        policy_loss, stats = model.compute_policy_loss(rollout.z.detach(), data)
    policy_loss.backward()
    policy = gradients(model)  # the model's losses were not differentiated
    compare_own({"policy_loss": policy_loss} | stats, out, "forward", precision)
    own = {name: grad for name, grad in policy.items() if name.startswith("_pi.")}
    compare_own(own, joint, "gradient", precision)
    assert own and set(policy) - set(own) <= {"_task_emb.weight"}

    ours: dict[str, Any] = {f"step0/info/{name}": value for name, value in out.items()}
    ours["step0/info/total_loss"] = out["loss"] - out["policy_loss"]
    ours.setdefault("step0/info/termination_loss", torch.zeros(()))
    mine = {k: g - policy.get(k, torch.zeros(())) for k, g in joint.items() if k not in own}
    ours |= {f"step0/grad/{name}": value for name, value in mine.items()}
    ours["step0/info/grad_norm"] = norm(mine)
    title = f"{folder}/update.npz by compute_loss {precision}"
    zero = f"step0/grad/{NO_GRADIENT}".__eq__
    compare(title, recording.outputs, ours, precision, kind, zero, at_least=30)


def first_update(recording: Recording) -> Recording:
    """Keep of a recording what the first update draws, and what its first half puts out."""
    steps = len(batches(recording))
    names = sorted(recording.group("draw"))
    assert len(names) % steps == 0
    later = {f"draw/{name}" for name in names[len(names) // steps :]}
    first = copy.copy(recording)
    first.arrays = {name: value for name, value in recording.arrays.items() if name not in later}
    first.outputs = {
        name: value
        for name, value in recording.outputs.items()
        if name.startswith(("step0/info/", "step0/grad/")) and "info/pi_" not in name
    }
    return first


def as_batch(agent: Agent, arrays: Mapping[str, np.ndarray], dtype: torch.dtype) -> Batch:
    """Turn a recorded batch into rows [B, T] as the replay samples them.

    The last row's action leads nowhere, the first row's reward came before.
    """
    data = agent.transitions(arrays, dtype)
    no = torch.zeros(data.rewards.shape[1], len(data.rewards) + 1, dtype=torch.bool)
    batch: Batch = {
        "obs": {key: value.transpose(0, 1) for key, value in data.obs.items()},
        "actions": F.pad(data.actions, (0, 0, 0, 0, 0, 1), value=0.5).transpose(0, 1),
        "rewards": F.pad(data.rewards, (0, 0, 1, 0), value=7.0).t(),
        "is_first": no,
        "is_last": no,  # the recorded rows go on after a termination
        "is_terminal": F.pad(data.terminated, (0, 0, 1, 0)).t().bool(),
    }
    return batch if data.task is None else {**batch, "task": data.task}


def compare_own(
    wanted: Mapping[str, Tensor], ours: Mapping[str, Tensor], row: str, precision: str
) -> None:
    """Assert that two ways of ours to the same numbers agree as well as the official ones must."""
    for name, value in wanted.items():
        error = deviation(ours[name], value.detach().cpu().numpy())
        assert error <= TOLERANCES[row][precision], f"{name} deviates by {error:.2e}"


# bfloat16 has 8 bits: a rounding is off by at most 2^-9 of a number. Terms of a loss are means over
# rows, in which roundings cancel; the policy's is a difference of entropy and value.
BF16_TERMS = {"consistency_loss": 0.02, "reward_loss": 0.005, "value_loss": 0.005}
BF16_TERMS |= {"termination_loss": 0.01, "policy_loss": 0.02, "loss": 0.01}


@pytest.mark.filterwarnings("ignore:a batch contains terminations")
@pytest.mark.parametrize("folder", agent_folders(FAMILY))
def test_tdmpc2_compute_loss_in_bfloat16(folder: str) -> None:
    """In bf16-mixed, terms and gradients are those of float32 but for roundings of products."""
    agent = Agent(folder)
    recording = first_update(Recording(folder, "update.npz", "float32"))
    arrays = recording.group("in/step0")
    found = []
    for mixed in (False, True):
        model = agent.build("float32").train()
        with drawing(recording), torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            out = model.compute_loss(as_batch(agent, arrays, recording.dtype))
        out["loss"].backward()
        grads = {name: p.grad for name, p in model.named_parameters() if p.requires_grad}
        found.append((out, grads))
    (exact, exact_grads), (out, grads) = found
    for name, tolerance in BF16_TERMS.items():
        if name in out:
            error = (out[name] - exact[name]).abs()
            assert error <= tolerance * exact[name].abs() + 1e-5, (name, out[name], exact[name])
    assert [k for k, g in grads.items() if g is None] == []
    for grad in grads.values():
        assert grad is not None and grad.dtype == torch.float32 and grad.isfinite().all()
    left, right = (
        torch.cat([g.flatten() for g in each.values() if g is not None]).double()
        for each in (exact_grads, grads)
    )
    assert F.cosine_similarity(left, right, 0) > 0.999
