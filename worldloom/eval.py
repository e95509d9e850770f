"""The command `python -m worldloom.eval`: score the model of a run."""

from pathlib import Path

from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides
from worldloom.training.config import EvaluationConfig

USAGE = """usage: python -m worldloom.eval checkpoint=<run folder> [episodes=…] [seed=…]
       [num_envs=…] [deterministic=true] [env.KEY=VALUE …] [env=…]
       [model._target_=my_pkg.MyModel]

Scores the run's saved model in its own environment, which its config.yaml describes, or in another
one: env=gymnasium env.id=CartPole-v1. Settings that are not given are those of the run's evaluation
section, so the score is that of the end of the run. For a custom model or environment, repeat the
override that named it for training: worldloom never imports third-party code just because a file
names it."""


def evaluate_command(overrides: Overrides) -> None:
    """Score a run as the command line describes, and print the result."""
    from worldloom.app.build import prepare_process
    from worldloom.app.task import Evaluator, Task, load_actor, open_saved_run

    if (checkpoint := overrides.value("checkpoint")) is None:
        raise ValueError("no run was named; add checkpoint=<run folder>")
    run = Path(checkpoint).expanduser()
    args, config_overrides = split_settings(overrides.without("checkpoint"))
    config, section = open_saved_run(run, config_overrides)
    settings = vars(parse_settings(args, EvaluationConfig, **config.get("evaluation", {})))
    prepare_process(settings["seed"], config["threads"])
    task = Task.from_config(section, collects=False)
    scores = Evaluator(task, load_actor(run, config, task), settings)(settings["episodes"])
    choice = "policy mode" if settings["deterministic"] else "sampled actions"
    success = f", success {scores['success']:.2f}" if "success" in scores else ""
    print(
        f"return {scores['return']:.2f} ± {scores['return_std']:.2f} over "
        f"{settings['episodes']} episodes ({choice}, seed {settings['seed']}), "
        f"mean length {scores['length']:.1f}{success}"
    )


def main() -> None:
    """Run the command line."""
    run_command(USAGE, evaluate_command)


if __name__ == "__main__":
    main()
