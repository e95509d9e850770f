"""The command: `python -m worldloom.run` composes a configuration, trains, evaluates, reports."""

import logging
import time
from pathlib import Path
from typing import Any

import hydra
from omegaconf import DictConfig, OmegaConf

from worldloom.cli import job_errors, readable_errors, register_schemas, validate
from worldloom.presets import config_dir

register_schemas()


def train(cfg: DictConfig) -> dict[str, float]:
    """Run one training as configured; return the final scores. Everything lies in cfg.folder."""
    from hydra.utils import instantiate

    from worldloom.assembly import Evaluator, Task, build_data, prepare
    from worldloom.saving import load_tensors, read_saved, save_model
    from worldloom.training.callbacks import Evaluation, log
    from worldloom.training.module import WorldModelModule
    from worldloom.transfer import transfer

    prepare(cfg.seed, cfg.threads)
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    folder = Path(cfg.folder)
    (folder / "config.yaml").write_text(OmegaConf.to_yaml(OmegaConf.create(plain)))
    task = Task.from_config(plain["env"])
    model: Any = task.build_model(plain["model"])
    if cfg.init_from is not None:
        print(transfer(model, cfg.init_from).report(), flush=True)
    actor = task.build_actor(model, plain["planner"])
    data = build_data(plain, task, actor)
    optimizer = instantiate(cfg.optimizer)
    module = WorldModelModule(model, optimizer, log_every=cfg.training.log_every, config=plain)
    evaluator = Evaluator(task, actor, plain["evaluation"])
    best = folder / "model" if cfg.evaluation.keep_best else None
    during = Evaluation(evaluator.during, cfg.evaluation.every, best)
    trainer = instantiate(
        cfg.trainer,
        logger=[instantiate(logger) for logger in cfg.logger.values() if logger],
        callbacks=[during, *(instantiate(c) for c in cfg.callbacks.values() if c)],
    )
    print(task.describe(model), f"everything lies in {folder}", sep="\n", flush=True)

    for logger in trainer.loggers:
        logger.log_hyperparams(plain)
    start = time.monotonic()
    trainer.fit(module, data)
    if trainer.interrupted:
        raise KeyboardInterrupt
    if during.best is not None:
        load_tensors(model, read_saved(folder / "model")[1], folder)
    else:
        save_model(model, folder / "model")
    scores = evaluator(cfg.evaluation.episodes)
    log(trainer, scores, data.env_steps)
    for logger in trainer.loggers:
        logger.log_hyperparams(plain, scores, data.env_steps)
        logger.finalize("success")
    report(cfg, scores, during.best, time.monotonic() - start)
    return scores


def report(
    cfg: DictConfig, scores: dict[str, float], best: dict[str, float] | None, seconds: float
) -> None:
    """Print what came out, and what to do with it."""
    mean, std = scores["eval/return"], scores["eval/return_std"]
    which = f" of the best model, from env step {best['step']:,}" if best else ""
    print(
        f"\nfinal return {mean:.1f} ± {std:.1f} ({cfg.evaluation.episodes} episodes){which}\n"
        f"trained in {seconds / 60:.1f} minutes\n"
        f"everything:  {cfg.folder}\n"
        f"watch it:    tensorboard --logdir {cfg.folder}\n"
        f"score it:    python -m worldloom.eval checkpoint={cfg.folder}\n"
        f"act with it: model = worldloom.create_world_model({str(cfg.folder)!r})",
        flush=True,
    )


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(cfg: DictConfig) -> float:
    with job_errors():
        validate(cfg)
        logging.captureWarnings(True)
        return train(cfg)["eval/return"]


def main() -> None:
    """Run the command line."""
    with readable_errors():
        _hydra_main()


if __name__ == "__main__":
    main()
