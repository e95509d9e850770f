"""Sweeps of real runs, undisturbed and killed. The launcher has its tests in tests/app."""

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.test_run import TINY, without_clocks

WORDS = ["-m", *TINY, "checkpoint.every=5updates", "seed=0,1", "sweep=s"]
RUNS = Path("runs/sweeps/s")


@pytest.fixture
def start():
    """Start a sweep in a folder; what is left of it after the test is stopped."""
    started = []

    def call(cwd, *words):
        command = [sys.executable, "-m", "worldloom.run", *WORDS, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=cwd, **pipes))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def wait_for_checkpoint(cwd, seed, after=0):
    """Wait until a job is saved again; return when."""
    file, end = cwd / RUNS / f"seed{seed}" / "checkpoints" / "last.ckpt", time.monotonic() + 200
    while not file.exists() or file.stat().st_mtime_ns <= after:
        assert time.monotonic() < end
        time.sleep(0.01)
    return file.stat().st_mtime_ns


def job_of(sweep):
    """Return the process id of the one job that a sweep runs now."""
    (child,) = Path(f"/proc/{sweep.pid}/task/{sweep.pid}/children").read_text().split()
    return int(child)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_killed_sweeps_end_with_the_results_of_an_undisturbed_one(start, tmp_path):
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    whole.mkdir()
    killed.mkdir()
    undisturbed = start(whole, "hydra.launcher.jobs=2")
    said, _ = undisturbed.communicate()
    assert undisturbed.returncode == 0, said

    sweep = start(killed)
    saved = wait_for_checkpoint(killed, 0)
    os.kill(job_of(sweep), signal.SIGKILL)  # the other job begins
    wait_for_checkpoint(killed, 1)
    job = job_of(sweep)
    sweep.kill()
    os.kill(job, signal.SIGKILL)
    said, _ = sweep.communicate()
    assert b"seed0: failed: killed by SIGKILL (" in said and b"seed1: started" in said

    sweep = start(killed)
    wait_for_checkpoint(killed, 0, saved)
    sweep.kill()  # the job saves
    said, _ = sweep.communicate()
    assert b"seed0: resumed" in said

    sweep = start(killed)
    said, _ = sweep.communicate()
    assert sweep.returncode == 0 and said.count(b"resumed") == 2, said
    assert b"stopped by SIGTERM; saved after" in (killed / RUNS / "logs/seed0.log").read_bytes()
    for seed in (0, 1):
        first, second = (place / RUNS / f"seed{seed}" for place in (whole, killed))
        assert without_clocks(first) == without_clocks(second)
        for name in ("scores.yaml", "model/model.safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes()
