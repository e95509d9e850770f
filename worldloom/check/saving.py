"""Checks of saving and moving a model, and the restoration of a checked model."""

import io
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.check.report import Report, are_identical, find_differences
from worldloom.errors import list_names
from worldloom.factory import construct
from worldloom.records import find_obstacle


@torch.no_grad()
def check_saving(report: Report) -> None:
    """Check that state_dict can be loaded without executing code, and is complete."""
    model, before = report.model, copy_parameters(report.model)
    try:
        file = io.BytesIO()
        torch.save(model.state_dict(), file)
        file.seek(0)
        loaded = torch.load(file, weights_only=True)
        for value in model.state_dict().values():
            if isinstance(value, Tensor):
                value.zero_()
        model.load_state_dict(loaded)
    except Exception as error:
        report.first_error = report.first_error or error
        fix = "store only tensors, numbers, strings, lists and dicts in it"
        got = f"saving and loading raised {' '.join(str(error).split())[:200]}"
        report.add("state_dict", got, "to load with torch.load(weights_only=True)", fix)
        return
    lost = find_differences(before, copy_parameters(model), are_identical)
    if lost:
        fix = "return every tensor from state_dict, and restore it in load_state_dict"
        got = f"{list_names(lost)} has another value after saving and loading"
        report.add("state_dict", got, "the saved value", fix)
    plain = _plain_tensors(model)
    if plain:
        report.remarks.append(
            f"{list_names(plain)} is a tensor but neither parameter nor buffer, so it is not saved "
            "and not moved by .to(device). Use register_buffer, or put it into the state's extras"
        )


@torch.no_grad()
def check_record(report: Report) -> None:
    """Check that the recorded class and arguments build a model with the same tensors.

    Models without a record, which are built by other code than worldloom's, are not checked.
    """
    config: Any = getattr(report.model, "build_config", None)
    if config is None:
        return
    if obstacle := find_obstacle(report.model):
        report.remarks.append(obstacle)
        return
    fix = "create all parameters and buffers in __init__, from its arguments alone"
    expected = "a model with the same tensors as this one"
    try:
        built = construct(config["model"], config["arguments"])
    except Exception as error:
        report.first_error = report.first_error or error
        got = f"the recorded arguments raise {' '.join(str(error).split())[:200]}"
        return report.add("the constructor", got, expected, fix)
    now, then = ({k: v.shape for k, v in m.state_dict().items()} for m in (report.model, built))
    if other := sorted(k for k in now.keys() | then.keys() if now.get(k) != then.get(k)):
        got = f"{list_names(other)} differs in a model built from the recorded arguments"
        report.add("the constructor", got, expected, fix)


def _plain_tensors(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def copy_parameters(model: nn.Module) -> dict[str, Tensor]:
    """Copy all parameters and buffers by name, including those that are not saved."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


@torch.no_grad()
def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Restore what `copy_parameters` returned."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            value.copy_(tensors[name])


@contextmanager
def preserve_model(model: nn.Module) -> Iterator[None]:
    """Restore parameters, buffers, gradients and modes at the end of the block."""
    tensors = copy_parameters(model)
    grads = [(parameter, parameter.grad) for parameter in model.parameters()]
    modes = [(module, module.training) for module in model.modules()]
    try:
        yield
    finally:
        restore(model, tensors)
        for parameter, grad in grads:
            parameter.grad = grad
        for module, mode in modes:
            module.training = mode
