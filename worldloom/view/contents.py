"""The data of a playback page, as JSON that `data.js` reads.

Letters used in shapes: N actions of an episode, S starts, H imagined steps, K elites, A = width of
an action, D units of a latent.
"""

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.app.metrics_csv import read_columns
from worldloom.app.run_dir import SCORES, read_scores
from worldloom.envs.spaces import ActionSpec
from worldloom.errors import escape, list_names
from worldloom.protocol import LatentState, count_parameters
from worldloom.trees import flatten_tree
from worldloom.view.encoding import encode_array, encode_images
from worldloom.view.episodes import Recording, to_rgb
from worldloom.view.imagination import Imagined
from worldloom.view.plans import PlannedStep

TRUE_QUALITY, IMAGINED_QUALITY = 80, 60  # of pictures, from 1 to 100
POINTS = 500  # of a return curve, at most
UNITS = 768  # of a latent, at most; of a larger one every n-th unit is shown
CURVES = {
    "episode/return": "training episodes",
    "eval/return": "evaluations",
    "final/return": "final model",
}


def describe_run(run: Path, config: Mapping[str, Any], model: Any) -> dict[str, Any]:
    """Return the facts, the configuration and the return curve of a run."""
    env = config["env"]
    steps, *returns = read_columns(run / "metrics.csv", ["step", *CURVES]).values()
    offline = (config.get("data") or {}).get("path") is not None
    unit = "updates" if offline else "environment steps"
    facts = [
        ("run", run.resolve().name),
        ("environment", _name_env(env)),
        ("model", type(model).__name__),
        ("parameters", f"{count_parameters(model):,}"),
        ("seed", config.get("seed")),
    ]
    if len(steps):
        facts.append((unit, f"{int(np.nanmax(steps)):,}"))
    if (run / SCORES).is_file() and "final/return" in (scores := read_scores(run)):
        spread = scores.get("final/return_std", math.nan)
        facts.append(("final return", f"{scores['final/return']:.2f} ± {spread:.2f}"))
    curves = [
        {"name": name, "points": _thin_curve(steps, values)}
        for name, values in zip(CURVES.values(), returns, strict=True)
        if np.isfinite(values).any()
    ]
    settings = flatten_tree(dict(config), ".", lists=True)
    return {
        "title": escape(f"{facts[1][1]}, {facts[2][1]}"),
        "facts": [[escape(name), escape(value)] for name, value in facts],
        "config": [[escape(key), escape(value)] for key, value in settings.items()],
        "curves": curves,
        "unit": unit,
    }


def _name_env(env: Mapping[str, Any]) -> str:
    """Return the id or the tasks of an env section, or the function that makes it."""
    names = env.get("tasks") or env.get("task") or env.get("id") or env["_target_"]
    return list_names(map(str, names)) if isinstance(names, list | tuple) else str(names)


def _thin_curve(steps: np.ndarray, values: np.ndarray) -> list[list[float]]:
    """Return at most `POINTS` points [step, value]; of more, means of neighbours."""
    known = np.isfinite(steps) & np.isfinite(values)
    points = np.stack([steps[known], values[known]], 1)
    parts = np.array_split(points, min(len(points), POINTS))
    return [part.mean(0).tolist() for part in parts]


def describe_episode(
    recording: Recording,
    imagined: Imagined,
    values: np.ndarray | None,
    discounts: np.ndarray | None,
    surprise: np.ndarray | None,
    actions: ActionSpec,
) -> dict[str, Any]:
    """Return an episode and what is imagined from its steps.

    values, discounts, surprise: [N + 1] of the states after each observation, as `Dreamer` returns
        them.
    """
    returns = None
    if values is not None and discounts is not None:
        returns = compute_returns(recording, values, discounts)
    film = np.stack(recording.film) if recording.film else None
    return {
        "name": escape(recording.name),
        "length": recording.length,
        "return": float(recording.rewards.sum(dtype=np.float64)),
        "ended": recording.ended,
        "rewards": encode_array(recording.rewards),
        "values": None if values is None else encode_array(values),
        "returns": None if returns is None else encode_array(returns),
        "surprise": None if surprise is None else encode_array(surprise),
        "film": None if film is None else encode_images(film, TRUE_QUALITY),
        "obs": [
            _describe_obs(key, array, recording, imagined) for key, array in recording.obs.items()
        ],
        "actions": _describe_actions(recording, actions),
        "latents": _describe_latents(recording.states),
        "plan": _describe_plans(recording.plans),
        "imagined": {
            "every": imagined.every,
            "horizon": imagined.rewards.shape[1] - 1,
            "rewards": encode_array(imagined.rewards),
            "continues": encode_array(imagined.continues),
            "values": None if imagined.values is None else encode_array(imagined.values),
            "stateErrors": encode_array(imagined.state_errors),
        },
    }


