"""The replay in files, against a plain one in memory that is given the same rows and draws."""

import copy
import errno
import io
import logging
import os
import subprocess
import threading
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.protocol import ReplayField
from worldloom.replay import block_files
from worldloom.training import ReplayBuffer

# Image and deter are large, so they leave memory where storage is "memmap"; the others are not.
SHAPES = {"image": (3, 16, 16), "joints": (3,)}
LATENTS = {"deter": ReplayField((300,), torch.float16), "stoch": ReplayField((4, 4), torch.uint8)}
ROWS = 42  # of a ring: blocks of 10 rows, which do not divide it


def make(folder=None, storage="ram", num_envs=2, **options) -> ReplayBuffer:
    options = {"fields": LATENTS, "online_queue": True, "seed": 1} | options
    return ReplayBuffer(
        ROWS * num_envs, SHAPES, 2, num_envs=num_envs, storage=storage, folder=folder, **options
    )


def rows(rng, lead) -> dict:
    return {
        "obs": {
            "image": rng.integers(0, 256, (*lead, 3, 16, 16), np.uint8),
            "joints": rng.normal(size=(*lead, 3)).astype(np.float32),
        },
        "actions": rng.uniform(-1, 1, (*lead, 2)).astype(np.float32),
        "rewards": rng.normal(size=lead).astype(np.float32),
    }


def latents(rng, lead) -> dict:
    return {
        "deter": rng.normal(size=(*lead, 300)).astype(np.float16),
        "stoch": rng.integers(0, 2, (*lead, 4, 4), np.uint8),
    }


def add(buffers, rng, count=1, episodes=0.15) -> None:
    """Add rows to every stream of each buffer, the same ones."""
    envs = buffers[0].num_envs
    for _ in range(count):
        last = buffers[0]._store.rings["is_last"]
        before = last[np.arange(envs), (buffers[0]._store.written - 1) % ROWS]
        first = before | (buffers[0]._store.written == 0)
        no = np.zeros(envs, bool)
        last = ~first & (rng.random(envs) < episodes)
        given_ = rows(rng, (envs,)) | {"fields": latents(rng, (envs,))}
        for buffer in buffers:
            buffer.add(**given_, is_first=first, is_last=last, is_terminal=no)


def add_episode(buffers, rng, steps, env) -> None:
    whole = rows(rng, (steps + 1,))
    whole |= {name: whole[name][:steps] for name in ("actions", "rewards")}
    for buffer in buffers:
        buffer.add_episode(**whole, env=env)


def flat(batch, prefix="") -> dict:
    out = {}
    for key, value in batch.items():
        out |= flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out


def same(a, b) -> None:
    a, b = flat(a), flat(b)
    assert a.keys() == b.keys()
    for key in a:
        assert a[key].dtype == b[key].dtype and torch.equal(a[key], b[key]), key


def draw(buffers, length=4, count=8):
    """Draw from all buffers and compare; return the first one's batch."""
    batches = [buffer.sample(count, length) for buffer in buffers]
    for other in batches[1:]:
        same(batches[0], other)
    return batches[0]


def compare(buffers) -> None:
    draw(buffers, 1, 200)
    draw(buffers, 7, 20)
    for other in buffers[1:]:
        same(buffers[0].newest(9), other.newest(9))
        assert (len(other), other.num_episodes) == (len(buffers[0]), buffers[0].num_episodes)


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def save(buffer) -> dict:
    state = buffer.state_dict()
    buffer.finish(state)
    return through_file(state)


def names(folder) -> set[str]:
    return {path.name for path in Path(folder).iterdir()}


# ---- bit for bit ------------------------------------------------------------------------------

STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 25)),
        st.tuples(st.just("episode"), st.integers(1, 90)),
        st.just(("draw", 0)),
        st.just(("latents", 0)),
        st.just(("state", 0)),
        st.just(("finish", 0)),
        st.tuples(st.just("resume"), st.sampled_from(["ram", "memmap"])),
    ),
    min_size=5,
    max_size=30,
)


