"""Numbers that are not finite: found before a weight is touched, saved to be looked at, skipped.

An update that is refused changes nothing: no weight, no state of the optimiser, no running scale of
the model, no field of the replay.
"""

import logging
import os
import shlex
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.factory import REGISTERED
from worldloom.saving import get_config
from worldloom.training.randomness import random_state

log = logging.getLogger(__name__)

FILE = "nonfinite.ckpt"
MODES = ("stop", "skip")
MOST_IN_A_ROW = 100  # skipped updates, after which nothing is learned any more
NAMED = 5  # terms or parameters in a message


@dataclass
class Start:
    """What `compute_loss` began with: enough to take it back, and to do it again elsewhere.

    batch: what the model gets; not copied, because a model does not change it.
    """

    batch: dict[str, Any]
    buffers: dict[str, Tensor]
    random: dict[str, Any]

    @classmethod
    def of(cls, buffers: Mapping[str, Tensor], batch: dict[str, Any]) -> "Start":
        """Remember it; a model's buffers, running scales and the like, are copied."""
        copies = {name: buffer.detach().clone() for name, buffer in buffers.items()}
        return cls(batch, copies, random_state())

    def take_back(self, model: nn.Module) -> None:
        """Drop the gradients and put the buffers back.

        An optimiser leaves parameters without a gradient alone, with all it knows of them.
        """
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in self.buffers:  # else it was made by this very update
                    buffer.copy_(self.buffers[name])


