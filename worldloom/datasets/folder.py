"""A folder of episodes, one `.npz` each: what `python -m worldloom.collect` writes.

A file holds an episode of N actions in Gymnasium's order, in the names and units of models. Write
one with `numpy.savez(file, **arrays)`. The files are read in the order of their names.

    obs         [N + 1, ...]  before each action and after the last: numbers, or images as uint8,
                              channels first. obs/KEY for each key of dict observations instead.
    actions     [N, A]        floats in [-1, 1], from each joint's lowest to its highest value; or
                [N]           integers for choices, counted from 0; [N, groups] for several at once
    rewards     [N]           what followed each action
    terminated  bool          the environment ended the episode; a time limit does not
    truncated   bool          it was cut off, as by a time limit; may be left out
    success     bool          the task was solved; may be left out

With only N observations the last action, its reward and `terminated` cannot be used.

Beside the files may lie a `dataset.yaml` with any of `action_dim` (number of joints or of choices;
a list for several groups), `discrete`, `obs_shape` and `env` (the section of a run's configuration
that made the environment); its `episodes` and `steps` are for people. Without it shapes are those
of the first file, and there are as many choices as the largest integer tells.
"""

import zipfile
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf
from yaml import YAMLError

from worldloom.datasets.episode import (
    Arrays,
    Dataset,
    Episode,
    Specs,
    choices_up_to,
    infer_obs,
    model_actions,
    require_numbers,
    without,
)
from worldloom.envs.spaces import ActionSpec, ObsSpec

ABOUT = "dataset.yaml"
FLAGS = ("terminated", "truncated", "success")


def open_folder(
    path: Path, obs: ObsSpec | None = None, actions: ActionSpec | None = None
) -> Dataset:
    """Open a folder of episodes, or a single one.

    obs, actions: of the environment, where it is known: which keys models do not see, and how
        many choices there are.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    about = read_about(path)
    first = _load(files[0])
    dropped = () if obs is None else obs.dropped
    spec = replace(infer_obs(str(files[0]), without(_obs(first), dropped)), dropped=dropped)
    shape = about.get("obs_shape", spec.shape)
    if isinstance(shape, dict):
        shape = {key: x for key, x in shape.items() if key not in dropped}
    if plain(shape) != plain(spec.shape):
        raise ValueError(
            f"{files[0]} has observations {spec.shape} but {ABOUT} says {shape}; correct or "
            f"delete {path / ABOUT}"
        )
    lengths, most = _scan(files)
    specs = Specs(
        spec,
        _actions(first["actions"], most, about, actions),
        like=f"{files[0].name} and {ABOUT} have it" if about else f"{files[0].name} has it",
        advice="Count choices from 0; store others as (action - middle) / half of their range.",
    )

    def read() -> Iterator[Episode]:
        return (_episode(file, specs) for file in files)

    return Dataset(str(path), specs.obs, specs.actions, lengths, read, about.get("env"))


def read_about(path: Path) -> dict[str, Any]:
    """Read dataset.yaml of a folder; nothing if there is none."""
    file = path / ABOUT
    if not file.is_file():
        return {}
    try:
        about: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OSError, ValueError) as error:
        raise ValueError(f"{file} is no YAML ({error}); correct or delete it") from error
    if not isinstance(about, dict):
        raise ValueError(
            f"{file} holds no keys; expected those that worldloom/datasets/folder.py lists; "
            "correct or delete it"
        )
    kinds = {"action_dim": int | list, "discrete": bool, "obs_shape": list | dict, "env": dict}
    for key, kind in kinds.items():
        if about.get(key) is not None and not isinstance(about[key], kind):
            raise ValueError(
                f"{file} has {key} {about[key]!r}; worldloom/datasets/folder.py says what it means"
            )
    return {key: value for key, value in about.items() if value is not None}


def _load(file: Path, names: Sequence[str] | None = None) -> Arrays:
    """Read the arrays of a file, or those of some names."""
    if not zipfile.is_zipfile(file):
        with file.open("rb") as opened:
            cut = opened.read(2) == b"PK"
        raise ValueError(
            f"{file} is {'a zip that was cut off' if cut else 'no zip'}; expected arrays written "
            "by numpy.savez; copy it again or delete it"
        )
    try:
        with np.load(file, allow_pickle=False) as arrays:
            held = arrays.files
            names = held if names is None else names
            found = {name: arrays[name] for name in names if name in held}
    except (OSError, EOFError, ValueError, zipfile.BadZipFile, zlib.error) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); expected arrays of numbers written by numpy.savez; "
            "copy it again or delete it"
        ) from error
    for name in ("actions", "rewards", "obs"):
        wanted = name != "obs" or names is held
        if wanted and not any(key == name or key.startswith(f"{name}/") for key in found):
            raise ValueError(
                f"{file} holds no {name} but {', '.join(held) or 'nothing'}; expected the arrays "
                "that worldloom/datasets/folder.py lists"
            )
    return found


def _obs(arrays: Arrays) -> Arrays:
    return {k: array for k, array in arrays.items() if k == "obs" or k.startswith("obs/")}


def _episode(file: Path, specs: Specs) -> Episode:
    arrays, source = _load(file), str(file)
    flags = {name: arrays[name] for name in FLAGS if name in arrays}
    if "terminated" not in flags:
        raise ValueError(
            f"{file} does not say whether the episode terminated; add terminated=True or False"
        )
    for name, flag in flags.items():
        if flag.size != 1 or flag.dtype.kind not in "biuf":
            raise ValueError(
                f"{file}: {name} has shape {flag.shape}; expected a single bool, which tells how "
                f"the episode ended: {name}={name}[-1]"
            )
    known = {name: bool(flag.reshape(())) for name, flag in flags.items()}
    obs = {key.removeprefix("obs").removeprefix("/"): x for key, x in _obs(arrays).items()}
    return specs.episode(
        source,
        obs,
        arrays["actions"],
        arrays["rewards"],
        known["terminated"],
        known.get("truncated", False),
        known.get("success"),
    )


def _scan(files: Sequence[Path]) -> tuple[list[int], np.ndarray | None]:
    """Return the steps of each episode, and the largest choice of each group (if integers)."""
    lengths, most = [], None
    for file in files:
        actions = _load(file, ("actions", "rewards"))["actions"]
        require_numbers(str(file), "actions", actions)
        lengths.append(len(actions))
        if actions.dtype.kind != "f" and actions.size:
            largest = actions.max(0)
            most = largest if most is None or most.shape != largest.shape else most
            most = np.maximum(most, largest)
    return lengths, most


def _actions(
    example: np.ndarray, most: np.ndarray | None, about: dict[str, Any], env: ActionSpec | None
) -> ActionSpec:
    """Work out what the actions are: as dataset.yaml says, as the environment, or as they look."""
    discrete = about.get("discrete", example.dtype.kind != "f")
    if "action_dim" in about:
        dim = about["action_dim"]
        if isinstance(dim, list) and not discrete:
            raise ValueError(
                f"{ABOUT} has action_dim {dim} but discrete is {discrete}; expected a number"
            )
        return model_actions(tuple(dim) if isinstance(dim, list) else dim, discrete)
    if env is not None and env.discrete and discrete:
        return model_actions(env.action_dim, True)
    if not discrete:
        return model_actions(int(example.shape[1]) if example.ndim == 2 else 1, False)
    assert most is not None
    return choices_up_to(most)


def plain(value: Any) -> Any:
    """Turn tuples into lists, as YAML has them."""
    if isinstance(value, dict):
        return {key: plain(part) for key, part in value.items()}
    return [plain(part) for part in value] if isinstance(value, tuple | list) else value