# Whatever went before: latents that change while they are being saved belong to the next state,
# and an episode longer than the ring may leap over rows that are being saved.
CHANGES = [("latents", 0), ("state", 0), ("latents", 0)]
ENDING = [
    *[*CHANGES, ("finish", 0), ("resume", "ram")],
    *[*CHANGES, ("finish", 0), ("state", 0), ("finish", 0), ("resume", "ram")],
    *[*CHANGES, ("episode", 90), ("finish", 0), ("resume", "memmap")],
]


@settings(max_examples=40, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 999), storage=st.sampled_from(["ram", "memmap"]))
def test_files_memory_and_every_resume_give_the_same_batches(
    tmp_path_factory, steps, seed, storage
):
    folder = tmp_path_factory.mktemp("replay")
    rng = np.random.default_rng(seed)
    pair = [make(), make(folder, storage)]
    add(pair, rng, 8)
    batch = draw(pair)
    taken = saved = None  # (what the plain buffer was, state): made, and finished
    kept: list[dict] = []
    for what, value in [*steps, *ENDING]:
        if what == "add":
            add(pair, rng, value)
        elif what == "episode":
            add_episode(pair, rng, value, seed % 2)
        elif what == "draw":
            batch = draw(pair)
        elif what == "latents":
            new = latents(rng, (8, 3))
            for buffer in pair:
                buffer.write_fields(batch["index"], new, 4)
        elif what == "state":
            # A copy, as the checkpoint is that goes to the thread which writes it.
            taken = copy.deepcopy(pair[0]), copy.deepcopy(pair[1].state_dict())
        elif what == "finish" and taken:
            pair[1].finish(taken[1])
            saved, taken = taken, None
            kept = [*kept[-1:], through_file(saved[1])]
            pair[1].keep({name for state in kept for name in state["files"]})
            assert pair[1].damaged(kept[0]) == pair[1].damaged(kept[-1]) == []
        elif what == "resume" and saved:
            pair = [copy.deepcopy(saved[0]), make(folder, value, seed=7)]
            pair[1].load_state_dict(kept[-1])
            batch, taken = draw(pair), None
    compare(pair)
    add(pair, rng, 30)
    compare(pair)


def test_a_state_without_files_can_go_to_files(tmp_path):
    rng = np.random.default_rng(0)
    plain = make()
    add([plain], rng, 100)
    moved = make(tmp_path, "memmap")
    moved.load_state_dict(through_file(plain.state_dict()))
    compare([plain, moved])
    again = make(tmp_path)
    again.load_state_dict(save(moved))
    compare([plain, again])
    with pytest.raises(ValueError, match="are in separate files; give ReplayBuffer the folder"):
        make().load_state_dict(save(moved))


@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_a_state_is_the_moment_it_was_made_whatever_happens_while_it_is_written(
    tmp_path, storage, monkeypatch
):
    rng = np.random.default_rng(0)
    pair = [make(), make(tmp_path, storage)]
    monkeypatch.setattr("worldloom.replay.archive.MAX_COPIES", 20_000)  # a few rows: they wait
    add(pair, rng, 60)
    for _ in range(5):
        batch = draw(pair)
        then, state = copy.deepcopy(pair[0]), pair[1].state_dict()
        writer = threading.Thread(target=pair[1].finish, args=(state,))
        writer.start()
        for _ in range(30):
            new = latents(rng, (8, 3))
            for buffer in pair:
                buffer.write_fields(batch["index"], new, 4)
            batch = draw(pair)
            add(pair, rng, 1)
        writer.join()
        resumed = make(tmp_path, storage)
        resumed.load_state_dict(through_file(state))
        compare([then, resumed])
    compare(pair)


# ---- what is written, and what is deleted -----------------------------------------------------


