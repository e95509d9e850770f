"""Compute a loss that was not finite once more, and say where it begins.

usage: python -m worldloom.diagnose <run folder>/checkpoints/nonfinite.ckpt [allow=my_pkg.MyModel]
       [device=cpu]

A run that meets a loss or a gradient that is not finite saves the batch, the model and all random
states. This prints every loss term, the batch's fields, and the first operation, forwards or
backwards, whose result is not finite though all that it read is. Exits with 1 if the loss and the
gradients are finite this time.

allow=… names a model outside worldloom, whose code may be run; nothing in the file is.
"""

import math
import sys
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.app.compose import readable_errors
from worldloom.factory import REGISTERED, create_world_model
from worldloom.protocol import split_result
from worldloom.training.nonfinite import bad_gradients, bad_terms, tensors_in
from worldloom.training.precision import computing_in, parameter_type
from worldloom.training.randomness import set_random_state
from worldloom.training.tracing import FirstOperation, is_finite, place_in, place_of

NAMED = 8  # parameters in the report
KEYS = {"what": str, "precision": str, "device": str, "batch": dict, "random": dict, "losses": dict}


@dataclass
class Diagnosis:
    """What was found; `str(diagnosis)` is the report.

    reproduced: whether the loss or a gradient is not finite again.
    losses: {name: value}; bad_terms, bad_gradients: names of what is not finite.
    forward: the first operation that made a number that is not finite out of finite ones; None if
        there is none. backward: the same of the gradients, as far as torch tells.
    raised: the error that ended the computation, if one did.
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
        """Whether the loss or a gradient is not finite again, or cannot be computed again."""
        return bool(self.bad_terms or self.bad_gradients or self.raised)

    def __str__(self) -> str:
        lines = [self.title, "", *(["losses and statistics"] if self.losses else [])]
        width = max(map(len, self.losses), default=0)
        for name, value in self.losses.items():
            then = self.before.get(name, value)
            same = value == then or not (math.isfinite(value) or math.isfinite(then))
            notes = "" if math.isfinite(value) else "   <- not finite"
            notes += "" if same else f"   was {then:.6g}"
            lines.append(f"  {name:<{width}}  {value:<12.6g}{notes}".rstrip())
        lines += [*([""] if self.losses else []), "batch", *self.batch, ""]
        lines += [f"weights before the update: {_listed(self.bad_weights)}"]
        if self.gradients:
            lines += [f"gradients: {_listed(self.bad_gradients, self.gradients)}"]
        lines += [f"forward:   {self._first()}"]
        if self.raised:
            lines += [f"error:     {self.raised}"]
        if self.backward:
            lines += [f"backward:  {self.backward}"]
        again = "fails again" if self.raised else "or a gradient is not finite again"
        lost = "not reproduced: the loss and all gradients are finite this time"
        return "\n".join([*lines, "", f"reproduced: the loss {again}" if self.reproduced else lost])

    def _first(self) -> str:
        """Say where it begins; bad inputs come before whatever became of them."""
        with_it = ", ".join(self.bad_fields) or ("the weights" if self.bad_weights else "")
        if with_it:
            besides = f"\n  besides, {self.forward}" if self.forward else ""
            return f"it came with {with_it}{besides}"
        return self.forward or "every operation made finite numbers"


def diagnose(
    path: str | Path,
    *,
    allow: Sequence[str] = (),
    device: str | None = None,
    model: nn.Module | None = None,
) -> Diagnosis:
    """Compute a saved batch's loss and gradients again.

    Args:
        path: a nonfinite.ckpt that a run saved. No code in it is run.
        allow: import paths of models outside worldloom that the file may name.
        device: "cpu" or "cuda"; by default what it was, if that is there.
        model: of the same shapes, to take the saved weights, instead of the one the file names.

    Raises:
        ValueError: the file is missing, damaged or no such batch, or names a model that is not
            allowed.
    """
    file = Path(path)
    saved = _read(file)
    found = saved["nonfinite"]
    gpu = found["device"] == "cuda" and torch.cuda.is_available()
    where = torch.device(device or ("cuda" if gpu else "cpu"))
    model = _build(file, saved, allow) if model is None else _filled(model, saved)
    model.to(device=where, dtype=parameter_type(found["precision"])).train()
    diagnosis = Diagnosis(
        f"{found['what']}\n{_circumstances(found, where)}", before=found["losses"]
    )
    for name, value in tensors_in(found["batch"]).items():
        text, finite = _described(value)
        diagnosis.batch.append(f"  {name:<16}{text}")
        diagnosis.bad_fields += [] if finite else [name]
    diagnosis.bad_weights = [k for k, v in model.state_dict().items() if not is_finite(v)]
    buffers = {name: value.clone() for name, value in model.named_buffers()}

    with FirstOperation(model) as first:
        try:
            losses = _loss(model, found, where)
        except Exception as error:
            diagnosis.raised = f"{type(error).__name__}: {error}{place_of(error)}"
    diagnosis.forward = first.found
    if diagnosis.raised:
        return diagnosis
    losses["loss"].backward()
    diagnosis.losses = {name: float(value.detach()) for name, value in losses.items()}
    if not torch.isfinite(losses["loss"]):
        diagnosis.bad_terms = bad_terms(losses)
    diagnosis.bad_gradients = bad_gradients(model)
    diagnosis.gradients = sum(p.grad is not None for p in model.parameters())
    if diagnosis.bad_gradients and not diagnosis.bad_terms:
        with torch.no_grad():
            for name, value in model.named_buffers():
                value.copy_(buffers[name])
        diagnosis.backward = _backward(model, found, where)
    return diagnosis


def _loss(model: nn.Module, found: Mapping[str, Any], device: torch.device) -> dict[str, Tensor]:
    model.zero_grad(set_to_none=True)
    batch = _moved(found["batch"], device)
    set_random_state(found["random"])
    with computing_in(found["precision"], device):
        return split_result(model.compute_loss(batch))[0]  # type: ignore[operator]


def _backward(model: nn.Module, found: Mapping[str, Any], device: torch.device) -> str | None:
    """Return which gradient is the first that is NaN, as torch's anomaly mode tells it."""
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
    traces = [str(note.message) for note in caught if "Error detected in" in str(note.message)]
    return f"{text}{place_in(traces[0]) if traces else ''}"


