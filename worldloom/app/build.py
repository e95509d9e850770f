"""Building of a run: from a resolved configuration to the trainer, module and data."""

import logging
import os
import threading
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from worldloom.acting import Actor
from worldloom.app.auto_precision import resolve_precision
from worldloom.app.data import build_data, open_task
from worldloom.app.evaluator import Evaluator
from worldloom.app.resume import require_changeable
from worldloom.app.run_dir import SCORES, clear_start, read_config, write_config
from worldloom.app.saved_config import ResolvedConfig
from worldloom.app.shares import take_share
from worldloom.app.task import Task
from worldloom.app.tasks import require_known_tasks
from worldloom.app.unsupported import require_supported
from worldloom.app.videos import Videos
from worldloom.cuda_graphs import record_graph
from worldloom.envs.workers import count_cores
from worldloom.errors import escape, quote
from worldloom.factory import transfer
from worldloom.ranks import Ranks, rank, world_size

OWN = ("max_time", "max_steps", "capture", "compile")  # keys of trainer that are not Lightning's


@dataclass
class Run:
    """Everything that a run trains with.

    checkpoint: to continue from; None for a new run.
    limits: after which the run stops, unfinished.
    evaluation: the callback that scores the model during the run; it has the best one.
    unit: what total_steps counts, "env step" or "update".
    """

    config: ResolvedConfig
    folder: Path
    task: Task
    model: Any
    data: Any
    module: Any
    trainer: Any
    evaluator: Evaluator
    evaluation: Any
    limits: Any
    checkpoint: Path | None
    unit: str


def build_run(config: ResolvedConfig, resume: bool) -> Run:
    """Build a run from its configuration, after the changes on resume were checked and printed.

    resume: continue the run in its folder, from its last checkpoint if it has one.
    """
    from worldloom.app.forecast import Forecast
    from worldloom.training.callbacks import Evaluation
    from worldloom.training.interruption import Limits, asks_to_stop
    from worldloom.training.module import WorldModelModule
    from worldloom.training.progress import print_line

    plain, folder = take_share(config.plain, world_size()), Path(config.plain["folder"])
    limits = Limits(*(plain["trainer"].get(name) for name in ("max_time", "max_steps")))
    prepare_process(plain["seed"], plain["threads"])
    ranks = Ranks()
    ranks.connect()
    before, resumes = _begin(config, folder, resume, ranks)
    task, dataset = open_task(plain)
    model: Any = task.build_model(plain["model"])
    if plain["init_from"] is not None and not resumes:
        require_known_tasks(plain["init_from"], plain["env"])
        print(transfer(model, plain["init_from"]).report(), flush=True)
    config = resolve_precision(config, before, model, ranks)
    actor = _build_actor(config.plain, task, model)
    data = build_data(plain, task, actor, dataset)
    checkpoint = find_checkpoint(folder, data, model, limits, ranks) if resumes else None
    module = WorldModelModule(
        model,
        instantiate("optimizer", plain["optimizer"]),
        log_every=plain["training"]["log_every"],
        config=config.plain,
        nonfinite=plain["nonfinite"],
        folder=folder,
        capture=plain["trainer"].get("capture", "auto"),
        compile=plain["trainer"].get("compile", "auto"),
    )
    stops = lambda: asks_to_stop(data.check_interruption)  # noqa: E731
    videos = Videos(task, plain, folder, data.ranks)
    settings = plain["evaluation"]
    evaluator = Evaluator(task, actor, settings, data.ranks, stops, print_line, videos)
    every = settings["every"] if task.make_env is not None else 0
    best = folder / "model" if settings["keep_best"] else None
    evaluation = Evaluation(evaluator.score_unfinished, every, best, videos)
    trainer = build_trainer(config, folder, evaluation, resumes)
    trainer.callbacks.insert(0, Forecast(task))
    return Run(
        config=config,
        folder=folder,
        task=task,
        model=model,
        data=data,
        module=module,
        trainer=trainer,
        evaluator=evaluator,
        evaluation=evaluation,
        limits=limits,
        checkpoint=checkpoint,
        unit="env step" if dataset is None else "update",
    )