def test_rows_are_written_once_and_only_latents_that_changed_again(tmp_path):
    rng = np.random.default_rng(0)
    buffer = make(tmp_path, num_envs=1)
    add([buffer], rng, 35)
    first = save(buffer)
    blocks = {f"0-{n:06d}" for n in range(3)}
    assert set(first["files"]) == {f"{b}-rows.bin" for b in blocks} | {
        f"{b}-fields-1.bin" for b in blocks
    }
    assert [len(x) for x in first["tails"][0].values()] == [5] * 10
    times = {name: os.stat(tmp_path / name).st_mtime_ns for name in names(tmp_path)}
    buffer.write_fields(torch.tensor([[0, 11]]), latents(rng, (1, 3)), 4)  # rows 12 to 14
    add([buffer], rng, 6)
    second = save(buffer)
    new = set(second["files"]) - set(first["files"])
    assert new == {
        "0-000001-fields-2.bin",
        "0-000003-fields-2.bin",
        "0-000003-rows.bin",
    }
    for name, time in times.items():
        assert os.stat(tmp_path / name).st_mtime_ns == time
    resumed = make(tmp_path, num_envs=1)
    resumed.load_state_dict(second)
    assert save(resumed)["files"] == second["files"]
    buffer.keep([*first["files"], *second["files"]])
    assert names(tmp_path) == {*first["files"], *second["files"]}
    buffer.keep(second["files"])
    assert names(tmp_path) == {*second["files"]}
    add([buffer], rng, 30)  # 71 rows, of which 42 are left: the first two blocks are gone
    third = save(buffer)
    buffer.keep(third["files"])
    assert names(tmp_path) == {*third["files"]}
    assert {name[:8] for name in third["files"]} == {f"0-{n:06d}" for n in range(2, 7)}


def test_the_block_size_follows_from_the_layout():
    fields = {"obs": ((3, 64, 64), np.dtype(np.uint8)), "deter": ((2048,), np.dtype(np.float16))}
    assert block_files.choose_block_rows(fields, ["deter"], 10**6) == 4 * 2**20 // (3 * 64 * 64)
    assert block_files.choose_block_rows(fields, ["deter"], 1000) == 250
    small = {"obs": ((8,), np.dtype(np.float32)), "deter": fields["deter"]}
    assert block_files.choose_block_rows(small, ["deter"], 10**6) == 4 * 2**20 // 4096
    huge = {"obs": ((3, 512, 512), np.dtype(np.uint8))}
    assert block_files.choose_block_rows(huge, [], 10**6) == 64
    assert block_files.choose_block_rows(huge, [], 3) == 1


def test_a_state_can_be_finished_once_and_only_the_newest(tmp_path):
    buffer = make(tmp_path)
    add([buffer], np.random.default_rng(0), 30)
    old, new = buffer.state_dict(), buffer.state_dict()
    with pytest.raises(ValueError, match=r"can no longer be finished.*make a new one"):
        buffer.finish(old)
    buffer.finish(new)
    files = dict(new["files"])
    buffer.finish(new)
    assert new["files"] == files and len(files) == 12


# ---- damage -----------------------------------------------------------------------------------


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-100])


