"""The Lightning module that trains any world model: `compute_loss` is its training step."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning import LightningModule
from torch import Tensor, nn

from worldloom.saving import config_of


class WorldModelModule(LightningModule):
    """Wrap a world model and an optimiser.

    Args:
        model: any `WorldModel` that is an nn.Module.
        optimizer: called with the model's parameters (or with its `parameter_groups()`, if it has
            such a method), returns a torch optimiser.
        log_every: updates over which the metrics of training are averaged.
        config: the run's composed configuration as plain data; saved in checkpoints.

    Counters: `updates` counts optimiser steps, across resumes.
    """

    def __init__(
        self,
        model: nn.Module,
        optimizer: Callable[[Iterable[Any]], torch.optim.Optimizer],
        *,
        log_every: int = 100,
        config: dict[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.model = model
        self.optimizer = optimizer
        self.log_every = log_every
        self.updates = 0
        self.metrics = Metrics()
        # Read by create_world_model("….ckpt"); plain data, so that loading it runs no code.
        settings = {"model": config_of(model), "run": config or {}}
        self.save_hyperparameters(settings, logger=False)

    def training_step(self, batch: dict[str, Any], batch_idx: int) -> dict[str, Any]:
        """Compute the loss of one batch; the losses and statistics are kept for the next flush."""
        losses: dict[str, Tensor] = self.model.compute_loss(batch)  # type: ignore[operator]
        loss = losses["loss"]
        if loss.device.type == "cpu" and not torch.isfinite(loss):
            _raise_non_finite(losses, self.updates)
        self.metrics.add({name: value.detach() for name, value in losses.items()})
        out: dict[str, Any] = {"loss": loss}
        if "latents" in batch:
            out["latents"] = batch["latents"]
        return out

    def optimizer_step(self, *args: Any, **kwargs: Any) -> None:
        """Step the optimiser, count the update and move slow targets.

        Not in `on_train_batch_end`: callbacks, which log and save, have theirs before the module's.
        """
        super().optimizer_step(*args, **kwargs)
        self.updates += 1
        if hasattr(self.model, "after_update"):
            self.model.after_update()  # type: ignore[operator]

    def on_train_batch_end(self, outputs: Any, batch: dict[str, Any], batch_idx: int) -> None:
        """Hand the batch its new latents back."""
        # Under DDP the model saw a copy of the batch; the replay looks at this one.
        if isinstance(outputs, dict) and "latents" in outputs:
            batch["latents"] = outputs["latents"]

    def configure_gradient_clipping(
        self,
        optimizer: torch.optim.Optimizer,
        gradient_clip_val: float | None = None,
        gradient_clip_algorithm: str | None = None,
    ) -> None:
        """Clip as the trainer asks, and measure the gradient's norm once per flush."""
        last = (self.updates + 1) % self.log_every == 0
        if last:
            grads = [p.grad for p in self.model.parameters() if p.grad is not None]
            self.metrics.once["grad_norm"] = torch.nn.utils.get_total_norm(grads).detach()
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

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
        """Save the counters."""
        checkpoint["updates"] = self.updates

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Restore the counters."""
        self.updates = checkpoint["updates"]


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
        self.sums += values
        self.count += 1

    def flush(self) -> dict[str, float]:
        """Return all means since the last flush; the only moment that waits for the device."""
        if self.sums is None:
            return {}
        means = (self.sums / self.count).tolist()
        result = dict(zip(self.names, means, strict=True))
        result |= {name: float(value) for name, value in self.once.items()}
        self.sums, self.count, self.once = None, 0, {}
        return result


def _raise_non_finite(losses: dict[str, Tensor], updates: int) -> None:
    bad = [name for name, value in losses.items() if not torch.isfinite(value)]
    named = [name for name in bad if name != "loss"] or bad
    raise FloatingPointError(
        f"the loss is not finite at update {updates}: {', '.join(named)}; look at the data for "
        "huge values, or lower training.learning_rate"
    )
