"""The command `python -m worldloom.run`: compose a configuration, train, evaluate, report."""

import copy
import logging
import signal
import sys
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from worldloom import starting
from worldloom.app.command_line import (
    FolderCheck,
    composing_once,
    print_errors,
    print_version,
    reject_empty,
    reject_slips,
    stop_on_errors,
    take_config_dir,
)
from worldloom.app.compose import SWEEPS, Overrides, register_defaults
from worldloom.app.help import describe_run
from worldloom.app.hints import flags_first
from worldloom.app.validation import validate_config
from worldloom.errors import quote
from worldloom.memory import keep_freed_memory
from worldloom.presets import config_dir, extra_dirs

if TYPE_CHECKING:
    from worldloom.app.build import Run
    from worldloom.app.saved_config import ResolvedConfig

register_defaults()


def train(cfg: DictConfig) -> dict[str, float]:
    """Run or resume one training as configured; return the final scores.

    All results are written to cfg.folder.
    """
    from worldloom.app.build import build_run
    from worldloom.app.launch import processes
    from worldloom.app.run_dir import CONFIG, claim_folder, remove_start
    from worldloom.app.run_log import record_output
    from worldloom.app.saved_config import format_command, resolve_config

    starting.end()
    config, resumes = resolve_config(cfg), cfg.resume is not None
    folder, run = Path(cfg.folder), None
    # The first process holds the folder for all.
    with claim_folder(folder, resumes) as is_new, record_output(folder):
        try:
            with processes.training(config, resumes):
                run = build_run(config, resumes)
                return finish(run)
        except Exception:
            if not resumes and (run is None or run.module.updates == 0):
                remove_start(folder, is_new)
            raise
        except KeyboardInterrupt:  # before training or in the evaluation after it
            if not (folder / CONFIG).exists():
                remove_start(folder, is_new)
                raise
            resume = format_command("run", f"resume={cfg.folder}", config=config.plain)
            print(f"stopped by SIGINT; to continue:\n{resume}", flush=True)
            sys.exit(130)


def train_with_others(config: "ResolvedConfig", resumes: bool) -> None:
    """Train a run in a process that is not the first one."""
    from worldloom.app.build import build_run

    starting.end()
    finish(build_run(config, resumes))


def finish(run: "Run") -> dict[str, float]:
    """Train a run to its end, evaluate the final model, and report; return the scores.

    They are empty if a limit stops the run before its end.
    """
    from worldloom.app.sweep_folder import read_differs
    from worldloom.ranks import world_size
    from worldloom.training.logger_guard import finishing_wandb
    from worldloom.training.loggers import TensorBoard

    print(
        *([f"{world_size()} processes, each with:"] if world_size() > 1 else []),
        run.task.describe(run.model),
        run.data.buffer.resources,
        f"all results are in {run.folder}",
        sep="\n",
        flush=True,
    )
    with finishing_wandb():
        differs = read_differs(run.folder)
        for logger in run.trainer.loggers:
            settings = copy.deepcopy(run.config.plain)
            logger.log_hyperparams({**settings, "differs": differs} if differs else settings)
            if isinstance(logger, TensorBoard):  # HPARAMS also shows runs that have not ended
                logger.log_hyperparams(summarize_settings(run), {}, 0)
        if not fit(run):
            return {}
        scores = evaluate_last(run)
    report(run, scores)
    return scores


def fit(run: "Run") -> bool:
    """Train to the end, from a checkpoint if there is one; return whether the run is finished.

    A signal stops the run between two updates. The run is saved, prints how to continue it, and
    ends with the exit code that shells expect after the signal. The limits `trainer.max_time` and
    `trainer.max_steps` do the same, without ending the process. A callback that sets
    `trainer.should_stop` finishes the run.
    """
    from lightning.pytorch.utilities.exceptions import SIGTERMException

    from worldloom.app.saved_config import format_command
    from worldloom.training.checkpoint_files import has_checkpoint
    from worldloom.training.interruption import Interrupted, Interruption, Paused

    interruption, data, folder = Interruption(), run.data, run.folder

    def check() -> None:
        interruption.check()
        run.limits.check(data)

    data.check_interruption = check
    args = [f"resume={folder}"] + ["trainer.max_steps=-1"] * (run.limits.max_steps > -1)
    resume = format_command("run", *args, config=run.config.plain)
    try:
        with interruption.listening():
            run.trainer.fit(run.module, data, ckpt_path=run.checkpoint)
        interruption.check()
    except (Interrupted, SIGTERMException) as raised:
        stopped = raised if isinstance(raised, Interrupted) else Interrupted(signal.SIGTERM)
        saved = _describe_saved(run.trainer, run.module, data, stopped.between)
        print(f"{stopped}; {saved}; to continue:\n{resume}", flush=True)
        if isinstance(stopped, Paused):
            return False
        sys.exit(stopped.exit_code)
    except Exception:
        if run.data.ranks.size == 1 and has_checkpoint(folder / "checkpoints"):
            print(f"to continue from the last checkpoint:\n{resume}", flush=True)
        raise
    finally:
        data.close()
    if not data.complete:
        print(describe_early_stop(run), flush=True)
    return True


