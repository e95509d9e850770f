"""Checks of what training uses: the loss, its gradients and the values for the replay."""

from typing import Any

import torch
from torch import Tensor

from worldloom.check.report import (
    Report,
    are_identical,
    copy_tensors,
    describe,
    find_differences,
)
from worldloom.check.saving import copy_parameters, restore
from worldloom.errors import list_names
from worldloom.protocol import REPLAY, ReplayField, is_scalar, split_result


def check_training(report: Report) -> None:
    """Check the loss, its gradients and its repeatability, in training mode and out of it."""
    model, batch = report.model, report.data.batch()
    if next(model.parameters(), None) is None:
        fix = "assign layers and nn.Parameter in __init__, and lists of them as nn.ModuleList"
        report.add("the class", "it has no parameters", "something to train", fix)
    model.train()
    begin = copy_parameters(model)
    losses = _check_losses(report, "compute_loss", report.call("compute_loss", copy_tensors(batch)))
    if losses is None:
        return
    _check_gradients(report, losses["loss"])
    # Otherwise running statistics in buffers would make the two losses differ.
    restore(model, begin)
    _check_repeatable(report, losses, report.call("compute_loss", copy_tensors(batch)))
    _check_replay_fields(report)
    if hasattr(model, "after_update"):
        report.call("after_update")
    model.eval()
    _check_losses(report, "compute_loss after eval()", report.call("compute_loss", batch))


def _check_losses(report: Report, where: str, losses: Any) -> dict[str, Tensor] | None:
    """Return the scalars if they are valid, else None."""
    if losses is None:
        return None
    if not isinstance(losses, dict) or "loss" not in losses:
        got = f"a dict of {sorted(losses)}" if isinstance(losses, dict) else describe(losses)
        fix = 'return {"loss": total, ...} with the name of every term'
        report.add(where, f"returned {got}", 'a dict with "loss"', fix)
        return None
    before = len(report.problems)
    for name, value in losses.items():
        if name == REPLAY or (name != "loss" and is_scalar(value)):
            continue
        # A statistic may be an integer, or NaN in some batches; the loss may not.
        options = {"floating": name == "loss", "finite": name == "loss"}
        report.require_tensor(where, f"{name!r}", value, (), **options, fix="take its mean")
    return split_result(losses)[0] if len(report.problems) == before else None


def _check_gradients(report: Report, loss: Tensor) -> None:
    if not loss.requires_grad:
        fix = "do not detach it, and do not compute it under torch.no_grad"
        return report.add("compute_loss", "'loss' requires no gradient", "one that does", fix)
    report.model.zero_grad(set_to_none=True)
    try:
        loss.backward()
    except RuntimeError as error:
        report.first_error = report.first_error or error
        fix = "look for tensors that are modified in place, or stored from an earlier call"
        got = f"loss.backward() raised {' '.join(str(error).split())}"
        return report.add("compute_loss", got, "gradients", fix)
    trained = {name: p for name, p in report.model.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
    broken = [name for name, grad in grads.items() if not grad.isfinite().all()]
    if broken:
        fix = "look for a root, log, norm or division at zero"
        got = f"the gradients of {list_names(broken)} are not finite"
        report.add("compute_loss", got, "finite gradients", fix)
    elif not any(grad.any() for grad in grads.values()):
        fix = "compute the loss from what the parameters predict"
        got = "no parameter gets a gradient other than zero"
        report.add("compute_loss", got, "something to learn", fix)
    idle = [name for name in trained if name not in grads]
    if idle and grads:
        report.remarks.append(
            f"no gradient reaches {list_names(idle)}. If this is intended, as for target networks, "
            "call requires_grad_(False) on them"
        )


def _check_repeatable(report: Report, losses: dict[str, Tensor], again: Any) -> None:
    other = [] if again is None else find_differences(losses, again, are_identical)
    if other:
        fix = "draw random numbers only from torch, and keep running statistics in buffers"
        got = f"{list_names(other)} differed between two calls under the same torch seed"
        report.add("compute_loss", got, "the same values for the same batch", fix)


def _check_replay_fields(report: Report) -> None:
    """Check what a model with replay fields provides for rows, and returns for them."""
    model, data = report.model, report.data
    fields: dict[str, ReplayField] = getattr(model, "replay_fields", None) or {}
    if not fields:
        return
    with torch.no_grad():
        state = report.call("encode", data.obs(data.rows))
    if state is not None and (values := report.call("replay_values", state)) is not None:
        for name, field in fields.items():
            _check_field(report, "replay_values", name, values.get(name), (data.rows, *field.shape))
    batch = data.batch()
    batch |= data.replay_inputs(fields, data.rows, data.length)
    if (result := report.call("compute_loss", batch)) is None:
        return
    for name, value in split_result(result)[1].items():
        if name not in fields:
            expected = f"names of model.replay_fields: {sorted(fields)}"
            report.add("compute_loss", f'"replay" has {name!r}', expected, "declare it there")
            continue
        most = data.length - (not fields[name].every_row)  # row 0 is the context
        rows = value.shape[1] if isinstance(value, Tensor) and value.ndim > 1 else most
        shape = (data.rows, min(max(rows, 1), most), *fields[name].shape)
        _check_field(report, "compute_loss", f'result["replay"]["{name}"]', value, shape)


def _check_field(report: Report, where: str, name: str, value: Any, shape: tuple[int, ...]) -> None:
    fix = "return a value for each of these rows, of the shape in model.replay_fields"
    # The replay converts values to the dtype of the field.
    report.require_tensor(where, name, value, shape, floating=False, fix=fix)
