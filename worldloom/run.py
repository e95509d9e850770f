"""The command: `python -m worldloom.run` composes a configuration, trains, evaluates, reports."""

import logging
import re
import signal
import sys
import time
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from worldloom.app.compose import (
    job_errors,
    readable_errors,
    register_schemas,
    validate,
    with_implied,
)
from worldloom.memory import keep_freed_memory
from worldloom.presets import config_dir

register_schemas()


def train(cfg: DictConfig) -> dict[str, float]:
    """Run or resume one training as configured; return the final scores.

    Everything lies in cfg.folder.
    """
    from worldloom.app.build import is_first_process
    from worldloom.app.run_dir import claimed
    from worldloom.app.saved_config import command

    if not is_first_process():  # which holds the folder for all
        return _train(cfg)
    with claimed(Path(cfg.folder), cfg.resume is not None):
        try:
            return _train(cfg)
        except KeyboardInterrupt:  # before training or in the evaluation after it
            plain: Any = OmegaConf.to_container(cfg, resolve=True)
            go_on = command("run", f"resume={cfg.folder}", config=plain)
            print(f"stopped by SIGINT; to go on:\n{go_on}", flush=True)
            sys.exit(130)


def _train(cfg: DictConfig) -> dict[str, float]:
    from hydra.utils import instantiate
    from lightning.pytorch.callbacks import LambdaCallback

    from worldloom.app.build import (
        Evaluator,
        build_data,
        is_first_process,
        open_task,
        prepare,
        settled,
    )
    from worldloom.app.resume import require_changeable
    from worldloom.app.run_dir import CONFIG, SCORES, begin_anew, read_config, write_text
    from worldloom.factory import transfer
    from worldloom.saving import load_tensors, read_saved, save_model
    from worldloom.training.callbacks import Evaluation, current_step, log_metrics
    from worldloom.training.checkpoint_files import find_usable, has_checkpoint
    from worldloom.training.checkpoints import Checkpoints
    from worldloom.training.config import parse_interval
    from worldloom.training.module import WorldModelModule
    from worldloom.training.precision import require_precision

    parse_interval(cfg.checkpoint.every)
    require_precision(cfg.trainer.get("precision"))
    prepare(cfg.seed, cfg.threads)
    folder = Path(cfg.folder)
    config = settled(cfg)
    plain: Any = OmegaConf.to_container(OmegaConf.create(config), resolve=True)
    resumes = False
    if cfg.resume is not None:
        changes = require_changeable(read_config(folder), config)
        print(f"resuming {folder}", *changes, sep="\n  ", flush=True)
        if not (resumes := has_checkpoint(folder / "checkpoints")):
            print("it was stopped before its first checkpoint, so it begins anew", flush=True)
    if not resumes and is_first_process():
        begin_anew(folder)
    task, dataset = open_task(plain)
    model: Any = task.build_model(plain["model"])
    if cfg.init_from is not None and not resumes:
        print(transfer(model, cfg.init_from).report(), flush=True)
    actor = task.build_actor(model, plain["planner"])
    data = build_data(plain, task, actor, dataset)
    saved = find_usable(folder / "checkpoints", data.damaged) if resumes else None
    if saved is not None:
        require_shapes(model, saved[1], folder)
    module = WorldModelModule(
        model,
        instantiate(cfg.optimizer),
        log_every=cfg.training.log_every,
        config=plain,
        nonfinite=cfg.nonfinite,
        folder=folder,
    )
    evaluator = Evaluator(task, actor, plain["evaluation"])
    best = folder / "model" if cfg.evaluation.keep_best else None
    every = cfg.evaluation.every if task.make_env is not None else 0
    during = Evaluation(evaluator.during, every, best)
    callbacks = [instantiate(callback) for callback in cfg.callbacks.values() if callback]

    def begin(*_: Any) -> None:
        write_text(folder / CONFIG, OmegaConf.to_yaml(OmegaConf.create(config)))
        (folder / SCORES).unlink(missing_ok=True)

    if resumes:  # the folder stays as it is until everything in the checkpoint was taken back
        callbacks.append(LambdaCallback(on_train_start=begin))
    else:
        begin()
    trainer = instantiate(
        cfg.trainer,
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        # What the others do after an update belongs to a checkpoint of it.
        callbacks=sorted([during, *callbacks], key=lambda c: isinstance(c, Checkpoints)),
    )
    if resumes and trainer.world_size > 1:
        raise ValueError(
            f"a run in {trainer.world_size} processes cannot be resumed yet: its checkpoint holds "
            "the replay of the first one alone; resume it in one (trainer.devices=1), or begin a "
            f"new run from its weights: init_from={folder}"
        )
    print(
        task.describe(model),
        data.buffer.resources,
        f"everything lies in {folder}",
        sep="\n",
        flush=True,
    )

    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
    start = time.monotonic()
    fit(trainer, module, data, None if saved is None else saved[0], folder)
    if during.best is not None:
        load_tensors(model, read_saved(folder / "model")[1], folder)
    else:
        save_model(model, folder / "model")
    scores = evaluator(cfg.evaluation.episodes) if task.make_env is not None else {}
    step = current_step(trainer, module)
    if scores:
        log_metrics(trainer, scores, step)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain, scores, step)
        logger.finalize("success")
    unit = "env step" if dataset is None else "update"
    which = f" of the best model, from {unit} {during.best['step']:,}" if during.best else ""
    write_text(folder / SCORES, OmegaConf.to_yaml({"step": step, **scores}))
    report(cfg, plain, scores, which, time.monotonic() - start)
    return scores


