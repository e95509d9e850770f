"""Real runs in two processes that are killed and resumed, also by another number of processes."""

import os
import random
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.test_survival import DREAMER, plain, require_equal, require_whole
from worldloom.training.checkpoint_files import PARTS, has_checkpoint, read_checkpoint, read_part

pytestmark = pytest.mark.slow  # tests/training/test_checkpoint_ranks.py is fast
DDP = [
    *("trainer=ddp", "trainer.accelerator=cpu", "trainer.precision=32-true"),
    "trainer.strategy.timeout.seconds=40",  # of a rank whose partner died before they met
]
RUN = [
    *(*DREAMER, "env=cartpole", "env.num_envs=4", "env.time_limit=30"),
    *("training.total_steps=240", "callbacks.open_loop=null", "callbacks.progress=null"),
]


def start(words, cwd):
    command = [sys.executable, "-m", "worldloom.run", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes)


def finish(words, cwd):
    """Run a command to its end; return what it printed."""
    with start(words, cwd) as process:
        try:
            said = process.communicate(timeout=240)[0]
        except BaseException:
            process.kill()
            raise
    assert process.returncode == 0, said
    return said


def children(number):
    """Return the child processes of a process."""
    found = Path(f"/proc/{number}/task/{number}/children")
    return [int(child) for child in found.read_text().split()]


def starts(folder):
    """Return how often a run has begun to train."""
    log = folder / "worldloom.log"
    return log.read_text().count("updates to come") if log.exists() else 0


def kill(words, cwd, folder, victims, seconds):
    """Kill ranks of a run, some time after it has begun to train and has a checkpoint."""
    before, begun, ranks = starts(folder), None, []
    with start(words, cwd) as process:
        while process.poll() is None and (begun is None or time.monotonic() < begun + seconds):
            ranks = ranks or children(process.pid)
            if begun is None and starts(folder) > before and has_checkpoint(folder / "checkpoints"):
                begun = time.monotonic()
            time.sleep(0.02)
        with suppress(ProcessLookupError):
            for victim in victims:
                os.kill([process.pid, *ranks][victim], signal.SIGKILL)
        process.communicate(timeout=120)
    end = time.monotonic() + 60
    while any(Path(f"/proc/{rank}").exists() for rank in ranks) and time.monotonic() < end:
        time.sleep(0.05)  # the other rank still ends


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """A run of two processes that is never stopped."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    finish([*RUN, *DDP, "trainer.devices=2", f"folder={folder}"], folder.parent)
    return folder


def parts(folder):
    """Return what the ranks above 0 saved in last.ckpt."""
    last = folder / "checkpoints" / "last.ckpt"
    return [read_part(last, name) for name in read_checkpoint(last)[PARTS]]


def require_same_run(folder, expected):
    require_equal(folder, expected)
    for ours, theirs in zip(parts(folder), parts(expected), strict=True):
        for part in (ours, theirs):
            for name in ("files", "generation"):  # which differ after a resume
                del part["ReplayDataModule"]["buffer"][name]
        for name in ("ReplayDataModule", "callbacks", "metrics", "nonfinite"):
            assert plain(ours[name]) == plain(theirs[name]), name


def kill_and_resume(folder, expected, kills, seed):
    rng = random.Random(seed)
    words = [*RUN, *DDP, "trainer.devices=2", f"folder={folder}"]
    for _ in range(kills):
        victims = rng.choice([(0,), (1,), (0, 1)])
        kill(words, folder.parent, folder, victims, rng.uniform(0.0, 1.5))
        require_whole(folder)
        words = [f"resume={folder}"]
    finish(words, folder.parent)
    require_same_run(folder, expected)


def test_a_killed_rank_changes_nothing(straight, tmp_path):
    kill_and_resume(tmp_path / "run", straight, 1, 1)


def test_ten_killed_ranks_change_nothing(straight, tmp_path):
    kill_and_resume(tmp_path / "run", straight, 10, 0)


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2)])
def test_another_number_of_processes_finishes_the_run(tmp_path, sizes):
    before, after = sizes
    folder = tmp_path / "run"
    words = [*RUN, *DDP, f"trainer.devices={before}", "+trainer.max_steps=10", f"folder={folder}"]
    assert "stopped by trainer.max_steps=10" in finish(words, tmp_path)
    change = [f"trainer.devices={after}", "trainer.max_steps=-1"]
    said = finish([f"resume={folder}", *change], tmp_path)
    assert said.count(f"the replay of {before} processes is redistributed over {after}") == 1
    last = read_checkpoint(folder / "checkpoints" / "last.ckpt")
    assert len(last.get(PARTS, ())) == after - 1
    data = last["ReplayDataModule"]
    steps, (first, _) = data["collector"]["env_steps"], data["origin"]
    assert steps >= 240 and data["replayed_steps"] == 32 * data["updates"]
    assert 0 <= 16 * (steps - first) - data["replayed_steps"] < 32
