"""The command `python -m worldloom.eval`: score the model of a run."""

from pathlib import Path
from typing import Any

from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides
from worldloom.training.config import EvaluationConfig

USAGE = """usage: python -m worldloom.eval checkpoint=<run folder> [episodes=20] [seed=…]
       [num_envs=5] [deterministic=true] [env.KEY=VALUE …] [env=…]
       [model._target_=my_pkg.MyModel]

Scores the run's saved model in its own environment, which its config.yaml describes, or in another
one: env=gymnasium env.id=CartPole-v1. For a custom model or environment, repeat the override that
named it for training: worldloom never imports third-party code just because a file names it."""


def evaluate_run(path: Path, settings: dict[str, Any], overrides: Overrides) -> dict[str, float]:
    """Load a run's model and environment and return the mean scores.

    path: the run's folder, or the model folder or a checkpoint in it.
    overrides: of the run's configuration.

    Raises:
        ValueError: the folder is not a run, its model cannot be read, or it names third-party code
            that the overrides do not name.
    """
    from worldloom.app.build import prepare_process
    from worldloom.app.task import Evaluator, Task, load_actor, open_saved_run

    config, section = open_saved_run(path, overrides)
    prepare_process(settings["seed"], config["threads"])
    task = Task.from_config(section, collects=False)
    return Evaluator(task, load_actor(path, config, task), settings)(settings["episodes"])


def evaluate_command(overrides: Overrides) -> None:
    """Score a run as the command line describes, and print the result."""
    run = overrides.value("checkpoint")
    args, config_overrides = split_settings(overrides.without("checkpoint"))
    if run is None:
        raise ValueError("no run was named; add checkpoint=<run folder>")
    settings = vars(parse_settings(args, EvaluationConfig))
    scores = evaluate_run(Path(run).expanduser(), settings, config_overrides)
    choice = "policy mode" if settings["deterministic"] else "sampled actions"
    success = f", success {scores['eval/success']:.2f}" if "eval/success" in scores else ""
    print(
        f"return {scores['eval/return']:.2f} ± {scores['eval/return_std']:.2f} over "
        f"{settings['episodes']} episodes ({choice}, seed {settings['seed']}), "
        f"mean length {scores['eval/length']:.1f}{success}"
    )


def main() -> None:
    """Run the command line."""
    run_command(USAGE, evaluate_command)


if __name__ == "__main__":
    main()