def fit(trainer: Any, module: Any, data: Any, checkpoint: Path | None, folder: Path) -> None:
    """Train to the end, from a checkpoint if there is one.

    A signal stops the run between two updates; it is saved, says how to go on, and ends with the
    exit code that shells know of the signal.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from worldloom.app.saved_config import command
    from worldloom.training.checkpoint_files import has_checkpoint
    from worldloom.training.checkpoints import Checkpoints
    from worldloom.training.interruption import Interrupted, Interruption

    interruption = Interruption()
    data.check_interruption = interruption.check
    try:
        with interruption.listening():
            trainer.fit(module, data, ckpt_path=checkpoint)
        interruption.check()
    except (Interrupted, SIGTERMException) as raised:
        stopped = raised if isinstance(raised, Interrupted) else Interrupted(signal.SIGTERM)
        done = f"{data.env_steps:,} environment steps and {module.updates:,} updates"
        kept = (
            f"saved after {done}"
            if stopped.between
            else "what came after the last checkpoint is lost"
        )
        if not any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):
            kept = "nothing was saved, for callbacks.checkpoint was left out"
        go_on = command("run", f"resume={folder}", config=module.hparams["run"])
        print(f"{stopped}; {kept}; to go on:\n{go_on}", flush=True)
        sys.exit(stopped.exit_code)
    except Exception:
        if has_checkpoint(folder / "checkpoints"):
            go_on = command("run", f"resume={folder}", config=module.hparams["run"])
            print(f"to go on from the last checkpoint:\n{go_on}", flush=True)
        raise
    finally:
        data.close()


def require_shapes(model: Any, checkpoint: dict[str, Any], folder: Path) -> None:
    """Refuse to resume with a model that the checkpoint's tensors do not fit."""
    saved = {k.removeprefix("model."): v.shape for k, v in checkpoint["state_dict"].items()}
    now = {k: v.shape for k, v in model.state_dict().items()}
    wrong = [k for k in {**saved, **now} if saved.get(k) != now.get(k)]
    if wrong:
        was, gets = (x.get(wrong[0]) for x in (saved, now))
        raise ValueError(
            f"the overrides change the model's shapes: {wrong[0]} has {was and tuple(was)} in the "
            f"checkpoint, and {gets and tuple(gets)} now; leave them out, or begin a new run from "
            f"this one's weights: init_from={folder}"
        )


def report(
    cfg: DictConfig, plain: dict[str, Any], scores: dict[str, float], which: str, seconds: float
) -> None:
    """Print what came out, and what to do with it."""
    from worldloom.app.saved_config import command

    final, score = "there was no environment, so nothing was evaluated", " env=… (as in a run)"
    if scores:
        mean, std = scores["eval/return"], scores["eval/return_std"]
        final = f"final return {mean:.1f} ± {std:.1f} ({cfg.evaluation.episodes} episodes){which}"
        score = ""
    print(
        f"\n{final}\n"
        f"trained in {seconds / 60:.1f} minutes\n"
        f"everything:  {cfg.folder}\n"
        f"watch it:    tensorboard --logdir {cfg.folder}\n"
        f"score it:    {command('eval', f'checkpoint={cfg.folder}', config=plain)}{score}\n"
        f"act with it: model = worldloom.create_world_model({str(cfg.folder)!r})",
        flush=True,
    )


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    with job_errors():
        validate(cfg)
        logging.captureWarnings(True)
        logging.raiseExceptions = False  # where worldloom.log cannot be written, go on
        return train(cfg).get("eval/return")


def main() -> None:
    """Run the command line."""
    keep_freed_memory()
    with readable_errors(), TemporaryDirectory() as scratch:
        words: list[str] | None = with_implied(sys.argv[1:])
        if any(re.match(r"\+*resume=", word) for word in sys.argv[1:]):
            from worldloom.app.resume import resumed_words

            words = resumed_words(sys.argv[1:], Path(scratch))
        if words is not None:
            sys.argv[1:] = words
            _hydra_main()


if __name__ == "__main__":
    main()