def _read(file: Path) -> dict[str, Any]:
    wanted = f"expected the nonfinite.ckpt that a run saves; {file} "
    if not file.is_file():
        raise ValueError(f"{wanted}does not exist; look in <run folder>/checkpoints")
    try:
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"{wanted}cannot be read: {reason}") from None
    sections = ("nonfinite", "hyper_parameters", "state_dict")
    if not isinstance(saved, dict) or not all(isinstance(saved.get(k), dict) for k in sections):
        raise ValueError(f"{wanted}holds no batch; an ordinary checkpoint has none")
    found = saved["nonfinite"]
    if not all(isinstance(found.get(key), kind) for key, kind in KEYS.items()):
        raise ValueError(f"{wanted}holds no batch; an ordinary checkpoint has none")
    return saved


def _build(file: Path, saved: Mapping[str, Any], allow: Sequence[str]) -> nn.Module:
    config = saved["hyper_parameters"].get("model")
    if not isinstance(config, dict) or "model" not in config:
        raise ValueError(
            f"{file} does not say how to build its model; in Python: from worldloom.diagnose "
            f"import diagnose; print(diagnose({str(file)!r}, model=model))"
        )
    if config["model"] not in REGISTERED and config["model"] not in allow:
        raise ValueError(
            f"{file} names the model {config['model']!r}, whose code is not part of worldloom; if "
            f"you trust it, add allow={config['model']}"
        )
    return create_world_model(file, allow=allow)


def _filled(model: nn.Module, saved: Mapping[str, Any]) -> nn.Module:
    weights = {name.removeprefix("model."): x for name, x in saved["state_dict"].items()}
    model.load_state_dict(weights)
    return model


def _circumstances(found: Mapping[str, Any], device: torch.device) -> str:
    text = f"precision {found['precision']}, on {device}"
    if found["device"] != device.type:
        text += f"; the run was on {found['device']}, whose random numbers are others"
    return text


def _moved(batch: Mapping[str, Any], device: torch.device) -> dict[str, Any]:
    """Move a batch; the model gets tensors of its own, to be asked twice."""
    return {
        k: _moved(v, device)
        if isinstance(v, Mapping)
        else (v.to(device, copy=True) if isinstance(v, Tensor) else v)
        for k, v in batch.items()
    }


def _described(value: Tensor) -> tuple[str, bool]:
    """Return a field's shape, type, range, and where it is not finite; whether it is finite."""
    shape = f"{list(value.shape)} {str(value.dtype).removeprefix('torch.')}"
    good = torch.isfinite(value)
    kept = value[good].to(torch.float64)
    span = f"{kept.min():.4g} to {kept.max():.4g}" if kept.numel() else "nothing finite"
    if good.all():
        return f"{shape:<28}{span}", True
    nans = int(value.isnan().sum())
    infinite = int((~good).sum()) - nans
    first = (~good).nonzero()[0].tolist()
    return f"{shape:<28}{span}   <- {nans} NaN, {infinite} infinite, first at {first}", False


def _listed(names: Sequence[str], of: int | None = None) -> str:
    """Name what is not finite, some of it if it is much."""
    if not names:
        return "all finite"
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    count = f"{len(names)} of {of} not finite: " if of is not None else ""
    return f"{count}{', '.join(names[:NAMED])}{more}"


def main() -> None:
    """Run the command line."""
    words = sys.argv[1:]
    if not words or {"-h", "--help"} & set(words):
        print(__doc__)
        sys.exit(0 if words else 2)
    with readable_errors():
        files = [word for word in words if not word.startswith(("allow=", "device="))]
        if len(files) != 1:
            raise ValueError(f"{len(files)} files were named; expected one nonfinite.ckpt")
        options = dict(word.split("=", 1) for word in words if word not in files)
        allow = [name for name in options.get("allow", "").split(",") if name]
        found = diagnose(files[0], allow=allow, device=options.get("device"))
    print(found)
    sys.exit(0 if found.reproduced else 1)


if __name__ == "__main__":
    main()
