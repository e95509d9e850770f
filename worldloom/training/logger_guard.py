"""Guarded loggers: an error of a logger is reported once and never stops a run."""

import functools
import logging
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from lightning import Trainer
from lightning.pytorch.loggers import Logger
from lightning.pytorch.loggers.logger import DummyExperiment

from worldloom.training.metrics import counters, current_step

log = logging.getLogger(__name__)

# Members of loggers that Lightning, callbacks and worldloom use.
MEMBERS = (
    *("log_metrics", "log_hyperparams", "log_graph", "log_image", "log_video", "log_picture"),
    *("save", "finalize", "after_save_checkpoint", "state_dict", "load_state_dict"),
    *("experiment", "name", "version", "save_dir", "root_dir", "log_dir"),
)
# After a failed call, a logger is left alone for this many times the duration of the call, so that
# an unreachable server, which fails slowly, costs a run at most a few percent of its time.
PAUSE = 30


class Guard:
    """The guard of one logger.

    key: its name in the configuration.
    """

    def __init__(self, key: str) -> None:
        self.key = key
        self._failed = False
        self._inside = False
        self._until = 0.0

    def protect(self, method: Callable[..., Any], otherwise: Any = None) -> Callable[..., Any]:
        """Return a method that catches errors; it returns `otherwise` after one.

        States are saved and restored during a pause as well.
        """

        @functools.wraps(method)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            if self._inside:  # called by another method of the logger
                return method(*args, **kwargs)
            start = time.monotonic()
            if start < self._until and not method.__name__.endswith("state_dict"):
                return otherwise
            self._inside = True
            try:
                return method(*args, **kwargs)
            except (Exception, SystemExit) as error:
                now = time.monotonic()
                self._until = now + PAUSE * (now - start)
                self.report(error)
                return otherwise
            finally:
                self._inside = False

        return guarded

    def report(self, error: BaseException) -> None:
        """Print the first error."""
        if not self._failed:
            self._failed = True
            reason = " ".join(f"{type(error).__name__}: {error}".split())
            log.warning(
                "logger.%s failed (%s); the run continues, and this logger may miss some points; "
                "its further errors are not reported",
                self.key,
                reason,
            )


def guard_logger(
    logger: Logger,
    key: str,
    complete: Callable[[Mapping[str, Any], int | None], tuple[Mapping[str, Any], int | None]],
) -> None:
    """Guard a logger, in place; it keeps its class, as a subclass with guarded methods.

    Its `log_metrics` is for callers that know neither the x-axis nor the counters: Lightning
    (`pl_module.log`, LearningRateMonitor) and callbacks of users. worldloom calls `log_row`, and
    `attempt(do, *args)` for do(logger, *args).

    key: name of the logger in the configuration; stored as `config_key`.
    complete: returns the metrics and step to log instead of those of an outside caller.
    """
    cls, guard = type(logger), Guard(key)
    members: dict[str, Any] = {"config_key": key, "__module__": cls.__module__}
    for name in MEMBERS:
        member = getattr(cls, name, None)
        if isinstance(member, property) and member.fget is not None:
            otherwise = DummyExperiment() if name == "experiment" else None
            members[name] = property(guard.protect(member.fget, otherwise), member.fset)
        elif callable(member):
            members[name] = guard.protect(member)
    log_row = members["log_metrics"]

    def log_metrics(self: Any, metrics: Mapping[str, Any], step: int | None = None) -> None:
        log_row(self, *complete(metrics, step))

    members |= {"log_row": log_row, "log_metrics": log_metrics}
    members["attempt"] = guard.protect(lambda self, do, *args: do(self, *args))
    logger.__class__ = type(cls.__name__, (cls,), members)


@contextmanager
def finishing_wandb() -> Iterator[None]:
    """Finish the W&B run that a block has started, so that the next job of a sweep starts another.

    It may have been started by worldloom's logger, Lightning's logger, or a callback.
    """
    code = 1
    try:
        yield
        code = 0
    finally:
        wandb: Any = sys.modules.get("wandb")
        if wandb is not None and wandb.run is not None:
            try:
                wandb.finish(exit_code=code)
            except (Exception, SystemExit) as error:
                log.warning("W&B could not finish its run: %s", error)


def guard_loggers(trainer: Trainer, loggers: Mapping[str, Logger]) -> None:
    """Guard all loggers of a trainer; `loggers` has them by their names in the configuration."""

    def complete(
        metrics: Mapping[str, Any], step: int | None
    ) -> tuple[Mapping[str, Any], int | None]:
        """Replace Lightning's x-axis, updates, by the run's, and its epochs by the counters.

        Before training there are neither; Lightning's TensorBoardLogger logs hp_metric then.
        """
        if trainer.datamodule is None:  # type: ignore[attr-defined]
            return metrics, step
        if step is None or abs(step - trainer.global_step) <= 1:
            step = current_step(trainer)
        row = {f"counters/{name}": value for name, value in counters(trainer).items()}
        return row | {name: value for name, value in metrics.items() if name != "epoch"}, step

    for key, logger in loggers.items():
        guard_logger(logger, key, complete)
