"""Real runs that are killed, starved, damaged, and resumed: nothing may be lost or changed."""

import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from contextlib import suppress

import pytest
import torch

from tests.test_run import CLOCKS, TINY_MODEL, metrics, without_clocks
from worldloom.training.checkpoint_files import read_checkpoint

TD_MODEL = [
    *("model.enc_dim=8", "model.mlp_dim=8", "model.latent_dim=16", "model.num_bins=11"),
    *("model.num_samples=12", "model.num_elites=3", "model.num_pi_trajs=3", "model.iterations=2"),
]
SHORT = [
    *("~experiment", "threads=1", "checkpoint.every=3updates", "training.log_every=5"),
    *("evaluation.episodes=2", "evaluation.episodes_during=2", "callbacks.open_loop.every=10"),
]
DREAMER = [
    *("model=dreamerv3_size1m", *TINY_MODEL, *SHORT, "training.batch_size=4"),
    *("training.sequence_length=8", "training.train_ratio=16", "training.total_steps=140"),
    *("evaluation.every=60", "optimizer.warmup=10"),
]
TDMPC2 = [
    *("model=tdmpc2_1m", *TD_MODEL, *SHORT, "training.batch_size=8", "training.prefill=30"),
    *("training.random_steps=30", "training.seed_episodes=0", "training.total_steps=90"),
    *("evaluation.every=40", "env.time_limit=12"),
]
RUNS = {
    "dreamerv3, vectors": [*DREAMER, "env=cartpole", "env.num_envs=3", "env.time_limit=30"],
    "dreamerv3, pixels in files": [
        *(*DREAMER, "env=gymnasium", "env.id=worldloom/Catch-v0", "env.num_envs=2"),
        *("data.storage=memmap", "data.capacity=96"),
    ],
    "r2dreamer, vectors": [
        *(*DREAMER, "model=r2dreamer_size1m", "env=cartpole", "env.num_envs=3"),
        *("env.time_limit=30", "model.decoder=true"),
    ],
    "dreamerpro, pixels": [
        *(*DREAMER, "model=dreamerpro_size1m", "env=gymnasium", "env.id=worldloom/Catch-v0"),
        *("env.num_envs=2", "model.representation.num_prototypes=16"),
        *("model.representation.freeze_prototypes_iters=8",),
    ],
    "tdmpc2, vectors in processes": [
        *(*TDMPC2, "env=gymnasium", "env.id=Pendulum-v1", "env.num_envs=2", "env.workers=2"),
    ],
    "tdmpc2, pixels": [
        *(*TDMPC2, "env=gymnasium", "env.id=worldloom/Catch-v0", "env.num_envs=1"),
        *("env.image_size=64", "env.frame_stack=2", "model.num_channels=1", "data.capacity=500"),
    ],
}


@pytest.fixture(scope="module")
def server(commands):
    return commands


@pytest.fixture(scope="module")
def straight(server, tmp_path_factory):
    """Return a function that runs one of RUNS without interruption, once: its folder."""
    folders = {}

    def get(name):
        if name not in folders:
            folder = tmp_path_factory.mktemp("straight") / "run"
            server.good([*RUNS[name], f"hydra.run.dir={folder}"], folder.parent)
            folders[name] = folder
        return folders[name]

    return get


def plain(tree):
    """Nested state as comparable data."""
    if isinstance(tree, torch.Tensor):
        return tree.dtype, tree.shape, tree.reshape(-1).tolist()
    if isinstance(tree, dict):
        return {key: plain(value) for key, value in tree.items()}
    return [plain(value) for value in tree] if isinstance(tree, (list, tuple)) else tree


def require_equal(folder, expected):
    """Compare two finished runs: curves, weights, optimiser, counters and random states."""
    assert without_clocks(folder) == without_clocks(expected)
    assert (folder / "metrics.csv").read_text().count("\n") > 5
    weights = "model/model.safetensors"
    assert (folder / weights).read_bytes() == (expected / weights).read_bytes()
    ours, theirs = (
        read_checkpoint(run / "checkpoints" / "last.ckpt") for run in (folder, expected)
    )
    for checkpoint in (ours, theirs):  # a phase has a column only once there was one
        state = checkpoint["callbacks"]["MetricsWriter"]["csv"]
        state["columns"] = [name for name in state["columns"] if not name.startswith(CLOCKS)]
    for name in ("state_dict", "optimizer_states", "updates", "callbacks"):
        assert plain(ours[name]) == plain(theirs[name]), name
    for name in ("updates", "replayed_steps", "origin"):
        assert ours["ReplayDataModule"][name] == theirs["ReplayDataModule"][name]
    assert (folder / "scores.yaml").read_text() == (expected / "scores.yaml").read_text()


