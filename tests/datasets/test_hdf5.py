"""HDF5 files in D4RL's layout: where episodes end, and what stands behind an end."""

import numpy as np
import pytest
from gymnasium import spaces

from worldloom.datasets import open_dataset
from worldloom.envs.spaces import ActionSpec, ObsSpec

h5py = pytest.importorskip("h5py", reason="needs the extra offline")


def write(file, **arrays):
    with h5py.File(file, "w") as opened:
        for name, array in arrays.items():
            if array is not None:
                opened[name] = array
    return file


def table(rows=10, terminals=(3,), timeouts=(6,), following=True, **changes):
    """`rows` steps; observation t is [t, t], and what follows an end is [t + 0.5] twice."""
    at = np.arange(rows, dtype=np.float32)
    after = at + 1
    ends = [np.isin(np.arange(rows), list(flags)) for flags in (terminals, timeouts or ())]
    after[(ends[0] | ends[1]) | (at == rows - 1)] -= 0.5
    made = {
        "observations": np.stack([at, at], 1),
        "actions": np.stack([at / rows, -at / rows], 1),
        "rewards": 10 * at,
        "terminals": ends[0],
        "timeouts": None if timeouts is None else ends[1],
        "next_observations": np.stack([after, after], 1) if following else None,
        "infos/qpos": np.zeros((rows, 3)),
    }
    return made | changes


def rows_of(data):
    """(first and last of the observations, rewards, terminated, truncated) of each episode."""
    return [
        (e.obs[:, 0].tolist(), (e.rewards / 10).tolist(), e.terminated, e.truncated) for e in data
    ]


def test_episodes_end_at_terminals_and_timeouts(tmp_path):
    data = open_dataset(write(tmp_path / "a.hdf5", **table()))
    assert data.obs.shape == (2,) and data.actions.action_dim == 2 and data.lengths == [4, 3, 3]
    assert rows_of(data) == [
        ([0, 1, 2, 3, 3.5], [0, 1, 2, 3], True, False),
        ([4, 5, 6, 6.5], [4, 5, 6], False, True),
        ([7, 8, 9, 9.5], [7, 8, 9], False, True),  # the tail that no end follows
    ]
    actions = np.concatenate([e.actions for e in data])
    assert (actions == np.float32(table()["actions"])).all()


def test_without_next_observations_the_last_ones_are_missing(tmp_path):
    data = open_dataset(write(tmp_path / "a.h5", **table(following=False)))
    assert rows_of(data)[:2] == [
        ([0, 1, 2, 3], [0, 1, 2, 3], True, False),
        ([4, 5, 6], [4, 5, 6], False, True),
    ]


def test_without_timeouts_the_next_observations_tell(tmp_path):
    whole = table(timeouts=(6,))
    data = open_dataset(write(tmp_path / "a.hdf5", **(whole | {"timeouts": None})))
    assert data.lengths == [4, 3, 3]
    assert [e.truncated for e in data] == [False, True, True]


def test_they_are_compared_in_pieces(tmp_path, monkeypatch):
    monkeypatch.setattr("worldloom.datasets.hdf5.CHUNK", 2)
    whole = table(rows=11, terminals=(), timeouts=(1, 4, 9)) | {"timeouts": None}
    assert open_dataset(write(tmp_path / "a.hdf5", **whole)).lengths == [2, 3, 5, 1]


def test_an_end_in_the_last_row_leaves_no_tail(tmp_path):
    data = open_dataset(write(tmp_path / "a.hdf5", **table(terminals=(3, 9), timeouts=None)))
    assert data.lengths == [4, 6] and [e.terminated for e in data] == [True, True]


def test_a_folder_of_files(tmp_path):
    write(tmp_path / "b.h5", **table(rows=3, terminals=(2,)))
    write(tmp_path / "a.hdf5", **table())
    (tmp_path / "notes.txt").touch()
    data = open_dataset(tmp_path)
    assert data.lengths == [4, 3, 3, 3]
    assert next(iter(data)).source == f"{tmp_path / 'a.hdf5'}, rows 0 to 3"


def test_choices(tmp_path):
    write(tmp_path / "a.hdf5", **table(actions=np.arange(10) % 3))
    write(tmp_path / "b.hdf5", **table(actions=np.arange(10) % 5))
    data = open_dataset(tmp_path)
    assert data.actions.discrete and data.actions.action_dim == 5
    assert next(iter(data)).actions.argmax(1).tolist() == [0, 1, 2, 0]


