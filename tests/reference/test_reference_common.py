"""Stand-alone functions, layers, normalisers and the optimiser, against common.npz."""

import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import (
    ROOT,
    Recording,
    agent_folders,
    below,
    tensor,
)
from worldloom.models.dreamerv3.official import from_official
from worldloom.nn.distributions import BoundedNormal
from worldloom.nn.layers import BlockLinear, Conv, rms_norm
from worldloom.nn.normalizer import Normalizer
from worldloom.nn.returns import lambda_return
from worldloom.nn.symlog import symexp, symlog
from worldloom.nn.twohot import symexp_bins, twohot_loss, twohot_mean
from worldloom.training.optimizers import LaProp


def test_reference_folder_is_not_empty() -> None:
    """The other tests run over what they find, so finding nothing must not pass."""
    assert agent_folders("dreamerv3"), f"no agent (config.json and params.npz) in {ROOT}/dreamerv3"
    assert (ROOT / "dreamerv3" / "common" / "common.npz").is_file(), (
        f"no common.npz in {ROOT}/dreamerv3"
    )


@pytest.mark.parametrize("precision", ["float64", "float32"])
def test_reference_common(precision: str) -> None:
    recording = Recording("dreamerv3/common", "common.npz", precision)
    config = json.loads((ROOT / "dreamerv3" / "common" / "config.json").read_text())
    dtype = recording.dtype
    inputs = {k: tensor(v, dtype) for k, v in recording.group("in").items()}
    ours: dict[str, Any] = {}
    for case in sorted({name.split("/")[0] for name in inputs}):
        values = below(inputs, case)
        if case.startswith("norm_"):
            ours |= normalizer(case, values["x"], recording, config)
        elif case.startswith("opt_"):
            ours |= optimizer(case, values, config["opt_cases"][case.removeprefix("opt_")], dtype)
        else:
            function = FUNCTIONS[re.sub(r"(?<=twohot)\d+|(?<=lambda)_\w+", "", case)]
            ours |= {f"{case}/{name}": value for name, value in function(values).items()}

    def kind(name: str) -> str:
        if name.startswith("opt_"):
            return "state"
        return "gradient" if name.endswith("grad") else "forward"

    recording.compare(ours, kind, at_least=100)


def symlogs(x: dict[str, Tensor]) -> dict[str, Tensor]:
    # symexp was recorded on the range of the bins.
    return {"symlog": symlog(x["x"]), "symexp": symexp(x["x"].clamp(-20, 20))}


def twohot(x: dict[str, Tensor]) -> dict[str, Tensor]:
    logits = x["logits"].requires_grad_()
    loss = twohot_loss(logits, x["target"])
    (grad,) = torch.autograd.grad(loss.sum(), logits)
    bins = symexp_bins(logits.shape[-1], logits.dtype, logits.device)
    return {"bins": bins, "loss": loss, "lossgrad": grad, "pred": twohot_mean(logits)}


def normal(x: dict[str, Tensor]) -> dict[str, Tensor]:
    dist = BoundedNormal.from_raw(x["mean"], x["rawstd"], dims=1, minstd=0.1, maxstd=1.0)
    low, high = dist.entropy_bounds()  # of all dimensions together; recorded per dimension
    per = torch.ones_like(x["mean"]) / x["mean"].shape[-1]
    return {
        "mean": dist.mode(),
        "stddev": dist.stddev,
        "logp": dist.log_prob(x["event"]),
        "entropy": dist.entropy(),
        "minent": low * per,
        "maxent": high * per,
    }


def rms(x: dict[str, Tensor]) -> dict[str, Tensor]:
    return {"y": rms_norm(x["x"], x["scale"])}


def block(x: dict[str, Tensor]) -> dict[str, Tensor]:
    blocks, own, out = x["kernel"].shape
    layer = BlockLinear(blocks * own, blocks * out, blocks).to(x["x"])
    layer.load_state_dict({"weight": x["kernel"], "bias": x["bias"]})
    y = layer(x["x"].unflatten(-1, (blocks, own)).transpose(0, 1))
    return {"y": y.transpose(0, 1).flatten(1)}


