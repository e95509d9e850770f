"""NaN and infinity in training: detected before weights change, saved for diagnosis, skipped.

A rejected update changes nothing: no weight, no optimiser state, no running scale of the model and
no field of the replay.
"""

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.errors import list_names, quote
from worldloom.ranks import RankError, rank, world_size
from worldloom.records import REGISTERED
from worldloom.saving import get_config
from worldloom.training.checkpoint_files import copy_to_cpu, write_checkpoint
from worldloom.training.randomness import random_state
from worldloom.trees import flatten_tree

log = logging.getLogger(__name__)

FILE = "nonfinite.ckpt"
MODES = ("stop", "skip")
MOST_IN_A_ROW = 100  # stop the run after this many consecutive skipped updates


def one_rank(number: int) -> list[int]:
    """Return the numbers of all ranks where there is only one."""
    return [number]


@dataclass
class StepSnapshot:
    """The state before `compute_loss`: enough to undo the call, and to repeat it elsewhere.

    batch: the model's input, not copied, because a model does not modify its batch.
    buffers: copies of the model's buffers, such as running scales.
    random: random states of torch, NumPy and Python.
    """

    batch: dict[str, Any]
    buffers: dict[str, Tensor]
    random: dict[str, Any]

    def restore(self, model: nn.Module) -> None:
        """Restore the buffers and drop all gradients, so that the optimiser changes no weight."""
        model.zero_grad(set_to_none=True)
        with torch.no_grad():
            for name, buffer in model.named_buffers():
                if name in self.buffers:  # otherwise this update has created the buffer
                    buffer.copy_(self.buffers[name])


