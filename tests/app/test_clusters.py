"""Sweeps on a cluster: submitit's real executors, SLURM's commands as tests/app/fake_slurm.py.

The jobs are the small program of test_sweeps.py; tests/test_sweeps.py has real runs.
"""

import importlib.util
import json
import os
import signal
import subprocess
import time
from pathlib import Path

import pytest

import worldloom
from tests.app import fake_slurm
from tests.app.test_sweeps import FOLDER, JOB, NAMES, lengths, starts, states
from worldloom.app.cluster import Cluster
from worldloom.app.cluster_config import ClusterConfig
from worldloom.app.cluster_queue import find_states
from worldloom.app.compose import Overrides, hint_launcher
from worldloom.app.sweep_folder import hold_sweep, read_jobs
from worldloom.results.runs import read_jobs as read_results

pytest.importorskip("submitit")

SLURM = ["-m", "sweep=name", "hydra/launcher=slurm", "hydra.launcher.time=1:00:00"]
THREE = [*SLURM, "seed=0,1,2"]
RUNNING = dict.fromkeys(NAMES, "running")


@pytest.fixture
def place(tmp_path):
    """A working directory with the program of the jobs and a cluster."""
    (tmp_path / "worldloom").mkdir()
    real = repr(str(Path(worldloom.__file__).parent))
    (tmp_path / "worldloom" / "__init__.py").write_text(f"__path__.append({real})\n")
    (tmp_path / "worldloom" / "run.py").write_text(JOB)
    fake_slurm.install(tmp_path / "slurm")
    yield tmp_path
    for file in (tmp_path / "slurm" / "state").glob("*.json"):
        for pid in json.loads(file.read_text())["steps"]:
            if Path(f"/proc/{pid}").exists():
                os.killpg(pid, signal.SIGKILL)


@pytest.fixture
def sweep(commands, place):
    """Run a sweep on the cluster: its exit code, stdout and stderr."""
    env = {"PATH": f"{place / 'slurm'}{os.pathsep}{os.environ['PATH']}"}
    return lambda *words, **options: commands.run(words or THREE, place, env=env, **options)


@pytest.fixture
def slurm(place, monkeypatch):
    """Call a command of the cluster, also from this process."""
    monkeypatch.setenv("PATH", str(place / "slurm"), prepend=os.pathsep)
    return lambda *words: subprocess.check_output(words, text=True)


def wait_for(condition, seconds=120):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def submissions(place):
    return [file.read_text() for file in sorted((place / "slurm" / "state").glob("*.sh"))]


def test_a_sweep_is_one_job_array_and_failures_do_not_stop_others(sweep, place):
    (place / "broken").write_text("1")
    done = sweep(
        *(*THREE, "hydra.launcher.partition=gpu", "hydra.launcher.mem=16G"),
        *("hydra.launcher.array_parallelism=2", "hydra.launcher.account=mine"),
        *("hydra.launcher.cpus_per_task=3", "trainer=gpu"),  # here is no GPU
        *("hydra.launcher.additional_parameters={reservation: night}",),
    )
    assert done["code"] == 1, done
    lines = done["out"].splitlines()
    assert lines[:4] == [
        "sweep runs/sweeps/name: 3 jobs, 0 of them finished",
        *(f"seed{i}: queued, job 1000_{i}" for i in range(3)),
    ]
    assert any(line.startswith("seed1: failed: seed 1 is unlucky (") for line in lines)
    assert "  log: runs/sweeps/name/logs/seed1.log" in lines
    assert "2 of 3 jobs are finished; results: runs/sweeps/name" in lines
    (script,) = submissions(place)
    for option in (
        *("array=0-2%2", "time=60", "partition=gpu", "mem=16G", "account=mine", "requeue"),
        *("reservation=night", "nodes=1", "ntasks-per-node=1", "signal=USR2@120", "job-name=name"),
    ):
        assert f"#SBATCH --{option}\n" in script
    assert "wckey" not in script and "srun --unbuffered" in script
    assert script.count("--cpus-per-task=3") == 2  # of sbatch, and of srun
    assert all(start["full"] is None for start in starts(place))
    assert states(place) == {"seed0": "finished", "seed1": "failed", "seed2": "finished"}
    (place / "broken").unlink()
    again = sweep(*THREE, "trainer=gpu")
    assert again["code"] == 0 and "seed1: queued, job 1001" in again["out"], again
    assert len(starts(place)) == 4 and "--array" not in submissions(place)[1]