def conv(x: dict[str, Tensor]) -> dict[str, Tensor]:
    kernel = x["kernel"]
    layer = Conv(kernel.shape[2], kernel.shape[3], kernel.shape[0]).to(x["x"])
    layer.load_state_dict({"weight": from_official(kernel.numpy()), "bias": x["bias"]})
    return {"y": layer(x["x"])}


def lambdas(x: dict[str, Tensor]) -> dict[str, Tensor]:
    last, term = x["last"].to(x["rew"]), x["term"].to(x["rew"])
    disc, lam = float(x["disc"]), float(x["lam"])
    return {"ret": lambda_return(last, term, x["rew"], x["boot"], disc, lam)}


FUNCTIONS = {
    "symlog": symlogs,
    "twohot": twohot,
    "normal": normal,
    "rms": rms,
    "block": block,
    "conv": conv,
    "lambda": lambdas,
}


def normalizer(
    case: str, values: Tensor, recording: Recording, config: dict[str, Any]
) -> dict[str, Tensor]:
    """Feed a sequence of batches; statistics after each, state after the last."""
    if case == "norm_ret":
        options = config["retnorm"]
    else:
        # The rate is not recorded, but after n updates 1 - corr is (1 - rate)^n.
        corr = float(recording.outputs[f"{case}/state/norm/corr/value"])
        rate = round(1 - (1 - corr) ** (1 / len(values)), 6)
        options = {"impl": case.removeprefix("norm_").removesuffix("debias"), "rate": rate}
    norm = Normalizer(**options).to(values.dtype)
    offsets, scales = [], []
    for x in values:
        norm.update(x)
        offset, scale = norm.stats()
        offsets.append(offset)
        scales.append(scale)
    names = ("mean", "sqrs") if norm.impl == "meanstd" else ("lo", "hi")
    state = dict(zip((*names, "corr"), (norm.first, norm.second, norm.corr), strict=True))
    return {
        f"{case}/offset": torch.stack(offsets),
        f"{case}/scale": torch.stack(scales),
        **{f"{case}/state/norm/{name}/value": value for name, value in state.items()},
    }


def optimizer(
    case: str, inputs: dict[str, Tensor], options: dict[str, Any], dtype: torch.dtype
) -> dict[str, Tensor]:
    """Take the recorded steps; weight decay acts on kernels only."""
    params = {name: torch.nn.Parameter(p) for name, p in below(inputs, "param").items()}
    grads = below(inputs, "grad")
    kernels = [p for name, p in params.items() if name.endswith("/kernel")]
    others = [p for name, p in params.items() if not name.endswith("/kernel")]
    laprop = LaProp(
        [{"params": kernels, "weight_decay": options["wd"]}, {"params": others}],
        lr=options["lr"],
        betas=(options["beta1"], options["beta2"]),
        eps=options["eps"],
        agc=options["agc"],
        warmup=options["warmup"],
    )
    ours = {}
    for n in range(len(next(iter(grads.values())))):
        before = {name: p.detach().clone() for name, p in params.items()}
        for name, p in params.items():
            p.grad = grads[name][n].clone()
        laprop.step()
        for name, p in params.items():
            ours[f"{case}/step{n}/param/{name}"] = p.detach().clone()
            update = p.detach() - before[name]
            if dtype == torch.float32:
                # The difference of two rounded parameters does not show so small a step.
                rate = options["lr"] * min(1, n / (options["warmup"] or 1) or not options["warmup"])
                step = laprop.state[p]["exp_avg"] / (1 - options["beta1"] ** (n + 1))
                step = step + before[name] * (options["wd"] if name.endswith("/kernel") else 0)
                update = -rate * step
            ours[f"{case}/step{n}/update/{name}"] = update
    return ours