def require_whole(folder):
    """After a kill, whatever lies there under its final name can be read."""
    for name in ("last.ckpt", "previous.ckpt"):
        if (folder / "checkpoints" / name).exists():
            read_checkpoint(folder / "checkpoints" / name)
    if (folder / "metrics.csv").exists():
        assert metrics(folder) is not None


# ---- kills ---------------------------------------------------------------------------------------


def without_multiprocessing(said):
    """Leave out tracebacks of Python's own code only.

    Its fork server prints one if the process that asks it for another one is killed meanwhile.
    """

    def strip(traceback):
        files = re.findall(r'^  File "(.*?)"', traceback[0], re.MULTILINE)
        foreign = all(file == "<string>" or "/multiprocessing/" in file for file in files)
        return "" if foreign else traceback[0]

    return re.sub(r"Traceback \(most recent call last\):\n(  .*\n)+.*", strip, said)


def kill_and_resume(server, name, kills, seed, cwd, expected):
    """Kill a run so many times at random moments, resuming it each time, to its end.

    Where it ends before the last kill, another one begins.
    """
    rng = random.Random(seed)
    runs = 0
    words = folder = None
    while kills or words:
        if words is None:
            runs, folder = runs + 1, cwd / f"run{runs}"
            words = [*RUNS[name], f"hydra.run.dir={folder}"]
        kill = (rng.uniform(0.2, 2.4), signal.SIGKILL) if kills else None
        done = server.run(words, cwd, kill=kill)
        said = done["out"] + done["err"]
        assert "damaged" not in said and "Traceback" not in without_multiprocessing(said), said
        if done["code"] == 0:
            require_equal(folder, expected)
            words = None
            continue
        assert done["code"] == -signal.SIGKILL, said
        kills -= 1
        require_whole(folder)
        if (folder / "config.yaml").exists():
            words = [f"resume={folder}"]


@pytest.mark.parametrize("name", ["dreamerv3, vectors"])  # all: the slow test below
def test_three_kills_change_nothing(server, straight, tmp_path, name):
    kill_and_resume(server, name, 3, name, tmp_path, straight(name))


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("name", RUNS)
def test_many_kills_change_nothing(server, straight, tmp_path, name, seed):
    kill_and_resume(server, name, 5, seed, tmp_path, straight(name))


SAVES = [signal.SIGTERM, signal.SIGINT]
RARER = [signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]


@pytest.mark.parametrize(
    "number", [*SAVES, *(pytest.param(number, marks=pytest.mark.slow) for number in RARER)]
)
def test_a_signal_saves_and_says_how_to_go_on(server, straight, tmp_path, number):
    name = "dreamerv3, vectors"
    folder = tmp_path / "run"
    words = [*RUNS[name], "checkpoint.every=99min", f"hydra.run.dir={folder}"]
    done = server.run(words, tmp_path, kill=("run/metrics.csv", number))
    assert done["code"] == 128 + number, done["out"] + done["err"]
    assert f"stopped by {signal.Signals(number).name}; saved after" in done["out"]
    assert done["out"].splitlines()[-1] == f"python -m worldloom.run resume={folder}"
    assert "Traceback" not in done["err"]
    done = server.good([f"resume={folder}"], tmp_path)
    require_equal(folder, straight(name))
    again = server.good([f"resume={folder}"], tmp_path)
    assert f"{folder} is finished" in again["out"]


@pytest.mark.slow
def test_a_signal_to_all_processes_of_a_job_loses_no_episode(server, straight, tmp_path):
    """As SLURM sends it, to the workers too."""
    name = "tdmpc2, vectors in processes"
    folder = tmp_path / "run"
    words = [*RUNS[name], f"hydra.run.dir={folder}"]
    with start(words, tmp_path, start_new_session=True) as process:
        read_until(process, "all results are in")
        while not (folder / "checkpoints" / "previous.ckpt").exists():
            time.sleep(0.005)
        os.killpg(process.pid, signal.SIGUSR1)
        said = process.stdout.read()
    assert process.returncode == 138, said
    done = server.good([f"resume={folder}"], tmp_path)
    assert "WARNING" not in said + done["out"] + done["err"]
    require_equal(folder, straight(name))


def test_auto_is_the_same_command_again_and_again(server, straight, tmp_path):
    """As a cluster's queue gives it: until it is done."""
    name = "dreamerv3, vectors"
    words = [*RUNS[name], "hydra.run.dir=runs/queue/now", "resume=auto"]
    folder, said = tmp_path / "runs" / "queue" / "now", []
    for code in (143, 143, 0):
        kill = ("runs/queue/now/checkpoints/previous.ckpt", signal.SIGTERM) if code else None
        done = server.run(words, tmp_path, kill=kill)
        assert done["code"] == code, done["out"] + done["err"]
        said.append(done["out"])
    assert "starting a new one" in said[0]
    assert all(f"continuing runs/queue/{folder.name}" in out for out in said[1:])
    require_equal(folder, straight(name))


