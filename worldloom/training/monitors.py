"""Validation hooks for Lightning's callbacks: EarlyStopping, ModelCheckpoint and users' own."""

from typing import Any

from lightning import Callback, LightningModule, Trainer

from worldloom.training.callbacks import Evaluation
from worldloom.training.module import WorldModelModule

SCORES = ("eval/return", "eval/return_std", "eval/length", "eval/success")


class Monitors(Callback):
    """Call the validation hooks of all callbacks after each evaluation.

    An evaluation counts as Lightning's validation. In a run without evaluations, each row of
    metrics does: every `log_every` updates.

    Must follow the callbacks that log metrics, so that `trainer.callback_metrics` is up to date.
    """

    def __init__(self, evaluation: Evaluation) -> None:
        self.evaluation = evaluation
        self._known = False  # whether the names of the losses were checked
        self._validated = -1  # updates at the last call of the hooks

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Call the hooks if this update was followed by an evaluation, or by a row of metrics."""
        assert isinstance(pl_module, WorldModelModule)
        if not self._known and any(name.startswith("loss/") for name in trainer.callback_metrics):
            require_metrics(trainer, ("loss/", "stats/"))
            self._known = True
        logged = not self.evaluation.every and pl_module.updates % pl_module.log_every == 0
        if logged or self._evaluated(pl_module):
            self._validate(trainer, pl_module)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Call the hooks after the evaluation of the final model."""
        assert isinstance(pl_module, WorldModelModule)
        if self._evaluated(pl_module):
            self._validate(trainer, pl_module)

    def _evaluated(self, module: WorldModelModule) -> bool:
        new = module.updates != self._validated
        return bool(self.evaluation.every) and new and self.evaluation.evaluated == module.updates

    def _validate(self, trainer: Trainer, module: WorldModelModule) -> None:
        self._validated = module.updates
        for name in ("on_validation_start", "on_validation_epoch_start", "on_validation_epoch_end"):
            for callback in callbacks_of(trainer):
                getattr(callback, name)(trainer, module)
        if self._known:
            require_metrics(trainer)
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


def require_metrics(trainer: Trainer, prefixes: tuple[str, ...] = ("",)) -> None:
    """Raise ValueError for a callback that monitors a metric which was not logged.

    prefixes: check only metrics whose names start with one of them.
    """
    known = trainer.callback_metrics
    for callback in callbacks_of(trainer):
        name = monitored(callback)
        if name is not None and name.startswith(prefixes) and name not in known:
            raise ValueError(
                f"{type(callback).__name__} monitors {name}, which is not logged; expected one of "
                f"{', '.join(sorted(known))}"
            )