def describe_early_stop(run: "Run") -> str:
    """Return why a callback ended a run before its last step."""
    from lightning.pytorch.callbacks import EarlyStopping

    messages = [
        callback.stopping_reason_message.removesuffix(" Signaling Trainer to stop.")
        for callback in run.trainer.callbacks
        if isinstance(callback, EarlyStopping) and callback.stopping_reason_message
    ]
    yours = [
        f"callbacks.{key}"
        for key, part in run.config.plain["callbacks"].items()
        if part and not part["_target_"].startswith("worldloom.")
    ]
    named = f"; yours: {', '.join(yours)}" if yours else ""
    return f"stopped early: {' '.join(messages) or f'a callback set trainer.should_stop{named}'}"


def _describe_saved(trainer: Any, module: Any, data: Any, between: bool) -> str:
    """Return what is saved of an interrupted run; between: it stopped between two updates."""
    from worldloom.training.checkpoints import Checkpoints

    if not any(isinstance(callback, Checkpoints) for callback in trainer.callbacks):
        return "nothing was saved, because callbacks.checkpoint was removed"
    if not between:
        return "progress since the last checkpoint is lost"
    return f"saved after {data.env_steps:,} environment steps and {module.updates:,} updates"


def evaluate_last(run: "Run") -> dict[str, float]:
    """Score the final model; a signal ends the process, with a line on how to continue."""
    from worldloom.acting import EvaluationStopped
    from worldloom.app.saved_config import format_command
    from worldloom.training.interruption import Interrupted, Interruption

    interruption = Interruption("stopping the evaluation")
    run.evaluator.stops = lambda: interruption.number is not None
    try:
        with interruption.listening():
            return evaluate(run)
    except (EvaluationStopped, Interrupted) as raised:
        numbers: list[Any] = [interruption.number]
        if isinstance(raised, EvaluationStopped):
            numbers = run.data.ranks.gather(interruption.number)
        stopped = Interrupted(next(number for number in numbers if number is not None))
    resume = format_command("run", f"resume={run.folder}", config=run.config.plain)
    print(f"{stopped} in the final evaluation; to continue:\n{resume}", flush=True)
    sys.exit(stopped.exit_code)


def evaluate(run: "Run") -> dict[str, float]:
    """Score the final model, the best one if it was kept; write scores.yaml and log the scores."""
    from lightning.pytorch.loggers import TensorBoardLogger

    from worldloom.app.run_dir import write_scores
    from worldloom.ranks import copy_from_first, rank
    from worldloom.saving import load_tensors, read_saved, save_model
    from worldloom.training.metrics import current_step, log_metrics, name_scores

    if rank() == 0:
        if run.evaluation.best is not None:
            load_tensors(run.model, read_saved(run.folder / "model")[1], run.folder)
        else:
            save_model(run.model, run.folder / "model")
    copy_from_first(run.model.state_dict().values())
    episodes, step = run.config.plain["evaluation"]["episodes"], current_step(run.trainer)
    run.evaluation.videos.start(step, every=0)
    found = run.evaluator(episodes) if run.task.make_env is not None else {}
    scores = name_scores("final", found)
    if scores:
        log_metrics(run.trainer, scores, step)
        run.evaluation.videos.finish(run.trainer, "final", step)
    for logger in run.trainer.loggers:
        if isinstance(logger, TensorBoardLogger):  # the interface of the others takes no scores
            logger.log_hyperparams(summarize_settings(run), scores, step)
        logger.finalize("success")
    if rank() == 0:
        write_scores(run.folder, scores, step)
    return scores


