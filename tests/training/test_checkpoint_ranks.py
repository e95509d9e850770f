"""Checkpoints of several real processes: killed, damaged, on a full disk, continued by others."""

import contextlib
import errno
import io
import itertools
import logging
import os
import signal
import threading
import time
from pathlib import Path

import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy

from tests.rank_processes import run_ranks
from tests.training.test_checkpoints import flip
from tests.training.test_ranks import Line, Walk
from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.ranks import Ranks, rank, seed_of_rank, world_size
from worldloom.training import (
    Collector,
    ReplayBuffer,
    ReplayDataModule,
    WorldModelModule,
    checkpoints,
)
from worldloom.training.checkpoint_files import find_usable, has_checkpoint, read_checkpoint
from worldloom.training.checkpoints import Checkpoints
from worldloom.training.interruption import Interrupted

STREAMS = 4
slow = pytest.mark.slow


def make(folder, total_steps=400, storage="memmap", **options):
    """Return a model and a data module with this rank's share of 4 environments."""
    each, seed = STREAMS // world_size(), seed_of_rank(5)
    env = make_vector_env(Walk, num_envs=each)
    model = Line()
    buffer = ReplayBuffer(
        *(160 * each, (2,), 1),
        num_envs=each,
        fields=model.replay_fields,
        seed=seed,
        online_queue=True,
        storage=storage,
        folder=folder / "replay",
        share=(rank(), world_size()),
    )
    specs = {
        "obs_spec": ObsSpec.from_space(env.single_observation_space),
        "action_spec": ActionSpec.from_space(env.single_action_space),
    }
    collector = Collector(env, Actor(model), buffer, seed=seed, **specs)
    options = {"batch_size": 4, "sequence_length": 5, "train_ratio": 4.0, "prefill": 60} | options
    return model, ReplayDataModule(buffer, collector, total_steps=total_steps, **options)


class Start(lightning.Callback):
    """Notes what was restored."""

    def on_train_start(self, trainer, module):
        self.outcome = outcome(module, trainer.datamodule)


class At(lightning.Callback):
    """Calls a function after an update of the last rank."""

    def __init__(self, update, function):
        self.update, self.function = update, function

    def on_train_batch_end(self, trainer, module, *args):
        if module.updates == self.update and rank() == world_size() - 1:
            self.function(trainer)


def train(folder, *callbacks, every="7 updates", **options):
    """Train from the newest checkpoint, if there is one, to the end; return what has become."""
    model, data = make(folder, **options)
    ranks = Ranks()
    ranks.connect()
    path = find_usable(folder, data.damaged, ranks)[0] if has_checkpoint(folder) else None
    lightning.seed_everything(0, verbose=False)
    module = WorldModelModule(model, lambda params: torch.optim.SGD(params, lr=0.1), log_every=10)
    size = world_size()
    trainer = lightning.Trainer(
        **{"accelerator": "cpu", "devices": size, "max_epochs": -1, "logger": False},
        strategy=DDPStrategy() if size > 1 else "auto",
        enable_checkpointing=any(
            isinstance(c, lightning.pytorch.callbacks.Checkpoint) for c in callbacks
        ),
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[*callbacks, Checkpoints(folder, every)],
    )
    try:
        trainer.fit(module, data, ckpt_path=path)
    except Interrupted:
        pass
    finally:
        data.close()
    return outcome(module, data)


def outcome(module, data):
    """Return weights, counters and all rows of a data module."""
    store = data.buffer._store
    rows = []
    for env in range(data.buffer.num_envs):
        place = np.array([env]), store.oldest[env : env + 1]
        slots = store.slots(*place, int(store.written[env] - store.oldest[env]))
        rows.append({name: store.take(name, *place, slots)[0] for name in store.fields})
    weights = {name: x.detach().clone() for name, x in module.model.state_dict().items()}
    counts = (module.updates, data.updates, data.env_steps, data.replayed_steps)
    return weights, (*counts, data.collector.episodes, data.collector.returns), rows


def require_equal(found, expected):
    for (weights, counts, rows), (weights_, counts_, rows_) in zip(found, expected, strict=True):
        assert counts == counts_
        assert all(torch.equal(weights[name], weights_[name]) for name in weights_)
        for stream, stream_ in zip(rows, rows_, strict=True):
            assert all((stream[name] == stream_[name]).all() for name in stream_)


