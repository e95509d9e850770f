"""Callbacks of training: metrics, evaluation and pictures of the imagination."""

import logging
import math
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from worldloom.acting import EvaluationStopped
from worldloom.saving import read_saved, save_model
from worldloom.timing import Timer, phase, timer_for
from worldloom.training.checkpoint_files import copy_to_cpu
from worldloom.training.media import log_pictures
from worldloom.training.metrics import (
    COUNTERS,
    counters,
    current_step,
    group_metric,
    log_metrics,
    name_scores,
)
from worldloom.training.module import WorldModelModule
from worldloom.training.periodic import Periodic
from worldloom.training.progress import print_line

messages = logging.getLogger(__name__)


class MetricsWriter(Callback):
    """Send loss/…, stats/…, episode/…, fps/…, replay/… and timings/… to the loggers.

    Metrics are written every `log_every` updates. timings/… are milliseconds per update, averaged
    since the last write: for every marked phase (see `worldloom.timing`), and timings/update for
    their sum.

    The x-axis is environment steps in online runs and updates in offline runs. When a run resumes,
    its loggers return to their state in the checkpoint; later points are written again.
    """

    def __init__(self) -> None:
        self._last = (0.0, 0, 0)  # time, environment steps and updates at the last write
        self._timer: Timer | None = None
        self._loggers: list[Any] = []
        self._saved: dict[str, Any] = {}
        self._warned = False  # of a value that is not finite

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find the loggers that have a state."""
        self._loggers = [logger for logger in trainer.loggers if hasattr(logger, "state_dict")]

    def state_dict(self) -> dict[str, Any]:
        """Return the states of the loggers."""
        states = {key_of(logger): logger.state_dict() for logger in self._loggers}
        return {key: state for key, state in states.items() if state is not None}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the states of the loggers until training starts."""
        self._saved = state_dict

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Start the timer and restore the loggers."""
        assert isinstance(pl_module, WorldModelModule)
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        self._last = (time.monotonic(), data.env_steps, pl_module.updates)
        for logger in self._loggers:
            if key_of(logger) in self._saved:
                logger.load_state_dict(self._saved[key_of(logger)])
        self._timer = timer_for(pl_module.device)
        self._timer.__enter__()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Write the metrics if they are due."""
        assert isinstance(pl_module, WorldModelModule)
        if pl_module.updates % pl_module.log_every == 0:
            self.flush(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write the remaining metrics."""
        self.flush(trainer, pl_module)
        self._stop()

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Stop the timer; Lightning does not call `teardown` after an error."""
        self._stop()

    def _stop(self) -> None:
        if self._timer is not None:
            self._timer.__exit__()
            self._timer = None

    def flush(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write everything since the last flush."""
        assert isinstance(pl_module, WorldModelModule)
        with phase("log"):
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            data.update_replay()
            log_episodes(trainer, data.collector)
            if pl_module.metrics.count or pl_module.metrics.once:
                metrics = self._collect(trainer, pl_module, data)
                log_metrics(trainer, metrics, current_step(trainer))

    def _collect(self, trainer: Trainer, module: WorldModelModule, data: Any) -> dict[str, Any]:
        """Return all metrics but those of episodes."""
        then, steps, updates = self._last
        self._last = (time.monotonic(), data.env_steps, module.updates)
        seconds = max(self._last[0] - then, 1e-9)
        new_steps, new_updates = self._last[1] - steps, self._last[2] - updates
        groups = trainer.optimizers[0].param_groups
        metrics = {"stats/learning_rate": max(float(group["lr"]) for group in groups)}
        found = module.metrics.flush(data.ranks)
        means = {group_metric(name): mean for name, mean in found.items()}
        bad = [f"{name} is {mean}" for name, mean in means.items() if not math.isfinite(mean)]
        if bad and not self._warned:
            self._warned = True
            messages.warning(
                "in the metrics up to update %d, %s; training goes on, since the loss and the "
                "gradients are finite; later ones are not reported",
                module.updates,
                ", ".join(bad),
            )
        metrics |= means
        metrics["fps/env"] = new_steps / seconds
        metrics["fps/train"] = new_updates * data.batch_size * data.sequence_length / seconds
        metrics["replay/size"] = int(data.ranks.share(len(data.buffer)).sum())
        metrics["replay/ratio"] = data.replay_ratio
        if self._timer is not None:
            metrics |= _timings(self._timer.flush(), new_updates)
        return metrics


class Evaluation(Callback):
    """Evaluate the agent at regular intervals, print the scores and keep the best model.

    evaluate: returns the scores, including "return".
    every: environment steps between evaluations; 0 for none. Another one follows at the end.
    folder: folder in which the best model is saved; None to keep none.
    videos: shows evaluations; its `start` is called before each one and `finish` after it.
    best: {"step", "return"} of the best model, or None before the first evaluation.
    """

    def __init__(
        self,
        evaluate: Callable[[], dict[str, float]],
        every: int,
        folder: Path | None = None,
        videos: Any = None,
    ) -> None:
        self.evaluate, self.every, self.folder, self.videos = evaluate, every, folder, videos
        self.best: dict[str, float] | None = None
        self._next = every
        self._owed: dict[str, float] | None = None  # counters at an evaluation that was stopped
        self._highest: float | None = None  # return so far
        self.evaluated = -1  # updates of the model that was evaluated last
        # Weights of the best model while the folder does not have them: after a resume, or if the
        # disk is full.
        self._weights: dict[str, Any] | None = None
        self._changed = False  # whether a resumed run evaluates at other steps than before
        self._writes = True  # whether this process saves and prints: only the first rank does

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Find out whether this process saves and prints."""
        self._writes = trainer.is_global_zero

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """After a resume, restore the best model; the folder may have a later one."""
        self._save_best(pl_module)
        if self._changed:
            self._schedule(current_step(trainer))

    def on_train_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int
    ) -> None:
        """Repeat an evaluation that was stopped; the model is still the same."""
        if self._owed is not None:
            self._evaluate(trainer, pl_module)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Evaluate the model if an evaluation is due."""
        step = current_step(trainer)
        if self.every and step >= self._next:
            self._schedule(step)
            self._evaluate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Evaluate the final model unless it was just evaluated."""
        assert isinstance(pl_module, WorldModelModule)
        if self.every and pl_module.updates != self.evaluated:
            self._evaluate(trainer, pl_module)
        self._save_best(pl_module)

    def state_dict(self) -> dict[str, Any]:
        """Return the best score, the best model and the step of the next evaluation."""
        weights = self._weights
        if weights is None and self._writes and self.folder is not None and self.best is not None:
            weights = read_saved(self.folder)[1]
        state: dict[str, Any] = {"every": self.every, "next": self._next, "owed": self._owed}
        state["evaluated"] = self.evaluated
        return {**state, "highest": self._highest, "best": self.best, "weights": weights}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; without the best model if this run keeps none."""
        self._next, self.evaluated = state_dict["next"], state_dict["evaluated"]
        self._highest = state_dict["highest"]
        self._owed = state_dict.get("owed") if self.every else None
        self._changed = bool(self.every) and self.every != state_dict["every"]
        if self.every and (self.folder is not None or state_dict["weights"] is None):
            self.best, self._weights = state_dict["best"], state_dict["weights"]

    def _schedule(self, step: int) -> None:
        self._next = step - step % self.every + self.every

    def _evaluate(self, trainer: Trainer, module: LightningModule) -> None:
        assert isinstance(module, WorldModelModule)
        # No other thread may draw random numbers during the evaluation.
        trainer.datamodule.update_replay()  # type: ignore[attr-defined]
        counts = self._owed or {"step": current_step(trainer), **counters(trainer)}
        step = int(counts["step"])
        if self.videos is not None:
            self.videos.start(step, self.every)
        try:
            with phase("evaluation"):
                scores = self.evaluate()
        except EvaluationStopped:  # the run stops after this callback
            self._owed = counts
            return
        self.evaluated, self._owed = module.updates, None
        # Earlier points first: TensorBoard connects points in the order in which they are logged.
        log_episodes(trainer, trainer.datamodule.collector, step)  # type: ignore[attr-defined]
        own = name_scores("eval", scores)
        log_metrics(trainer, {**own, **{name: counts[name] for name in COUNTERS}}, step)
        if self.videos is not None:
            with phase("pictures"):
                self.videos.finish(trainer, "eval", step)
        if self._writes:
            data: Any = trainer.datamodule  # type: ignore[attr-defined]
            unit = "update" if data.collector is None else "env step"
            print_line(f"evaluation at {unit} {step:,}: {describe_scores(scores, self._highest)}")
        if is_best(scores["return"], self._highest):
            self._highest = scores["return"]
        # Of equal scores the later model is kept, which was trained longer.
        kept = None if self.best is None else self.best["return"]
        if self.folder and is_best(scores["return"], kept):
            self.best = {"step": step, "return": scores["return"]}
            if self._writes:
                self._save(module, self.folder)

    def _save(self, module: WorldModelModule, folder: Path) -> None:
        try:
            _save_model(module, folder)
            self._weights = None
        except OSError as error:
            messages.warning("the best model cannot be saved now, and will be later: %s", error)
            self._weights = copy_to_cpu(module.model.state_dict())

    def _save_best(self, module: LightningModule) -> None:
        assert isinstance(module, WorldModelModule)
        if self._weights is not None and self._writes and self.folder is not None:
            _save_model(module, self.folder, self._weights)
            self._weights = None


def _save_model(module: WorldModelModule, folder: Path, weights: Any = None) -> None:
    folder.parent.stat()  # `save_model` would make a run's folder again that was moved
    save_model(module.model, folder, weights)


def describe_scores(scores: dict[str, float], highest: float | None) -> str:
    """Return the scores of an evaluation as text; highest: return of the earlier ones, if any."""
    spread = f" ± {scores['return_std']:.4g}" if "return_std" in scores else ""
    parts = [f"return {scores['return']:.4g}{spread}", f"length {scores['length']:.4g}"]
    if "success" in scores:
        parts.append(f"success {scores['success']:.2f}")
    if "normalized_score" in scores:
        parts.append(f"normalized score {scores['normalized_score']:.2f}")
    best = "" if is_best(scores["return"], highest) else f": {highest:.4g}"
    return f"{', '.join(parts)} (best so far{best})"


def is_best(score: float, highest: float | None) -> bool:
    """Return whether a score is at least as high as those before; any is better than NaN."""
    return highest is None or math.isnan(highest) or score >= highest


class OpenLoop(Periodic):
    """Visualise the imagination: truth, prediction and error in the newest collected rows.

    A model that does not decode observations, or that raises an error here, is reported once.

    every: updates between pictures, see `Periodic`. context: rows observed before imagining.
    length: maximum number of rows of a sequence, which is part of a single episode.
    sequences: maximum number of sequences.
    """

    def __init__(
        self, every: int | str = "auto", context: int = 5, length: int = 50, sequences: int = 3
    ) -> None:
        super().__init__(every)
        self.context, self.length, self.sequences = context, length, sequences
        self._reported = False  # what is not drawn, and why

    def act(self, trainer: Trainer, module: WorldModelModule) -> None:
        """Log the pictures."""
        if trainer.is_global_zero:
            with phase("pictures"):
                self._log_pictures(trainer, module, trainer.datamodule)  # type: ignore[attr-defined]

    def _log_pictures(self, trainer: Trainer, pl_module: WorldModelModule, data: Any) -> None:
        from worldloom.training.pictures import find_stretches, open_loop

        rows: Any = data.buffer.newest(self.sequences * self.length, pl_module.device)
        parts = find_stretches(rows["is_first"], self.context, self.length)[: self.sequences]
        pictures, problem = {}, "decodes no 'obs', so no observations are pictured"
        gpus = [pl_module.device] if pl_module.device.type == "cuda" else []
        with torch.random.fork_rng(devices=gpus):  # pictures must not affect training
            try:
                pictures = open_loop(pl_module.model, rows, parts, self.context)
            except Exception as error:
                reason = " ".join(f"{type(error).__name__}: {error}".split())
                problem = f"cannot be pictured ({reason}); the run continues"
        if parts and {*pictures} <= {"open_loop_rewards"} and not self._reported:
            self._reported = True
            level, name = logging.INFO if pictures else logging.WARNING, type(pl_module.model)
            messages.log(level, "callbacks.open_loop: %s %s", name.__name__, problem)
        named = {f"imagination/{name}": picture for name, picture in pictures.items()}
        log_pictures(trainer, named, current_step(trainer))


def key_of(logger: Any) -> str:
    """Return the name of a logger in the configuration, or of its class if it is not guarded."""
    return getattr(logger, "config_key", type(logger).__name__)


def _timings(seconds: dict[str, float], updates: int) -> dict[str, float]:
    """Return milliseconds per update of every phase and of their sum."""
    ms = {name: 1e3 * value / max(updates, 1) for name, value in seconds.items()}
    return {f"timings/{name}": value for name, value in {**ms, "update": sum(ms.values())}.items()}


def log_episodes(trainer: Trainer, collector: Any, last: float = math.inf) -> None:
    """Log the episodes that finished until a step, and remove them from the collector."""
    while collector is not None and collector.finished:
        episode = collector.finished[0]
        if episode["env_steps"] > last:
            return
        named = {k if k in COUNTERS else f"episode/{k}": v for k, v in episode.items()}
        log_metrics(trainer, named, int(episode["env_steps"]))
        del collector.finished[0]
