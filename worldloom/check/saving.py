"""What saving and moving use; and leaving a model as it was found."""

import io
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from worldloom.check.report import Report
from worldloom.check.trees import differing, identical, some


@torch.no_grad()
def check_saving(report: Report) -> None:
    """Check that what state_dict saves can be read without running code, and is all there is."""
    model, before = report.model, copy_of_tensors(report.model)
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
        fix = "keep only tensors and plain numbers, strings, lists and dicts in it"
        got = f"saving and loading raised {' '.join(str(error).split())[:200]}"
        report.add("state_dict", got, "to load with torch.load(weights_only=True)", fix)
        return
    lost = differing(before, copy_of_tensors(model), identical)
    if lost:
        fix = "let state_dict return, and load_state_dict take back, every tensor"
        got = f"{some(lost)} came back as something else"
        report.add("state_dict", got, "what was saved", fix)
    plain = _plain_tensors(model)
    if plain:
        report.remarks.append(
            f"{some(plain)} is a tensor but neither parameter nor buffer, so it is not saved and "
            "does not follow .to(device). Use register_buffer, or carry it in the state's extras"
        )


def _plain_tensors(model: nn.Module) -> list[str]:
    return [
        f"{path}.{name}".lstrip(".")
        for path, module in model.named_modules()
        for name, value in vars(module).items()
        if isinstance(value, Tensor)
    ]


def copy_of_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Copy parameters and buffers, by name; those that are not saved as well."""
    named = [*model.named_parameters(), *model.named_buffers()]
    return {name: value.detach().clone() for name, value in named}


@torch.no_grad()
def restore(model: nn.Module, tensors: dict[str, Tensor]) -> None:
    """Write back what `copy_of_tensors` returned."""
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if name in tensors:
            value.copy_(tensors[name])


@contextmanager
def left_as_it_was(model: nn.Module) -> Iterator[None]:
    """Put parameters, buffers, gradients and modes back at the end."""
    tensors = copy_of_tensors(model)
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