class NonFiniteGuard:
    """Check every loss and gradient before the optimiser uses it; stop the run or skip the update.

    mode: "stop" or "skip".
    folder: run folder; the rejected batch is saved with its checkpoints. None to save nothing.
    run: the run's configuration as plain data.

    skipped: number of updates skipped so far. in_a_row: those since the last accepted update.
    rejected: whether the last batch was rejected.
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
                f"nonfinite is {mode!r}; expected stop (end the run at the first NaN or infinity) "
                "or skip (skip such updates and count them)"
            )
        self.model, self.mode, self.run = model, mode, dict(run or {})
        self.folder = folder
        self.skipped = self.in_a_row = 0
        self.rejected = False
        self.anomaly: str | None = None  # message of torch's anomaly mode (trainer=debug)
        self._snapshot: StepSnapshot | None = None
        self._owners: list[tuple[str, nn.Module]] | None = None
        self._spoiled = False  # whether a batch of the current update was rejected
        self._reported = False

    def begin(self, batch: dict[str, Any]) -> None:
        """Take a snapshot before the loss of a batch is computed."""
        buffers = {name: x.detach().clone() for name, x in self._buffers().items()}
        self._snapshot = StepSnapshot(batch, buffers, random_state())
        self.anomaly, self.rejected = None, False

    @property
    def file(self) -> Path | None:
        """Return where a rejected batch of this rank is saved."""
        name = FILE.replace(".", f"-rank{rank()}.") if rank() else FILE
        return None if self.folder is None else Path(self.folder) / "checkpoints" / name

    def handle_error(self, error: Exception, update: int, precision: str = "32-true") -> None:
        """Reject a batch whose loss raised an error that NaN or infinity in its inputs explain.

        Models may check their inputs themselves; torch's distributions do. In several ranks the
        error is raised: the others already wait for this one's gradients.

        Raises:
            FloatingPointError: the run has to stop.
            Exception: the error itself, if all inputs and weights are finite.
        """
        if world_size() > 1 or not (self._bad_fields() or self._bad_weights()):
            raise error
        self.rejected = True
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        try:
            found = f"the loss at update {update} failed: {reason}"
            self._reject(found, {}, update, precision, one_rank(1))
        except FloatingPointError as stop:
            raise stop from error

    def accepts(
        self,
        losses: dict[str, Tensor],
        grads: list[Tensor],
        update: int,
        precision: str = "32-true",
        share: Callable[[int], list[int]] = one_rank,
    ) -> bool:
        """Return whether a batch may change the model; if not, undo its effects.

        losses: scalars of the batch. grads: all its gradients. Loss and gradients are reduced to
            one flag on the device, so this waits for the device only once.
        share: returns the numbers of all ranks, given that of this one.

        Raises:
            FloatingPointError: the batch was rejected and the run has to stop.
            RankError: that of another rank was.
        """
        finite = (torch.isfinite(losses["loss"]) & all_finite(grads, losses["loss"].device)).item()
        found = "" if finite and not self.anomaly else self._explain(losses, f"at update {update}")
        # A NaN in the loss of one rank reaches the gradients of all; that rank is to blame.
        in_loss = bool(found) and not torch.isfinite(losses["loss"]).item()
        shared = share(bool(found) + in_loss)
        self.rejected = any(shared)
        if self.rejected:
            self._reject(found, losses, update, precision, shared)
        elif self._spoiled:  # by an earlier batch of the same update
            self.model.zero_grad(set_to_none=True)
        return not self.rejected

    def end_update(self) -> bool:
        """Count an update; return whether it was done, rather than skipped."""
        if self._owners is None:  # after the first update, which creates buffers made on first use
            modules = self.model.named_modules()
            self._owners = [(name, m) for name, m in modules if m._buffers]
        spoiled, self._spoiled, self._snapshot = self._spoiled, False, None
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
        """Return the model's buffers by name; skips modules without buffers, which saves time."""
        if self._owners is None:
            return dict(self.model.named_buffers())
        found = [module.named_buffers(name, False) for name, module in self._owners]
        return {name: buffer for buffers in found for name, buffer in buffers}

    def _explain(self, losses: dict[str, Tensor], where: str) -> str:
        """Return a description of what is not finite; "" if everything is finite."""
        if not torch.isfinite(losses["loss"]):
            return f"the loss is not finite {where}: {list_names(bad_terms(losses))}"
        if bad := bad_gradients(self.model):
            count = sum(p.grad is not None for p in self.model.parameters())
            return f"gradients are not finite {where}, {len(bad)} of {count}: {list_names(bad)}"
        return f"a gradient is not finite {where}: {self.anomaly}" if self.anomaly else ""

    def _reject(
        self,
        found: str,
        losses: dict[str, Tensor],
        update: int,
        precision: str,
        blame: list[int],
    ) -> None:
        """Undo a batch; report and save it.

        found: what is not finite in this rank. blame: of each rank; the highest one is the cause.
        """
        assert self._snapshot is not None
        guilty = blame.index(max(blame))
        if blame[rank()] < max(blame):
            found = ""
        self._snapshot.restore(self.model)
        self._spoiled = True
        hopeless = self.in_a_row + 1 >= MOST_IN_A_ROW
        if self.mode == "skip" and not hopeless and self._reported:
            return
        command = self._save(found, losses, update, precision) if found else ""
        message = f"{found}; {self._advice()}{command}"
        kind: type[Exception] = FloatingPointError
        if not found:
            kind = RankError
            message = f"NaN or infinity in rank {guilty} at update {update}; see its log"
        if self.mode == "stop":
            raise kind(message)
        if hopeless:
            raise kind(
                f"{MOST_IN_A_ROW} updates in a row were skipped, so the model no longer learns; "
                f"the last one: {message}"
            )
        self._reported = True
        log.warning("an update was skipped and is counted as stats/skipped: %s", message)

    def _advice(self) -> str:
        """Return the likely cause and what to change."""
        more = "" if self.mode == "skip" else ", or skip such updates with nonfinite=skip"
        if bad := self._bad_fields():
            return (
                f"the batch's {list_names(bad)} contained NaN or infinity: fix the data or the "
                f"environment that produced it{more}"
            )
        if bad := self._bad_weights():
            return (
                f"the weights were already not finite ({list_names(bad)}): start from an earlier "
                "checkpoint with a lower training.learning_rate"
            )
        return f"look for very large values in the data, lower training.learning_rate{more}"

    def _bad_fields(self) -> list[str]:
        assert self._snapshot is not None
        return find_nonfinite(flatten_tree(self._snapshot.batch))

    def _bad_weights(self) -> list[str]:
        assert self._snapshot is not None
        return find_nonfinite(dict(self.model.named_parameters()) | self._snapshot.buffers)

    def _save(self, what: str, losses: dict[str, Tensor], update: int, precision: str) -> str:
        """Save the batch and the model; return how to diagnose them, as the end of a message."""
        if self.file is None:
            return ""
        config = get_config(self.model)
        try:
            write_checkpoint(self.file, self._content(what, losses, update, precision))
        except OSError as error:
            return f"; the batch could not be saved to {self.file} ({error.strerror or error})"
        start = "; to find where it begins"
        if config is None:
            return (
                f"{start}, in Python: from worldloom.diagnose import diagnose; "
                f"print(diagnose({str(self.file)!r}, model=model))"
            )
        target = str(config["model"])
        model = [] if target in REGISTERED else [f"model._target_={target}"]
        return f"{start}:\npython -m worldloom.diagnose {quote(self.file, *model)}"

    def _content(
        self, what: str, losses: dict[str, Tensor], update: int, precision: str
    ) -> dict[str, Any]:
        """Return a checkpoint of the model, with the batch and all else its loss depends on."""
        assert self._snapshot is not None
        weights = self.model.state_dict()
        return {
            "hyper_parameters": {"model": get_config(self.model), "run": self.run},
            "state_dict": {f"model.{name}": value.cpu() for name, value in weights.items()},
            "updates": update - 1,
            "nonfinite": {
                "what": what,
                "update": update,
                "batch": copy_to_cpu(self._snapshot.batch),
                "random": self._snapshot.random,
                "losses": {name: float(value) for name, value in losses.items()},
                "precision": precision,
                "device": next(self.model.parameters()).device.type,
            },
        }


def all_finite(tensors: list[Tensor], device: torch.device) -> Tensor:
    """Return a flag on the device, without waiting for it: whether all values are finite.

    Uses the single call of torch's gradient scaler, where norms would need one call per tensor. It
    multiplies the tensors by 1 in place, which changes nothing.
    """
    found, one = torch.zeros((), device=device), torch.ones((), device=device)
    if tensors:
        torch._amp_foreach_non_finite_check_and_unscale_(tensors, found, one)
    return found == 0


def find_nonfinite(values: Mapping[str, Any]) -> list[str]:
    """Return the names of the numbers and tensors that contain NaN or infinity."""
    numbers = {k: torch.as_tensor(v) for k, v in values.items() if isinstance(v, Tensor | float)}
    return [name for name, value in numbers.items() if not torch.isfinite(value).all()]


def bad_terms(losses: Mapping[str, Any]) -> list[str]:
    """Return the names of the terms that are not finite: losses if there are any, else statistics.

    The total, "loss", is named only if no other term is.
    """
    bad = find_nonfinite(losses)
    terms = [name for name in bad if name != "loss"]
    return [name for name in terms if "loss" in name] or terms or bad


def bad_gradients(model: nn.Module) -> list[str]:
    """Return the names of the parameters whose gradients are not finite."""
    return find_nonfinite({name: p.grad for name, p in model.named_parameters()})