def summarize_settings(run: "Run") -> dict[str, Any]:
    """Return the settings that TensorBoard's page HPARAMS compares; it shows the first five.

    In a sweep those that differ come first. The whole configuration would have 150 columns.
    """
    from worldloom.app.sweep_folder import read_differs
    from worldloom.protocol import count_parameters
    from worldloom.results.labels import name_task
    from worldloom.trees import flatten_tree

    plain = run.config.plain
    training = ("learning_rate", "train_ratio", "total_steps", "batch_size", "sequence_length")
    settings = {
        "task": name_task(flatten_tree(plain, ".")),
        "model": type(run.model).__name__,
        "seed": plain["seed"],
        **{name: plain["training"][name] for name in training},
        "num_envs": plain["env"].get("num_envs"),
        "parameters": count_parameters(run.model),
    }
    differs = read_differs(run.folder)
    others = {name: v for name, v in settings.items() if f"training.{name}" not in differs}
    return {**differs, **others}


def report(run: "Run", scores: dict[str, float]) -> None:
    """Print the final score, and the commands to look at, score and use the model."""
    from worldloom.app.saved_config import format_allow, format_command

    plain, folder, best = run.config.plain, run.folder, run.evaluation.best
    final = "there was no environment, so nothing was evaluated"
    if scores:
        mean, std = scores["final/return"], scores["final/return_std"]
        which = f" of the best model, from {run.unit} {best['step']:,}" if best else ""
        episodes = plain["evaluation"]["episodes"]
        each = " of each task" if run.task.choices else ""
        final = f"final return {mean:.1f} ± {std:.1f} ({episodes} episodes{each}){which}"
        if "final/normalized_score" in scores:
            final += f"\nnormalized score {scores['final/normalized_score']:.2f}"
    lines = [
        f"\n{final}",
        f"trained in {run.module.seconds / 60:.1f} minutes",
        f"results:     {folder}",
    ]
    if any(folder.rglob("events.out.tfevents.*")):
        lines.append(f"watch it:    {quote('tensorboard', '--logdir', folder)}")
    path = f"{str(folder)!r}{format_allow(plain)}"
    if scores:
        score = format_command("eval", f"checkpoint={folder}", config=plain)
        act = f"run = worldloom.load_run({path}); agent = run.agent(); env = run.make_env()"
        lines += [f"score it:    {score}", f"act with it: import worldloom; {act}"]
    else:
        load = f"model = worldloom.create_world_model({path})"
        lines.append(f"load it:     import worldloom; {load}")
    print(*lines, sep="\n", flush=True)


@hydra.main(version_base="1.3", config_path=str(config_dir()), config_name="config")
def _hydra_main(cfg: DictConfig) -> float | None:
    with stop_on_errors():
        validate_config(cfg, HydraConfig.get().runtime.choices)
        logging.captureWarnings(True)
        logging.raiseExceptions = False  # continue where the terminal is gone
        return train(cfg).get("final/return")


@starting.safe_output()
def main() -> None:
    """Run the command line, or train with the process that runs it."""
    starting.end_with_parent()
    if not starting.has_others():
        run_command_line()
        return
    from worldloom.app.launch import processes

    keep_freed_memory()
    if processes.rank:
        with print_errors():
            processes.work(train_with_others)
    with processes.leading():
        run_command_line()


def run_command_line() -> None:
    """Run the command that the arguments of the process describe."""
    given = tuple(sys.argv[1:])
    if {"-h", "--help"} & {*given}:
        if "all" not in given:
            print(describe_run())
            sys.exit()
        given = ("--help", *(arg for arg in given if arg not in ("-h", "--help", "all")))
    print_version(given)
    keep_freed_memory()
    scratch = TemporaryDirectory()
    starting.cleanups[:] = [scratch.cleanup, FolderCheck.release]
    with print_errors(), scratch:
        given = take_config_dir(given)
        flags = tuple(word for folder in extra_dirs for word in ("--config-dir", str(folder)))
        reject_slips(given)
        overrides = Overrides(flags_first(given)).with_restart()
        reject_empty(overrides)
        args: Any = overrides.with_implied().args
        if overrides.value("resume") is not None:
            from worldloom.app.resume import resume_arguments

            args = resume_arguments(overrides, Path(scratch.name))
        if args is not None:
            if SWEEPS & {*args}:
                from worldloom.app.launcher import register_launcher

                register_launcher((*flags, *given))
            sys.argv[1:] = [*flags, *args]
            try:
                with composing_once(args):
                    _hydra_main()
            finally:
                FolderCheck.release()


if __name__ == "__main__":
    main()