def test_jobs_outlive_the_sweep_and_are_not_submitted_twice(sweep, slurm, place):
    (place / "slow").touch()
    killed = sweep(kill=("two", signal.SIGKILL))  # as soon as two jobs have begun
    assert killed["code"] == -signal.SIGKILL, killed
    wait_for(lambda: states(place) == RUNNING)
    (place / "slurm" / "full").touch()
    # A preemption, as submitit's SlurmJob._interrupt sends it.
    slurm("scancel", "--signal=CONT", "1000_0")
    slurm("scancel", "--signal=TERM", "1000_0")
    slurm("scancel", "--signal=USR2", "1000_0")
    slurm("scancel", "--signal=USR1", "1000_1")
    wait_for(lambda: [*states(place).values()] == ["queued", "queued", "running"])
    found = {job.name: job.state for job in read_results([place / FOLDER])}
    assert found == states(place)

    (place / "slurm" / "down").touch()  # what was recorded last; nothing is interrupted
    assert {*states(place).values()} <= {"queued", "running"}
    lost = sweep()
    (line,) = lost["err"].splitlines()
    assert lost["code"] == 1 and "may still be queued or running, but SLURM cannot be" in line
    (place / "slurm" / "down").unlink()

    stopped = sweep(kill=("slurm/asked", signal.SIGINT))
    assert stopped["code"] == 130 and "SIGINT: the jobs stay queued or running" in stopped["err"]
    assert stopped["out"].splitlines()[-2:] == [
        "3 jobs stay on the cluster; to cancel them:",
        "scancel '1000_[0,1,2]'",
    ]
    (place / "slow").unlink()
    (place / "slurm" / "full").unlink()
    done = sweep()
    assert done["code"] == 0, done
    assert len(submissions(place)) == 1 and lengths(place) == [5, 5, 5]
    resumed = [x["args"] for x in starts(place) if x["args"][0].startswith("resume=")]
    assert sorted(resumed) == [[f"resume={FOLDER / name}"] for name in NAMES[:2]]


@pytest.mark.slow
def test_a_cancelled_job_ends_and_one_that_gets_sigterm_is_requeued(sweep, slurm, place):
    (place / "slow").touch()
    sweep(kill=("two", signal.SIGKILL))
    wait_for(lambda: states(place) == RUNNING)
    slurm("scancel", "1000_0")
    (place / "slow").unlink()
    slurm("scancel", "--signal=TERM", "1000_1")
    wait_for(lambda: [*states(place).values()] == ["interrupted", "finished", "finished"])
    assert "stopped by SIGTERM" in (place / FOLDER / "logs" / "seed0.log").read_text()
    assert sweep()["code"] == 0
    assert lengths(place) == [5, 5, 5] and len(submissions(place)) == 2


@pytest.mark.slow
def test_the_local_executor_requeues_and_the_driver_may_die(sweep, place):
    (place / "slow").touch()
    words = ["-m", "seed=0,1", "sweep=name", "hydra/launcher=local"]
    words += ["hydra.launcher.array_parallelism=2"]
    killed = sweep(*words, kill=("two", signal.SIGKILL))
    assert killed["code"] == -signal.SIGKILL
    wait_for(lambda: [*states(place).values()] == ["running"] * 2)
    first, second = (job["cluster"]["id"] for job in read_jobs(place / FOLDER).values())
    children = Path(f"/proc/{first}/task/{first}/children").read_text().split()
    for task in children:  # as SLURM's slurmstepd does; submitit's controller has no handler
        os.kill(int(task), signal.SIGUSR2)
    wait_for(lambda: len(starts(place)) == 3)
    assert [*states(place).values()] == ["running"] * 2
    os.kill(int(second), signal.SIGTERM)
    wait_for(lambda: [*states(place).values()] == ["running", "interrupted"])
    (place / "slow").unlink()
    done = sweep(*words)
    assert done["code"] == 0, done
    assert len(starts(place)) == 4
    assert [len((place / FOLDER / name / "steps").read_text()) for name in NAMES[:2]] == [5, 5]


@pytest.mark.slow
def test_a_job_continues_after_its_time_limit(sweep, place):
    (place / "slow").touch()
    local = ["hydra/launcher=local", "hydra.launcher.time=1", "hydra.launcher.signal_delay_s=45"]
    killed = sweep("-m", "seed=0", "sweep=name", *local, kill=("starts", signal.SIGKILL))
    assert killed["code"] == -signal.SIGKILL
    wait_for(lambda: len(starts(place)) == 2)
    (place / "slow").unlink()
    wait_for(lambda: [*states(place).values()] == ["finished"])
    assert "stopped by SIGUSR2" in (place / FOLDER / "logs" / "run.log").read_text()


MISTAKES = {
    "hydra/launcher=slrm": "(did you mean 'slurm'?); choices: processes, slurm, local",
    "hydra/launcher=slurm hydra.launcher.partitoin=x": "mean 'hydra.launcher.partition'?",
    "hydra/launcher=local hydra.launcher.tasks_per_node=2": "seed0: hydra.launcher.nodes and t",
}


