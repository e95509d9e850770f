"""Folders of episodes, one `.npz` file each: the format of `python -m worldloom.collect`.

A file holds an episode of N actions in Gymnasium's order, with the names and units of models. It
can be written with `numpy.savez(file, **arrays)`. Files are read in the order of their names.

    obs         [N + 1, ...]  before each action and after the last: numbers, or images as uint8,
                              channels first. obs/KEY for each key of dict observations instead.
    actions     [N, A]        floats in [-1, 1], from each joint's lowest to its highest value; or
                [N]           integers for choices, counted from 0; [N, groups] for several groups
    rewards     [N]           received after each action
    terminated  bool          the environment ended the episode; false for a time limit
    truncated   bool          the episode was cut off, for example by a time limit; optional
    success     bool          the task was solved; optional

With only N observations the last action, its reward and `terminated` cannot be used.

A file `dataset.yaml` in the folder is optional. It has `format: 1` and any of `action_dim` (number
of joints or choices; a list for several groups), `discrete`, `obs_shape` and `env` (the section of
the configuration that made the environment); `episodes` and `steps` are only information. Without
it, the first file determines the shapes, and the largest integer the number of choices.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from worldloom.datasets.episode import (
    Arrays,
    Dataset,
    Episode,
    Schema,
    drop_keys,
    infer_choices,
    infer_obs,
    make_action_spec,
    require_numbers,
)
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.files import check_format, read_arrays, read_yaml
from worldloom.trees import map_tree

ABOUT = "dataset.yaml"
FORMAT = 1
FLAGS = ("terminated", "truncated", "success")
LAYOUT = "see worldloom/datasets/folder.py"
KINDS = {"action_dim": int | list, "discrete": bool, "obs_shape": list | dict, "env": dict}


def open_folder(
    path: Path,
    obs: ObsSpec | None = None,
    actions: ActionSpec | None = None,
    choice: Mapping[str, str | None] = MappingProxyType({}),
) -> Dataset:
    """Open a folder of episodes, or a single episode.

    obs, actions: of the environment, if it is known: the keys that models do not see, and the
        number of choices.
    choice: without obs, the observations of models, as in `ObsSpec.from_space`.
    """
    files = sorted(path.glob("*.npz")) if path.is_dir() else [path]
    about = read_about(path)
    first = _load(files[0])
    dropped = () if obs is None else obs.dropped
    arrays, options = drop_keys(_get_obs(first), dropped), choice if obs is None else {}
    spec = infer_obs(str(files[0]), arrays, choice=options)
    dropped = (*dropped, *spec.dropped)
    spec = replace(spec, dropped=dropped)
    inferred = map_tree(int, spec.shape, sequence=list)
    shape = about.get("obs_shape", inferred)
    if isinstance(shape, dict):
        shape = {key: x for key, x in shape.items() if key not in dropped}
    if shape != inferred:
        raise ValueError(
            f"{files[0]} has observations {spec.shape}, but obs_shape in {ABOUT} is {shape}; "
            f"correct or delete {path / ABOUT}"
        )
    lengths, largest = _scan_actions(files)
    schema = Schema(
        spec,
        _infer_actions(first["actions"], largest, about, actions),
        f"{files[0].name} and {ABOUT}" if about else files[0].name,
        "Count choices from 0; store others as (action - middle) / half of their range.",
    )

    def read() -> Iterator[Episode]:
        return (_read_episode(file, schema) for file in files)

    return Dataset(str(path), schema.obs, schema.actions, lengths, read, about.get("env"))


def read_about(path: Path) -> dict[str, Any]:
    """Return the contents of a folder's dataset.yaml as plain data; {} if there is none."""
    file = path / ABOUT
    if not file.is_file():
        return {}
    about = read_yaml(file, "correct or delete it")
    found = about.get("format") if isinstance(about, dict) else None
    fix = f"record the dataset again, or, if you wrote the file, add 'format: {FORMAT}'"
    check_format(file, found, FORMAT, fix)
    about = {key: value for key, value in about.items() if value is not None}
    for key, kind in KINDS.items():
        given = about.get(key)
        sizes = (given if isinstance(given, list) else [given]) if key == "action_dim" else []
        positive = all(type(n) is int and n >= 1 for n in sizes)
        if key in about and not (isinstance(given, kind) and positive):
            raise ValueError(f"{file} has {key} {about[key]!r}, which is not valid; {LAYOUT}")
    return about


def _load(file: Path, names: Sequence[str] | None = None) -> Arrays:
    """Read all arrays of a file, or those with the given names."""
    try:
        found, available = read_arrays(file, names)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"{file} cannot be read ({error}); expected arrays of numbers written by numpy.savez; "
            "copy it again or delete it"
        ) from error
    for name in ("actions", "rewards", "obs"):
        required = name != "obs" or names is None
        if required and not any(key == name or key.startswith(f"{name}/") for key in found):
            raise ValueError(
                f"{file} has no array {name}, only {', '.join(available) or 'nothing'}; {LAYOUT}"
            )
    return found


def _get_obs(arrays: Arrays) -> Arrays:
    return {k: array for k, array in arrays.items() if k == "obs" or k.startswith("obs/")}


def _read_episode(file: Path, schema: Schema) -> Episode:
    arrays = _load(file)
    flags = {name: arrays[name] for name in FLAGS if name in arrays}
    if "terminated" not in flags:
        raise ValueError(
            f"{file} has no array terminated; add terminated=True if the environment ended the "
            "episode, or else False"
        )
    for name, flag in flags.items():
        if flag.size != 1 or flag.dtype.kind not in "biuf":
            raise ValueError(
                f"{file}: {name} has shape {flag.shape}; expected a single bool for the end of the "
                f"episode; use {name}={name}[-1]"
            )
    values = {name: bool(flag.reshape(())) for name, flag in flags.items()}
    obs = {key.removeprefix("obs").removeprefix("/"): x for key, x in _get_obs(arrays).items()}
    return schema.make_episode(
        str(file),
        obs.get("", obs),
        arrays["actions"],
        arrays["rewards"],
        values["terminated"],
        values.get("truncated", False),
        values.get("success"),
    )


def _scan_actions(files: Sequence[Path]) -> tuple[list[int], np.ndarray | None]:
    """Return the steps of each episode, and the largest integer of each group of choices."""
    lengths, largest = [], None
    for file in files:
        actions = _load(file, ("actions", "rewards"))["actions"]
        require_numbers(f"{file}: actions", actions)
        lengths.append(len(actions))
        if actions.dtype.kind != "f" and actions.size:
            new = actions.max(0)
            largest = new if largest is None or largest.shape != new.shape else largest
            largest = np.maximum(largest, new)
    return lengths, largest


def _infer_actions(
    example: np.ndarray, largest: np.ndarray | None, about: dict[str, Any], env: ActionSpec | None
) -> ActionSpec:
    """Return the action space given by dataset.yaml, by the environment, or by the actions."""
    discrete = about.get("discrete", example.dtype.kind != "f")
    if "action_dim" in about:
        dim = about["action_dim"]
        if isinstance(dim, list) and not discrete:
            raise ValueError(
                f"{ABOUT} has action_dim {dim} but discrete is {discrete}; expected a number"
            )
        return make_action_spec(tuple(dim) if isinstance(dim, list) else dim, discrete)
    if env is not None and env.discrete and discrete:
        return make_action_spec(env.action_dim, True)
    if not discrete:
        return make_action_spec(int(example.shape[1]) if example.ndim == 2 else 1, False)
    assert largest is not None
    return infer_choices(largest)
