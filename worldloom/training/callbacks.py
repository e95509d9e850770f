"""What happens beside training: metrics, evaluation, a look at the imagination."""

import logging
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from worldloom.saving import read_saved, save_model
from worldloom.timing import Timer, phase, timer_for
from worldloom.training.module import WorldModelModule

messages = logging.getLogger(__name__)


class MetricsWriter(Callback):
    """Send train/…, episode/…, env/…, fps/…, replay/… and timings/… to the loggers.

    It does so every `log_every` updates. timings/… are milliseconds per update, means since the
    last time: of every phase that is marked (see `worldloom.timing`), and timings/update of all.

    The x-axis is environment steps in online runs and updates in offline ones. A resumed run's
    loggers go back to where they were when it was saved: what came after it is written again.
    """

    def __init__(self) -> None:
        self._mark = (0.0, 0, 0)
        self._timer: Timer | None = None
        self._loggers: list[Any] = []
        self._saved: dict[str, Any] = {}

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Remember the loggers, whose states are saved."""
        self._loggers = [logger for logger in trainer.loggers if hasattr(logger, "state_dict")]

    def state_dict(self) -> dict[str, Any]:
        """Return how far the loggers are."""
        return {type(logger).__name__: logger.state_dict() for logger in self._loggers}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember how far the loggers were."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the clocks, and rewind the loggers."""
        self._mark = (time.monotonic(), *_counts(trainer, pl_module))
        for logger in self._loggers:
            if type(logger).__name__ in self._saved:
                logger.load_state_dict(self._saved[type(logger).__name__])
        self._timer = timer_for(pl_module.device)
        self._timer.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Flush when the interval is over."""
        assert isinstance(pl_module, WorldModelModule)
        if pl_module.updates % pl_module.log_every == 0:
            self.flush(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Flush what is left."""
        self.flush(trainer, pl_module)
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the clock, for Lightning tears nothing down after an error."""
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.__exit__()
            self._timer = None

    def flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything since the last flush."""
        with phase("log"):
            self._flush(trainer, pl_module)

    def _flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, WorldModelModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.update_replay()
        episodes = _drain(data.collector)
        for episode in episodes:
            step = int(episode.pop("env_steps"))
            log(trainer, {f"episode/{name}": value for name, value in episode.items()}, step)
        if not pl_module.metrics.count and not pl_module.metrics.once:
            return
        now = time.monotonic()
        then, steps, updates = self._mark
        self._mark = (now, *_counts(trainer, pl_module))
        seconds = max(now - then, 1e-9)
        metrics = {f"train/{k}": v for k, v in pl_module.metrics.flush().items()}
        metrics["train/updates"] = pl_module.updates
        metrics["fps/env"] = (self._mark[1] - steps) / seconds
        replayed = (self._mark[2] - updates) * data.batch_size * data.sequence_length
        metrics["fps/train"] = replayed / seconds
        metrics["replay/size"] = len(data.buffer)
        metrics["replay/ratio"] = data.replay_ratio
        if data.collector is not None:
            metrics |= data.collector.metrics()
        if self._timer is not None:
            metrics |= _timings(self._timer.flush(), self._mark[2] - updates)
        log(trainer, metrics, x_axis(trainer, pl_module))


