"""The memory that is left, in a container or not, and the replay that does not fit into it."""

import logging
import shutil
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from worldloom import memory
from worldloom.protocol import ReplayField
from worldloom.replay import capacity
from worldloom.training import ReplayBuffer


def test_more_than_the_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 3_900_000_000)
    message = (
        r"replay of 1000000000 steps needs 39.0 GB \(39 bytes per step\) but the machine has "
        r"3.9 GB available; lower data.capacity, for example to 90000000$"
    )
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(1e9)
    monkeypatch.undo()
    assert 1e8 < capacity.available_memory() < 1e14


@pytest.mark.parametrize(
    ("files", "left"),
    [
        # Version 2: limit - use + cache of files.
        (
            {
                "memory.max": "6000\n",
                "memory.current": "5000\n",
                "memory.stat": "inactive_file 700",
            },
            1700,
        ),
        ({"memory.max": "max\n", "memory.current": "5000\n", "memory.stat": "file 9"}, None),
        # Version 1, whose total_… include the groups below this one.
        (
            {
                "memory/memory.limit_in_bytes": "6000\n",
                "memory/memory.usage_in_bytes": "5000\n",
                "memory/memory.stat": "inactive_file 3\ntotal_inactive_file 800\n",
            },
            1800,
        ),
        ({"memory.max": "6000\n"}, None),  # half a version says nothing
        ({}, None),
    ],
)
def test_limit_of_a_container(monkeypatch, tmp_path, files, left):
    monkeypatch.setattr(memory, "CGROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if left is not None:
        assert capacity.available_memory() == left
        with pytest.raises(
            ValueError, match=rf"needs 0.0 GB .* for example to {int(0.9 * left / 39)}$"
        ):
            ReplayBuffer(1000)
    else:
        assert capacity.available_memory() > 1e8


# 8 bytes of an action, 4 of a reward, 3 flags and 8 for the episode: small. Images are large.
SMALL, IMAGE, DETER = 23, 3 * 16 * 16, 600
LATENTS = {"deter": ReplayField((300,), torch.float16)}


def replay(tmp_path, capacity, storage="memmap", **options):
    return ReplayBuffer(
        capacity, (3, 16, 16), 2, fields=LATENTS, storage=storage, folder=tmp_path, **options
    )


@pytest.fixture
def disk(monkeypatch):
    """A disk and a memory of a set size."""
    sizes = SimpleNamespace(free=10**9, memory=10**9)
    usage = shutil.disk_usage("/")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=sizes.free))
    monkeypatch.setattr(capacity, "available_memory", lambda: sizes.memory)
    return sizes


@pytest.mark.parametrize(("storage", "latents"), [("ram", 3), ("memmap", 4)])
def test_more_than_the_free_disk_is_refused(tmp_path, disk, storage, latents):
    # Latents: two checkpoints, the one being written, and a scratch file where memory has none.
    size = SMALL + IMAGE + latents * DETER
    disk.free = 1000 * size
    replay(tmp_path, 900, storage)
    message = (
        rf"replay of 901 steps needs 0.0 GB \({size} bytes per step\) but the disk of .* has 0.0 "
        rf"GB free; lower data.capacity, for example to 900$"
    )
    with pytest.raises(ValueError, match=message):
        replay(tmp_path, 901, storage)


def test_memory_has_to_hold_what_is_not_mapped(tmp_path, disk):
    disk.memory = 1000 * SMALL
    replay(tmp_path, 900)
    with pytest.raises(ValueError, match=rf"\({SMALL} bytes per step\) but the machine has"):
        replay(tmp_path, 901)
    with pytest.raises(
        ValueError, match=rf"\({SMALL + IMAGE + DETER} bytes per step\) but the mac"
    ):
        replay(tmp_path, 900, "ram")


def test_jobs_of_a_sweep_at_a_time_share_the_memory(monkeypatch):
    """Also while the others have not used theirs; one that starts later finds less available."""
    monkeypatch.setattr(capacity, "total_memory", lambda: 4_000_000_000)
    monkeypatch.setattr(capacity, "available_memory", lambda: 4_000_000_000)
    assert capacity.fit_rows(1000, 1, 3_000_000) == 1000
    monkeypatch.setenv("WORLDLOOM_JOBS", "2")
    assert capacity.fit_rows(500, 1, 3_000_000) == 500
    with pytest.raises(ValueError, match=r"has 2\.0 GB available, shared by 2 jobs"):
        capacity.fit_rows(1000, 1, 3_000_000)
    monkeypatch.setattr(capacity, "available_memory", lambda: 2_100_000_000)
    assert capacity.fit_rows(500, 1, 3_000_000) == 500


def test_shrinking_takes_what_fits_and_says_so(tmp_path, disk, caplog):
    disk.memory, disk.free = 1000 * SMALL, 500 * (SMALL + IMAGE + 4 * DETER)
    with caplog.at_level(logging.WARNING):
        assert replay(tmp_path, 800, shrink=True, num_envs=4).capacity == 448  # 450, in fours
    assert "needs 0.0 GB" in caplog.text and "keeps the newest 448 steps instead" in caplog.text
    caplog.clear()
    assert replay(tmp_path, 440, shrink=True).capacity == 440
    assert not caplog.text
    disk.memory = 20
    with pytest.raises(ValueError, match=r"lower data.capacity, for example to 0$"):
        replay(tmp_path, 440, shrink=True)


def test_files_of_the_run_itself_count_as_free(tmp_path, disk):
    buffer = replay(tmp_path, 500)
    no = np.array([False])
    for t in range(500):
        image = np.zeros((1, 3, 16, 16), np.uint8)
        buffer.add(image, np.zeros((1, 2)), np.zeros(1), no | (t == 0), no, no)
    state = buffer.state_dict()
    buffer.finish(state)
    written = sum(path.stat().st_size for path in tmp_path.iterdir())
    assert written > 480 * (SMALL + IMAGE + DETER)
    disk.free = int(500 * (SMALL + IMAGE + 4 * DETER) / 0.9) - written + 1
    replay(tmp_path, 500).load_state_dict(state)
    with pytest.raises(ValueError, match="GB free"):
        replay(tmp_path / "another", 500)


def test_needs_are_told_beside_what_there_is(tmp_path, disk):
    disk.memory, disk.free = 20 * 10**9, 70 * 10**9
    assert capacity.describe_resources(1_000_000, 45, 12_300, tmp_path / "not" / "there") == (
        "replay: 1,000,000 steps x 12,300 bytes = 12.3 GB on disk (70.0 GB free), "
        "x 45 bytes = 45.0 MB in memory (20.0 GB available)"
    )
    assert capacity.describe_resources(1_000_000, 12_345) == (
        "replay: 1,000,000 steps x 12,345 bytes = 12.3 GB in memory (20.0 GB available)"
    )
    assert replay(tmp_path, 1000).resources == capacity.describe_resources(
        1000, SMALL, SMALL + IMAGE + 4 * DETER, tmp_path
    )
