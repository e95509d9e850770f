"""The Lightning module that trains any world model: `compute_loss` is its training step."""

import logging
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from worldloom.errors import list_names
from worldloom.protocol import split_result
from worldloom.records import find_obstacle
from worldloom.saving import get_config
from worldloom.timing import phase
from worldloom.training.capture import CapturedLoss, require_mode, start_capture
from worldloom.training.compile import compile_networks
from worldloom.training.metrics import RunningMeans
from worldloom.training.nonfinite import NonFiniteGuard

log = logging.getLogger(__name__)


class WorldModelModule(LightningModule):
    """Wrap a world model and an optimiser.

    Args:
        model: any `WorldModel` that is an nn.Module.
        optimizer: function that takes the model's parameters (or its `parameter_groups()`, if it
            has that method) and returns a torch optimiser.
        log_every: updates over which training metrics are averaged.
        config: the run's configuration as plain data; saved in checkpoints.
        nonfinite: reaction to a NaN or infinite loss or gradient, before it changes anything:
            "stop" raises a FloatingPointError, "skip" skips the update.
        folder: run folder, where a rejected batch is saved for diagnosis; None to save nothing.
        capture: whether updates are recorded as CUDA graphs: "off", "on", or "auto", on for a GPU.
        compile: whether networks are compiled: "off", "on", or "auto", on where this was measured
            to be faster, which is nowhere so far.

    Counters: `updates` counts optimiser steps across resumes, including skipped ones, as do
    `trainer.global_step` and the data module. `guard.skipped` counts only the skipped ones.
    `seconds` is the time spent in training, across resumes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        *,
        log_every: int = 100,
        config: dict[str, Any] | None = None,
        nonfinite: str = "stop",
        folder: Path | None = None,
        capture: str = "auto",
        compile: str = "auto",
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.log_every = log_every
        self.updates = 0
        self.metrics = RunningMeans()
        self._changed_options: set[str] = set()  # of the optimiser, on resume
        self.guard = NonFiniteGuard(model, nonfinite, folder, config)
        self.capture = require_mode("capture", capture)
        self.compile_mode = require_mode("compile", compile)
        self.captured: CapturedLoss | None = None
        self._losses: dict[str, Tensor] = {}
        # Seconds of training before this process, and the time at which this one started to train.
        self._seconds: float = 0.0
        self._started: float | None = None
        self._replay: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        # Parameters without which DDP averages no gradients, by name.
        self._averaged: dict[str, nn.Parameter] = {}
        if obstacle := find_obstacle(model):  # reported before training, not when it is saved
            log.warning("the trained model cannot be loaded by name: %s", obstacle)
        # Read by create_world_model("….ckpt"); plain data, so loading it executes no code.
        settings = {"model": get_config(model), "run": config or {}}
        self.save_hyperparameters(settings, logger=False)

    @property
    def seconds(self) -> float:
        """Return the seconds of training so far, those before a resume included."""
        running = 0.0 if self._started is None else time.monotonic() - self._started
        return self._seconds + running

    def on_train_start(self) -> None:
        """Start counting the seconds of training."""
        self._started = time.monotonic()
        ddp: Any = self.trainer.strategy.model
        if isinstance(ddp, DistributedDataParallel) and not ddp.find_unused_parameters:
            parameters = self.model.named_parameters()
            self._averaged = {name: p for name, p in parameters if p.requires_grad}
        if self.compile_mode == "on":
            compile_networks(self.model)
        optimizer = self.trainer.optimizers[0]
        self.captured = start_capture(self.capture, self.trainer, self.model, optimizer)

    def on_train_end(self) -> None:
        """Stop counting the seconds of training."""
        self._seconds, self._started = self.seconds, None

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> Tensor:
        """Return the loss [] of one batch.

        Raises:
            ValueError: `compute_loss` returned no dict of scalars, or a "loss" without gradient.
            FloatingPointError: the model failed on NaN or infinity, and the run has to stop.
        """
        with phase("check"):
            self.guard.begin(batch)
        captured = None
        try:
            with phase("loss"):
                if self.captured is not None:
                    captured = self.captured(batch)
                result = captured or self.model.compute_loss(batch)  # type: ignore[operator]
        except Exception as error:
            self.guard.handle_error(error, self.updates + 1, str(self.trainer.precision))
            return torch.zeros((), requires_grad=True)  # skipped: no gradient reaches the model
        losses, replay = split_result(result)
        if captured is None and not losses["loss"].requires_grad:
            raise ValueError(
                f"compute_loss returned 'loss' = {losses['loss'].item():.4g} without a gradient; "
                "expected a tensor that depends on the parameters: do not detach it"
            )
        self._losses = {name: value.detach() for name, value in losses.items()}
        self._replay = (batch, replay) if replay and "index" in batch else None
        return losses["loss"]

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients, unless a recorded update has computed them with the loss."""
        if self.captured is not None and not loss.requires_grad:
            self.captured.attach()
            return
        try:
            with phase("backward"):
                super().backward(loss, *args, **kwargs)
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            self.guard.anomaly = str(error)  # by trainer=debug; handled like a NaN gradient

    def on_after_backward(self) -> None:
        """Check the loss and the gradients; if they are finite, record what the model returned.

        Raises:
            ValueError: a parameter has no gradient, and several processes therefore have not
                averaged the others.
            FloatingPointError: the run has to stop.
        """
        if self.guard.rejected:
            return
        if missing := [name for name, p in self._averaged.items() if p.grad is None]:
            raise ValueError(
                f"the loss does not depend on {list_names(missing)}, so the gradients of the "
                "processes were not averaged; freeze parameters that no loss uses "
                "(requires_grad_(False)), or set trainer.strategy.find_unused_parameters=true"
            )
        with phase("check"):
            # Parameters of the optimiser; collecting those of the model would walk its modules.
            groups = self.trainer.optimizers[0].param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            precision = str(self.trainer.precision)
            if self.guard.accepts(self._losses, grads, self.updates + 1, precision, self._share):
                self.metrics.add(self._losses)
                if (self.updates + 1) % self.log_every == 0:
                    self.metrics.once["grad_norm"] = torch.nn.utils.get_total_norm(grads).detach()
                if self._replay is not None:
                    self.trainer.datamodule.store_fields(*self._replay)  # type: ignore[attr-defined]
            self._replay = None

    def on_train_batch_end(self, outputs: Any, batch: Any, batch_idx: int) -> None:
        """End all ranks after this update if a callback has set `trainer.should_stop` in one."""
        if self.trainer.world_size > 1:
            self.trainer.should_stop = any(self._share(self.trainer.should_stop))

    def _share(self, number: int) -> list[int]:
        """Return the numbers of all ranks."""
        data: Any = self.trainer.datamodule  # type: ignore[attr-defined]
        return [number] if data is None else data.ranks.share(number)[:, 0].tolist()

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute, bypassing nn.Module.__setattr__ for Lightning's `_current_fx_name`.

        Lightning sets it about 40 times per update; the bypass saves as much time as the whole loss
        of a small model takes.
        """
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimiser, count the update and call the model's `after_update`.

        `on_train_batch_end` would be too late: callbacks, which log and save, are called before it.
        """
        with phase("optimizer"):
            super().optimizer_step(*args, **kwargs)
            self.updates += 1
            # A skipped update has no gradients here, so the optimiser has changed nothing.
            if self.guard.end_update() and hasattr(self.model, "after_update"):
                self.model.after_update()  # type: ignore[operator]
        if self.guard.skipped:
            self.metrics.once["skipped"] = torch.tensor(float(self.guard.skipped))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Create the optimiser."""
        groups = getattr(self.model, "parameter_groups", None)
        params = (
            groups()
            if groups is not None
            else [p for p in self.model.parameters() if p.requires_grad]
        )
        optimizer = self.optimizer(params)
        optimizer.register_load_state_dict_pre_hook(self._keep_changes)
        return optimizer

    def _keep_changes(
        self, optimizer: torch.optim.Optimizer, state: dict[str, Any]
    ) -> dict[str, Any]:
        """Keep the options that were changed on resume instead of those in the checkpoint."""
        pairs = zip(state["param_groups"], optimizer.param_groups, strict=True)
        groups = [
            saved | {key: now[key] for key in self._changed_options if key in now}
            for saved, now in pairs
        ]
        return {**state, "param_groups": groups}

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters and the running means."""
        checkpoint["updates"] = self.updates
        checkpoint["seconds"] = self.seconds
        checkpoint["nonfinite"] = self.guard.state_dict()
        checkpoint["metrics"] = self.metrics.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore what `on_save_checkpoint` saved."""
        self.updates, self._seconds = checkpoint["updates"], checkpoint["seconds"]
        self.guard.load_state_dict(checkpoint["nonfinite"])
        self.metrics.load_state_dict(checkpoint["metrics"])
        before, now = (
            held["run"].get("optimizer", {})
            for held in (checkpoint["hyper_parameters"], self.hparams)
        )
        self._changed_options = {key for key in now if now[key] != before.get(key)}
        if "lr" in self._changed_options:
            self._changed_options.add("peak_lr")  # see `LaProp`
