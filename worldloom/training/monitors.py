"""Validation hooks for Lightning's callbacks: EarlyStopping, ModelCheckpoint and users' own."""

import logging
from collections.abc import Mapping
from typing import Any

from lightning import Callback, LightningModule, Trainer

from worldloom.training.callbacks import Evaluation
from worldloom.training.module import WorldModelModule

log = logging.getLogger(__name__)

SCORES = ("eval/return", "eval/return_std", "eval/length", "eval/success")


class Monitors(Callback):
    """Call the validation hooks of all callbacks after each evaluation.

    An evaluation counts as Lightning's validation. In a run without evaluations, each row of
    metrics does: every `log_every` updates.

    Must follow the callbacks that log metrics, so that `trainer.callback_metrics` is up to date.

    callbacks: those of the run, by their names in the configuration.
    """

    def __init__(self, evaluation: Evaluation, callbacks: Mapping[str, Callback]) -> None:
        self.evaluation, self.callbacks = evaluation, callbacks
        self._known = False  # whether the names of the losses were checked
        self._validated = -1  # updates at the last call of the hooks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the hooks if this update was followed by an evaluation, or by a row of metrics."""
        assert isinstance(pl_module, WorldModelModule)
        if not self._known and any(name.startswith("loss/") for name in trainer.callback_metrics):
            self._require_metrics(trainer, ("loss/", "stats/"))
            self._known = True
        logged = not self.evaluation.every and pl_module.updates % pl_module.log_every == 0
        if logged or self._evaluated(pl_module):
            self._validate(trainer, pl_module, check=self._known)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the hooks after the evaluation of the final model, and check all names.

        A wrong one is only a warning here: the training is done.
        """
        assert isinstance(pl_module, WorldModelModule)
        if self._evaluated(pl_module):
            self._validate(trainer, pl_module, check=False)
        for message in missing_metrics(trainer, self.callbacks):
            log.warning("%s", message)

    def _evaluated(self, module: WorldModelModule) -> bool:
        new = module.updates != self._validated
        return bool(self.evaluation.every) and new and self.evaluation.evaluated == module.updates

    def _require_metrics(self, trainer: Trainer, prefixes: tuple[str, ...] = ("",)) -> None:
        """Raise ValueError for a callback that monitors a metric which was not logged.

        Scores of the model are not checked: they are logged less often than other metrics.
        """
        expected = {
            key: callback
            for key, callback in self.callbacks.items()
            if not str(monitored(callback)).startswith("imagination/")
        }
        for message in missing_metrics(trainer, expected, prefixes):
            raise ValueError(message)

    def _validate(self, trainer: Trainer, module: WorldModelModule, check: bool) -> None:
        self._validated = module.updates
        for name in ("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"):
            for callback in callbacks_of(trainer):
                getattr(callback, name)(trainer, module)
        if check:
            self._require_metrics(trainer)
        for callback in callbacks_of(trainer):
            if monitored(callback) in (None, *trainer.callback_metrics):
                callback.on_validation_end(trainer, module)


def callbacks_of(trainer: Trainer) -> list[Callback]:
    """Return the callbacks of a trainer, an attribute that Lightning sets without declaring it."""
    return trainer.callbacks  # type: ignore[attr-defined]


def monitored(callback: Any) -> str | None:
    """Return the metric that a callback needs, such as EarlyStopping's `monitor`."""
    needed = getattr(callback, "strict", True)
    return getattr(callback, "monitor", None) if needed else None


def require_evaluations(callbacks: dict[str, Callback], evaluates: bool) -> None:
    """Raise ValueError for a callback that monitors an evaluation which does not take place.

    callbacks: by their names in the configuration.
    """
    for key, callback in callbacks.items():
        name = monitored(callback)
        if name is None or not name.startswith(("eval/", "final/")):
            continue
        if name not in SCORES:
            raise ValueError(
                f"callbacks.{key}.monitor is {name}; expected {', '.join(SCORES)}, or another "
                "metric that is logged during training"
            )
        if not evaluates:
            raise ValueError(
                f"callbacks.{key}.monitor is {name}, but the run evaluates no model while it "
                "trains; set evaluation.every=<environment steps>"
            )


def missing_metrics(
    trainer: Trainer, callbacks: Mapping[str, Callback], prefixes: tuple[str, ...] = ("",)
) -> list[str]:
    """Return a message for each callback that monitors a metric which was not logged.

    callbacks: by their names in the configuration.
    prefixes: check only metrics whose names start with one of them.
    """
    known = trainer.callback_metrics
    return [
        f"callbacks.{key}.monitor is {name}, which was not logged; expected one of "
        f"{', '.join(sorted(known))}; write callbacks.{key}.monitor=NAME, also on resume, or "
        f"'~callbacks.{key}' in place of all its keys"
        for key, callback in callbacks.items()
        if (name := monitored(callback)) and name.startswith(prefixes) and name not in known
    ]
