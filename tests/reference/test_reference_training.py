"""Whole training steps with replay context, optimiser and slow critic, against train.npz."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.dreamerv3_format import (
    Agent,
    gradients,
    metrics,
    official_params,
    official_state,
    sampling,
)
from tests.reference.reference_format import (
    ROOT,
    Noise,
    Recording,
    agent_folders,
    compare,
    norm,
    tensor,
)
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.dreamerv3.official import read_arrays, to_official
from worldloom.protocol import Batch, split_result
from worldloom.training.optimizers import LaProp


@pytest.mark.parametrize("precision", ["float64", "float32"])
@pytest.mark.parametrize("folder", agent_folders("dreamerv3"))
def test_reference_training(folder: str, precision: str) -> None:
    agent, recording = Agent(folder), Recording(folder, "train.npz", precision)
    context = agent.config["replay_context_of_train_npz"]
    options = agent.config["opt_of_train_npz"]
    model = agent.build(precision, replay_context=bool(context)).train()
    optimizer = laprop(model, options)
    chunk = replay_chunk(agent, recording, context)

    ours: dict[str, Any] = {}
    grads: list[dict[str, Tensor]] = []
    with sampling(recording.group("noise")):
        for n in range(agent.config["train_steps"]):
            out, replay = train_step(agent, model, optimizer, chunk)
            grads.append(gradients(model))
            latents = {"deter": replay["deter"], "stoch": agent.grouped(replay["stoch"])}
            ours |= {f"step{n}/metrics/{name}": value for name, value in out.items()}
            ours |= {f"step{n}/replay/dyn/{name}": value for name, value in latents.items()}
    ours |= {f"final/carry/{name}": value[:, -1] for name, value in latents.items()}
    last = agent.split_action(chunk["actions"][:, -1])
    ours |= {f"final/carry/prevact/{key}": value for key, value in last.items()}
    state = final_state(model, optimizer)
    ours |= {f"final/state/{name}": value for name, value in state.items()}
    noise = undetermined(folder, grads, options["lr"]) if precision == "float32" else {}
    recording.compare(ours, lambda name: kind(name, options), at_least=200, noise=noise)

    checkpoint = ROOT / folder / "official_ckpt"
    if checkpoint.is_dir() and precision == "float32":
        # What the official code wrote after the same steps, with all moments.
        arrays = {f"final/state/{k}": v for k, v in read_arrays(checkpoint).items()}
        title = f"{folder}/official_ckpt {precision}"
        compare(title, arrays, ours, precision, lambda name: kind(name, options), at_least=200)


def undetermined(folder: str, grads: list[dict[str, Tensor]], lr: float) -> dict[str, Noise]:
    """Find weights with a gradient below the official code's own rounding noise at some step."""
    floors = Recording(folder, "loss_noise.npz", "float32")
    noise = {}
    for name in grads[0]:
        steps = torch.stack([step[name] for step in grads]).abs().flatten(1)
        floor = floors.noise_floor(f"grad/{name}") * steps.amax(1, keepdim=True)
        below = (steps <= floor).any(0).view(grads[0][name].shape)
        noise[f"final/state/{name}"] = Noise(below.cpu().numpy(), limit=lr)
    return noise


def kind(name: str, options: Mapping[str, Any]) -> str:
    if name.endswith("metrics/ret_rate"):
        return "float32 mean"
    if name.startswith("final/state/opt/"):
        return "moment"
    if name.startswith("step0/"):  # before the first update
        if "opt/grad" in name:
            return "gradient"
        if "opt/update" not in name and (options["warmup"] or "opt/param" not in name):
            return "forward"
    return "state"


def laprop(model: DreamerV3, options: Mapping[str, Any]) -> LaProp:
    """Build the optimiser from the official options; "momentum" is never read there."""
    if options["schedule"] != "const":
        pytest.skip(f"LaProp has no schedule {options['schedule']!r}, only a warm-up")
    known = {"agc", "anneal", "beta1", "beta2", "eps", "lr", "momentum", "schedule", "warmup", "wd"}
    assert set(options) == known, f"unknown options of the optimiser: {set(options) ^ known}"
    return LaProp(
        [p for p in model.parameters() if p.requires_grad],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        agc=options["agc"],
        warmup=options["warmup"],
        weight_decay=options["wd"],
    )


def replay_chunk(agent: Agent, recording: Recording, context: int) -> Batch:
    """Return the recorded chunk as the replay samples it: one row of context, then the rest."""
    arrays = recording.group("in")
    dtype = recording.dtype
    skip = max(0, context - 1)  # of several rows of context only the last one counts
    if not context or (arrays["consec"][:, 0] != 0).any():
        pytest.skip(f"{recording.folder}: the chunk goes on from the running carry of the last one")
    flags = ("is_first", "is_last", "is_terminal")
    return {
        "obs": {k: v[:, skip:] for k, v in agent.observation(arrays, dtype).items()},
        "actions": agent.action(arrays, dtype)[:, skip:],
        "rewards": tensor(arrays["reward"], dtype)[:, skip:],
        **{k: tensor(arrays[k], dtype)[:, skip:] for k in flags},  # type: ignore[typeddict-item]
        "context": {
            "deter": tensor(arrays["dyn/deter"], dtype)[:, skip],
            "stoch": agent.flat(arrays["dyn/stoch"], dtype)[:, skip],
        },
    }


def train_step(
    agent: Agent, model: DreamerV3, optimizer: LaProp, batch: Batch
) -> tuple[dict[str, Tensor | float], dict[str, Tensor]]:
    """Train once; return what the official agent reports, and the new latents."""
    optimizer.zero_grad()
    before = {name: p.detach().clone() for name, p in official_params(model).items()}
    out, replay = split_result(model.compute_loss(batch))
    out["loss"].backward()
    grads = gradients(model)
    optimizer.step()
    model.after_update()
    params = official_params(model)
    updates = {name: p.detach() - before[name] for name, p in params.items()}
    reported = {
        **metrics(agent, out),
        "opt/loss": out["loss"],
        "opt/updates": float(optimizer.state[next(iter(params.values()))]["step"]),
        "opt/grad_norm": norm(grads),
        "opt/grad_rms": root_mean_square(grads),
        "opt/update_rms": root_mean_square(updates),
        "opt/param_rms": root_mean_square(params),
        "opt/param_count": float(sum(p.numel() for p in params.values())),
    }
    return reported, replay


def root_mean_square(tensors: Mapping[str, Tensor]) -> Tensor:
    return norm(tensors) / sum(t.numel() for t in tensors.values()) ** 0.5


def final_state(model: DreamerV3, optimizer: LaProp) -> dict[str, Tensor]:
    """Return weights, running statistics and the optimiser's state by official name."""
    state = dict(official_state(model))
    for name, p in official_params(model).items():
        mine = optimizer.state[p]
        state[f"opt/state/1/1/{name}"] = to_official(mine["exp_avg_sq"])
        state[f"opt/state/2/1/{name}"] = to_official(mine["exp_avg"])
        # One counter of ours stands for theirs; weight decay shifts the last one.
        for counter in ("state/1/0", "state/2/0", "state/3/count", "state/4/count", "step/value"):
            state[f"opt/{counter}"] = mine["step"]
    return state