def test_a_run_can_be_extended_with_what_was_changed_written_down(server, straight, tmp_path):
    folder = shutil.copytree(straight("dreamerv3, vectors"), tmp_path / "run")
    before = len(metrics(folder))
    words = [f"resume={folder}", "training.total_steps=180", "training.learning_rate=1e-3"]
    done = server.good(words, tmp_path)
    assert "training.total_steps: 140 -> 180" in done["out"]
    assert int(metrics(folder)[-1]["step"]) >= 180 and len(metrics(folder)) > before
    config = (folder / "config.yaml").read_text()
    assert "total_steps: 180" in config and "learning_rate: 0.001" in config
    done = server.good([f"resume={folder}"], tmp_path)
    assert "is finished: 180 steps" in done["out"]


def test_other_shapes_are_refused_by_name_and_nothing_is_touched(server, straight, tmp_path):
    folder = straight("dreamerv3, vectors")
    files = [p for p in folder.rglob("*") if p.is_file() and p.name != "worldloom.log"]
    before = {path: path.read_bytes() for path in files}
    words = [f"resume={folder}", "model.units=12", "training.total_steps=999"]
    done = server.run(words, tmp_path)
    assert done["code"] == 1
    assert "model's shapes" in done["err"] and "init_from=" in done["err"]
    assert done["err"].count("error:") == 1 and "Traceback" not in done["err"]
    assert {path: path.read_bytes() for path in files} == before


# ---- faults --------------------------------------------------------------------------------------


def killed_late(server, name, cwd):
    """A run with two checkpoints that was stopped in the middle."""
    kill = ("run/checkpoints/previous.ckpt", signal.SIGTERM)
    done = server.run([*RUNS[name], f"hydra.run.dir={cwd / 'run'}"], cwd, kill=kill)
    assert done["code"] == 143, done["out"] + done["err"]
    return cwd / "run"


def test_a_truncated_newest_checkpoint_costs_the_steps_since_the_one_before(
    server, straight, tmp_path
):
    name = "dreamerv3, vectors"
    folder = killed_late(server, name, tmp_path)
    last = folder / "checkpoints" / "last.ckpt"
    last.write_bytes(last.read_bytes()[:-1000])
    done = server.good([f"resume={folder}"], tmp_path)
    assert "last.ckpt is not a complete checkpoint" in done["out"] + done["err"]
    assert "continuing from the previous checkpoint" in done["out"] + done["err"]
    require_equal(folder, straight(name))  # it is repeated exactly


@pytest.mark.slow
def test_a_flipped_byte_in_a_replay_chunk_is_found_and_left_out(server, tmp_path):
    name = "dreamerv3, pixels in files"
    folder = killed_late(server, name, tmp_path)
    files = sorted((folder / "checkpoints" / "replay").iterdir())
    damaged = next(file for file in files if "-rows." in file.name)
    content = bytearray(damaged.read_bytes())
    content[len(content) // 2] ^= 1
    damaged.write_bytes(content)
    done = server.good([f"resume={folder}"], tmp_path)
    assert damaged.name in done["out"] + done["err"]
    assert (folder / "scores.yaml").exists()


@pytest.mark.slow
def test_a_second_run_in_the_same_folder_is_refused(server, tmp_path):
    folder = tmp_path / "run"
    words = [*RUNS["dreamerv3, vectors"], "training.total_steps=100000", f"hydra.run.dir={folder}"]
    command = [sys.executable, "-m", "worldloom.run", *words]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    with subprocess.Popen(
        command, cwd=tmp_path, env=env, stdout=subprocess.PIPE, text=True
    ) as first:
        while "all results are in" not in first.stdout.readline():
            assert first.poll() is None
        for second in (words, [f"resume={folder}"]):
            done = server.run(second, tmp_path)
            assert done["code"] == 1 and "written by another run" in done["err"]
        first.send_signal(signal.SIGINT)
        assert "stopped by SIGINT; saved" in first.stdout.read()
    assert first.returncode == 130


def start(words, cwd, **options):
    """Start a command of its own; what it prints can be read line by line."""
    command = [sys.executable, "-u", "-m", "worldloom.run", *map(str, words)]
    env = {**os.environ, "OMP_NUM_THREADS": "1"}
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True}
    return subprocess.Popen(command, cwd=cwd, env=env, **pipes, **options)


def read_until(process, text):
    """Read lines until one has this text; return them all."""
    lines = []
    while text not in (line := process.stdout.readline()):
        assert line, f"it ended without {text!r}:\n{''.join(lines)}"
        lines.append(line)
    return "".join([*lines, line])


