import os
import pickle
import random
import time
from functools import partial
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer

from tests.training.test_callbacks import Breaks, Line, online
from worldloom.training import WorldModelModule, checkpoints
from worldloom.training.checkpoint_files import (
    DamagedCheckpoint,
    find_usable,
    has_checkpoint,
    read_checkpoint,
)
from worldloom.training.checkpoints import Checkpoints
from worldloom.training.interruption import Interrupted
from worldloom.training.randomness import random_state, set_random_state

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


def fit(data, *callbacks, model=None, resume=None):
    module = WorldModelModule(model or Line(), partial(torch.optim.SGD, lr=0.1), log_every=5)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, data, ckpt_path=resume)
    return module


def updates(file):
    return torch.load(file, weights_only=True)["updates"]


@pytest.fixture
def saved(tmp_path):
    """A folder with the two checkpoints of a finished run: of its updates 10 and 13."""
    fit(online(), Checkpoints(tmp_path, "5updates"))
    assert updates(tmp_path / "last.ckpt") == 13
    assert updates(tmp_path / "previous.ckpt") == 10
    return tmp_path


def flip(file, at):
    """Change one bit, as a failing disk does."""
    content = bytearray(file.read_bytes())
    content[at] ^= 1
    file.write_bytes(content)


# ---- when ----------------------------------------------------------------------------------------


class Spy(Checkpoints):
    """Notes the updates of each checkpoint once it lies in the folder."""

    def __init__(self, *args):
        super().__init__(*args)
        self.seen = []

    def save(self, trainer, wait=False):
        super().save(trainer, wait=True)
        self.seen.append(updates(self.file))


