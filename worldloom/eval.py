"""Score a trained run: `python -m worldloom.eval checkpoint=runs/cartpole/…`."""

import sys
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from worldloom.cli import readable_errors
from worldloom.presets import nearest
from worldloom.training.config import EvaluationConfig

USAGE = """usage: python -m worldloom.eval checkpoint=<run folder> [episodes=20] [seed=…]
       [num_envs=5] [deterministic=true] [env.KEY=VALUE …]

Scores the run's saved model in its own environment, which comes from the run's config.yaml."""


def evaluate_run(path: Path, settings: dict[str, Any], env: dict[str, Any]) -> dict[str, float]:
    """Load a run's model and environment and return the mean scores.

    path: the run's folder, or the model folder or a checkpoint in it.

    Raises:
        ValueError: the folder is no run, or its model cannot be read.
    """
    from worldloom.assembly import Evaluator, Task, prepare
    from worldloom.factory import create_world_model

    run = path.parent if path.name == "model" else path
    run = path.parent.parent if path.suffix == ".ckpt" else run
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} holds no config.yaml; expected a folder that python -m worldloom.run wrote, "
            "such as runs/cartpole/2026-01-01_00-00-00"
        )
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    if unknown := [key for key in env if key not in config["env"]]:
        raise ValueError(
            f"unknown key 'env.{unknown[0]}'{nearest(unknown[0], config['env'], 'env.')}"
        )
    prepare(settings["seed"], config["threads"])
    task = Task.from_config(config["env"] | env)
    # The user names this run on the command line, as when it was trained: its own model is allowed.
    target = config["model"]["_target_"]
    model = create_world_model(path, allow=(target,)).eval()
    actor = task.build_actor(model, config["planner"])
    return Evaluator(task, actor, settings)(settings["episodes"])


def main() -> None:
    """Run the command line."""
    if len(sys.argv) < 2 or {"-h", "--help"} & set(sys.argv):
        print(USAGE)
        sys.exit(0 if len(sys.argv) > 1 else 2)
    with readable_errors():
        given: Any = OmegaConf.to_container(OmegaConf.from_cli(sys.argv[1:]))
        env = given.pop("env", {})
        if not isinstance(env, dict):
            raise ValueError(f"env is {env!r}; expected env.KEY=VALUE, such as env.id=CartPole-v1")
        if "checkpoint" not in given:
            raise ValueError("no run was named; add checkpoint=<run folder>")
        run = Path(str(given.pop("checkpoint"))).expanduser()
        defaults = OmegaConf.structured(EvaluationConfig)
        for key in given:
            if key not in defaults:
                raise ValueError(f"unknown key '{key}'{nearest(key, defaults)}")
        settings: Any = OmegaConf.to_container(OmegaConf.merge(defaults, given))
        EvaluationConfig(**settings)
        scores = evaluate_run(run, settings, env)
    choice = "policy mode" if settings["deterministic"] else "sampled actions"
    success = f", success {scores['eval/success']:.2f}" if "eval/success" in scores else ""
    print(
        f"return {scores['eval/return']:.2f} ± {scores['eval/return_std']:.2f} over "
        f"{settings['episodes']} episodes ({choice}, seed {settings['seed']}), "
        f"mean length {scores['eval/length']:.1f}{success}"
    )


if __name__ == "__main__":
    main()
