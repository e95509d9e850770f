"""Score a trained run: `python -m worldloom.eval checkpoint=runs/cartpole/…`."""

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from worldloom.app.compose import readable_errors
from worldloom.memory import keep_freed_memory
from worldloom.training.config import EvaluationConfig

USAGE = """usage: python -m worldloom.eval checkpoint=<run folder> [episodes=20] [seed=…]
       [num_envs=5] [deterministic=true] [env.KEY=VALUE …] [env=…]
       [model._target_=my_pkg.MyModel]

Scores the run's saved model in its own environment, which comes from the run's config.yaml, or in
another one: env=gymnasium env.id=CartPole-v1. A model or an environment of your own is named again
as it was for training, for a file must not choose which code is run."""


def evaluate_run(path: Path, settings: dict[str, Any], words: Sequence[str]) -> dict[str, float]:
    """Load a run's model and environment and return the mean scores.

    path: the run's folder, or the model folder or a checkpoint in it.
    words: what the command line says about the run's configuration.

    Raises:
        ValueError: the folder is no run, its model cannot be read, or it names code that `words`
            do not name.
    """
    from worldloom.app.build import Evaluator, prepare
    from worldloom.app.saved_config import load_actor, opened_run
    from worldloom.app.task import Task

    config, section = opened_run(path, words)
    prepare(settings["seed"], config["threads"])
    task = Task.from_config(section, collects=False)
    return Evaluator(task, load_actor(path, config, task), settings)(settings["episodes"])


def main() -> None:
    """Run the command line."""
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv):
        print(USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    keep_freed_memory()
    with readable_errors():
        from worldloom.app.saved_config import checked, split_words

        given, words = split_words(sys.argv[1:])
        if given.get("checkpoint") is None:
            raise ValueError("no run was named; add checkpoint=<run folder>")
        run = Path(str(given.pop("checkpoint"))).expanduser()
        settings = vars(checked(given, EvaluationConfig))
        scores = evaluate_run(run, settings, words)
    choice = "policy mode" if settings["deterministic"] else "sampled actions"
    success = f", success {scores['eval/success']:.2f}" if "eval/success" in scores else ""
    print(
        f"return {scores['eval/return']:.2f} ± {scores['eval/return_std']:.2f} over "
        f"{settings['episodes']} episodes ({choice}, seed {settings['seed']}), "
        f"mean length {scores['eval/length']:.1f}{success}"
    )


if __name__ == "__main__":
    main()
