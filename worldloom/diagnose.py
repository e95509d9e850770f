"""Diagnosis of a NaN or infinite loss: repeat the computation and find where it begins.

usage: worldloom diagnose <run folder>/checkpoints/nonfinite.ckpt [device=cpu]
       [model._target_=my_pkg.MyModel]

A run that encounters a NaN or infinite loss or gradient saves the batch, the model and all random
states. This command prints every loss term, the fields of the batch, and the first module whose
output is not finite although its inputs and weights are; for gradients, the operation that torch's
anomaly detection reports. The exit code is 1 if the loss and the gradients are finite this time.

model._target_=… names a model class outside worldloom that may be imported; the file alone cannot
do that.
"""

import re
import sys
import traceback
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from math import isfinite
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree

from worldloom.app.command_line import run_command
from worldloom.app.compose import Overrides
from worldloom.devices import require_device
from worldloom.errors import escape, list_names
from worldloom.factory import create_world_model
from worldloom.files import read_tensors
from worldloom.protocol import split_result
from worldloom.records import REGISTERED
from worldloom.training.nonfinite import bad_gradients, bad_terms, find_nonfinite
from worldloom.training.precision import computing_in, parameter_type
from worldloom.training.randomness import set_random_state
from worldloom.trees import flatten_tree, map_tree

NAMED = 8  # parameters listed in the report
KEYS = {"what": str, "precision": str, "device": str, "batch": dict, "random": dict, "losses": dict}


@dataclass
class Diagnosis:
    """The result of `diagnose`; `str(diagnosis)` is the report.

    reproduced: whether the loss or a gradient is not finite again, or an error was raised again.
    losses: {name: value} now; before: in the run. bad_*: names of everything that is not finite.
    forward: the first module with a non-finite output for finite inputs and weights, or None.
    backward: the same for gradients, as far as torch's anomaly detection finds it.
    raised: the error that ended the computation, or None.
    """

    title: str
    losses: dict[str, float] = field(default_factory=dict)
    before: dict[str, float] = field(default_factory=dict)
    batch: list[str] = field(default_factory=list)
    bad_fields: list[str] = field(default_factory=list)
    bad_weights: list[str] = field(default_factory=list)
    bad_terms: list[str] = field(default_factory=list)
    bad_gradients: list[str] = field(default_factory=list)
    gradients: int = 0
    forward: str | None = None
    backward: str | None = None
    raised: str | None = None

    @property
    def reproduced(self) -> bool:
        """Whether the loss or a gradient is not finite again, or an error was raised again."""
        return bool(self.bad_terms or self.bad_gradients or self.raised)

    def __str__(self) -> str:
        lines = [self.title, ""]
        if self.losses:
            lines += ["losses and statistics", *self._loss_lines(), ""]
        lines += ["batch", *self.batch, ""]
        lines += [f"weights before the update: {_list_bad(self.bad_weights)}"]
        if self.gradients:
            lines += [f"gradients: {_list_bad(self.bad_gradients, self.gradients)}"]
        lines += [f"forward:   {self._begin()}"]
        if self.raised:
            lines += [f"error:     {self.raised}"]
        if self.backward:
            lines += [f"backward:  {self.backward}"]
        again = "fails again" if self.raised else "or a gradient is not finite again"
        lost = "not reproduced: the loss and all gradients are finite this time"
        lines += ["", f"reproduced: the loss {again}" if self.reproduced else lost]
        return "\n".join(escape(line) for text in lines for line in text.split("\n"))

    def _loss_lines(self) -> Iterator[str]:
        width = max(map(len, self.losses))
        for name, value in self.losses.items():
            then = self.before.get(name, value)
            same = value == then or not (isfinite(value) or isfinite(then))
            notes = "" if isfinite(value) else "   <- not finite"
            notes += "" if same else f"   was {then:.6g}"
            yield f"  {name:<{width}}  {value:<12.6g}{notes}".rstrip()

    def _begin(self) -> str:
        """Return where the first non-finite value comes from: the inputs, or else a module."""
        source = ", ".join(self.bad_fields) or ("the weights" if self.bad_weights else "")
        if source:
            more = f"\n  in addition, {self.forward}" if self.forward else ""
            return f"it came with {source}{more}"
        outside = "; it begins in compute_loss itself" if self.bad_terms else ""
        return self.forward or f"every module returned finite values{outside}"


