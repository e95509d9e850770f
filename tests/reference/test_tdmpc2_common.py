"""The stand-alone functions of TD-MPC2, against common.npz."""

import re
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import ROOT, Recording, below, tensor
from tests.reference.tdmpc2_format import FAMILY, drawing
from worldloom.models.tdmpc2 import draws
from worldloom.models.tdmpc2.encoder import SHIFT
from worldloom.models.tdmpc2.hyperparameters import compute_discount
from worldloom.models.tdmpc2.layers import NormedLinear
from worldloom.models.tdmpc2.losses import termination_stats
from worldloom.models.tdmpc2.planner import LatentMPPI
from worldloom.models.tdmpc2.policy import RunningScale, SquashedNormal, squash
from worldloom.nn.shifts import shift_images
from worldloom.nn.simnorm import simnorm
from worldloom.nn.symlog import symexp, symlog
from worldloom.nn.twohot import symlog_twohot_loss, symlog_twohot_mean
from worldloom.presets import load_preset

Inputs = dict[str, Tensor]


def test_tdmpc2_common_is_there() -> None:
    """Finding nothing must not pass."""
    assert (ROOT / FAMILY / "common" / "common.npz").is_file(), f"no common.npz in {ROOT / FAMILY}"


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_tdmpc2_common(precision: str) -> None:
    recording = Recording(f"{FAMILY}/common", "common.npz", precision)
    inputs = {k: tensor(v, recording.dtype) for k, v in recording.group("in").items()}
    ours: dict[str, Any] = {}
    with drawing(recording):
        # Backwards, for the shift was drawn before the noise of gumbel.
        for case in sorted({name.split("/")[0] for name in inputs}, reverse=True):
            function = FUNCTIONS[re.sub(r"\d+$", "", case)]
            out = function(below(inputs, case), recording)
            ours |= {f"{case}/{name}": value for name, value in out.items()}

    def kind(name: str) -> str:
        if name.endswith("/logprob"):
            return "logprob"
        return "gradient" if name.endswith("grad") else "forward"

    recording.compare(ours, kind, at_least=24)


def discounts(x: Inputs, recording: Recording) -> Inputs:
    options = load_preset("tdmpc2:5m")
    limits = [options[f"discount_{name}"] for name in ("denom", "min", "max")]
    values = [compute_discount(int(length), *limits) for length in x["episode_length"]]
    return {"value": torch.tensor(values, dtype=recording.dtype)}


def gumbel(x: Inputs, recording: Recording) -> Inputs:
    planner: Any = None  # the choice needs none
    return {"choice": LatentMPPI.sample_elite(planner, x["p"].unsqueeze(0))[0]}


def normed(x: Inputs, recording: Recording) -> Inputs:
    outputs, inputs = x["weight"].shape
    layer = NormedLinear(inputs, outputs, mishes=True).to(recording.dtype)
    layer.linear.load_state_dict({"weight": x["weight"], "bias": x["bias"]})
    layer.norm.load_state_dict({"weight": x["ln_weight"], "bias": x["ln_bias"]})
    return {"y": layer(x["x"])}


def scale(x: Inputs, recording: Recording) -> Inputs:
    running = RunningScale(float(x["tau"])).to(recording.dtype)
    values, scaled = [], []
    for batch in x["x"]:
        running.update(batch.squeeze(-1))
        values.append(running.value.reshape(1).clone())
        scaled.append(batch / running.value)
    return {"value": torch.stack(values), "scaled": torch.stack(scaled)}


def shift(x: Inputs, recording: Recording) -> Inputs:
    shifts = draws.draw_shifts(len(x["x"]), 2 * SHIFT, torch.device("cpu"))
    return {"y": shift_images(x["x"], shifts, SHIFT)}


def simnormed(x: Inputs, recording: Recording) -> Inputs:
    return {"y": simnorm(x["x"], int(x["dim"]))}


def squashed(x: Inputs, recording: Recording) -> Inputs:
    # The bounds of the recorded log deviations, as the README says.
    actor = SquashedNormal(1, 1, 1, log_std_min=-10, log_std_max=2)
    log_std, eps = actor.bound(x["raw_log_std"]), x["eps"]
    choice = squash(x["mean"], log_std, eps, eps.shape[-1])
    logprob = -choice.entropy.unsqueeze(-1)
    # The bonus is -logprob * (dims * gaussian / (logprob + 1e-8)).
    gaussian = choice.scaled_entropy.unsqueeze(-1) / -logprob * (logprob + 1e-8) / eps.shape[-1]
    return {
        "action": choice.action,
        "mean": choice.mode,
        "log_std": log_std,
        "logprob": logprob,
        "gaussian_logprob": gaussian,
    }


def symexped(x: Inputs, recording: Recording) -> Inputs:
    return {"y": symexp(x["x"])}


def symlogged(x: Inputs, recording: Recording) -> Inputs:
    return {"y": symlog(x["x"])}


def termstats(x: Inputs, recording: Recording) -> Inputs:
    pred, target = x["pred"].squeeze(-1), x["target"].squeeze(-1)
    return termination_stats(pred, target, torch.ones_like(target))


def twohot(x: Inputs, recording: Recording) -> Inputs:
    low, high = x["range"].tolist()
    logits, target = x["logits"].requires_grad_(), x["target"].squeeze(-1)
    loss = symlog_twohot_loss(logits, target, low, high)
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    return {
        # Ours never writes the code down, but the gradient is softmax(logits) minus the code.
        "encoded": logits.softmax(-1) - grad,
        "soft_ce": loss.unsqueeze(-1),
        "soft_ce_grad": grad,
        "decoded": symlog_twohot_mean(logits, low, high).unsqueeze(-1),
    }


FUNCTIONS: dict[str, Callable[[Inputs, Recording], Inputs]] = {
    "discount": discounts,
    "gumbel": gumbel,
    "normed": normed,
    "scale": scale,
    "shift": shift,
    "simnorm": simnormed,
    "squash": squashed,
    "symexp": symexped,
    "symlog": symlogged,
    "termstats": termstats,
    "twohot": twohot,
}
