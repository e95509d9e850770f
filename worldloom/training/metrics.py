"""Metrics of a run: their names, their means over updates, the counters, and the way to loggers."""

from collections.abc import Mapping
from typing import Any

import torch
from lightning import Trainer
from torch import Tensor

from worldloom.ranks import Ranks

# Logged with every metric: metrics.csv has them right after "step", other loggers as "counters/…".
COUNTERS = ("env_steps", "frames", "updates", "episodes", "restarts", "seconds")


def log_metrics(trainer: Trainer, metrics: Mapping[str, Any], step: int) -> None:
    """Send metrics and the counters to every logger, and to `trainer.callback_metrics`.

    Every metric of a run is logged by this function. A counter in `metrics` replaces the current
    one. In `trainer.callback_metrics`, which callbacks such as EarlyStopping read, values are
    tensors and counters have their plain names.
    """
    counts = counters(trainer)
    counts |= {name: metrics[name] for name in COUNTERS if name in metrics}
    own = {name: value for name, value in metrics.items() if name not in counts}
    row = {**{f"counters/{name}": value for name, value in counts.items()}, **own}
    for logger in trainer.loggers:
        getattr(logger, "log_row", logger.log_metrics)(row, step=step)  # see logger_guard
    values = {name: torch.as_tensor(value) for name, value in {**counts, **own}.items()}
    trainer.callback_metrics.update(values)


def counters(trainer: Trainer) -> dict[str, float]:
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


def name_scores(kind: str, scores: Mapping[str, float]) -> dict[str, float]:
    """Return the scores of an evaluation as eval/NAME or final/NAME, and model scores as they are.

    kind: eval or final.
    """
    return {n if n.startswith("imagination/") else f"{kind}/{n}": x for n, x in scores.items()}


def group_metric(name: str) -> str:
    """Return the logged name of what `compute_loss` returns: loss/NAME or stats/NAME.

    Names that are "loss", or whose whole or first part ends in "_loss", are losses.
    """
    is_loss = name == "loss" or name.endswith("_loss") or name.split("/")[0].endswith("_loss")
    return f"loss/{name}" if is_loss else f"stats/{name}"


class RunningMeans:
    """Means of scalars since the last flush, summed on their device and transferred when flushed.

    A name that is missing in some calls is averaged over the others.

    count: calls of `add` since the last flush.
    once: values that are measured once per flush.
    """

    def __init__(self) -> None:
        # Sums and numbers of calls, by the names that were added together.
        self._sums: dict[tuple[str, ...], tuple[Tensor, int]] = {}
        self.count = 0
        self.once: dict[str, Tensor] = {}

    def add(self, scalars: Mapping[str, Tensor]) -> None:
        """Add one value [] of each scalar; does not wait for a device."""
        self.count += 1
        names, values = tuple(scalars), list(scalars.values())
        devices = {value.device for value in values}
        if len(devices) == 1:
            return self._add(names, torch.stack(values))
        for device in devices:
            group = {name: value for name, value in scalars.items() if value.device == device}
            self._add(tuple(group), torch.stack(list(group.values())))

    def _add(self, names: tuple[str, ...], values: Tensor) -> None:
        if names not in self._sums:
            dtype = torch.promote_types(values.dtype, torch.float32)  # bfloat16 stops at 256
            self._sums[names] = torch.zeros_like(values, dtype=dtype), 0
        sums, count = self._sums[names]
        # Not in place, so that a returned state does not change; a loaded one is on the CPU.
        self._sums[names] = sums.to(values.device) + values, count + 1

    def flush(self, ranks: Ranks | None = None) -> dict[str, float]:
        """Return the means since the last flush; waits for the device.

        ranks: the others, which flush at the same time; all return the means over all of them.
        """
        mine = [
            (name, value, count)
            for names, (sums, count) in self._sums.items()
            for name, value in zip(names, sums.tolist(), strict=True)
        ]
        totals: dict[str, tuple[float, int]] = {}
        for found in [mine] if ranks is None else ranks.gather(mine):
            for name, value, count in found:
                total, counted = totals.get(name, (0.0, 0))
                totals[name] = total + value, counted + count
        means = {name: total / count for name, (total, count) in totals.items()}
        # A model's own statistic takes precedence.
        means = {name: float(value) for name, value in self.once.items()} | means
        self._sums, self.count, self.once = {}, 0, {}
        return means

    def state_dict(self) -> dict[str, Any]:
        """Return everything that was added since the last flush, as tensors and plain data."""
        sums = [[list(names), *held] for names, held in self._sums.items()]
        return {"sums": sums, "count": self.count, "once": dict(self.once)}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned."""
        self._sums = {tuple(names): (sums, count) for names, sums, count in state["sums"]}
        self.count, self.once = state["count"], dict(state["once"])