@pytest.mark.parametrize("harm", [flip, cut, os.remove])
@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_rows_of_a_damaged_file_are_never_drawn(tmp_path, storage, harm, caplog):
    rng = np.random.default_rng(0)
    pair = [make(num_envs=1), make(tmp_path, num_envs=1)]
    add(pair, rng, 65)  # rows 23 to 64; blocks 2 to 5 complete, 60 to 64 in the state
    state = save(pair[1])
    bad = "0-000004-rows.bin"
    harm(tmp_path / bad)
    assert pair[1].damaged(state) == [bad]
    hurt = make(tmp_path, storage, num_envs=1, online_queue=False)
    with caplog.at_level(logging.WARNING):
        hurt.load_state_dict(state)
    assert len(caplog.records) == 1
    assert "10 rows of the replay are lost" in caplog.text and bad[:8] in caplog.text
    assert len(hurt) == 42 - 10
    for length in (1, 4, 12):
        index = hurt.sample(3000, length)["index"][:, 1].tolist()
        whole = {*range(23, 40 - length + 1), *range(50, 65 - length + 1)}
        assert set(index) == whole  # one of 30 is missed with probability (29/30)^3000 = 1e-44
    options = {"online_queue": False, "draw_by": "episode"}
    by_episode = make(tmp_path, storage, num_envs=1, **options)
    with caplog.at_level(logging.ERROR):
        by_episode.load_state_dict(state)
    inside = [hurt, by_episode]
    drawn = [{*x.sample(3000, 3, across_episodes=False)["index"][:, 1].tolist()} for x in inside]
    assert drawn[0] == drawn[1] < {*range(23, 38), *range(50, 63)}
    assert hurt.can_sample(17) and not hurt.can_sample(18)
    with pytest.raises(ValueError, match="replay holds 17 steps but a sequence needs 18"):
        hurt.sample(1, 18)
    inside = hurt.sample(500, 3, across_episodes=False)["index"][:, 1]
    assert not ((inside > 37) & (inside < 50)).any()
    assert len(hurt.newest(100)["rewards"][0]) == 15

    # What is left is what was written, latents too.
    kept = hurt.sample(2000, 1)
    row = kept["index"][:, 1]
    truth = pair[0]._store.rings
    for key, name in (("actions", "actions"), ("rewards", "rewards")):
        np.testing.assert_array_equal(kept[key][:, 0], truth[name][0, row % ROWS])
    np.testing.assert_array_equal(kept["obs"]["image"][:, 0], truth["obs['image']"][0, row % ROWS])
    np.testing.assert_array_equal(kept["context"]["deter"], truth["fields['deter']"][0, row % ROWS])

    # A later state knows of it, until the rows would have left the ring.
    again = make(tmp_path, num_envs=1, online_queue=False)
    again.load_state_dict(save(hurt))
    compare([hurt, again])
    add([hurt], rng, 26)
    assert hurt._store.lost and len(hurt) == 42 - 1
    add([hurt], rng, 1)
    assert len(hurt) == 42 and not hurt._store.lost


def test_the_online_queue_leaps_over_a_gap(tmp_path, caplog):
    buffer = make(tmp_path, num_envs=1)
    add([buffer], np.random.default_rng(0), 40)
    state = save(buffer)
    flip(tmp_path / "0-000001-rows.bin")
    hurt = make(tmp_path, num_envs=1)
    hurt.load_state_dict(state)
    served = [hurt.sample(1, 4)["index"][0, 1].item() for _ in range(7)]
    assert served == [0, 4, 20, 24, 28, 32, 36]
    assert "are the rows of 0-000001" in caplog.text


def test_rows_go_on_behind_a_gap_as_preceded_by_nothing(tmp_path):
    rng = np.random.default_rng(0)
    buffer = make(tmp_path, num_envs=1)
    add([buffer], rng, 40, episodes=0.0)  # one episode of 40 rows, four blocks
    state = save(buffer)
    os.remove(tmp_path / "0-000003-rows.bin")
    hurt = make(tmp_path, num_envs=1, online_queue=False)
    hurt.load_state_dict(state)
    add([hurt], rng, 6, episodes=0.0)
    assert hurt.num_episodes == 2
    starts = set(hurt.sample(2000, 5, across_episodes=False)["index"][:, 1].tolist())
    assert starts == {*range(4, 26), 40, 41}


def test_damaged_latents_begin_at_zero(tmp_path, caplog):
    rng = np.random.default_rng(0)
    pair = [make(num_envs=1), make(tmp_path, "memmap", num_envs=1)]
    add(pair, rng, 40)
    state = save(pair[1])
    cut(tmp_path / "0-000002-fields-1.bin")
    hurt = make(tmp_path, "memmap", num_envs=1)
    hurt.load_state_dict(state)
    assert "10 rows of the replay have lost these fields, which are now zero" in caplog.text
    for name in ("fields['deter']", "fields['stoch']"):
        pair[0]._store.rings[name][0, 20:30] = 0
    compare([pair[0], hurt])
    healed = make(tmp_path, num_envs=1)
    healed.load_state_dict(save(hurt))
    compare([pair[0], healed])


# ---- a full disk ------------------------------------------------------------------------------


