"""The Lightning module that trains any world model: `compute_loss` is its training step."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from worldloom.protocol import split_result
from worldloom.saving import get_config
from worldloom.timing import phase
from worldloom.training.nonfinite import Guard


class WorldModelModule(LightningModule):
    """Wrap a world model and an optimiser.

    Args:
        model: any `WorldModel` that is an nn.Module.
        optimizer: called with the model's parameters (or with its `parameter_groups()`, if it has
            such a method), returns a torch optimiser.
        log_every: updates over which the metrics of training are averaged.
        config: the run's composed configuration as plain data; saved in checkpoints.
        nonfinite: what to do at a loss or gradient that is not finite, before it changes anything:
            "stop" raises a FloatingPointError, "skip" leaves the update out.
        folder: of the run, where such a batch is saved to be looked at; None to save nothing.

    Counters: `updates` counts optimiser steps, across resumes, and the skipped ones with them: as
    `trainer.global_step` does, and the batches of the data. `guard.skipped` counts only those.
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
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.log_every = log_every
        self.updates = 0
        self.metrics = Metrics()
        self.guard = Guard(model, nonfinite, folder, config)
        self._losses: dict[str, Tensor] = {}
        self._replay: tuple[dict[str, Any], dict[str, Tensor]] | None = None
        # Read by create_world_model("….ckpt"); plain data, so that loading it runs no code.
        settings = {"model": get_config(model), "run": config or {}}
        self.save_hyperparameters(settings, logger=False)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Compute the loss of one batch."""
        with phase("check"):
            self.guard.begin(batch)
        try:
            with phase("loss"):
                result = self.model.compute_loss(batch)  # type: ignore[operator]
        except Exception as error:
            self.guard.raised(error, self.updates + 1, str(self.trainer.precision))
            return {"loss": torch.zeros((), requires_grad=True)}  # skipped: nothing to learn from
        losses, replay = split_result(result)
        self._losses = {name: value.detach() for name, value in losses.items()}
        self._replay = (batch, replay) if replay and "index" in batch else None
        return {"loss": losses["loss"]}

    def backward(self, loss: Tensor, *args: Any, **kwargs: Any) -> None:
        """Compute the gradients."""
        try:
            with phase("backward"):
                super().backward(loss, *args, **kwargs)
        except RuntimeError as error:
            if "returned nan values" not in str(error):
                raise
            self.guard.anomaly = str(error)  # from trainer=debug; what follows is the same

    def on_after_backward(self) -> None:
        """Check the loss and the gradients; if they are finite, count and store the results."""
        if self.guard.refused:
            return
        with phase("check"):
            # Of the optimiser's parameters: a model would be walked through for its own.
            groups = self.trainer.optimizers[0].param_groups
            grads = [p.grad for group in groups for p in group["params"] if p.grad is not None]
            precision, agree = self.trainer.precision, self.trainer.strategy.reduce_boolean_decision
            if self.guard.passes(self._losses, grads, self.updates + 1, str(precision), agree):
                self.metrics.add(self._losses)
                if (self.updates + 1) % self.log_every == 0:
                    self.metrics.once["grad_norm"] = torch.nn.utils.get_total_norm(grads).detach()
                if self._replay is not None:
                    self.trainer.datamodule.store_fields(*self._replay)  # type: ignore[attr-defined]
            self._replay = None

    def __setattr__(self, name: str, value: Any) -> None:
        """Set an attribute; Lightning's note of the hook it is in goes past torch's slow way.

        It is taken forty times an update, which costs as much as a small model's whole loss.
        """
        if name == "_current_fx_name":
            object.__setattr__(self, name, value)
        else:
            super().__setattr__(name, value)

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimiser, count the update and move slow targets.

        Not in `on_train_batch_end`: callbacks, which log and save, have theirs before the module's.
        """
        with phase("optimizer"):
            super().optimizer_step(*args, **kwargs)
            self.updates += 1
            # A skipped update came here without gradients, so the optimiser has done nothing.
            if self.guard.close() and hasattr(self.model, "after_update"):
                self.model.after_update()  # type: ignore[operator]
        if self.guard.skipped:
            self.metrics.once["skipped"] = torch.tensor(float(self.guard.skipped))

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """Build the optimiser."""
        groups = getattr(self.model, "parameter_groups", None)
        params = (
            groups()
            if groups is not None
            else [p for p in self.model.parameters() if p.requires_grad]
        )
        return self.optimizer(params)

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Save the counters, and the means since the last flush."""
        checkpoint["updates"] = self.updates
        checkpoint["nonfinite"] = self.guard.state_dict()
        checkpoint["metrics"] = self.metrics.state_dict()

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore them."""
        self.updates = checkpoint["updates"]
        self.guard.load_state_dict(checkpoint["nonfinite"])
        self.metrics.load_state_dict(checkpoint["metrics"])


class Metrics:
    """Running means of scalars, summed on their device and read only when flushed.

    `once` holds values that are measured once per flush.
    """

    def __init__(self) -> None:
        self.names: list[str] = []
        self.sums: Tensor | None = None
        self.count = 0
        self.once: dict[str, Tensor] = {}

    def add(self, scalars: dict[str, Tensor]) -> None:
        """Add one value of each scalar; the names must be the same at every call."""
        values = torch.stack(list(scalars.values()))
        if self.sums is None:
            self.names, self.sums = list(scalars), torch.zeros_like(values)
        # Not in place, so that a state stays as it was taken; one that was loaded is on the CPU.
        self.sums = self.sums.to(values.device) + values
        self.count += 1

    def flush(self) -> dict[str, float]:
        """Return all means since the last flush; the only moment that waits for the device."""
        means = [] if self.sums is None else (self.sums / self.count).tolist()
        result = dict(zip(self.names, means, strict=True)) if means else {}
        result |= {name: float(value) for name, value in self.once.items()}
        self.sums, self.count, self.once = None, 0, {}
        return result

    def state_dict(self) -> dict[str, Any]:
        """Return what was added since the last flush."""
        state = {"names": list(self.names), "sums": self.sums, "count": self.count}
        return {**state, "once": dict(self.once)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self.names, self.sums, self.count = list(state["names"]), state["sums"], state["count"]
        self.once = dict(state["once"])
