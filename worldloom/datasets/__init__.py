"""Datasets of recorded episodes, with one reader for each file format.

All formats become the same episodes, as models see them. worldloom/datasets/folder.py documents the
format that worldloom writes.
"""

import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from worldloom.datasets.episode import Dataset, Episode, require_same_spaces
from worldloom.datasets.folder import open_folder
from worldloom.datasets.hdf5 import SUFFIXES, open_hdf5
from worldloom.datasets.minari import open_minari
from worldloom.datasets.tensordicts import SUFFIX, open_tensordicts
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.memory import require_memory

__all__ = ["Dataset", "Episode", "open_dataset"]

Reader = Callable[..., Dataset]


def open_dataset(
    path: str | Path,
    obs: ObsSpec | None = None,
    actions: ActionSpec | None = None,
    *,
    choice: Mapping[str, str | None] | None = None,
    episode_length: int | None = None,
) -> Dataset:
    """Open a folder of episodes, HDF5 files in D4RL's or .pt files in TD-MPC2's layout, or Minari.

    path: folder, file, or id of a Minari dataset.
    obs, actions: of the environment in which a model will act; the data must match them.
    choice: without obs, the observations of models: keep, image and vector of `ObsSpec.from_space`.
    episode_length: steps per episode of HDF5 files that do not tell where episodes end.

    Raises:
        FileNotFoundError: nothing exists at the path.
        ValueError: the data is missing, broken or does not match; names the file and the problem.
        ImportError: h5py or minari is missing; names the extra that installs it.
    """
    reader, found = _find_reader(Path(path).expanduser())
    options: dict[str, Any] = {"choice": choice or {}}
    if episode_length is not None:
        if reader is not open_hdf5:
            raise ValueError(
                f"data.episode_length is {episode_length}, but the episodes of {path} are separate "
                "already; expected HDF5 files; leave it out"
            )
        options["episode_length"] = episode_length
    dataset = reader(found, obs, actions, **options)
    if obs is not None and actions is not None:
        require_same_spaces(dataset, obs, actions)
    longest, width = max(dataset.lengths, default=0), dataset.actions.width
    require_memory(4 * longest * width, f"{path}: {longest} actions of {width} numbers each")
    return dataset


def _find_reader(path: Path) -> tuple[Reader, Path]:
    """Return the reader for a path, and the path that it reads."""
    if path.is_dir():
        if any((folder / "metadata.json").is_file() for folder in (path, path / "data")):
            return open_minari, path
        suffixes = {file.suffix for file in path.iterdir()}
    elif path.is_file():
        suffixes = {path.suffix}
    else:
        return open_minari, _find_minari(path)
    hdf5: dict[str, tuple[str, Reader]] = dict.fromkeys(SUFFIXES, ("HDF5", open_hdf5))
    known = {".npz": (".npz", open_folder), **hdf5, SUFFIX: (SUFFIX, open_tensordicts)}
    kinds = dict(known[suffix] for suffix in sorted(suffixes) if suffix in known)
    if len(kinds) != 1:
        both = f"both {' and '.join(sorted(kinds))} files"
        raise ValueError(
            f"{path} holds {both if kinds else 'no data'}; expected .npz "
            "files, one per episode (see worldloom/datasets/folder.py), HDF5 files in D4RL's "
            "layout (.hdf5, .h5), .pt files in TD-MPC2's (see worldloom/datasets/tensordicts.py), "
            "or a Minari dataset (data/metadata.json)"
        )
    return next(iter(kinds.values())), path


def _find_minari(path: Path) -> Path:
    """Return the folder of a downloaded Minari dataset by its id."""
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    folder = Path(root) / path
    if not (folder / "data" / "metadata.json").is_file():
        raise FileNotFoundError(
            f"there is no file or folder {path}, and no Minari dataset with this id in {root}; set "
            "data.path to an existing dataset (MINARI_DATASETS_PATH is the folder of Minari's)"
        )
    return folder
