"""HDF5 files in D4RL's layout: all episodes one behind the other.

    observations       [T, ...]   before each action
    actions            [T, A]     in the environment's units; integers [T] for choices
    rewards            [T]        what followed each action
    terminals          [T] bool   the environment ended the episode there
    timeouts           [T] bool   it was cut off there; may be missing
    next_observations  [T, ...]   after each action; may be missing

An episode ends at a terminal or a timeout, and where the next observation is not the one that
follows in the file. What stands behind the last end was cut off. Without next_observations no
episode has an observation after its last action, so that action cannot be used.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.datasets.episode import (
    Dataset,
    Episode,
    Specs,
    choices_up_to,
    infer_obs,
    model_actions,
    require_numbers,
)
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.extras import naming_the_extra

SUFFIXES = (".hdf5", ".h5")
REQUIRED = ("observations", "actions", "rewards", "terminals")
CHUNK = 65_536  # rows that are compared at once


def open_hdf5(path: Path, obs: ObsSpec | None = None, actions: ActionSpec | None = None) -> Dataset:
    """Open one file, or all of a folder.

    obs, actions: of the environment, whose spaces say how observations and actions are to be read.
    Without them observations are pictures if 3-D uint8 and else vectors, and actions lie in
    [-1, 1] or are choices.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    ends = {file: _ends(file) for file in files}
    specs = _specs(files, obs, actions)
    lengths = [int(n) for file in files for n in np.diff(ends[file], prepend=0)]

    def read() -> Iterator[Episode]:
        for file in files:
            yield from _episodes(file, ends[file], specs)

    return Dataset(str(path), specs.obs, specs.actions, lengths, read)


def _specs(files: list[Path], obs: ObsSpec | None, actions: ActionSpec | None) -> Specs:
    with _opened(files[0]) as data:
        obs = obs or infer_obs(
            str(files[0]), {"observations": data["observations"][:1]}, "observations"
        )
        example = data["actions"][:1]
        require_numbers(str(files[0]), "actions", example)
    if actions is not None:
        advice = "Choose the environment that this data was made in."
        return Specs(obs, actions, "the environment has it", advice)
    like = f"{files[0].name} has it"
    advice = "Name the environment of this data (env=…), whose action space tells their range."
    if example.dtype.kind == "f":
        return Specs(obs, model_actions(example.size, False), like, advice)
    most = np.zeros(example.shape[1:], np.int64)
    for file in files:
        with _opened(file) as data:
            most = np.maximum(most, data["actions"][:].max(0))
    return Specs(obs, choices_up_to(most), like, advice)


def _episodes(file: Path, ends: np.ndarray, specs: Specs) -> Iterator[Episode]:
    with _opened(file) as data:
        start = 0
        for end in ends.tolist():
            obs = data["observations"][start:end]
            if "next_observations" in data:
                obs = np.concatenate([obs, data["next_observations"][end - 1 : end]])
            terminated = bool(data["terminals"][end - 1])
            yield specs.episode(
                f"{file}, rows {start} to {end - 1}",
                obs,
                data["actions"][start:end],
                data["rewards"][start:end],
                terminated,
                not terminated,
                name="observations",
            )
            start = end


def _ends(file: Path) -> np.ndarray:
    """Return the number behind the last row of each episode."""
    with _opened(file) as data:
        _require_layout(file, data)
        rows = len(data["actions"])
        last = np.zeros(rows, bool)
        last[-1] = True
        for name in ("terminals", "timeouts"):
            if name in data:
                last |= data[name][:].astype(bool)
        if "next_observations" in data:
            seen, following = data["observations"], data["next_observations"]
            for start in range(0, rows - 1, CHUNK):
                stop = min(start + CHUNK, rows - 1)
                differ = following[start:stop] != seen[start + 1 : stop + 1]
                last[start:stop] |= differ.reshape(stop - start, -1).any(1)
    return np.flatnonzero(last) + 1


def _require_layout(file: Path, data: Any) -> None:
    held = {name: getattr(data[name], "shape", ()) for name in data}
    for name in REQUIRED:
        if not held.get(name):
            raise ValueError(
                f"{file} has no {name} but {', '.join(held) or 'nothing'}; expected D4RL's layout "
                f"({', '.join(REQUIRED)}), as worldloom/datasets/hdf5.py says"
            )
    rows = held["actions"][:1]
    for name in (*REQUIRED, "timeouts", "next_observations"):
        shape = held.get(name) or rows
        flat = name in ("rewards", "terminals", "timeouts")
        if shape[:1] != rows or (flat and len(shape) > 1):
            raise ValueError(
                f"{file}: {name} has shape {shape} but actions {held['actions']}; expected as many "
                f"rows{', of one number each' if flat else ''}"
            )
    if rows in ((), (0,)):
        raise ValueError(f"{file} holds no steps; expected at least one; delete it")


def _opened(file: Path) -> Any:
    with naming_the_extra(str(file)):
        import h5py
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read as HDF5 ({error}); copy it again or delete it"
        ) from error