def _begin(
    config: ResolvedConfig, folder: Path, resume: bool, ranks: Ranks
) -> tuple[dict[str, Any], bool]:
    """Return the saved configuration of a resumed run, or {}, and whether it has a checkpoint.

    Changes on resume are checked and printed. What a run without checkpoint has left is removed.
    """
    from worldloom.training.checkpoint_files import has_checkpoint

    resumes = bool(ranks.decide(resume and has_checkpoint(folder / "checkpoints")))
    before = read_config(folder) if resume else {}
    if resume:
        changes = require_changeable(before, config.saved)
        print(f"resuming {folder}", *map(escape, changes), sep="\n  ", flush=True)
    if resume and not resumes:
        print("it was stopped before its first checkpoint, so it starts again", flush=True)
    if not resumes and rank() == 0:
        clear_start(folder)
    ranks.share(0)  # nobody writes to the folder before
    return before, resumes


def find_checkpoint(folder: Path, data: Any, model: Any, limits: Any, ranks: Ranks) -> Path:
    """Return the checkpoint from which all ranks continue a run.

    Raises:
        ValueError: none is intact, the model has other shapes, or the limit is reached already.
    """
    from worldloom.training.checkpoint_files import find_usable

    path, saved = find_usable(folder / "checkpoints", data.damaged, ranks)
    require_shapes(model, saved, folder)
    if saved["updates"] >= limits.max_steps > -1:
        raise ValueError(
            f"trainer.max_steps is {limits.max_steps}, but the run already has "
            f"{saved['updates']} updates; raise it, or remove the limit: trainer.max_steps=-1"
        )
    return path


def build_trainer(config: ResolvedConfig, folder: Path, evaluation: Any, resumes: bool) -> Any:
    """Build the trainer with its loggers and callbacks; a new run writes its configuration.

    A resumed run writes it only when training starts: its folder stays unchanged until everything
    in the checkpoint was restored.

    Raises:
        ValueError: a logger or callback cannot be built or monitors a metric that does not exist.
    """
    from lightning.fabric.plugins.environments import LightningEnvironment
    from lightning.pytorch.callbacks import Checkpoint, LambdaCallback
    from lightning.pytorch.loggers.logger import DummyLogger

    from worldloom.training.checkpoints import Checkpoints
    from worldloom.training.logger_guard import guard_loggers
    from worldloom.training.monitors import Monitors, require_evaluations

    def begin(*_: Any) -> None:
        write_config(folder, config.saved)
        (folder / SCORES).unlink(missing_ok=True)

    loggers, callbacks = (
        {key: instantiate(f"{group}.{key}", part) for key, part in parts.items() if part}
        for group, parts in (
            ("logger", config.plain["logger"] if rank() == 0 else {}),
            ("callbacks", config.plain["callbacks"]),
        )
    )
    for key, callback in callbacks.items():  # validation does not know what a function returns
        require_supported(f"callbacks.{key}", type(callback))
    require_evaluations(callbacks, bool(evaluation.every))
    place_checkpoints(callbacks, folder)
    if rank() == 0 and resumes:
        callbacks["begin"] = LambdaCallback(on_train_start=begin)
    elif rank() == 0:
        begin()
    options: dict[str, Any] = {}
    # All processes are there: Lightning starts none. In a SLURM job it would handle signals itself.
    if world_size() > 1 or "SLURM_JOB_ID" in os.environ:
        options["plugins"] = [LightningEnvironment()]
    trainer = instantiate(
        "trainer",
        {k: v for k, v in config.plain["trainer"].items() if k not in OWN},
        logger=list(loggers.values()),
        callbacks=[evaluation, *callbacks.values(), Monitors(evaluation, callbacks)],
        enable_checkpointing=any(isinstance(c, Checkpoint) for c in callbacks.values()),
        **options,
    )
    # A checkpoint includes what the other callbacks did, although Lightning moves its own last.
    trainer.callbacks.sort(key=lambda c: isinstance(c, Checkpoint) + 2 * isinstance(c, Checkpoints))
    guard_loggers(trainer, loggers)
    if world_size() > 1:
        # Lightning's handler of SIGTERM exchanges tensors in the middle of any other exchange.
        trainer._signal_connector.register_signal_handlers = lambda: None
    if rank() > 0:  # LearningRateMonitor requires a logger
        trainer.loggers = [DummyLogger()]
    return trainer


