"""The command `python -m worldloom.eval`: score the model of a run."""

import os
from collections.abc import Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides
from worldloom.app.hints import hint_run
from worldloom.envs.film import open_film
from worldloom.training.config import EvaluationConfig

if TYPE_CHECKING:
    from worldloom.model_scores.recorder import RowRecorder

SEQUENCES = 64  # on which the model's predictions are scored

USAGE = """usage: worldloom eval checkpoint=<run folder> [episodes=…] [seed=…]
       [num_envs=…] [deterministic=true] [decisions=6] [video=….mp4] [device=cuda]
       [env.KEY=VALUE …] [env=…] [model._target_=my_pkg.MyModel]

Scores the run's saved model in its own environment, which its config.yaml describes, or in another
one: env=gymnasium env.id=CartPole-v1. Settings that are not given are those of the run's evaluation
section, so the score is that of the end of the run. The predictions of the model in these episodes
are scored too (docs/inspecting.md). video= records the episodes of the first
environment; the name ends in .mp4 or .gif. For a custom model or environment, repeat the
override that named it for training: worldloom never imports third-party code just because a file
names it."""


def evaluate_command(overrides: Overrides) -> None:
    """Score a run as the command line describes, and print the result."""
    from worldloom.app.build import prepare_process
    from worldloom.app.evaluator import Evaluator
    from worldloom.app.saved_run import SavedRun, add_render_mode
    from worldloom.app.task import open_saved_run
    from worldloom.devices import require_device
    from worldloom.model_scores.recorder import RowRecorder

    if (checkpoint := overrides.value("checkpoint")) is None:
        raise ValueError(f"no run was named; add checkpoint={hint_run(overrides.args)}")
    path, video = Path(checkpoint).expanduser(), overrides.value("video")
    if video == "":
        raise ValueError("video is empty; expected the name of a file, such as video=episodes.mp4")
    device = require_device(overrides.value("device") or "cpu")
    args, config_overrides = split_settings(overrides.without("checkpoint", "video", "device"))
    config, section = open_saved_run(path, config_overrides)
    settings = vars(parse_settings(args, EvaluationConfig, **config.get("evaluation", {})))
    prepare_process(settings["seed"], config["threads"])
    if video is not None:
        section = add_render_mode(section, "rgb_array")
        os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen
    run, episodes = SavedRun(path, config, section, device), settings["episodes"]
    recorder = RowRecorder()
    with nullcontext() if video is None else open_film(Path(video).expanduser()) as film:
        scores = Evaluator(run.task, run.actor, settings)(episodes, film=film, record=recorder)
    names = [task.name for task in run.task.choices if task.info is None]
    total = episodes * max(1, len(names))
    choice = "policy mode" if settings["deterministic"] else "sampled actions"
    success = f", success {scores['success']:.2f}" if "success" in scores else ""
    print(
        f"return {scores['return']:.2f} ± {scores['return_std']:.2f} over "
        f"{total} episodes ({choice}, seed {settings['seed']}), "
        f"mean length {scores['length']:.1f}{success}"
    )
    for name in names:
        print(describe_task(name, scores))
    if "normalized_score" in scores:
        print(f"normalized score {scores['normalized_score']:.2f} (mean of the tasks, 0 to 100)")
    print(*describe_model(run.model, recorder, scores, settings["decisions"]), sep="\n")
    if film is not None:
        print(f"{video}: {film.episodes} of {total} episodes, {film.describe()}")


def describe_model(
    model: Any, recorder: "RowRecorder", scores: Mapping[str, float], decisions: int
) -> list[str]:
    """Return lines with the scores of a model on recorded rows, and those of its decisions.

    decisions: number of action sequences; 0 if decisions were not scored.
    """
    from worldloom.model_scores.model import score_model
    from worldloom.model_scores.report import describe_failures, describe_scores

    found, failures = score_model(model, recorder.window, SEQUENCES)
    found |= {name.removeprefix("imagination/"): score for name, score in scores.items()}
    lines = ["predictions in these episodes (docs/inspecting.md):", *describe_scores(found)]
    if decisions and "decision_loss" not in found:
        lines.append(
            "decisions are not scored: the environment does not return the same observations for "
            "the same seed and actions, or the model failed"
        )
    return [*lines, *describe_failures(failures).values()]


def describe_task(name: str, scores: Mapping[str, float]) -> str:
    """Return a line about one of several tasks."""
    parts = [f"return {scores[f'{name}/return']:.2f} ± {scores[f'{name}/return_std']:.2f}"]
    for key in ("success", "score"):
        if f"{name}/{key}" in scores:
            parts.append(f"{key} {scores[f'{name}/{key}']:.2f}")
    return f"  {name:<24} {', '.join(parts)}"


def main() -> None:
    """Run the command line."""
    run_command(USAGE, evaluate_command)


if __name__ == "__main__":
    main()