def test_the_environment_says_how_actions_and_observations_are_read(tmp_path):
    images = np.random.default_rng(0).integers(0, 256, (10, 16, 32, 3), np.uint8)
    made = table(observations=images, following=False, actions=np.full((10, 1), 1.5))
    obs = ObsSpec.from_space(spaces.Box(0, 255, (16, 32, 3), np.uint8))
    actions = ActionSpec.from_space(spaces.Box(0, 2, (1,)))
    data = open_dataset(write(tmp_path / "a.hdf5", **made), obs, actions)
    episode = next(iter(data))
    assert (episode.obs[:, 2] == images[:4, ..., 2]).all()
    assert episode.actions.tolist() == [[0.5]] * 4
    assert open_dataset(tmp_path).obs.shape == (3, 16, 32)  # the picture can be told without it


def test_actions_outside_ask_for_the_environment(tmp_path):
    data = open_dataset(write(tmp_path / "a.hdf5", **table(actions=np.full((10, 1), 1.5))))
    with pytest.raises(ValueError, match=r"a.hdf5, rows 0 to 3: The action \[1.5\] .*\(env=…\)"):
        list(data)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"terminals": None}, "a.hdf5 has no terminals, only actions, infos, .*D4RL's layout"),
        ({"observations": None}, "has no observations, only"),
        ({"rewards": np.zeros(9)}, r"rewards has shape \(9,\) but actions \(10, 2\); expected the"),
        ({"rewards": np.zeros((10, 2))}, r"has shape \(10, 2\) .* rows, with one number each"),
        ({"next_observations": np.zeros((9, 2))}, r"next_observations has shape \(9, 2\)"),
        ({"rewards": np.full(10, np.nan)}, r"rows 0 to 3: rewards holds nan at index \[0\]"),
        ({"observations": np.full((10, 2), np.nan)}, r"a.hdf5: observations holds nan at index"),
        ({"actions": np.zeros((10, 2), "S1")}, r"actions is \|S1"),
    ],
)
def test_what_is_wrong_is_named(tmp_path, changes, message):
    write(tmp_path / "a.hdf5", **(table() | changes))
    with pytest.raises(ValueError, match=message):
        list(open_dataset(tmp_path))


def test_no_rows(tmp_path):
    empty = {name: array[:0] for name, array in table().items() if array is not None}
    with pytest.raises(ValueError, match=r"a.hdf5 has no steps"):
        open_dataset(write(tmp_path / "a.hdf5", **empty))


def test_files_that_are_cut_off(tmp_path):
    file = write(tmp_path / "a.hdf5", **table())
    file.write_bytes(file.read_bytes()[:2000])
    with pytest.raises(ValueError, match=r"a.hdf5 cannot be read as HDF5 \("):
        open_dataset(tmp_path)


@pytest.mark.parametrize("timeouts", [None, ()])
def test_a_file_that_does_not_tell_where_episodes_end_is_refused(tmp_path, timeouts):
    unmarked = table(terminals=(), timeouts=timeouts, following=False)
    file = write(tmp_path / "a.hdf5", **unmarked)
    with pytest.raises(ValueError, match=r"a.hdf5 does not tell where its 10 steps.*episode_len"):
        open_dataset(file)
    assert open_dataset(file, episode_length=4).lengths == [4, 4, 2]
    assert open_dataset(file, episode_length=99).lengths == [10]


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_damaged_rows_name_the_file_and_the_dataset(tmp_path, name):
    file = write(tmp_path / "a.hdf5", **table())
    with h5py.File(file, "a") as data:
        rows = data[name][:]
        del data[name]
        data.create_dataset(name, data=rows, chunks=rows.shape, fletcher32=True)
        place = data[name].id.get_chunk_info(0).byte_offset
    content = bytearray(file.read_bytes())
    content[place] ^= 1
    file.write_bytes(content)
    with pytest.raises(ValueError, match=rf"a.hdf5: {name} cannot be read \(.*copy the file again"):
        list(open_dataset(file))


@pytest.mark.parametrize("name", ["observations", "actions", "rewards", "terminals"])
def test_something_else_under_the_name_of_a_dataset(tmp_path, name):
    file = write(tmp_path / "a.hdf5", **(table() | {name: None}))
    with h5py.File(file, "a") as data:
        data.create_group(name)
    with pytest.raises(ValueError, match=f"a.hdf5 has no {name}, only"):
        list(open_dataset(file))
    with h5py.File(file, "a") as data:
        del data[name]
        data[name] = [b"no"] * 10
    with pytest.raises(ValueError, match=f"a.hdf5.* {name} "):
        list(open_dataset(file))
