"""HDF5 files in D4RL's layout: the episodes are concatenated.

    observations       [T, ...]   before each action
    actions            [T, A]     in the environment's units; integers [T] for choices
    rewards            [T]        received after each action
    terminals          [T] bool   the environment ended the episode
    timeouts           [T] bool   the episode was cut off; optional
    next_observations  [T, ...]   after each action; optional

An episode ends at a terminal, at a timeout, where next_observations differs from the following
observation, and at the end of the file. Without next_observations, the last action of each episode
cannot be used, because the observation after it is not known. A file in which nothing tells where
episodes end is rejected, unless `data.episode_length` does.
"""

import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from worldloom.datasets.episode import (
    Dataset,
    Episode,
    Schema,
    infer_choices,
    infer_obs,
    make_action_spec,
    require_numbers,
)
from worldloom.envs.extras import suggest_extra
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.files import require_regular
from worldloom.memory import require_memory

SUFFIXES = (".hdf5", ".h5")
REQUIRED = ("observations", "actions", "rewards", "terminals")
CHUNK = 65_536  # rows compared at once


def open_hdf5(
    path: Path,
    obs: ObsSpec | None = None,
    actions: ActionSpec | None = None,
    choice: Mapping[str, str | None] = MappingProxyType({}),
    episode_length: int | None = None,
) -> Dataset:
    """Open one file, or all files of a folder.

    obs, actions: of the environment, in whose spaces the data is. Without them observations are
        images if 3-D uint8, else vectors, and actions are in [-1, 1] or choices.
    choice: without obs, the observations of models, as in `ObsSpec.from_space`.
    episode_length: steps after which an episode ends, where the file does not tell.
    """
    files = [path]
    if path.is_dir():
        files = sorted(file for file in path.iterdir() if file.suffix in SUFFIXES)
    ends = {file: _find_ends(file, episode_length) for file in files}
    schema = _make_schema(files, obs, actions, choice)
    lengths = [int(n) for file in files for n in np.diff(ends[file], prepend=0)]

    def read() -> Iterator[Episode]:
        for file in files:
            yield from _read_episodes(file, ends[file], schema)

    return Dataset(str(path), schema.obs, schema.actions, lengths, read)


def _make_schema(
    files: list[Path],
    obs: ObsSpec | None,
    actions: ActionSpec | None,
    choice: Mapping[str, str | None],
) -> Schema:
    first = str(files[0])
    with _open_file(files[0]) as data:
        arrays = {"observations": _read(data, "observations", 0, 1)}
        obs = obs or infer_obs(first, arrays, "observations", choice)
        example = _read(data, "actions", 0, 1)
        require_numbers(f"{first}: actions", example)
    if actions is not None:
        advice = "Choose the environment in which this data was recorded."
        return Schema(obs, actions, "the environment", advice)
    if example.dtype.kind == "f":
        actions = make_action_spec(example.size, False)
    else:
        largest = np.zeros(example.shape[1:], np.int64)
        for file in files:
            with _open_file(file) as data:
                largest = np.maximum(largest, _read(data, "actions").max(0))
        actions = infer_choices(largest)
    advice = "Name the environment of this data (env=…); its action space defines their range."
    return Schema(obs, actions, files[0].name, advice)


def _read_episodes(file: Path, ends: np.ndarray, schema: Schema) -> Iterator[Episode]:
    with _open_file(file) as data:
        start = 0
        for end in ends.tolist():
            size = data["observations"].nbytes // len(data["observations"]) * (end - start)
            require_memory(size, f"{file}: rows {start} to {end - 1} of observations")
            obs = _read(data, "observations", start, end)
            if "next_observations" in data:
                obs = np.concatenate([obs, _read(data, "next_observations", end - 1, end)])
            terminated = bool(_read(data, "terminals", end - 1, end)[0])
            yield schema.make_episode(
                f"{file}, rows {start} to {end - 1}",
                obs,
                _read(data, "actions", start, end),
                _read(data, "rewards", start, end),
                terminated,
                not terminated,
                name="observations",
            )
            start = end


