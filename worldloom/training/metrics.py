"""Metrics of a run: their names, their means over updates, the counters, and the way to loggers."""

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from lightning import Trainer
from torch import Tensor

from worldloom.protocol import REPLAY

# Logged with every metric: metrics.csv has them right after "step", other loggers as "counters/…".
COUNTERS = ("env_steps", "frames", "updates", "episodes", "restarts", "seconds")
# Statistics that are logged by worldloom itself.
RESERVED = {"grad_norm", "learning_rate", "skipped"}


def log_metrics(trainer: Trainer, metrics: Mapping[str, Any], step: int) -> None:
    """Send metrics and the counters to every logger, and to `trainer.callback_metrics`.

    Every metric of a run is logged by this function. A counter in `metrics` replaces the current
    one. In `trainer.callback_metrics`, which callbacks such as EarlyStopping read, values are
    tensors and counters have their plain names.
    """
    counters = count(trainer)
    counters |= {name: metrics[name] for name in COUNTERS if name in metrics}
    own = {name: value for name, value in metrics.items() if name not in counters}
    for logger in trainer.loggers:
        logger.log_metrics({**{f"counters/{k}": v for k, v in counters.items()}, **own}, step=step)
    values = {name: torch.as_tensor(value) for name, value in {**counters, **own}.items()}
    trainer.callback_metrics.update(values)


def count(trainer: Trainer) -> dict[str, float]:
    """Return the counters: environment steps, frames, episodes and restarts are 0 offline."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    module: Any = trainer.lightning_module
    counts = {} if data.collector is None else data.collector.counters()
    counts |= {"updates": module.updates, "seconds": round(module.seconds, 3)}
    return {name: counts.get(name, 0) for name in COUNTERS}


def current_step(trainer: Trainer) -> int:
    """Return the position on the x-axis: environment steps, or updates in an offline run."""
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    module: Any = trainer.lightning_module
    return module.updates if data.collector is None else data.env_steps


def group_metric(name: str) -> str:
    """Return the logged name of what `compute_loss` returns: loss/NAME or stats/NAME.

    Names that are "loss", or whose whole or first part ends in "_loss", are losses.
    """
    is_loss = name == "loss" or name.endswith("_loss") or name.split("/")[0].endswith("_loss")
    return f"loss/{name}" if is_loss else f"stats/{name}"


def read_scalars(result: Any) -> tuple[dict[str, Tensor], dict[str, float]]:
    """Return the tensors [] and the numbers among the scalars that `compute_loss` returned.

    The tensors are detached and on the device of "loss". Nothing here waits for that device.

    Raises:
        ValueError: the result is not a dict with a "loss" to minimise, or contains something else
            than scalars with a name.
    """
    loss = _require_loss(result)
    if reserved := RESERVED & result.keys():
        raise ValueError(
            f"compute_loss returned {min(reserved)!r}, which worldloom logs itself; rename it"
        )
    tensors: dict[str, Tensor] = {}
    numbers: dict[str, float] = {}
    for name, value in result.items():
        if not isinstance(name, str):
            raise ValueError(f"compute_loss returned the key {name!r}; expected a string")
        if isinstance(value, Tensor) and value.device == loss.device and not value.is_complex():
            if value.dim() == 0:
                tensors[name] = value.detach()
                continue
            if value.numel() == 1:
                tensors[name] = value.detach().reshape(())
                continue
        if name != REPLAY:
            numbers[name] = _read_number(name, value)
    return tensors, numbers


def _require_loss(result: Any) -> Tensor:
    if not isinstance(result, dict) or "loss" not in result:
        names = ", ".join(map(repr, result)) if isinstance(result, dict) else ""
        held = f"a dict with {names or 'nothing in it'}" if isinstance(result, dict) else None
        raise ValueError(
            f"compute_loss returned {held or _describe(result)}; expected a dict with 'loss', the "
            "scalar to minimise"
        )
    loss = result["loss"]
    if not isinstance(loss, Tensor) or loss.numel() != 1 or not loss.requires_grad:
        without = " without gradient" if isinstance(loss, Tensor) and loss.numel() == 1 else ""
        raise ValueError(
            f"compute_loss returned 'loss', {_describe(loss)}{without}; expected a tensor with one "
            "element and a gradient: take its mean, and do not detach it"
        )
    return loss


def _read_number(name: str, value: Any) -> float:
    """Return a number, or the only element of an array or of a tensor on another device."""
    one = isinstance(value, Tensor | np.ndarray) and np.prod(value.shape) == 1
    item = value.item() if one else value
    if not isinstance(item, bool | int | float | np.bool_ | np.integer | np.floating):
        raise ValueError(
            f"compute_loss returned {name!r}, {_describe(value)}; expected a scalar: a number, or "
            "a tensor with one element, such as its mean"
        )
    return float(item)


def _describe(value: Any) -> str:
    if isinstance(value, Tensor | np.ndarray):
        kind = "a tensor" if isinstance(value, Tensor) else "an array"
        return f"{kind} of shape {list(value.shape)} and type {value.dtype}"
    return "None" if value is None else f"a {type(value).__name__} ({str(value)[:40]})"


class RunningMeans:
    """Means of scalars since the last flush, summed on their device and transferred when flushed.

    A name that is missing in some calls is averaged over the others.

    count: calls of `add` since the last flush.
    once: values that are measured once per flush.
    """

    def __init__(self) -> None:
        # Sums and numbers of calls, by the names in a call: mostly all calls have the same names.
        self._tensors: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self._numbers: dict[str, tuple[float, int]] = {}
        self.count = 0
        self.once: dict[str, Tensor] = {}

    def add(
        self, tensors: Mapping[str, Tensor], numbers: Mapping[str, float] | None = None
    ) -> None:
        """Add one value of each scalar; tensors [] are on one device."""
        values, names = torch.stack(list(tensors.values())), tuple(tensors)
        if names not in self._tensors:
            dtype = torch.promote_types(values.dtype, torch.float32)  # bfloat16 cannot count to 300
            self._tensors[names] = torch.zeros_like(values, dtype=dtype), 0
        sums, count = self._tensors[names]
        # Not in place, so that a returned state does not change; a loaded one is on the CPU.
        self._tensors[names] = sums.to(values.device) + values, count + 1
        for name, number in (numbers or {}).items():
            total, count = self._numbers.get(name, (0.0, 0))
            self._numbers[name] = total + number, count + 1
        self.count += 1

    def flush(self) -> dict[str, float]:
        """Return the means since the last flush; waits for the device."""
        totals: dict[str, tuple[float, int]] = {}
        for names, (sums, count) in self._tensors.items():
            for name, value in zip(names, sums.tolist(), strict=True):
                total, counted = totals.get(name, (0.0, 0))
                totals[name] = total + value, counted + count
        for name, (number, count) in self._numbers.items():
            total, counted = totals.get(name, (0.0, 0))
            totals[name] = total + number, counted + count
        means = {name: total / count for name, (total, count) in totals.items()}
        means |= {name: float(value) for name, value in self.once.items()}
        self._tensors, self._numbers, self.count, self.once = {}, {}, 0, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was added since the last flush, as tensors and plain data."""
        tensors = [[list(names), *held] for names, held in self._tensors.items()]
        numbers = {name: list(held) for name, held in self._numbers.items()}
        return {"tensors": tensors, "numbers": numbers, "count": self.count, "once": {**self.once}}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._tensors = {tuple(names): (sums, count) for names, sums, count in state["tensors"]}
        self._numbers = {name: (total, count) for name, (total, count) in state["numbers"].items()}
        self.count, self.once = state["count"], dict(state["once"])