class FullDisk:
    """Let writing fail half way, as a full disk does, while `full` is set; `room` more succeed."""

    def __init__(self, monkeypatch):
        self.full, self.room, self.write = False, 0, block_files.atomic_write
        monkeypatch.setattr(block_files, "atomic_write", self)

    @contextmanager
    def __call__(self, path, sync=True):
        self.room -= self.full
        with self.write(path, sync=sync) as file:
            yield file
            if self.full and self.room < 0:
                file.truncate(file.tell() // 2)
                raise OSError(errno.ENOSPC, "No space left on device")


@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_a_full_disk_loses_nothing_and_is_tried_again(tmp_path, storage, monkeypatch, caplog):
    disk, rng = FullDisk(monkeypatch), np.random.default_rng(0)
    pair = [make(), make(tmp_path, storage)]
    add(pair, rng, 15)
    before = save(pair[1])
    there = names(tmp_path)
    disk.full = True
    add(pair, rng, 50)  # rows 23 to 64 are left: a part of block 2, which has no file
    assert caplog.text.count("the replay could not write to") == 1
    assert "No space left on device" in caplog.text
    compare(pair)
    for _ in range(2):
        with pytest.raises(OSError, match="No space left"):
            pair[1].finish(pair[1].state_dict())
        assert names(tmp_path) == there
    batch = draw(pair)
    new = latents(rng, (8, 3))
    for buffer in pair:
        buffer.write_fields(batch["index"], new, 4)
    disk.full = False
    after = save(pair[1])
    assert "the replay can write to" in caplog.text
    resumed = make(tmp_path, storage)
    resumed.load_state_dict(after)
    compare([copy.deepcopy(pair[0]), resumed])
    assert pair[1].damaged(before) == pair[1].damaged(after) == []
    add(pair, rng, 20)
    compare(pair)
    pair[1].finish(pair[1].state_dict())
    resumed = make(tmp_path, storage)
    resumed.load_state_dict(save(pair[1]))
    pair.append(resumed)
    pair[1:2] = []
    compare(pair)


def test_only_latents_that_cannot_be_written_fail_too(tmp_path, monkeypatch):
    disk, rng = FullDisk(monkeypatch), np.random.default_rng(0)
    pair = [make(), make(tmp_path, "memmap")]
    add(pair, rng, 45)  # all complete blocks have their rows in files already
    state = pair[1].state_dict()
    there = names(tmp_path)
    disk.full, disk.room = True, 3
    with pytest.raises(OSError, match="No space left"):
        pair[1].finish(state)
    assert disk.room < 0 and names(tmp_path) == there
    with pytest.raises(ValueError, match="make a new one"):
        pair[1].finish(state)
    disk.full = False
    resumed = make(tmp_path)
    resumed.load_state_dict(save(pair[1]))
    compare([pair[0], resumed])


def test_halves_that_a_kill_left_are_removed(tmp_path):
    (tmp_path / ".0-000000-rows.bin.1234abcd.tmp").write_bytes(b"half")
    (tmp_path / "notes.txt").write_bytes(b"mine")
    buffer = make(tmp_path)
    buffer.keep([])
    assert names(tmp_path) == {"notes.txt"}


# ---- offline ----------------------------------------------------------------------------------


def filled(folder, seed=0, storage="ram", number=5):
    buffer = make(folder, storage, num_envs=1, online_queue=False)
    rng = np.random.default_rng(seed)
    for _ in range(number):
        add_episode([buffer], rng, 6, 0)
    buffer.freeze()
    return buffer


@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_a_sealed_replay_saves_latents_only(tmp_path, storage):
    folders = [tmp_path / "a", tmp_path / "b"]
    buffer, twin = filled(folders[0], storage=storage), filled(None)
    for _ in range(3):
        batch = draw([twin, buffer])
        new = latents(np.random.default_rng(1), (8, 3))
        for each in (twin, buffer):
            each.write_fields(batch["index"], new, 4)
    state = save(buffer)
    assert all("fields" in name for name in state["files"]) and len(state["files"]) == 3
    assert set(state["tails"][0]) == {"fields['deter']", "fields['stoch']"}
    buffer.keep(state["files"])
    assert (names(folders[0]) == set(state["files"])) == (storage == "ram")
    compare([copy.deepcopy(twin)])
    resumed = filled(folders[0], storage=storage)
    resumed.load_state_dict(state)
    compare([twin, resumed])
    with pytest.raises(RuntimeError, match="frozen; add all rows before freeze"):
        add([resumed], np.random.default_rng(0))
    with pytest.raises(RuntimeError, match="frozen"):
        add_episode([resumed], np.random.default_rng(0), 3, 0)
    for seed, number in ((1, 5), (0, 4)):
        with pytest.raises(ValueError, match=r"dataset has changed since .* had 35 rows then, and"):
            filled(folders[1], seed, number=number).load_state_dict(state)
    with pytest.raises(
        ValueError, match=r"filled from a dataset; fill this one and call freeze\(\)"
    ):
        make(folders[1], num_envs=1).load_state_dict(state)
    open_ = make(folders[1], num_envs=1)
    with pytest.raises(ValueError, match="do not come from a dataset"):
        filled(folders[1]).load_state_dict(save(open_))


# ---- memory and messages ----------------------------------------------------------------------


def resident_of_files() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(("RssFile", "RssShmem")))


