"""The memory that is left, in a container or not, and the replay that does not fit into it."""

import pytest

from worldloom.training import ReplayBuffer, capacity


def test_more_than_the_free_memory_is_refused(monkeypatch):
    monkeypatch.setattr(capacity, "available_memory", lambda: 3_900_000_000)
    message = (
        r"replay of 1000000000 steps needs 39.0 GB \(39 bytes per step\) but the machine has "
        r"3.9 GB available; lower data.capacity, for example to 80000000"
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
    monkeypatch.setattr(capacity, "CGROUPS", tmp_path)
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    if left is not None:
        assert capacity.available_memory() == left
        with pytest.raises(ValueError, match=r"needs 0.0 GB .* for example to 3"):
            ReplayBuffer(1000)
    else:
        assert capacity.available_memory() > 1e8
