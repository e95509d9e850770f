"""What runs do not support: parts of Lightning's trainer and callbacks, and some combinations."""

from collections.abc import Mapping
from typing import Any

from worldloom.presets import choice_files, family_name, preset_names

# Trainer arguments -> (accepted values, what to use instead).
TRAINER: dict[str, tuple[tuple[Any, ...], str]] = {
    "accumulate_grad_batches": ((1,), "training.batch_size: every batch is one update"),
    "max_epochs": ((-1, None), "training.total_steps: a run has one epoch"),
    "min_epochs": ((None,), "training.total_steps: a run has one epoch"),
    "min_steps": ((None, 0), "training.total_steps"),
    "limit_train_batches": ((None,), "training.total_steps"),
    "overfit_batches": ((0,), "data=offline with a few episodes"),
    "fast_dev_run": ((False,), "a small training.total_steps: it would skip loggers and callbacks"),
    "barebones": ((False,), "logger.NAME=null and '~callbacks.NAME'"),
    "val_check_interval": ((1_000_000_000,), "evaluation.every"),
    "check_val_every_n_epoch": ((None, 1), "evaluation.every"),
    "logger": ((), "the logger section: logger=NAME or +logger.NAME._target_=…"),
    "callbacks": ((), "the callbacks section: +callbacks.NAME._target_=…"),
}
# Names of strategies that runs support. Others divide the model, or start processes in other ways.
STRATEGIES = (
    *("auto", "single_device"),
    *("ddp", "ddp_find_unused_parameters_true", "ddp_find_unused_parameters_false"),
)
# Base classes of strategies that runs support -> those of their subclasses that they do not.
STRATEGY_CLASSES: dict[str, set[str]] = {
    "DDPStrategy": {"DeepSpeedStrategy", "XLAStrategy"},
    "SingleDeviceStrategy": set(),
}
# Classes of lightning.pytorch.callbacks, also as base classes -> (reason, what to use instead).
CALLBACKS = {
    "GradientAccumulationScheduler": (
        "makes fewer updates than the run counts",
        "training.batch_size: every batch is one update",
    ),
    "StochasticWeightAveraging": (
        "would never act: it averages over epochs, and a run has one",
        "evaluation.keep_best=true, which keeps the best model",
    ),
    "TQDMProgressBar": ("does not know the length of a run", "callbacks.progress, the default"),
    "RichProgressBar": ("does not know the length of a run", "callbacks.progress, the default"),
    "BatchSizeFinder": (
        "trains and collects in trials, which cannot be undone",
        "training.batch_size; python -m worldloom.bench compares sizes",
    ),
    "LearningRateFinder": (
        "trains and collects in trials, which cannot be undone",
        "a few short runs: --multirun training.learning_rate=1e-4,3e-4",
    ),
    "Timer": (
        "ends a run as finished",
        "+trainer.max_time=DD:HH:MM:SS, after which the run can be resumed",
    ),
}


def require_family(recipe: Any, model: Any) -> None:
    """Raise ValueError if a recipe is a published protocol of another family than a preset.

    recipe, model: choices of the groups experiment and model. The protocols of a family are in a
        folder with its name.
    """
    wanted, family = str(recipe).partition("/")[0], family_name(str(model))
    families = {name.partition(":")[0] for name in preset_names()}
    own = [name for name in choice_files("experiment") if name.startswith(f"{family}/")]
    if own and wanted in families and wanted != family:
        raise ValueError(
            f"model is {model}, but experiment={recipe} is a protocol of {wanted}; expected a "
            f"{wanted} model, or a protocol of {family}: experiment={own[0]}"
        )


def require_supported(name: str, cls: Any) -> None:
    """Raise ValueError for a callback that does not act in runs, or silently changes them.

    name: its key in the configuration. cls: its class, or a function that builds the callback,
        which is accepted.
    """
    for base in getattr(cls, "__mro__", ()):
        if base.__module__.startswith("lightning.") and base.__name__ in CALLBACKS:
            reason, instead = CALLBACKS[base.__name__]
            kind = "" if base is cls else f", a {base.__name__}"
            raise ValueError(
                f"{name} is {cls.__name__}{kind}, which {reason}; leave it out and use {instead}"
            )


def require_strategy(trainer: Mapping[str, Any]) -> None:
    """Raise ValueError for a strategy or an argument for several processes that fails in a run.

    trainer: the section of the configuration; its strategy is a name, or a section.
    """
    from worldloom.records import import_target

    strategy = name = trainer.get("strategy") or "auto"
    supported = strategy in STRATEGIES if isinstance(strategy, str) else True
    if isinstance(strategy, Mapping):
        if (method := strategy.get("start_method", "popen")) != "popen":
            raise ValueError(
                f"trainer.strategy.start_method is {method!r}; leave it out: a run starts its "
                "processes with its own command line"
            )
        name = strategy.get("_target_", "lightning.pytorch.strategies.DDPStrategy")
        bases = {base.__name__ for base in getattr(import_target(name), "__mro__", ())}
        supported = any(base in bases and not bases & no for base, no in STRATEGY_CLASSES.items())
    if not supported:
        raise ValueError(
            f"trainer.strategy is {name}, which a run does not support; use trainer=ddp. Each "
            "process holds the whole model: 400M parameters with gradients and optimiser states "
            "take 6.4 GB"
        )
    if trainer.get("sync_batchnorm") and trainer.get("accelerator") == "cpu":
        raise ValueError(
            "trainer.sync_batchnorm is true, but torch synchronises batch statistics only on GPUs; "
            "leave it out: each process then normalises its own rows"
        )