class Guard:
    """Look at every loss and gradient before the optimiser does: stop the run, or skip the update.

    mode: "stop" or "skip".
    folder: of the run; what was not finite is saved in its checkpoints. None to save nothing.
    run: the run's configuration, plain data.

    skipped: updates left out so far. in_a_row: those since the last one that was not.
    refused: whether the last batch was.
    """

    def __init__(
        self,
        model: nn.Module,
        mode: str = "stop",
        folder: Path | None = None,
        run: Mapping[str, Any] | None = None,
    ) -> None:
        if mode not in MODES:
            raise ValueError(
                f"nonfinite is {mode!r}; expected stop (end the run at the first number that is "
                "not finite) or skip (leave such updates out, and count them)"
            )
        self.model, self.mode, self.run = model, mode, dict(run or {})
        self.file = None if folder is None else Path(folder) / "checkpoints" / FILE
        self.skipped = self.in_a_row = 0
        self.refused = False
        self.anomaly: str | None = None  # what torch's anomaly mode (trainer=debug) found
        self._start: Start | None = None
        self._holders: list[tuple[str, nn.Module]] | None = None
        self._spoiled = False
        self._told = False

    def begin(self, batch: dict[str, Any]) -> None:
        """Remember how things are before the loss of a batch is computed."""
        self._start = Start.of(self._buffers(), batch)
        self.anomaly, self.refused = None, False

    def raised(self, error: Exception, update: int, precision: str = "32-true") -> None:
        """Refuse a batch whose loss raised an error, if numbers that are not finite explain it.

        Many models check theirs, torch's distributions do.

        Raises:
            FloatingPointError: the run is to stop.
            Exception: the error itself, if all numbers that went in were finite.
        """
        if not (self._bad_fields() or self._bad_weights()):
            raise error
        self.refused = True
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        try:
            self._refuse(f"the loss at update {update} failed: {reason}", {}, update, precision)
        except FloatingPointError as stop:
            raise stop from error

    def passes(
        self,
        losses: dict[str, Tensor],
        grads: list[Tensor],
        update: int,
        precision: str = "32-true",
        agree: Callable[[bool], bool] = bool,
    ) -> bool:
        """Tell whether a batch may change the model; it is taken back if not.

        losses: of the batch, scalars; grads: all its gradients. The only thing that is waited for
            is one flag out of both.
        agree: makes the decisions of several processes one.

        Raises:
            FloatingPointError: it may not, and the run is to stop.
        """
        finite = (torch.isfinite(losses["loss"]) & all_finite(grads, losses["loss"].device)).item()
        where = f"at update {update}"
        found = "" if finite and not self.anomaly else self._look(losses, where)
        self.refused = not agree(not found)
        if self.refused:
            self._refuse(found, losses, update, precision)
        elif self._spoiled:  # by an earlier batch of the same update
            self.model.zero_grad(set_to_none=True)
        return not self.refused

    def close(self) -> bool:
        """End an update; tell whether it was one, or skipped."""
        if self._holders is None:  # the first update has made what modules make when first used
            modules = self.model.named_modules()
            self._holders = [(name, m) for name, m in modules if m._buffers]
        spoiled, self._spoiled, self._start = self._spoiled, False, None
        self.skipped += spoiled
        self.in_a_row = self.in_a_row + 1 if spoiled else 0
        return not spoiled

    def state_dict(self) -> dict[str, int]:
        """Return the counters."""
        return {"skipped": self.skipped, "in_a_row": self.in_a_row}

    def load_state_dict(self, state: Mapping[str, int]) -> None:
        """Restore what `state_dict` returned."""
        self.skipped, self.in_a_row = state["skipped"], state["in_a_row"]

    def _buffers(self) -> dict[str, Tensor]:
        """Return the model's buffers by name, without a walk through modules that have none."""
        if self._holders is None:
            return dict(self.model.named_buffers())
        found = [module.named_buffers(name, False) for name, module in self._holders]
        return {name: buffer for buffers in found for name, buffer in buffers}

    def _look(self, losses: dict[str, Tensor], where: str) -> str:
        """Say what is not finite; "" if everything is."""
        if not torch.isfinite(losses["loss"]):
            return f"the loss is not finite {where}: {_some(bad_terms(losses))}"
        if bad := bad_gradients(self.model):
            of = sum(p.grad is not None for p in self.model.parameters())
            return f"gradients are not finite {where}, {len(bad)} of {of}: {_some(bad)}"
        return f"a gradient is not finite {where}: {self.anomaly}" if self.anomaly else ""

    def _refuse(self, found: str, losses: dict[str, Tensor], update: int, precision: str) -> None:
        assert self._start is not None
        self._start.take_back(self.model)
        self._spoiled = True
        what = found or f"numbers of another process are not finite at update {update}"
        full = self.in_a_row + 1 >= MOST_IN_A_ROW
        if self.mode == "skip" and not full and self._told:
            return
        saved = self._saved(found, losses, update, precision) if found else ""
        message = f"{what}; {self._advice()}{saved}"
        if self.mode == "stop":
            raise FloatingPointError(message)
        if full:
            many = f"{MOST_IN_A_ROW} updates in a row were skipped, so nothing is learned any more"
            raise FloatingPointError(f"{many}; the last: {message}")
        self._told = True
        log.warning("an update is skipped, and counted as train/skipped: %s", message)

    def _advice(self) -> str:
        """Say where it comes from, as far as that is seen at once, and what to do."""
        more = "" if self.mode == "skip" else ", or leave such updates out by nonfinite=skip"
        if bad := self._bad_fields():
            held = f"the batch's {_some(bad)} held NaN or infinity"
            return f"{held}: mend the data it comes from{more}"
        if bad := self._bad_weights():
            return (
                f"the weights were not finite before it ({_some(bad)}): start from an earlier "
                "checkpoint, with a lower training.learning_rate"
            )
        return f"look at the data for huge values, lower training.learning_rate{more}"

    def _bad_fields(self) -> list[str]:
        assert self._start is not None
        fields = tensors_in(self._start.batch)
        return [name for name, value in fields.items() if not torch.isfinite(value).all()]

    def _bad_weights(self) -> list[str]:
        assert self._start is not None
        weights = dict(self.model.named_parameters()) | self._start.buffers
        return [name for name, value in weights.items() if not torch.isfinite(value).all()]

    def _saved(self, what: str, losses: dict[str, Tensor], update: int, precision: str) -> str:
        """Save what reproduces it; return how to do so, or why there is nothing to do it with."""
        if self.file is None:
            return ""
        try:
            self._save(self.file, what, losses, update, precision)
        except OSError as error:
            return f"; the batch could not be saved in {self.file} ({error.strerror or error})"
        config = get_config(self.model)
        if config is None:
            return (
                "; to see where it begins, in Python: from worldloom.diagnose import diagnose; "
                f"print(diagnose({str(self.file)!r}, model=model))"
            )
        target = str(config["model"])
        allow = "" if target in REGISTERED else f" allow={shlex.quote(target)}"
        command = f"python -m worldloom.diagnose {shlex.quote(str(self.file))}{allow}"
        return f"; to see where it begins:\n{command}"

    def _save(
        self, file: Path, what: str, losses: dict[str, Tensor], update: int, precision: str
    ) -> None:
        """Write a checkpoint of the model, and the batch with all else that its loss depends on."""
        assert self._start is not None
        weights = self.model.state_dict()
        saved = {
            "hyper_parameters": {"model": get_config(self.model), "run": self.run},
            "state_dict": {f"model.{name}": value.cpu() for name, value in weights.items()},
            "updates": update - 1,
            "nonfinite": {
                "what": what,
                "update": update,
                "batch": _to_cpu(self._start.batch),
                "random": self._start.random,
                "losses": {name: float(value) for name, value in losses.items()},
                "precision": precision,
                "device": next(self.model.parameters()).device.type,
            },
        }
        file.parent.mkdir(parents=True, exist_ok=True)
        temporary = file.with_name(f".{file.name}.{os.getpid()}")
        try:
            with temporary.open("wb") as stream:
                torch.save(saved, stream)
                stream.flush()
                os.fsync(stream.fileno())
            os.replace(temporary, file)
        finally:
            temporary.unlink(missing_ok=True)


