"""Which reader a path gets, and what is said where there is none."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from worldloom import datasets
from worldloom.datasets import open_dataset
from worldloom.envs.spaces import ActionSpec, ObsSpec


def save(file, width=2):
    obs, actions = np.zeros((3, width), np.float32), np.zeros((2, 1), np.float32)
    np.savez(file, obs=obs, actions=actions, rewards=np.zeros(2), terminated=False)


def test_nothing_there(tmp_path, monkeypatch):
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"no file or folder gone/x-v0, and no Minari da"):
        open_dataset("gone/x-v0")


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ([], r"holds no data; expected .npz files, one per episode"),
        (["notes.txt"], "holds no data"),
        (["a.npz", "b.hdf5"], "holds both .npz and HDF5 files"),
    ],
)
def test_folders_without_an_answer(tmp_path, files, message):
    for name in files:
        (tmp_path / name).touch()
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


def test_files_of_another_kind(tmp_path):
    (tmp_path / "a.csv").touch()
    with pytest.raises(ValueError, match=r"a.csv holds no data"):
        open_dataset(tmp_path / "a.csv")


def test_home_folders_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    save(tmp_path / "a.npz")
    assert len(open_dataset("~")) == 1


def test_an_environment_of_another_kind_is_refused(tmp_path):
    save(tmp_path / "a.npz")
    obs = ObsSpec.from_space(spaces.Box(-9, 9, (3,)))
    actions = ActionSpec.from_space(spaces.Discrete(4))
    message = (
        r"has observations \(2,\) and 1 continuous actions, but the environment has observations "
        r"\(3,\) and 4 choices; choose the environment .* or env=none"
    )
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path, obs, actions)


@pytest.mark.parametrize(("package", "name"), [("h5py", "a.hdf5"), ("minari", "metadata.json")])
def test_a_missing_package_is_named_with_our_extra(tmp_path, monkeypatch, package, name):
    (tmp_path / name).write_text('{"observation_space": "", "action_space": ""}')
    monkeypatch.setitem(sys.modules, package, None)
    with pytest.raises(ImportError, match=rf"{package}.*pip install 'worldloom\[offline\]'"):
        open_dataset(tmp_path)


def test_nothing_heavy_is_imported_for_our_own_format(tmp_path):
    save(tmp_path / "a.npz")
    # The package around it is left out: what it imports is its own affair.
    code = f"""
import sys, types
package = sys.modules["worldloom"] = types.ModuleType("worldloom")
package.__path__ = [{str(Path(datasets.__file__).parents[1])!r}]
from worldloom.datasets import open_dataset
assert len(open_dataset({str(tmp_path)!r})) == 1
assert not {{"torch", "h5py", "minari"}} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", code], check=True)
