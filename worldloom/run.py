"""The command: `python -m worldloom.run` composes a configuration, trains, evaluates, reports."""

import logging
import sys
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from worldloom.cli import job_errors, readable_errors, register_schemas, validate, with_implied
from worldloom.presets import config_dir

register_schemas()


def train(cfg: DictConfig) -> dict[str, float]:
    """Run one training as configured; return the final scores. Everything lies in cfg.folder."""
    from hydra.utils import instantiate

    from worldloom.assembly import Evaluator, build_data, open_task, prepare, settle_env
    from worldloom.saving import load_tensors, read_saved, save_model
    from worldloom.training.callbacks import Evaluation, log, x_axis
    from worldloom.training.module import WorldModelModule
    from worldloom.transfer import transfer

    prepare(cfg.seed, cfg.threads)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    folder = Path(cfg.folder)
    settle_env(plain)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    task, dataset = open_task(plain)
    model: Any = task.build_model(plain["model"])
    if cfg.init_from is not None:
        print(transfer(model, cfg.init_from).report(), flush=True)
    actor = task.build_actor(model, plain["planner"])
    data = build_data(plain, task, actor, dataset)
    optimizer = instantiate(cfg.optimizer)
    module = WorldModelModule(model, optimizer, log_every=cfg.training.log_every, config=plain)
    evaluator = Evaluator(task, actor, plain["evaluation"])
    best = folder / "model" if cfg.evaluation.keep_best else None
    every = cfg.evaluation.every if task.make_env is not None else 0
    during = Evaluation(evaluator.during, every, best)
    trainer = instantiate(
        cfg.trainer,
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        callbacks=[during, *(instantiate(c) for c in cfg.callbacks.values() if c)],
    )
    print(task.describe(model), f"everything lies in {folder}", sep="\n", flush=True)

    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
    start = time.monotonic()
    try:
        trainer.fit(module, data)
    finally:
        data.close()
    if trainer.interrupted:
        raise KeyboardInterrupt
    if during.best is not None:
        load_tensors(model, read_saved(folder / "model")[1], folder)
    else:
        save_model(model, folder / "model")
    scores = evaluator(cfg.evaluation.episodes) if task.make_env is not None else {}
    step = x_axis(trainer, module)
    if scores:
        log(trainer, scores, step)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain, scores, step)
        logger.finalize("success")
    unit = "env step" if dataset is None else "update"
    which = f" of the best model, from {unit} {during.best['step']:,}" if during.best else ""
    report(cfg, scores, which, time.monotonic() - start)
    return scores


def report(cfg: DictConfig, scores: dict[str, float], which: str, seconds: float) -> None:
    """Print what came out, and what to do with it."""
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
        f"score it:    python -m worldloom.eval checkpoint={cfg.folder}{score}\n"
        f"act with it: model = worldloom.create_world_model({str(cfg.folder)!r})",
        flush=True,
    )


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    with job_errors():
        validate(cfg)
        logging.captureWarnings(True)
        return train(cfg).get("eval/return")


def main() -> None:
    """Run the command line."""
    sys.argv[1:] = with_implied(sys.argv[1:])
    with readable_errors():
        _hydra_main()


if __name__ == "__main__":
    main()