def test_a_run_is_saved_at_its_start_in_time_and_at_its_end(tmp_path, monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    class Tick(Callback):
        def on_train_batch_start(self, *args):
            clock.now += 25.0

    spy = Spy(tmp_path / "deep" / "checkpoints", "1 minute")
    fit(online(), Tick(), spy)
    assert spy.seen == [0, 3, 6, 9, 12, 13]
    names = sorted(f.name for f in (tmp_path / "deep" / "checkpoints").iterdir())
    assert names == ["last.ckpt", "previous.ckpt"]


def test_or_every_so_many_updates(tmp_path):
    spy = Spy(tmp_path, "4 updates")
    fit(online(), spy)
    assert spy.seen == [0, 4, 8, 12, 13]


@pytest.mark.parametrize("error", [RuntimeError("the disk is on fire"), Interrupted(15)])
def test_a_run_that_breaks_off_is_saved(tmp_path, error):
    with pytest.raises(type(error)):
        fit(online(), Checkpoints(tmp_path), model=Breaks(error))
    assert updates(tmp_path / "last.ckpt") == 4


@pytest.mark.parametrize("error", [FloatingPointError("nan"), Interrupted(2, between=False)])
def test_half_an_update_or_broken_numbers_do_not_replace_a_good_checkpoint(tmp_path, error):
    with pytest.raises(type(error)):
        fit(online(), Checkpoints(tmp_path), model=Breaks(error))
    assert updates(tmp_path / "last.ckpt") == 0


def test_a_signal_between_two_updates_stops_the_run_saved(tmp_path):
    data = online()

    def check():
        if data.updates == 7:
            raise Interrupted(15)

    data.check_interruption = check
    with pytest.raises(Interrupted):
        fit(data, Checkpoints(tmp_path))
    assert updates(tmp_path / "last.ckpt") == 7


# ---- what ----------------------------------------------------------------------------------------


class Decay(Line):
    """Its weight after k updates is 0.8**k, with what momentum adds, and noise."""

    def __init__(self):
        super().__init__()
        torch.nn.init.ones_(self.weight)

    def compute_loss(self, batch):
        super().compute_loss(batch)
        noise = torch.rand(()) + np.random.rand() + random.random()
        return {"loss": self.weight**2 * noise + batch["obs"].mean() * self.weight}


@pytest.mark.parametrize("stop", [1, 4, 9])
def test_training_goes_on_to_the_same_weights(tmp_path, stop):
    def seeded():
        torch.manual_seed(1), np.random.seed(1), random.seed(1)
        return online()

    straight = fit(seeded(), Checkpoints(tmp_path / "straight"), model=Decay())
    data = seeded()

    def check():
        if data.updates == stop:
            raise Interrupted(15)

    data.check_interruption = check
    with pytest.raises(Interrupted):
        fit(data, Checkpoints(tmp_path / "broken"), model=Decay())
    torch.manual_seed(2), np.random.seed(2), random.seed(2)
    file = tmp_path / "broken" / "last.ckpt"
    resumed = fit(online(), Checkpoints(tmp_path / "broken"), model=Decay(), resume=file)
    assert resumed.updates == straight.updates == 13
    assert torch.equal(resumed.model.weight, straight.model.weight)


def test_a_finished_run_can_be_extended(tmp_path):
    fit(online(total_steps=40), Checkpoints(tmp_path))
    longer = fit(online(total_steps=60), Checkpoints(tmp_path), resume=tmp_path / "last.ckpt")
    assert longer.updates == 13


def test_random_states_are_plain_data_and_come_back(tmp_path):
    def draw():
        normal = np.random.normal(), random.gauss(0, 1)  # both keep a second number for later
        return torch.rand(3).tolist(), np.random.rand(3).tolist(), random.random(), normal

    draw()
    torch.save(random_state(), tmp_path / "state.pt")
    expected = draw(), draw()
    set_random_state(torch.load(tmp_path / "state.pt", weights_only=True))
    assert (draw(), draw()) == expected


def test_a_checkpoint_is_of_the_moment_it_was_asked_for(tmp_path, monkeypatch):
    """Training goes on while a thread writes it."""
    write, held = torch.save, []

    def late(checkpoint, path):
        held.append(model.updates)
        end = time.monotonic() + 0.5  # the next one may already wait for this one
        while model.updates < min(held[-1] + 3, 12) and time.monotonic() < end:
            time.sleep(0.001)
        write(checkpoint, path)

    monkeypatch.setattr(torch, "save", late)
    model = Decay()
    seen = []

    class Look(Callback):
        def on_train_batch_end(self, trainer, module, *args):
            seen.append(module.model.weight.item())

    fit(online(), Look(), Checkpoints(tmp_path, "5updates"), model=model)
    checkpoint = torch.load(tmp_path / "previous.ckpt", weights_only=True)
    assert checkpoint["updates"] == 10
    assert checkpoint["state_dict"]["model.weight"].item() == seen[9] != seen[12]


# ---- damage --------------------------------------------------------------------------------------


def whole(state):
    return []


def test_the_newest_whole_checkpoint_is_taken(saved):
    path, checkpoint = find_usable(saved, whole)
    assert path == saved / "last.ckpt" and checkpoint["updates"] == 13


def test_whether_there_is_one(saved, tmp_path):
    assert has_checkpoint(saved) and not has_checkpoint(tmp_path / "elsewhere")


@pytest.mark.parametrize("damage", ["truncate", "flip", "empty", "text", "missing"])
def test_a_damaged_one_is_left_for_the_one_before_with_a_warning(saved, damage, caplog):
    last = saved / "last.ckpt"
    if damage == "truncate":
        last.write_bytes(last.read_bytes()[:-200])
    elif damage == "flip":
        flip(last, last.stat().st_size // 2)
    elif damage == "missing":
        last.unlink()
    else:
        last.write_text("" if damage == "empty" else "hello")
    path, checkpoint = find_usable(saved, whole)
    assert checkpoint["updates"] == 10 and updates(path) == 10
    assert "continuing from the previous checkpoint" in caplog.text
    assert damage == "missing" or "last.ckpt" in caplog.text.split("\n")[0]
    # It goes on as the last one, so that the next one to be saved does not drop it.
    assert path == last and not (saved / "previous.ckpt").exists()


def test_every_byte_of_the_tensors_is_watched(saved):
    """A flipped bit is found wherever it lies, or does not change what is read."""
    last = saved / "last.ckpt"
    good, content = read_checkpoint(last), last.read_bytes()
    found = 0
    for at in range(0, len(content), 97):
        flip(last, at)
        try:
            again = read_checkpoint(last)
        except DamagedCheckpoint:
            found += 1
        else:
            assert repr(again) == repr(good)
        last.write_bytes(content)
    assert found > 0.5 * len(range(0, len(content), 97))


def test_two_damaged_ones_end_with_a_readable_error(saved):
    for name in ("last.ckpt", "previous.ckpt"):
        (saved / name).write_bytes(b"hello")
    with pytest.raises(ValueError, match=r"no intact checkpoint.*init_from="):
        find_usable(saved, whole)


def test_a_damaged_replay_counts_too(saved):
    def damaged(state):
        return ["0-000001.safetensors"] if state["updates"] == 13 else []

    assert find_usable(saved, damaged)[1]["updates"] == 10


def test_a_file_that_both_need_does_not_end_the_run(saved, caplog):
    """The replay leaves its rows out, so the newest is as good."""
    assert find_usable(saved, lambda state: ["0-000001.safetensors"])[1]["updates"] == 13
    assert "0-000001.safetensors" in caplog.text


def test_a_pickle_in_a_checkpoint_is_not_run(tmp_path):
    class Hostile:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "was-here"),)

    torch.save({"state_dict": {}, "ReplayDataModule": Hostile()}, tmp_path / "last.ckpt")
    with pytest.raises(DamagedCheckpoint, match=r"last.ckpt is not a complete checkpoint"):
        read_checkpoint(tmp_path / "last.ckpt")
    (tmp_path / "last.ckpt").write_bytes(pickle.dumps(Hostile()))
    with pytest.raises(DamagedCheckpoint):
        read_checkpoint(tmp_path / "last.ckpt")
    assert not (tmp_path / "was-here").exists()