def diagnose(
    path: str | Path,
    *,
    allow: str | Sequence[str] = (),
    device: str | None = None,
    model: nn.Module | None = None,
) -> Diagnosis:
    """Compute the loss and the gradients of a saved batch again.

    Args:
        path: a nonfinite.ckpt that a run saved. No code in the file is executed.
        allow: import paths of model classes outside worldloom that the file may name.
        device: "cpu" or "cuda"; by default the device of the run, if it is available.
        model: model of the same shapes, which gets the saved weights; by default the model is
            created from the file.

    Raises:
        ValueError: the file is missing, damaged or contains no batch, or names a model class that
            is not allowed.
    """
    file = Path(path)
    saved = _read(file)
    found = saved["nonfinite"]
    gpu = found["device"] == "cuda" and torch.cuda.is_available()
    where = require_device(device or ("cuda" if gpu else "cpu"))
    allow = (allow,) if isinstance(allow, str) else allow
    model = _build(file, saved, allow) if model is None else _load_weights(model, saved)
    model.to(device=where, dtype=parameter_type(found["precision"])).train()
    fields = flatten_tree(found["batch"])
    diagnosis = Diagnosis(
        f"{found['what']}\n{_describe_conditions(found, where)}",
        before=found["losses"],
        batch=[f"  {name:<16}{_describe(value)}" for name, value in fields.items()],
        bad_fields=find_nonfinite(fields),
        bad_weights=find_nonfinite(model.state_dict()),
    )
    buffers = {name: value.clone() for name, value in model.named_buffers()}
    with _watch_modules(model) as first:
        try:
            losses = _loss(model, found, where)
        except Exception as error:
            place = _find_place(_lines(traceback.extract_tb(error.__traceback__)))
            diagnosis.raised = f"{type(error).__name__}: {error}{place}"
    diagnosis.forward = next(iter(first), None)
    if diagnosis.raised:
        return diagnosis
    losses["loss"].backward()
    diagnosis.losses = {name: value.item() for name, value in losses.items()}
    if not torch.isfinite(losses["loss"]):
        diagnosis.bad_terms = bad_terms(losses)
    diagnosis.bad_gradients = bad_gradients(model)
    diagnosis.gradients = sum(p.grad is not None for p in model.parameters())
    if diagnosis.bad_gradients and not diagnosis.bad_terms:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        diagnosis.backward = _detect_anomaly(model, found, where)
    return diagnosis


