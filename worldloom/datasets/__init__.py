"""Recorded experience: one way to read each format in which it is kept.

`open_dataset` tells the formats apart. All of them become the same episodes, as models see them;
worldloom/datasets/folder.py documents the format that worldloom writes itself.
"""

import os
from collections.abc import Callable
from pathlib import Path

from worldloom.datasets.episode import Dataset, Episode, require_agreement
from worldloom.datasets.folder import open_folder
from worldloom.datasets.hdf5 import SUFFIXES, open_hdf5
from worldloom.datasets.minari import open_minari
from worldloom.envs.spaces import ActionSpec, ObsSpec

__all__ = ["Dataset", "Episode", "open_dataset"]

Reader = Callable[[Path, ObsSpec | None, ActionSpec | None], Dataset]


def open_dataset(
    path: str | Path, obs: ObsSpec | None = None, actions: ActionSpec | None = None
) -> Dataset:
    """Open a folder of episodes, HDF5 files in D4RL's layout, or a data set of Minari.

    path: of a folder or file, or the id of a data set of Minari.
    obs, actions: of the environment in which a model will act, which the data must fit.

    Raises:
        FileNotFoundError: there is nothing at the path.
        ValueError: it holds no data, or none that fits; names the file and what is wrong in it.
        ImportError: h5py or minari is missing; names the extra that installs it.
    """
    reader, found = _detect(Path(path).expanduser())
    dataset = reader(found, obs, actions)
    if obs is not None and actions is not None:
        require_agreement(dataset, obs, actions)
    return dataset


def _detect(path: Path) -> tuple[Reader, Path]:
    """Tell from what lies at a path how it is read."""
    if path.is_dir():
        if any((folder / "metadata.json").is_file() for folder in (path, path / "data")):
            return open_minari, path
        suffixes = {file.suffix for file in path.iterdir()}
    elif path.is_file():
        suffixes = {path.suffix}
    else:
        return open_minari, _downloaded(path)
    npz, hdf5 = ".npz" in suffixes, bool(suffixes & {*SUFFIXES})
    if npz == hdf5:
        raise ValueError(
            f"{path} holds {'both .npz and HDF5 files' if npz else 'no data'}; expected .npz files,"
            " one per episode (worldloom/datasets/folder.py says what is in them), HDF5 files in "
            "D4RL's layout (.hdf5, .h5), or a data set of Minari (data/metadata.json)"
        )
    return open_folder if npz else open_hdf5, path


def _downloaded(path: Path) -> Path:
    """Return the folder of a data set of Minari by its id."""
    root = os.environ.get("MINARI_DATASETS_PATH") or Path.home() / ".minari" / "datasets"
    folder = Path(root) / path
    if not (folder / "data" / "metadata.json").is_file():
        raise FileNotFoundError(
            f"there is no file or folder {path}, nor a data set of Minari with this id in {root}; "
            "set data.path to what there is (MINARI_DATASETS_PATH says where Minari's lie)"
        )
    return folder