def ranked(rank, function, *args):
    return function(*args)


def run(size, function, *args):
    return run_ranks(ranked, size, function, *args)


def names(folder):
    return sorted(str(f.relative_to(folder)) for f in folder.rglob("*") if f.is_file())


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """What becomes of two ranks that are never stopped."""
    return run(2, train, tmp_path_factory.mktemp("straight"))


# ---- what a checkpoint consists of ---------------------------------------------------------------


def stop_on(update, folder, **options):
    """Train; a signal to the last rank stops all after an update."""

    def stop(trainer):
        def check():
            raise Interrupted(signal.SIGTERM)

        trainer.datamodule.check_interruption = check

    return train(folder, At(update, stop), **options)


def test_a_signal_to_one_rank_saves_all_and_all_continue_to_the_same_end(tmp_path, straight):
    assert straight[0][1][:2] == (68, 68) and straight[0][1] == straight[1][1]
    stopped = run(2, stop_on, 40, tmp_path / "stopped")
    assert [counts[:2] for _, counts, _ in stopped] == [(40, 40)] * 2
    assert read_checkpoint(tmp_path / "stopped" / "last.ckpt")["updates"] == 40
    require_equal(run(2, train, tmp_path / "stopped"), straight)


def test_only_the_files_of_the_two_checkpoints_remain(tmp_path):
    run(2, train, tmp_path)
    saved = [read_checkpoint(tmp_path / name) for name in ("last.ckpt", "previous.ckpt")]
    parts = [name for checkpoint in saved for name in checkpoint["parts"]]
    assert len(parts) == len(set(parts)) == 2 and [x["updates"] for x in saved] == [68, 63]
    states = [x["ReplayDataModule"] for x in saved]
    states += [
        torch.load(tmp_path / "parts" / x, weights_only=True)["ReplayDataModule"] for x in parts
    ]
    files = {f"replay/{name}" for state in states for name in state["buffer"]["files"]}
    assert {name.split("/")[1][0] for name in files} == set("0123")
    assert set(names(tmp_path)) == {
        *files,
        *(f"parts/{name}" for name in parts),
        *("last.ckpt", "previous.ckpt"),
    }


# ---- killed at any moment ------------------------------------------------------------------------


def die(*_):
    os.kill(os.getpid(), signal.SIGKILL)


def train_and_die(folder, victim, nth):
    """Train; the victim is killed right before its n-th change of a file's name."""
    if rank() == victim:
        calls = itertools.count(1)
        for owner, name in ((os, "replace"), (os, "link"), (Path, "unlink")):
            original = getattr(owner, name)

            def change(*args, original=original, **kwargs):
                if next(calls) == nth:
                    die()
                return original(*args, **kwargs)

            setattr(owner, name, change)
    train(folder, every="2 updates")


@pytest.mark.parametrize(
    ("victim", "moments"), [pytest.param(0, (2, 17, 30, 43), marks=slow), (1, (2, 9))]
)
def test_a_kill_between_any_two_changes_of_files_changes_nothing(
    tmp_path, straight, victim, moments
):
    reached = []
    for nth in moments:
        with pytest.raises(Exception):  # noqa: B017 which rank notices it first varies
            run(2, train_and_die, tmp_path / "killed", victim, nth)
        if has_checkpoint(tmp_path / "killed"):
            reached.append(read_checkpoint(tmp_path / "killed" / "last.ckpt")["updates"])
    require_equal(run(2, train, tmp_path / "killed"), straight)
    assert 0 < reached[-1] < 68 and reached == sorted(reached), reached


class DieLater(lightning.Callback):
    """Kills its process some time after the first update, however long the start has taken."""

    def __init__(self, seconds):
        self.timer = threading.Timer(seconds, die)
        self.timer.daemon = True

    def on_train_batch_end(self, trainer, module, *args):
        if self.timer.ident is None:
            self.timer.start()


def train_and_die_later(folder, victims, seconds):
    callbacks = [DieLater(seconds)] if rank() in victims else []
    train(folder, *callbacks, every="0.0001 minutes", total_steps=2000)