def place_checkpoints(callbacks: Mapping[str, Any], folder: Path) -> None:
    """Give each of Lightning's ModelCheckpoint callbacks its own folder in the run folder.

    Raises:
        ValueError: one of them would write into the folder of the run's own checkpoints.
    """
    from lightning.pytorch.callbacks import ModelCheckpoint

    for key, callback in callbacks.items():
        if not isinstance(callback, ModelCheckpoint):
            continue
        if callback.dirpath is None:
            callback.dirpath = str(folder / "model_checkpoints" / key)
        elif Path(callback.dirpath).resolve() == (folder / "checkpoints").resolve():
            raise ValueError(
                f"callbacks.{key}.dirpath is the folder of the checkpoints that resume the run; "
                "choose another one, or leave it out"
            )


def _build_actor(plain: Mapping[str, Any], task: Task, model: Any) -> Actor:
    """Return the run's actor, whose decisions are recorded as its updates are."""
    from worldloom.training.capture import require_mode

    trainer = plain["trainer"]
    records = require_mode("capture", trainer.get("capture", "auto")) != "off"
    record = record_graph if records and not plain["data"].get("overlap") else None
    return task.build_actor(model, plain["planner"], trainer.get("precision"), record)


def instantiate(name: str, section: Mapping[str, Any], **arguments: Any) -> Any:
    """Build the class that `_target_` names in a section, or ValueError with the section's name."""
    import hydra.utils
    from hydra.errors import InstantiationException

    try:
        return hydra.utils.instantiate(section, **arguments)
    except InstantiationException as error:
        raise ValueError(f"{name}: {error.__cause__ or error}") from error


def require_shapes(model: Any, checkpoint: dict[str, Any], folder: Path) -> None:
    """Raise ValueError if a checkpoint's tensors do not fit the model of the resumed run."""
    tensors = {k.removeprefix("model."): v for k, v in checkpoint["state_dict"].items()}
    saved = {k: v.shape for k, v in tensors.items()}
    now = {k: v.shape for k, v in model.state_dict().items()}
    wrong = [k for k in {**saved, **now} if saved.get(k) != now.get(k)]
    if wrong:
        before, after = (shapes.get(wrong[0]) for shapes in (saved, now))
        raise ValueError(
            f"the overrides change the model's shapes: {wrong[0]} has {before and tuple(before)} "
            f"in the checkpoint, and {after and tuple(after)} now; leave them out, or begin a new "
            f"run from this one's weights: {quote(f'init_from={folder}')}"
        )
    if require := getattr(model, "require_same_inputs", None):
        require(checkpoint["hyper_parameters"].get("model"), tensors, folder)


def prepare_process(seed: int, threads: int | None) -> None:
    """Seed all random generators, set torch's CPU threads, and quieten Lightning.

    threads: None for all cores; the processes of a machine share them.
    Each of Lightning's messages then appears once, through Hydra's log, without advertisements.
    """
    import lightning  # adds the handlers that would print every line twice

    lightning.seed_everything(seed, verbose=False)
    if threads is None and world_size() > 1:
        threads = min(torch.get_num_threads(), count_cores())
    if threads:
        torch.set_num_threads(threads)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
    for name in ("lightning.pytorch.utilities.rank_zero", "lightning.fabric.utilities.distributed"):
        logging.getLogger(name).setLevel(logging.WARNING)
    logging.getLogger("urllib3").setLevel(logging.ERROR)  # a failing logger is reported once
    threading.excepthook = _ignore_full_disk
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")
    # '~callbacks.NAME' on resume drops the callback on purpose.
    warnings.filterwarnings("ignore", message=".*callbacks used to create the checkpoint.*")


def _ignore_full_disk(error: threading.ExceptHookArgs) -> None:
    """Print no traceback of TensorBoard's thread on a full disk: the logger warns about it."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)