@pytest.fixture
def small_disk(tmp_path):
    """A disk of 6 MB."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=6m", "tmpfs", str(disk)]
    if subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("a disk of its own needs the right to mount one")
    yield disk
    subprocess.run(["umount", "-l", str(disk)], check=True)


@pytest.mark.slow
def test_a_full_disk_is_told_once_and_costs_nothing(server, tmp_path, small_disk):
    words = [*RUNS["dreamerv3, vectors"], "training.total_steps=280", "data.capacity=5000"]
    server.good([*words, f"hydra.run.dir={tmp_path / 'straight'}"], tmp_path)
    folder = small_disk / "run"
    with start([*words, f"hydra.run.dir={folder}"], tmp_path) as process:
        read_until(process, "all results are in")
        while not (folder / "checkpoints" / "previous.ckpt").exists():
            time.sleep(0.01)
        with (small_disk / "ballast").open("wb", buffering=0) as file, suppress(OSError):
            while file.write(bytes(4096)):
                pass
        said = read_until(process, "could not be written")
        require_whole(folder)
        time.sleep(0.5)
        (small_disk / "ballast").unlink()
        said += process.stdout.read()
    assert process.returncode == 0, said
    assert said.count("checkpoint could not be written") == 1
    assert "Traceback" not in said.replace("Exception in thread", "")
    require_equal(folder, tmp_path / "straight")


FAULTY = """
import os, signal, time
import numpy as np
import gymnasium as gym

class Faulty(gym.Wrapper):
    "CartPole, whose copy in the first process fails once, in its 40th step."
    def __init__(self, fault):
        super().__init__(gym.make("CartPole-v1"))
        self.fault, self.steps = fault, 0

    def step(self, action):
        obs, *rest = self.env.step(action)
        self.steps += 1
        if self.steps == 40 and self.fault == "no number":
            obs = np.full_like(obs, np.nan)
        elif self.fault == "never a number":
            if self.steps >= 40:
                obs = np.full_like(obs, np.nan)
        elif self.steps == 40 and not os.path.exists("failed"):
            open("failed", "w").close()
            if self.fault == "killed":
                os.kill(os.getpid(), signal.SIGKILL)
            time.sleep(1000)
        return obs, *rest

def make_env(fault):
    return Faulty(fault)
"""


def faulty(fault, cwd, *words):
    (cwd / "my_env.py").write_text(FAULTY)
    own = ["env=custom", "env._target_=my_env.make_env", f"+env.fault='{fault}'"]
    # The evaluation's copies are to end before their 40th step.
    words = [*words, "env.num_envs=2", "training.total_steps=100", "evaluation.decisions=0"]
    return [*DREAMER, *own, *words, f"hydra.run.dir={cwd / 'run'}"]


@pytest.mark.parametrize(
    ("fault", "reason"),
    [("killed", "the process was killed by SIGKILL"), ("hangs", "no answer within 3 seconds")],
)
def test_a_broken_worker_is_replaced_and_the_run_goes_on(server, tmp_path, fault, reason):
    words = faulty(fault, tmp_path, "env.workers=2", "env.timeout=3")
    done = server.good(words, tmp_path)
    assert f": {reason}" in done["out"] + done["err"]
    restarts = [row["restarts"] for row in metrics(tmp_path / "run") if row["restarts"]]
    assert float(restarts[-1]) == 1
    assert int(metrics(tmp_path / "run")[-1]["step"]) >= 100


def test_a_nan_in_an_observation_ends_its_episode_and_the_run_goes_on(server, tmp_path):
    done = server.good(faulty("no number", tmp_path), tmp_path)
    assert (done["out"] + done["err"]).count("returned nan in the observation") == 1
    last = metrics(tmp_path / "run")[-1]
    assert int(last["step"]) >= 100
    restarts = [row["restarts"] for row in metrics(tmp_path / "run") if row["restarts"]]
    assert float(restarts[-1]) == 2  # one in each environment


def test_repeated_nans_stop_the_run_saved_and_named(server, tmp_path):
    done = server.run(faulty("never a number", tmp_path), tmp_path)
    assert done["code"] == 1 and done["err"].count("error:") == 1
    assert "error: environment 0 returned nan in the observation" in done["err"]
    assert "3 times without a finished episode" in done["err"] and "Traceback" not in done["err"]
    go_on = f"python -m worldloom.run resume={tmp_path / 'run'} env._target_=my_env.make_env"
    assert done["out"].splitlines()[-1] == go_on
    checkpoint = read_checkpoint(tmp_path / "run" / "checkpoints" / "last.ckpt")
    assert checkpoint["updates"] > 0
    assert checkpoint["ReplayDataModule"]["collector"]["env_steps"] >= 70
