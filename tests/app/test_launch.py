"""Runs in two processes, each started as a user starts them."""

import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

from tests.test_run import TINY_MODEL

HERE = Path(__file__).parent
RUN = [sys.executable, "-m", "worldloom.run"]
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node=2"]
ARGS = [
    *("~experiment", "model=dreamerv3_size1m", *TINY_MODEL, "env._target_=failing_env.make_env"),
    *("env.num_envs=2", "env.workers=0", "training.batch_size=4", "training.sequence_length=8"),
    *("training.train_ratio=16", "training.total_steps=80", "evaluation.every=40"),
    *("evaluation.episodes=2", "evaluation.episodes_during=2", "checkpoint.every=3updates"),
    *("threads=1", "optimizer.warmup=10"),
]
TWO = ["trainer=ddp", "trainer.accelerator=cpu", "trainer.devices=2"]


def start(args, folder, command=RUN, **env):
    """Start a run in a folder, as the leader of a process group."""
    path = os.pathsep.join([str(HERE), str(HERE.parent.parent)])
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", **env}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    return subprocess.Popen([*command, *args], cwd=folder, env=env, start_new_session=True, **pipes)


def end(process, seconds=150):
    """Return the exit code, stdout and stderr; nothing of the run may be left."""
    try:
        out, err = process.communicate(timeout=seconds)
        assert not members(process.pid), "processes are left"
    finally:
        for pid in members(process.pid):
            os.kill(pid, signal.SIGKILL)
    return process.returncode, out, err