@slow
@pytest.mark.parametrize("seed", range(2))
def test_ten_kills_of_either_or_both_ranks_change_nothing(tmp_path, seed):
    options = ("7 updates", 2000)
    straight = run(2, train_and_save, tmp_path / "straight", *options)
    rng, reached = np.random.default_rng(seed), []
    for _ in range(10):
        victims = [(0,), (1,), (0, 1)][rng.integers(3)]
        with contextlib.suppress(Exception):
            run(2, train_and_die_later, tmp_path / "killed", victims, float(rng.uniform(0, 0.8)))
        if has_checkpoint(tmp_path / "killed"):
            reached.append(read_checkpoint(tmp_path / "killed" / "last.ckpt")["updates"])
    require_equal(run(2, train_and_save, tmp_path / "killed", *options), straight)
    assert reached == sorted(reached) and len(set(reached)) > 4, reached


def train_and_save(folder, every, total_steps=400):
    return train(folder, every=every, total_steps=total_steps)


# ---- another number of processes -----------------------------------------------------------------


def resume(folder):
    """Return what was restored, and what it has become at the end."""
    start = Start()
    end = train(folder, start)
    return start.outcome, end


@pytest.mark.parametrize(
    "sizes", [(2, 1), (1, 2), pytest.param((2, 4), marks=slow), pytest.param((4, 2), marks=slow)]
)
def test_another_number_of_processes_continues_with_all_rows(tmp_path, straight, sizes):
    before, after = sizes
    stopped = run(before, stop_on, 40, tmp_path / "run")
    restored, ends = zip(*run(after, resume, tmp_path / "run"), strict=True)
    for weights, counts, _ in restored:
        assert counts == stopped[0][1]
        assert all(torch.equal(weights[name], stopped[0][0][name]) for name in weights)
    joined = [[stream for _, _, rows in ranks for stream in rows] for ranks in (stopped, restored)]
    for stream, stream_ in zip(*joined, strict=True):
        assert all((stream[name] == stream_[name]).all() for name in stream)
    rows = [stream for end in ends for stream in end[2]]
    assert len(rows) == STREAMS and len({stream["obs"].tobytes() for stream in rows}) == STREAMS
    for stream, old in zip(rows, joined[0], strict=True):
        # No episode was broken off, and each stream continues its own.
        assert (stream["is_first"][1:] == stream["is_last"][:-1]).all()
        assert (stream["obs"][: len(old["obs"])] == old["obs"]).all()
    assert all(end[1][:4] == straight[0][1][:4] for end in ends)


@slow
def test_back_and_forth_keeps_only_the_files_that_are_needed(tmp_path):
    for updates, size in ((20, 2), (35, 1), (50, 4)):
        run(size, stop_on, updates, tmp_path)
    run(1, train, tmp_path)
    saved = [read_checkpoint(tmp_path / name) for name in ("last.ckpt", "previous.ckpt")]
    assert [x["updates"] for x in saved] == [68, 63] and not any("parts" in x for x in saved)
    files = {name for x in saved for name in x["ReplayDataModule"]["buffer"]["files"]}
    assert set(names(tmp_path)) == {
        *(f"replay/{name}" for name in files),
        *("last.ckpt", "previous.ckpt"),
    }


# ---- damage and full disks -----------------------------------------------------------------------


def find(folder):
    ranks = Ranks()
    ranks.connect()
    path, checkpoint = find_usable(folder, make(folder)[1].damaged, ranks)
    return path.name, checkpoint["updates"]


@pytest.mark.parametrize(
    ("size", "damage"),
    [
        (2, "truncated"),
        *(
            pytest.param(*case, marks=slow)
            for case in ((1, "missing"), (2, "replay"), (1, "replay"))
        ),
    ],
)
def test_damage_of_a_part_leads_to_the_previous_checkpoint(tmp_path, damage, size):
    run(2, train_and_save, tmp_path, "40 updates")
    part = tmp_path / "parts" / read_checkpoint(tmp_path / "last.ckpt")["parts"][0]
    if damage == "missing":
        part.unlink()
    elif damage == "truncated":
        part.write_bytes(part.read_bytes()[:-200])
    else:  # a file of rank 1, which the previous checkpoint does not need
        flip(tmp_path / "replay" / "2-000001-rows.bin", 5)
    assert run(size, find, tmp_path) == [("last.ckpt", 40)] * size
    assert (tmp_path / "last.damaged").exists() and not (tmp_path / "previous.ckpt").exists()
    assert run(2, train, tmp_path)[0][1][0] == 68