def own_memory() -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    names = ("RssAnon", "RssFile", "RssShmem")
    return sum(int(x.split()[1]) * 1024 for x in lines if x.startswith(names))


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="reads Linux' /proc")
def test_memory_and_disk_grow_with_the_rows_and_only_on_the_disk(tmp_path):
    fields = {"deter": ReplayField((2**15,), torch.float32)}  # 128 KiB a row
    buffer = ReplayBuffer(20_000, (3,), 2, fields=fields, storage="memmap", folder=tmp_path)
    assert used_blocks(buffer) == 0 and not names(tmp_path)  # the scratch file has no name
    before = own_memory()
    no, value = np.zeros(1, bool), torch.empty(1, 2**15)
    for t in range(1024):  # 128 MiB
        first = np.array([t == 0])
        value.fill_(t)
        buffer.add(np.zeros((1, 3)), np.zeros((1, 2)), no * 1.0, first, no, no, {"deter": value})
    assert own_memory() - before < 40 * 2**20
    assert 127 * 2**20 <= used_blocks(buffer) <= 130 * 2**20
    batch = buffer.sample(30, 1)
    assert torch.equal(batch["context"]["deter"][:, 7], batch["index"][:, 1].float())


def used_blocks(buffer) -> int:
    return os.fstat(buffer._store._scratch._handle).st_blocks * 512


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 2 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting a disk needs permission")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.parametrize("storage", ["ram", "memmap"])
def test_a_disk_that_is_really_full_is_reported(small_disk, storage, caplog):
    rng = np.random.default_rng(0)
    pair = [make(), make(small_disk, storage)]
    pair[1].finish(pair[1].state_dict())
    ballast = small_disk / "ballast"
    ballast.write_bytes(bytes(2_050_000))
    add(pair, rng, 75)
    assert "No space left on device" in caplog.text
    batch = draw(pair)
    new = latents(rng, (8, 3))
    for buffer in pair:
        buffer.write_fields(batch["index"], new, 4)
    with pytest.raises(OSError, match="No space left"):
        pair[1].finish(pair[1].state_dict())
    compare(pair)
    ballast.unlink()
    add(pair, rng, 20)
    state = save(pair[1])
    resumed = make(small_disk, storage)
    resumed.load_state_dict(state)
    compare([pair[0], resumed])


def test_a_symbolic_link_in_the_folder_is_replaced_and_its_target_left_alone(tmp_path):
    (tmp_path / "mine.txt").write_bytes(b"mine")
    folder = tmp_path / "replay"
    folder.mkdir()
    (folder / "0-000000-rows.bin").symlink_to(tmp_path / "mine.txt")
    buffer = make(folder, num_envs=1)
    add([buffer], np.random.default_rng(0), 25)
    assert buffer.damaged(save(buffer)) == []
    assert (tmp_path / "mine.txt").read_bytes() == b"mine"
    assert not (folder / "0-000000-rows.bin").is_symlink()