def all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return a flag: whether all numbers are finite. Nothing is waited for.

    torch's gradient scaler looks in the same way: one call, where norms take one for each tensor.
    It multiplies by 1 in place, which leaves every number as it is.
    """
    found, one = torch.zeros((), device=device), torch.ones((), device=device)
    if tensors:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    return found == 0


def bad_terms(losses: Mapping[str, Any]) -> list[str]:
    """Name the terms that are not finite: the losses if there are any, else the statistics.

    The sum of all, "loss", is named only where nothing else can be.
    """
    bad = [name for name, value in losses.items() if not torch.isfinite(torch.as_tensor(value))]
    terms = [name for name in bad if name != "loss"]
    return [name for name in terms if "loss" in name] or terms or bad


def bad_gradients(model: nn.Module) -> list[str]:
    """Name the parameters whose gradients are not finite."""
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return [name for name, grad in grads.items() if not torch.isfinite(grad).all()]


def tensors_in(nested: Mapping[str, Any], prefix: str = "") -> dict[str, Tensor]:
    """Flatten a batch: {"obs/camera": tensor, …}."""
    found: dict[str, Tensor] = {}
    for key, value in nested.items():
        if isinstance(value, Mapping):
            found |= tensors_in(value, f"{prefix}{key}/")
        elif isinstance(value, Tensor):
            found[f"{prefix}{key}"] = value
    return found


def _to_cpu(value: Any) -> Any:
    """Copy, so that a view does not drag along all that it is a view of."""
    if isinstance(value, Mapping):
        return {key: _to_cpu(item) for key, item in value.items()}
    return value.detach().to("cpu", copy=True) if isinstance(value, Tensor) else value


def _some(names: list[str]) -> str:
    more = f" and {len(names) - NAMED} more" if len(names) > NAMED else ""
    return ", ".join(names[:NAMED]) + more