def members(group):
    """Return the processes of a group that are not zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, _, number = stat.read_text().rpartition(")")[2].split()[:3]
        except OSError:
            continue
        if int(number) == group and state != "Z":
            found.append(int(stat.parent.name))
    return found


def wait_for(path, process):
    """Wait until a path exists."""
    while not path.exists():
        assert process.poll() is None, process.communicate()
        time.sleep(0.05)


def require_finished(folder):
    scores = yaml.safe_load((folder / "scores.yaml").read_text())
    assert scores["step"] in (80, 81)
    assert yaml.safe_load((folder / "config.yaml").read_text())["env"]["num_envs"] == 2
    assert "final return" in (folder / "worldloom-rank1.log").read_text()


@pytest.mark.slow
def test_a_failing_process_is_named_and_the_run_continues_with_the_printed_command(tmp_path):
    # Local step 28 of rank 1 is after updates and checkpoints.
    code, out, err = end(start([*ARGS, *TWO, "folder=run"], tmp_path, FAULT="1 raise 28"))
    assert code == 1
    assert err.count("rank 1: environment 0 raised ValueError: the lever is stuck in step") == 1
    assert err.endswith("error: stopped, because rank 1 failed\n")
    (command,) = re.findall(r"^python -m worldloom.run (resume=.*)", err, re.MULTILINE)
    code, out, err = end(start(command.split(), tmp_path))
    assert code == 0 and out.count("resuming") == 1, err
    require_finished(tmp_path / "run")


def test_values_that_do_not_divide_are_named_before_a_process_starts(tmp_path):
    args = [*ARGS, *TWO, "env.num_envs=3", "folder=run"]
    code, _, err = end(start(args, tmp_path))
    assert code == 1 and not (tmp_path / "run").exists()
    (line,) = err.splitlines()
    assert line.startswith("error: env.num_envs is 3, which 2 processes cannot divide equally")


FAULTS = {
    "1 raise 0": "rank 1 failed",
    "0 raise 5": "error: environment 0 raised ValueError: the lever is stuck in step",
    "1 nan 15": "rank 1 failed",
    "1 kill 5": "rank 1 was killed by SIGKILL",
    "1 kill 28": "rank 1 was killed by SIGKILL",
    "0 kill 28": "rank 0 was killed",
    "1 sleep 28": "rank 1 did not answer",
    "0 sleep 28": "rank 0 did not answer",
    "1 stop 28": "rank 1 did not answer",
    "0 stop 28": "rank 0 did not answer",
}


@pytest.mark.slow
@pytest.mark.parametrize("fault", FAULTS)
def test_no_process_is_left_after_a_failure(fault, tmp_path):
    args = [*ARGS, *TWO, "trainer.strategy.timeout.seconds=20", "folder=run"]
    process = start(args, tmp_path, FAULT=fault)
    _, err = process.communicate(timeout=150)
    deadline = time.monotonic() + 30  # a process that outlives rank 0 for a moment still prints
    while members(process.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    left = members(process.pid)
    for pid in left:
        os.kill(pid, signal.SIGKILL)
    assert not left
    assert process.returncode == (1 if fault[:2] == "1 " or "raise" in fault else -9)
    assert FAULTS[fault] in err
    saved = (tmp_path / "run/checkpoints/last.ckpt").exists()
    assert err.count("to continue from the last checkpoint") == saved


@pytest.mark.slow
@pytest.mark.parametrize("target", ["0", "1", "all"])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGUSR2])
def test_a_signal_to_one_or_all_saves_and_stops_all(number, target, tmp_path):
    args = [*ARGS, *TWO, "training.total_steps=100000", "evaluation.every=0", "folder=run"]
    process = start(args, tmp_path)
    wait_for(tmp_path / "run/checkpoints/last.ckpt", process)
    if target == "all":
        os.killpg(process.pid, number)
    else:
        (child,) = [pid for pid in members(process.pid) if pid != process.pid]
        os.kill(process.pid if target == "0" else child, number)
    code, out, err = end(process)
    assert code == 128 + number, err
    assert out.count(f"stopped by {number.name}; saved after") == 1


@pytest.mark.slow
def test_a_sweep_trains_each_job_in_all_processes(tmp_path):
    args = [*ARGS, *TWO, "-m", "seed=0,1", "hydra.sweep.dir=sweep"]
    code, _, err = end(start(args, tmp_path))
    assert code == 0, err
    folders = {path.name for path in (tmp_path / "sweep").iterdir() if path.is_dir()}
    assert folders == {"logs", "seed0", "seed1"}
    for seed in (0, 1):
        require_finished(tmp_path / "sweep" / f"seed{seed}")


@pytest.mark.slow
def test_a_sweep_is_started_once(tmp_path):
    command = [*TORCHRUN, "--standalone", "-m", "worldloom.run"]
    code, _, err = end(start([*ARGS, *TWO, "-m", "seed=0,1"], tmp_path, command))
    assert code != 0 and "error: a sweep starts the processes of its jobs, but torchrun" in err
    assert not (tmp_path / "runs").exists()


@pytest.mark.slow
def test_torchrun_makes_one_folder(tmp_path):
    command = [*TORCHRUN, "--standalone", "-m", "worldloom.run"]
    code, out, err = end(start([*ARGS, *TWO], tmp_path, command))
    assert code == 0 and out.count("final return") == 1, err
    (folder,) = (tmp_path / "runs/run").iterdir()
    require_finished(folder)


@pytest.mark.slow
def test_torchrun_with_another_number_of_processes_is_rejected(tmp_path):
    command = [*TORCHRUN, "--standalone", "-m", "worldloom.run"]
    code, _, err = end(start([*ARGS, "trainer=cpu"], tmp_path, command))
    assert code == 1 and "error: WORLD_SIZE or SLURM_NTASKS, of torchrun or srun, is 2," in err


@pytest.mark.slow
def test_srun_starts_the_processes(tmp_path):
    slurm = {"SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "2", "SLURM_JOB_ID": str(os.getpid())}
    slurm |= {"SLURM_JOB_NAME": "train", "SLURM_NODELIST": "localhost", "SLURM_NODEID": "0"}
    processes = [
        start([*ARGS, *TWO], tmp_path, **slurm, SLURM_PROCID=rank, SLURM_LOCALID=rank)
        for rank in "01"
    ]
    ended = [end(process) for process in processes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    assert "final return" in ended[0][1] and ended[1][1] == ""
    (folder,) = (tmp_path / "runs/run").iterdir()
    require_finished(folder)


def run_in(name):
    return ["ip", "netns", "exec", name]


@pytest.fixture
def machines():
    """Two network namespaces that reach each other, as two machines do."""
    names, ends = ["worldloom0", "worldloom1"], ["wl0", "wl1"]
    commands = [f"netns add {name}" for name in names]
    commands += [f"link add {ends[0]} type veth peer name {ends[1]}"]
    for i, (name, link) in enumerate(zip(names, ends, strict=True)):
        commands += [f"link set {link} netns {name}"]
        commands += [f"-n {name} addr add 10.77.0.{i + 1}/24 dev {link}"]
        commands += [f"-n {name} link set {link} up", f"-n {name} link set lo up"]
    try:
        for command in commands:
            try:
                done = subprocess.run(["ip", *command.split()], capture_output=True, text=True)
            except FileNotFoundError:
                pytest.skip("needs the command ip")
            if done.returncode:
                pytest.skip(f"needs root: {done.stderr.strip()}")
        yield list(zip(names, ends, strict=True))
    finally:
        for name in names:
            subprocess.run(["ip", "netns", "del", name], capture_output=True)


@pytest.mark.slow
@pytest.mark.parametrize("starts", ["worldloom", "torchrun"])
def test_two_machines_train_one_run(starts, machines, tmp_path):
    args = [*ARGS, *TWO[:2], "trainer.devices=1", "trainer.num_nodes=2"]
    processes = []
    for rank, (name, link) in enumerate(machines):
        command, env = RUN, {}
        env = {"MASTER_ADDR": "10.77.0.1", "MASTER_PORT": "29511", "NODE_RANK": str(rank)}
        if starts == "torchrun":
            where = ["--nnodes=2", f"--node-rank={rank}", "--master-addr=10.77.0.1"]
            where += ["--master-port=29511", "--nproc-per-node=1"]
            command, env = [*TORCHRUN[:-1], *where, "-m", "worldloom.run"], {}
        command = [*run_in(name), *command]
        processes.append(start(args, tmp_path, command, GLOO_SOCKET_IFNAME=link, **env))
    ended = [end(process) for process in processes]
    assert [code for code, _, _ in ended] == [0, 0], ended
    (folder,) = (tmp_path / "runs/run").iterdir()
    require_finished(folder)