def fill_disk_of(victim, folder, first, end):
    """Train while the disk of one rank is full for some of its checkpoints; return the log."""
    checkpoints.RETRY_SECONDS = checkpoints.LAST_PAUSE = 0.0
    write, calls = torch.save, itertools.count()

    def save(content, sink):
        if first <= next(calls) < end and rank() == victim:
            raise OSError(errno.ENOSPC, "No space left on device")
        write(content, sink)

    torch.save = save
    text, found = io.StringIO(), ""
    logging.getLogger("worldloom").addHandler(logging.StreamHandler(text))
    try:
        train(folder, every="4 updates")
    except OSError as error:
        found = str(error)
    return text.getvalue(), found


@pytest.mark.parametrize("victim", [pytest.param(0, marks=slow), 1])
def test_a_full_disk_of_one_rank_is_reported_once_and_tried_again(tmp_path, victim):
    for text, error in run(2, fill_disk_of, victim, tmp_path, 2, 6):
        assert text.count(f"last.ckpt (rank {victim}: No space left on device)") == 1
        assert text.count("can be written again") == 1 and not error
    assert read_checkpoint(tmp_path / "last.ckpt")["updates"] == 68
    assert len(list((tmp_path / "parts").iterdir())) == 2


@slow
@pytest.mark.parametrize("victim", [0, 1])
def test_a_disk_full_to_the_end_leaves_the_last_good_checkpoint(tmp_path, victim):
    for _, error in run(2, fill_disk_of, victim, tmp_path, 1, 1000):
        assert f"last.ckpt could not be written: rank {victim}: No space left on device" in error
    assert read_checkpoint(tmp_path / "last.ckpt")["updates"] == 0
    assert len(list((tmp_path / "parts").iterdir())) == 1
    assert run(2, find, tmp_path) == [("last.ckpt", 0)] * 2


# ---- when ----------------------------------------------------------------------------------------


def fail(trainer):
    raise ValueError("one rank alone")


def test_an_error_of_one_rank_saves_nothing(tmp_path):
    with pytest.raises(Exception):  # noqa: B017 the other rank's is that of a broken connection
        run(2, train_and_fail, tmp_path)
    assert read_checkpoint(tmp_path / "last.ckpt")["updates"] in (0, 7)
    assert run(2, train, tmp_path)[0][1][0] == 68


def train_and_fail(folder):
    train(folder, At(10, fail))


class Slow(lightning.Callback):
    """Makes an update take 5 ms, and notes which updates the first rank saved."""

    def on_train_batch_end(self, trainer, module, *args):
        time.sleep(0.005 * (1 + rank()))


def save_often(folder):
    saved = []
    save = Checkpoints.save

    def spy(self, trainer, wait=False):
        saved.append(trainer.datamodule.updates)
        save(self, trainer, wait)

    Checkpoints.save = spy
    return saved, train(folder, Slow(), every="0.005 minutes", total_steps=1060)


def test_ranks_with_different_clocks_save_together(tmp_path):
    """A checkpoint every 0.3 s for 200 updates."""
    (saved, first), (saved_, second) = run(2, save_often, tmp_path)
    assert saved == saved_ and len(saved) > 5 and first[1][0] == second[1][0] == 200


def save_model(folder):
    callback = lightning.pytorch.callbacks.ModelCheckpoint(
        folder / "own", every_n_train_steps=10, save_top_k=-1, save_on_train_epoch_end=False
    )
    return train(folder, callback)


@slow
def test_a_model_checkpoint_is_written_by_the_first_rank(tmp_path, straight):
    require_equal(run(2, save_model, tmp_path / "run"), straight)
    files = sorted((tmp_path / "run" / "own").iterdir())
    assert len(files) == 6
    saved = [torch.load(file, weights_only=True) for file in files]
    assert sorted(x["updates"] for x in saved) == [10, 20, 30, 40, 50, 60]
    assert not any("ReplayDataModule" in x or "parts" in x for x in saved)