def test_mistakes_are_named_before_anything_is_submitted(sweep, place):
    for command, message in MISTAKES.items():
        refused = sweep("-m", "seed=0,1", *command.split())
        (line,) = refused["err"].splitlines()
        assert refused["code"] == 1 and message in line
    refused = sweep("seed=0", "hydra/launcher=slurm")
    assert "but -m was not given; add -m" in refused["err"]
    assert not (place / "runs").exists()
    refused = sweep(*THREE, "hydra.launcher.partition=none")
    (line,) = refused["err"].splitlines()
    assert line.endswith("cannot be submitted: sbatch: error: invalid partition specified: none")
    assert states(place) == dict.fromkeys(NAMES, "waiting")


SETTINGS = [
    ("slurm", {}, "hydra.launcher.time is not set; add the time limit"),
    ("slurm", {"time": 5}, "sbatch, srun, squeue, scontrol, scancel cannot be found"),
    ("slurm", {"time": 2}, "time is 2, but runs are stopped 120 seconds before its end"),
    ("local", {"nodes": 2}, "hydra.launcher.nodes is 2, but hydra/launcher=local uses this mach"),
    ("local", {"mem": "16GB"}, "hydra.launcher.mem is '16GB'; expected memory of a node such as"),
    ("local", {"cpus_per_task": "x"}, "hydra.launcher.cpus_per_task is 'x'; expected a whole num"),
    ("local", {"array_parallelism": 0}, "array_parallelism is 0; expected at least 1"),
]


@pytest.mark.parametrize(("executor", "settings", "message"), SETTINGS)
def test_impossible_settings(executor, settings, message, monkeypatch):
    monkeypatch.setenv("PATH", "")
    with pytest.raises(ValueError) as error:
        Cluster(executor, settings)
    assert message in str(error.value)


def test_other_names_of_settings_are_translated():
    def hint(*args):
        return hint_launcher(args[0], Overrides(args[1:]))

    assert hint("timeout_min", "hydra/launcher=slurm") == "; write hydra.launcher.time=4:00:00"
    assert hint("jobs", "hydra/launcher=slurm") == "; write hydra.launcher.array_parallelism"
    assert hint("partition") == "; it belongs to hydra/launcher=slurm, local: add it"
    assert hint("job") == " (did you mean 'hydra.launcher.jobs'?)"


def test_a_job_has_the_processes_that_its_run_asks_for():
    several = Cluster("local", {"tasks_per_node": 2})
    several.require_processes({"devices": 2})
    several.require_processes({"devices": "auto"})
    Cluster("local", {}).require_processes({"devices": 8})  # which one task starts
    for trainer in ({"devices": 1}, {"devices": 2, "num_nodes": 2}):
        with pytest.raises(ValueError, match="tasks_per_node are 1 and 2, but trainer"):
            several.require_processes(trainer)


def test_without_submitit_the_command_to_install_it_is_named(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(ImportError, match=r"needs the package submitit; pip install 'worldloom\[s"):
        Cluster("local", {})


def test_time_limits_are_read_as_slurm_does():
    limits = {"90": 90, 90: 90, "90:30": 91, "4:00:00": 240, "1-12": 2160, "1-00:30:00": 1470}
    assert {time: ClusterConfig(time=time).minutes for time in limits} == limits
    for wrong in ("1h", "-5", "1:2:3:4"):
        with pytest.raises(ValueError, match="expected minutes, or days-hours"):
            ClusterConfig(time=wrong)


def test_a_record_of_a_stranger_runs_nothing(tmp_path, monkeypatch):
    """Ids, paths and pickles in a sweep's folder may come from anyone."""
    (tmp_path / "jobs" / "0123abcd").mkdir(parents=True)
    (tmp_path / "jobs" / "0123abcd" / "7_submitted.pkl").write_bytes(
        b"cos\nsystem\n(S'touch bad'\ntR."
    )
    (tmp_path / "jobs" / "0123abcd" / "c.txt").write_text("ended 7 rm -rf\n")
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    record = {"executor": "slurm", "submission": "0123abcd", "host": "h"}
    records = {
        "a": {**record, "id": "$(touch bad)"},
        "b": {**record, "id": "--help"},
        "c": {**record, "id": "7"},
        "d": {**record, "id": "7", "submission": "../jobs/0123abcd"},
        "e": {**record, "id": "7", "executor": "evil"},
        "f": "text",
        "g": {**record, "id": "7"},
    }
    found = {name: state for name, (state, _) in find_states(tmp_path, records).items()}
    assert found == {**dict.fromkeys("abcdef", "ended"), "g": "unknown"}  # no squeue here
    with hold_sweep(tmp_path, ["seed"], {}) as sweep:
        sweep.jobs = {n: {"state": "running", "cluster": held} for n, held in records.items()}
        sweep.write()
    assert {job["state"] for job in read_jobs(tmp_path).values()} == {"interrupted", "running"}
    assert len(read_results([tmp_path])) == 7 and not (tmp_path / "bad").exists()