def compute_returns(recording: Recording, values: np.ndarray, discounts: np.ndarray) -> np.ndarray:
    """Return the discounted sums [N + 1] of the rewards after each row.

    Unless the environment terminated, the value of the last row stands for the rewards after it.
    """
    returns = np.zeros(recording.length + 1)
    returns[-1] = 0.0 if recording.ended == "terminated" else values[-1]
    for row in reversed(range(recording.length)):
        returns[row] = recording.rewards[row + 1] + discounts[row] * returns[row + 1]
    return returns


def _describe_obs(
    key: str, array: np.ndarray, recording: Recording, imagined: Imagined
) -> dict[str, Any]:
    """Return one key of the observations: what is true, imagined, and the error."""
    guess, error = imagined.obs.get(key), imagined.errors.get(key)
    held: dict[str, Any] = {"key": escape(key or "observation")}
    held["error"] = None if error is None else encode_array(error)
    if array.ndim == 4:
        frames = None if guess is None else guess.reshape(-1, *guess.shape[2:])
        held["kind"] = "image"
        held["true"] = encode_images(to_rgb(array), TRUE_QUALITY)
        held["imagined"] = None if frames is None else encode_images(frames, IMAGINED_QUALITY)
        return held
    array = array.reshape(len(array), -1)
    guess = None if guess is None else guess.reshape(*guess.shape[:2], -1)
    names = recording.names.obs.get(key, [])
    held["kind"] = "vector"
    held["names"] = names or [f"{held['key']}[{i}]" for i in range(array.shape[1])]
    held["true"] = encode_array(array)
    held["imagined"] = None if guess is None else encode_array(guess)
    return held


def _describe_actions(recording: Recording, spec: ActionSpec) -> dict[str, Any]:
    groups = spec.action_dim if isinstance(spec.action_dim, tuple) else (spec.width,)
    return {
        "names": recording.names.actions,
        "groups": list(groups) if spec.discrete else None,
        "values": encode_array(recording.actions),
    }


def _describe_latents(states: LatentState) -> list[dict[str, Any]]:
    """Return the parts of the latent states: name, number of units, and values [N + 1, D]."""
    parts = {"deterministic": states.deterministic, "stochastic": states.stochastic}
    found = []
    for name, tensor in parts.items():
        if tensor is None or not tensor.numel():
            continue
        units = tensor.detach().float().flatten(1).cpu().numpy()
        stride = -(-units.shape[1] // UNITS)
        shown = encode_array(units[:, ::stride], bits=8)
        found.append({"name": name, "units": units.shape[1], "stride": stride, "values": shown})
    return found


def _describe_plans(plans: Sequence[PlannedStep]) -> dict[str, Any] | None:
    """Return the plans of all actions: mean [N, H, A], std, elites [N, K, H, A], weights, returns.

    The range of actions is that of the model, [-1, 1], or [0, 1] for probabilities.
    """
    if not plans:
        return None
    stds = [plan.std for plan in plans if plan.std is not None]
    return {
        "mean": encode_array(np.stack([plan.mean for plan in plans])),
        "std": encode_array(np.stack(stds)) if stds else None,
        "elites": encode_array(np.stack([plan.elites for plan in plans]), bits=8),
        "weights": encode_array(np.stack([plan.weights for plan in plans]), bits=8),
        "returns": encode_array(np.stack([plan.returns for plan in plans])),
    }