# ---- a full disk ---------------------------------------------------------------------------------


def full_disk(monkeypatch, is_full):
    """Let the disk be full half way while `is_full(number of the call)`."""
    write, calls = torch.save, []

    class Full:
        """Takes some bytes, then no more."""

        def __init__(self, file):
            self.file, self.left = file, 500

        def write(self, data):
            self.left -= len(data)
            if self.left < 0:
                raise OSError(28, "No space left on device")
            return self.file.write(data)

    def save(checkpoint, sink):
        calls.append(sink)
        if is_full(len(calls)):
            sink.file = Full(sink.file)
        write(checkpoint, sink)

    monkeypatch.setattr(torch, "save", save)


def test_a_full_disk_is_told_once_and_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(checkpoints, "RETRY_SECONDS", 0.0)
    full_disk(monkeypatch, lambda call: 2 <= call <= 5)
    fit(online(), Checkpoints(tmp_path, "2updates"))
    assert updates(tmp_path / "last.ckpt") == 13
    assert caplog.text.count("No space left on device") == 1
    assert "training continues" in caplog.text and "can be written again" in caplog.text
    assert sorted(f.name for f in tmp_path.iterdir()) == ["last.ckpt", "previous.ckpt"]


def test_a_disk_full_to_the_end_leaves_the_last_good_one_and_is_an_error(tmp_path, monkeypatch):
    monkeypatch.setattr(checkpoints, "LAST_PAUSE", 0.0)
    full_disk(monkeypatch, lambda call: call > 1)
    with pytest.raises(OSError, match="No space left on device; nor could the final state be kept"):
        fit(online(), Checkpoints(tmp_path, "5updates"))
    assert updates(tmp_path / "last.ckpt") == 0
    assert [f.name for f in tmp_path.iterdir()] == ["last.ckpt"]


class KeepsBest(Callback):
    """A callback whose state has a NumPy number, as the mean of some scores is."""

    def state_dict(self):
        return {"best": np.float64(1.5), "history": [np.int64(3)]}


def test_numpy_numbers_in_the_state_of_a_callback_are_saved_as_pythons(tmp_path, caplog):
    fit(online(), KeepsBest(), Checkpoints(tmp_path, "5updates"))
    states = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]
    assert states["KeepsBest"] == {"best": 1.5, "history": [3]}
    assert "is not saved" not in caplog.text