def _loss(model: nn.Module, found: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    # A copy, because the loss may be computed twice.
    batch = map_tree(
        lambda x: x.to(device, copy=True) if isinstance(x, Tensor) else x, found["batch"]
    )
    set_random_state(found["random"])
    with computing_in(found["precision"], device):
        return split_result(model.compute_loss(batch))[0]  # type: ignore[operator]


@contextmanager
def _watch_modules(model: nn.Module) -> Iterator[list[str]]:
    """Fill the list with a description of each module that turns finite values into others."""
    first: list[str] = []

    def watch(name: str, module: nn.Module, args: Any, kwargs: Any, out: Any) -> None:
        if first or _is_finite(out) or not _is_finite((args, kwargs)):
            return
        if find_nonfinite(dict(module.named_parameters()) | dict(module.named_buffers())):
            return
        spans = " and ".join(map(_describe, _tensors((args, kwargs)))) or "no tensors"
        place = _find_place(_lines(traceback.extract_stack()))
        first.append(f"module {name or 'model'} ({type(module).__name__}), given {spans}{place}")

    hooks = []
    for name, module in model.named_modules():

        def hook(*call: Any, name: str = name) -> None:
            watch(name, *call)

        hooks.append(module.register_forward_hook(hook, with_kwargs=True))
    try:
        yield first
    finally:
        for handle in hooks:
            handle.remove()


def _tensors(tree: Any) -> list[Tensor]:
    """Return the tensors in nested containers and in the attributes of other objects."""
    leaves = pytree.tree_leaves(tree)
    found = [x for x in leaves if isinstance(x, Tensor) and x.numel()]
    others = [vars(x) for x in leaves if hasattr(x, "__dict__") and not isinstance(x, Tensor)]
    return found + [x for y in others for x in y.values() if isinstance(x, Tensor) and x.numel()]


def _is_finite(tree: Any) -> bool:
    return all(bool(torch.isfinite(x).all()) for x in _tensors(tree))


def _detect_anomaly(model: nn.Module, found: Mapping[str, Any], device: torch.device) -> str | None:
    """Return the first operation whose gradient is NaN, as torch's anomaly detection reports it."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with torch.autograd.detect_anomaly(check_nan=True):
            try:
                _loss(model, found, device)["loss"].backward()
                return None
            except RuntimeError as error:
                if "returned nan values" not in str(error):
                    raise
                text = str(error)
    notes = "".join(
        str(note.message) for note in caught if "Error detected in" in str(note.message)
    )
    return text + _find_place(re.findall(r'File "(.+?)", line (\d+),.*\n(.*)', notes))


def _find_place(frames: Iterable[tuple[str, Any, str]]) -> str:
    """Return the last line outside torch and this file, as the end of a message.

    frames: file, number and code of each line, outermost first.
    """
    for file, number, code in reversed(list(frames)):
        if not _is_internal(file):
            return f"\n           at {file}:{number}: {code.strip()}"
    return ""


def _lines(frames: traceback.StackSummary) -> list[tuple[str, Any, str]]:
    return [(frame.filename, frame.lineno, frame.line or "") for frame in frames]


def _is_internal(file: str) -> bool:
    return file == __file__ or file.startswith(str(Path(torch.__file__).parent))


def _read(file: Path) -> dict[str, Any]:
    expected = f"expected the nonfinite.ckpt that a run saved; {file} "
    if not file.is_file():
        raise ValueError(f"{expected}does not exist; look in <run folder>/checkpoints")
    try:
        saved = read_tensors(file, verify=True)
    except Exception as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"{expected}cannot be read: {reason}") from None
    sections = ("nonfinite", "hyper_parameters", "state_dict")
    if (
        not isinstance(saved, dict)
        or not all(isinstance(saved.get(k), dict) for k in sections)
        or not all(isinstance(saved["nonfinite"].get(key), kind) for key, kind in KEYS.items())
    ):
        raise ValueError(f"{expected}holds no batch; an ordinary checkpoint has none")
    return saved


def _build(file: Path, saved: Mapping[str, Any], allow: Sequence[str]) -> nn.Module:
    config = saved["hyper_parameters"].get("model")
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(
            f"{file} does not contain the settings of its model; use Python: from "
            f"worldloom.diagnose import diagnose; print(diagnose({str(file)!r}, model=model))"
        )
    if config["model"] not in REGISTERED and config["model"] not in allow:
        raise ValueError(
            f"{file} names the model {config['model']!r}, whose code is not part of worldloom; if "
            f"you trust it, add model._target_={config['model']} (in Python: "
            f"allow=({config['model']!r},))"
        )
    return create_world_model(file, allow=allow)


def _load_weights(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    weights = {name.removeprefix("model."): x for name, x in saved["state_dict"].items()}
    model.load_state_dict(weights)
    return model


def _describe_conditions(found: Mapping[str, Any], device: torch.device) -> str:
    text = f"precision {found['precision']}, on {device}"
    if found["device"] != device.type:
        text += f"; the run was on {found['device']}, which draws different random numbers"
    return text


def _describe(value: Tensor) -> str:
    """Return shape, dtype and range of a tensor, and where it is not finite."""
    shape = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    good = torch.isfinite(value)
    kept = value.detach()[good].to(torch.float64)
    span = f"{kept.min():.4g} to {kept.max():.4g}" if kept.numel() else "no finite value"
    if good.all():
        return f"{shape:<28}{span}"
    nans = int(value.isnan().sum())
    infinite = int((~good).sum()) - nans
    first = (~good).nonzero()[0].tolist()
    return f"{shape:<28}{span}   <- {nans} NaN, {infinite} infinite, first at {first}"


def _list_bad(names: Sequence[str], count: int | None = None) -> str:
    if not names:
        return "all finite"
    of = f"{len(names)} of {count} not finite: " if count is not None else ""
    return f"{of}{list_names(names, NAMED)}"


def diagnose_command(overrides: Overrides) -> None:
    """Diagnose the file that the command line names; exit with 1 if the loss is finite now."""
    files = overrides.without("model._target_", "device").args
    if len(files) != 1:
        raise ValueError(f"{len(files)} files were named; expected one nonfinite.ckpt")
    target = overrides.value("model._target_")
    found = diagnose(files[0], allow=[target] if target else [], device=overrides.value("device"))
    print(found)
    sys.exit(0 if found.reproduced else 1)


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), diagnose_command)


if __name__ == "__main__":
    main()