class Evaluation(Callback):
    """Score the agent every so many environment steps, and keep the model that scored best.

    evaluate: returns the scores, eval/return among them.
    every: environment steps between evaluations; 0 for none. One more follows at the end.
    folder: where the best model is saved; None to keep none.
    best: {"step", "return"} of that model, or None before the first evaluation.
    """

    def __init__(
        self, evaluate: Callable[[], dict[str, float]], every: int, folder: Path | None = None
    ) -> None:
        self.evaluate, self.every, self.folder = evaluate, every, folder
        self.best: dict[str, float] | None = None
        self._next = every
        self._scored = -1  # updates of the model that was scored last
        # Of the best model, while they do not lie in its folder: after a resume, on a full disk.
        self._weights: dict[str, Any] | None = None
        self._changed = False  # whether a resumed run evaluates at other steps than before

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume, put the best model back: a later one may have been saved since."""
        self._save_best(pl_module)
        if self._changed:
            steps = x_axis(trainer, pl_module)
            self._next = steps - steps % self.every + self.every

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate when it is time."""
        steps = x_axis(trainer, pl_module)
        if not self.every or steps < self._next:
            return
        self._next = steps - steps % self.every + self.every
        self._score(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Give the last model its chance, if it has not just had it."""
        assert isinstance(pl_module, WorldModelModule)
        if self.every and pl_module.updates != self._scored:
            self._score(trainer, pl_module)
        self._save_best(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the best model and when the next evaluation is due."""
        weights = self._weights
        if weights is None and self.folder is not None and self.best is not None:
            weights = read_saved(self.folder)[1]
        state = {"every": self.every, "next": self._next, "scored": self._scored}
        return {**state, "best": self.best, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned, unless this run keeps no best model any more."""
        self._next, self._scored = state_dict["next"], state_dict["scored"]
        self._changed = bool(self.every) and self.every != state_dict["every"]
        if self.every and (self.folder is not None or state_dict["weights"] is None):
            self.best, self._weights = state_dict["best"], state_dict["weights"]

    def _score(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, WorldModelModule)
        # The random numbers of an evaluation are its own only while nobody else draws any.
        trainer.datamodule.update_replay()  # type: ignore[attr-defined]
        with phase("evaluation"):
            step, scores = x_axis(trainer, module), self.evaluate()
        self._scored = module.updates
        log(trainer, scores, step)
        # Of equal scores the later counts: it has seen more.
        if self.folder and (self.best is None or scores["eval/return"] >= self.best["return"]):
            self.best = {"step": step, "return": scores["eval/return"]}
            try:
                save_model(module.model, self.folder)
                self._weights = None
            except OSError as error:
                messages.warning("the best model waits to be saved: %s", error)
                tensors = module.model.state_dict().items()
                self._weights = {k: v.detach().to("cpu", copy=True) for k, v in tensors}

    def _save_best(self, module: LightningModule) -> None:
        assert isinstance(module, WorldModelModule)
        if self._weights is not None and self.folder is not None:
            save_model(module.model, self.folder, self._weights)
            self._weights = None


class OpenLoop(Callback):
    """Show what the model imagines: truth, prediction and error of what was collected last.

    every: updates between pictures; 0 for none. context: rows that are watched before imagining.
    length: rows of a picture, if so many are within one episode.
    """

    def __init__(self, every: int = 1000, context: int = 5, length: int = 50) -> None:
        self.every, self.context, self.length = every, context, length

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Draw a picture when it is time."""
        assert isinstance(pl_module, WorldModelModule)
        if not self.every or pl_module.updates % self.every:
            return
        with phase("pictures"):
            self._draw(trainer, pl_module)

    def _draw(self, trainer: Trainer, pl_module: WorldModelModule) -> None:
        from worldloom.training.pictures import open_loop

        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        data.update_replay()
        sequence: Any = data.buffer.newest(self.length, pl_module.device)
        own = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=own):  # looking must not change what is learned
            pictures = open_loop(pl_module.model, sequence, self.context)
        for logger in trainer.loggers:
            if hasattr(logger, "log_picture"):
                for name, picture in pictures.items():
                    logger.log_picture(f"imagination/{name}", picture, x_axis(trainer, pl_module))


def _timings(seconds: dict[str, float], updates: int) -> dict[str, float]:
    """Return milliseconds per update of every phase, and of all together."""
    ms = {name: 1e3 * value / max(updates, 1) for name, value in seconds.items()}
    return {f"timings/{name}": value for name, value in {**ms, "update": sum(ms.values())}.items()}


def _drain(collector: Any) -> list[dict[str, float]]:
    """Take the finished episodes out of the collector."""
    if collector is None:
        return []
    episodes = list(collector.finished)
    collector.finished.clear()
    return episodes


def x_axis(trainer: Trainer, module: LightningModule) -> int:
    """Return the position on the x-axis: environment steps, or updates if nothing is collected."""
    steps, updates = _counts(trainer, module)
    data: Any = trainer.datamodule  # type: ignore[attr-defined]
    return updates if data.collector is None else steps


def log(trainer: Trainer, metrics: dict[str, Any], step: int) -> None:
    """Send metrics to every logger."""
    for logger in trainer.loggers:
        logger.log_metrics(metrics, step=step)


def _counts(trainer: Trainer, module: LightningModule) -> tuple[int, int]:
    assert isinstance(module, WorldModelModule)
    return trainer.datamodule.env_steps, module.updates  # type: ignore[attr-defined]
