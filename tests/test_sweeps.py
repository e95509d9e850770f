"""Sweeps of real runs, undisturbed and killed. The launcher has its tests in tests/app."""

import os
import re
import shlex
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.app import fake_slurm
from tests.test_run import TINY, without_clocks
from worldloom.app.sweep_folder import read_jobs

WORDS = ["-m", *TINY, "checkpoint.every=5updates", "seed=0,1", "sweep=s"]
RUNS = Path("runs/sweeps/s")


@pytest.fixture
def start():
    """Start a sweep in a folder; what is left of it after the test is stopped."""
    started = []

    def call(cwd, *words, base=WORDS):
        command = [sys.executable, "-m", "worldloom.run", *base, *words]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT}
        started.append(subprocess.Popen(command, cwd=cwd, **pipes))
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def run_undisturbed(start, cwd, **options):
    """Make a folder, and run a sweep in it to its end, two jobs at a time."""
    cwd.mkdir()
    sweep = start(cwd, "hydra.launcher.jobs=2", **options)
    said, _ = sweep.communicate()
    assert sweep.returncode == 0, said


def wait_for_checkpoint(cwd, run, after=0):
    """Wait until a job, named or with a seed, is saved again; return when."""
    name = f"seed{run}" if isinstance(run, int) else run
    file, end = cwd / RUNS / name / "checkpoints" / "last.ckpt", time.monotonic() + 200
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
    killed.mkdir()
    run_undisturbed(start, whole)

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
    require_equal(whole, killed)


def require_equal(whole, other):
    """Two sweeps have the same results, bit for bit."""
    for seed in (0, 1):
        first, second = (place / RUNS / f"seed{seed}" for place in (whole, other))
        assert without_clocks(first) == without_clocks(second)
        for name in ("scores.yaml", "model/model.safetensors"):
            assert (first / name).read_bytes() == (second / name).read_bytes()


def preempt(cwd, seed, number):
    """Send a signal to the processes of a job of submitit's local executor, as SLURM does."""
    job = read_jobs(cwd / RUNS)[f"seed{seed}"]["cluster"]["id"]
    for task in Path(f"/proc/{job}/task/{job}/children").read_text().split():
        for child in Path(f"/proc/{task}/task/{task}/children").read_text().split():
            os.kill(int(child), number)
        os.kill(int(task), number)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_preempted_jobs_of_a_cluster_end_with_the_results_of_undisturbed_ones(start, tmp_path):
    pytest.importorskip("submitit")
    whole, disturbed = tmp_path / "whole", tmp_path / "disturbed"
    disturbed.mkdir()
    run_undisturbed(start, whole)

    local = ["hydra/launcher=local", "hydra.launcher.array_parallelism=2"]
    sweep = start(disturbed, *local)
    saved = [wait_for_checkpoint(disturbed, seed) for seed in (0, 1)]
    preempt(disturbed, 0, signal.SIGUSR2)
    preempt(disturbed, 1, signal.SIGUSR1)
    sweep.kill()  # its jobs go on
    for seed in (0, 1):
        wait_for_checkpoint(disturbed, seed, saved[seed])
    sweep = start(disturbed, *local)
    said, _ = sweep.communicate()
    assert sweep.returncode == 0, said
    logs = [(disturbed / RUNS / f"logs/seed{seed}.log").read_text() for seed in (0, 1)]
    assert "stopped by SIGUSR2; saved after" in logs[0]
    assert "stopped by SIGUSR1; saved after" in logs[1]
    assert all("resuming " in log for log in logs)
    require_equal(whole, disturbed)