def _find_ends(file: Path, episode_length: int | None) -> np.ndarray:
    """Return the index after the last row of each episode.

    Raises:
        ValueError: nothing in the file tells where episodes end, and episode_length is None.
    """
    with _open_file(file) as data:
        _require_layout(file, data)
        rows = len(data["actions"])
        last = np.zeros(rows, bool)
        last[-1] = True
        for name in ("terminals", "timeouts"):
            if name in data:
                flags = _read(data, name)
                require_numbers(f"{file}: {name}", flags)
                last |= flags.astype(bool)
        if "next_observations" in data:
            for start in range(0, rows - 1, CHUNK):
                stop = min(start + CHUNK, rows - 1)
                obs = _read(data, "observations", start + 1, stop + 1)
                differ = _read(data, "next_observations", start, stop) != obs
                last[start:stop] |= differ.reshape(stop - start, -1).any(1)
        elif episode_length is not None:
            last[episode_length - 1 :: episode_length] = True
        elif not last[:-1].any() and not data["terminals"][-1]:
            raise ValueError(
                f"{file} does not tell where its {rows:,} steps are divided into episodes: no "
                "terminal or timeout is set, and there are no next_observations; set "
                "data.episode_length to the steps of an episode (to a larger number if each file "
                "is one episode)"
            )
    return np.flatnonzero(last) + 1


def _require_layout(file: Path, data: Any) -> None:
    shapes: dict[str, Any] = {name: getattr(data[name], "shape", ()) for name in data}
    for name in REQUIRED:
        if not shapes.get(name):
            raise ValueError(
                f"{file} has no {name}, only {', '.join(shapes) or 'nothing'}; expected D4RL's "
                f"layout ({', '.join(REQUIRED)}); see worldloom/datasets/hdf5.py"
            )
    rows = shapes["actions"][:1]
    for name in (*REQUIRED, "timeouts", "next_observations"):
        shape = shapes.get(name) or rows
        flat = name in ("rewards", "terminals", "timeouts")
        if shape[:1] != rows or (flat and len(shape) > 1):
            raise ValueError(
                f"{file}: {name} has shape {shape} but actions {shapes['actions']}; expected the "
                f"same number of rows{', with one number each' if flat else ''}"
            )
    after = shapes.get("next_observations") or shapes["observations"]
    if after != shapes["observations"]:
        raise ValueError(
            f"{file}: next_observations has shape {after} but observations "
            f"{shapes['observations']}; expected the same"
        )
    for name in filter(shapes.get, (*REQUIRED, "timeouts", "next_observations")):
        array, count, row = data[name], shapes[name][0], shapes[name][1:]
        link = type(data.get(name, getlink=True)).__name__
        if link != "HardLink" or array.is_virtual or array.external:
            raise ValueError(f"{file}: {name} is stored in another file; write it into this one")
        count = min(count, CHUNK) if name.endswith("observations") else count
        size = math.prod(row) * array.dtype.itemsize * count
        require_memory(size, f"{file}: {name} of shape {shapes[name]}")
    if rows in ((), (0,)):
        raise ValueError(f"{file} has no steps; expected at least one; delete it")


def _read(data: Any, name: str, start: int = 0, stop: int | None = None) -> np.ndarray:
    """Return rows of a dataset; a damaged one raises ValueError with the names of both."""
    try:
        return np.asarray(data[name][start:stop])
    except (OSError, RuntimeError, ValueError, TypeError, KeyError) as error:
        raise ValueError(
            f"{data.filename}: {name} cannot be read ({error}); copy the file again or delete it"
        ) from error


def _open_file(file: Path) -> Any:
    with suggest_extra(str(file)):
        import h5py
    require_regular(file)
    try:
        return h5py.File(file, "r")
    except OSError as error:
        raise ValueError(
            f"{file} cannot be read as HDF5 ({error}); copy it again or delete it"
        ) from error
