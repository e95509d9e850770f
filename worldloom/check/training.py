"""What training uses: the loss, its gradients and what it leaves in the batch."""

from typing import Any

import torch
from torch import Tensor

from worldloom.check.report import Report
from worldloom.check.saving import copy_of_tensors, restore
from worldloom.check.trees import clone, differing, identical, layout, some


def check_training(report: Report) -> None:
    """Check the loss, its gradients and its repeatability, in training mode and out of it."""
    model, batch = report.model, report.data.batch()
    if next(model.parameters(), None) is None:
        fix = "assign layers and nn.Parameter in __init__, and lists of them as nn.ModuleList"
        report.add("the class", "it has no parameters", "something to train", fix)
    model.train()
    begin = copy_of_tensors(model)
    losses = _losses(report, "compute_loss", report.call("compute_loss", clone(batch)))
    if losses is None:
        return
    _gradients(report, losses["loss"])
    # The moving statistics that a loss may keep in buffers must not look like randomness.
    restore(model, begin)
    _repeatable(report, losses, report.call("compute_loss", clone(batch)))
    _latents(report)
    if hasattr(model, "after_update"):
        report.call("after_update")
    model.eval()
    _losses(report, "compute_loss after eval()", report.call("compute_loss", batch))


def _losses(report: Report, where: str, losses: Any) -> dict[str, Tensor] | None:
    """Return the losses if nothing is wrong with them, else None."""
    if losses is None:
        return None
    if not isinstance(losses, dict) or "loss" not in losses:
        got = f"a dict of {sorted(losses)}" if isinstance(losses, dict) else layout(losses)
        fix = 'return {"loss": total, ...} with every term by its name'
        report.add(where, f"returned {got}", 'a dict with "loss"', fix)
        return None
    before = len(report.problems)
    for name, value in losses.items():
        # A statistic may be an integer, or undefined in some batch; the loss may not.
        strict = name == "loss"
        fix = "take its mean"
        report.tensor(where, f"{name!r}", value, (), floating=strict, finite=strict, fix=fix)
    return losses if len(report.problems) == before else None


def _gradients(report: Report, loss: Tensor) -> None:
    if not loss.requires_grad:
        fix = "do not detach it, nor compute it under torch.no_grad"
        return report.add("compute_loss", "'loss' requires no gradient", "one that does", fix)
    report.model.zero_grad(set_to_none=True)
    try:
        loss.backward()
    except RuntimeError as error:
        report.first_error = report.first_error or error
        fix = "look for tensors changed in place, or kept from an earlier call"
        got = f"loss.backward() raised {' '.join(str(error).split())}"
        return report.add("compute_loss", got, "gradients", fix)
    trained = {name: p for name, p in report.model.named_parameters() if p.requires_grad}
    grads = {name: p.grad for name, p in trained.items() if p.grad is not None}
    broken = [name for name, grad in grads.items() if not grad.isfinite().all()]
    if broken:
        fix = "look for a root, log, norm or division at zero"
        got = f"the gradients of {some(broken)} are not finite"
        report.add("compute_loss", got, "finite gradients", fix)
    elif not any(grad.any() for grad in grads.values()):
        fix = "compute the loss from what the parameters predict"
        got = "no parameter gets a gradient other than zero"
        report.add("compute_loss", got, "something to learn", fix)
    idle = [name for name in trained if name not in grads]
    if idle and grads:
        report.remarks.append(
            f"no gradient reaches {some(idle)}. If that is meant, as for slowly moving targets, "
            "say so by requires_grad_(False)"
        )


def _repeatable(report: Report, losses: dict[str, Tensor], again: Any) -> None:
    other = [] if again is None else differing(losses, again, identical)
    if other:
        fix = "draw random numbers from torch alone, and keep what moves in buffers"
        got = f"{some(other)} differed between two calls under the same torch seed"
        report.add("compute_loss", got, "the same values for the same batch", fix)


def _latents(report: Report) -> None:
    """Check what a model that keeps latents in the replay writes into its batch."""
    latents = getattr(report.model, "latents", None) or {}
    data, batch = report.data, report.data.batch()
    if not latents:
        return
    batch["context"] = {
        name: torch.zeros(data.rows, *shape, dtype=dtype, device=data.device)
        for name, (shape, dtype) in latents.items()
    }
    if report.call("compute_loss", batch) is None:
        return
    written = batch.get("latents", {})
    for name, (shape, _) in latents.items():  # the replay converts them to its own dtype
        report.tensor(
            "compute_loss",
            f'batch["latents"]["{name}"]',
            written.get(name),
            (data.rows, data.length - 1, *shape),
            floating=False,
            fix="write the latents of rows 1 to T - 1, or leave the name out of model.latents",
        )