@pytest.mark.slow
@pytest.mark.parametrize("executor", ["local", "slurm"])
def test_the_tasks_of_a_job_train_one_run(start, tmp_path, monkeypatch, executor):
    pytest.importorskip("submitit")
    fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "slurm"), prepend=os.pathsep)
    two = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]
    two += ["hydra.launcher.time=90", "hydra.launcher.tasks_per_node=2"]
    sweep = start(tmp_path, f"hydra/launcher={executor}", *two)
    said, _ = sweep.communicate()
    logs = [path.read_text() for path in tmp_path.glob("runs/sweeps/s/**/*log*") if path.is_file()]
    assert sweep.returncode == 0, (said, logs)
    for seed in (0, 1):
        folder = tmp_path / RUNS / f"seed{seed}"
        assert "final return" in (folder / "worldloom-rank1.log").read_text()
        assert f"seed{seed}: final return".encode() in said and (folder / "scores.yaml").exists()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="finds processes in /proc")
def test_a_killed_search_ends_with_the_scores_of_an_undisturbed_one(start, tmp_path):
    pytest.importorskip("optuna")
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    killed.mkdir()
    space = "search.space.training.learning_rate={low: 1e-5, high: 1e-3, log: true}"
    base = [word for word in WORDS if word != "seed=0,1"]
    words = (*base, space, "search.sampler=RandomSampler", "search.trials=8")
    run_undisturbed(start, whole, base=words)

    search = start(killed, base=words)
    wait_for_checkpoint(killed, "trial0")
    os.kill(job_of(search), signal.SIGKILL)  # the next trial begins
    wait_for_checkpoint(killed, "trial1")
    job = job_of(search)
    search.kill()
    os.kill(job, signal.SIGKILL)
    said, _ = search.communicate()
    assert b"trial0: failed: killed by SIGKILL (" in said

    search = start(killed, base=words)
    saved = wait_for_checkpoint(killed, "trial1")
    search.kill()  # the job saves
    search.communicate()
    workers = [start(killed, base=words), start(killed, base=words)]
    said = b"".join(worker.communicate()[0] for worker in workers)
    assert [worker.returncode for worker in workers] == [0, 0], said
    assert b"8 of 8 trials done (8 finished)" in said and saved
    names = [f"trial{number}" for number in range(8)]
    assert sorted(path.name for path in (killed / RUNS).glob("trial*")) == names
    for name in names:
        first, second = (place / RUNS / name for place in (whole, killed))
        assert without_clocks(first) == without_clocks(second)
        assert (first / "scores.yaml").read_bytes() == (second / "scores.yaml").read_bytes()


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="the signals of the cluster need it")
def test_the_script_of_the_documentation_requeues_itself(tmp_path, monkeypatch):
    page = (Path(__file__).parent.parent / "docs" / "clusters.md").read_text()
    (script,) = re.findall(r"```bash\n(#!/bin/bash\n.*?)```", page, re.DOTALL)
    words = [*TINY, "checkpoint.every=5updates"]
    folders = [tmp_path / "whole", tmp_path / "requeued"]
    for folder in folders:
        command = shlex.join([sys.executable, "-m", "worldloom.run", *words, f"folder={folder}"])
        text, count = re.subn(r"python -m worldloom.run .*", lambda _, c=command: c, script)
        assert count == 1
        (tmp_path / f"{folder.name}.sh").write_text(text)
    fake_slurm.install(tmp_path / "slurm")
    monkeypatch.setenv("PATH", str(tmp_path / "slurm"), prepend=os.pathsep)
    for folder in folders:
        subprocess.run(["sbatch", tmp_path / f"{folder.name}.sh"], check=True)
    wait_for_file(folders[1] / "checkpoints" / "previous.ckpt")
    subprocess.run(["scancel", "--signal=USR1", "1001"], check=True)
    for folder in folders:
        wait_for_file(folder / "scores.yaml")
    log = (folders[1] / "worldloom.log").read_text()
    assert "stopped by SIGUSR1; saved after" in log and "resuming " in log
    assert without_clocks(folders[0]) == without_clocks(folders[1])
    first, second = (folder / "model/model.safetensors" for folder in folders)
    assert first.read_bytes() == second.read_bytes()


def wait_for_file(file, seconds=300):
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, [*file.parent.glob("*")]
        time.sleep(0.01)