def test_large_fields_are_not_in_memory(tmp_path):
    buffer = ReplayBuffer(100_000, (3, 64, 64), 2, storage="memmap", folder=tmp_path)
    rings = sum(ring.nbytes for ring in buffer._store.rings.values())
    assert rings == 100_000 * (2 * 4 + 4 + 3 + 8)
    assert str(100_000) in buffer.resources.replace(",", "")


def test_messages_about_storage(tmp_path):
    with pytest.raises(ValueError, match="'memmap' but there is no folder"):
        make(storage="memmap")
    with pytest.raises(ValueError, match=r"'disk'; set data.storage to 'ram' or 'memmap'"):
        make(tmp_path, "disk")
    state = save(make(tmp_path))
    message = (
        r"saved replay has fields\['deter'\] float16\(300,\) but this one float16\(200,\); resume "
        r"without changing the sizes of the model .*, or start a new run"
    )
    other = LATENTS | {"deter": ReplayField((200,), torch.float16)}
    with pytest.raises(ValueError, match=message):
        make(tmp_path, fields=other).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has fields\['stoch'\] uint8\(4, 4\) but this one none"):
        make(tmp_path, fields={"deter": LATENTS["deter"]}).load_state_dict(state)


def test_a_file_cut_off_under_the_run_is_an_error_and_no_crash(tmp_path):
    buffer = make(tmp_path, "memmap", num_envs=1)
    add([buffer], np.random.default_rng(0), 40)
    os.truncate(tmp_path / "0-000000-rows.bin", 100)
    with pytest.raises(OSError, match="was truncated while the run was using it"):
        for _ in range(50):
            buffer.sample(8, 4)


def test_a_replay_that_is_never_filled_needs_no_room_for_its_capacity(tmp_path):
    huge = {"capacity": 10**9, "obs_shape": (3, 64, 64), "action_dim": 2}
    with pytest.raises(ValueError, match=r"lower data\.capacity"):
        ReplayBuffer(**huge, folder=tmp_path / "too-much")
    states = {}
    for run, expected in enumerate((40, 300)):  # as a run that is extended
        for storage in ("ram", "memmap"):
            folder = tmp_path / storage
            buffer = ReplayBuffer(**huge, expected=expected, storage=storage, folder=folder)
            assert buffer.capacity == expected
            assert buffer.resources.startswith(f"replay: {expected} steps x")
            if run:
                buffer.load_state_dict(states[storage])
            obs = np.random.default_rng(run).integers(0, 256, (30, 3, 64, 64), np.uint8)
            buffer.add_episode(obs, np.zeros((29, 2)), np.zeros(29))
            states[storage] = buffer.state_dict()
            buffer.finish(states[storage])
            assert len(buffer) == 30 * (run + 1)
            newest = buffer.newest(30)["obs"][0]
            assert torch.equal(newest, torch.from_numpy(obs))
    small = ReplayBuffer(**huge, expected=40, folder=tmp_path / "ram")
    with pytest.raises(ValueError, match=r"60 rows .* expects 40 .*total_steps"):
        small.load_state_dict(states["ram"])


def test_large_batches_are_read_by_several_threads(tmp_path, monkeypatch):
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    filed = ReplayBuffer(200, (3, 64, 64), 2, storage="memmap", folder=tmp_path)
    plain = ReplayBuffer(200, (3, 64, 64), 2)
    rng = np.random.default_rng(0)
    frames = rng.integers(0, 256, (301, 3, 64, 64), np.uint8)
    for buffer in (filed, plain):
        buffer.add_episode(frames, np.zeros((300, 2)), np.zeros(300))
    for _ in range(5):
        assert torch.equal(filed.sample(16, 60)["obs"], plain.sample(16, 60)["obs"])
    files = sorted(tmp_path.glob("*-rows.bin"))
    file = files[len(files) // 2]
    data = file.read_bytes()
    os.truncate(file, len(data) // 2)
    with pytest.raises(OSError, match="was truncated"):
        filed.sample(64, 60)
    file.write_bytes(data)
    plain.sample(64, 60)
    assert torch.equal(filed.sample(16, 60)["obs"], plain.sample(16, 60)["obs"])
