"""Output that cannot be written, and terminals that go away: no command ends or fails for it."""

import fcntl
import os
import subprocess
import sys
import termios
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = (
    "model=dreamerv3_tiny env.id=CartPole-v1 env.workers=0 training.total_steps=80 threads=1 "
    "training.prefill=40 training.batch_size=2 training.sequence_length=8 evaluation.episodes=1 "
    "training.train_ratio=8"
)
RUN = f"run {TINY} \"folder='läuft-±'\""
BROKEN = {
    "nobody reads it": "{} | sleep 0; exit ${{PIPESTATUS[0]}}",
    "full disk": "{} > /dev/full",
    "full disk for both": "{} > /dev/full 2>&1",
    "closed stdout": "{} >&-",
    "closed stderr": "{} 2>&-",
    "all closed": "{} <&- >&- 2>&-",
    "ASCII": "PYTHONIOENCODING=ascii {}",
    "a locale without UTF-8": "PYTHONUTF8=0 PYTHONCOERCECLOCALE=0 LC_ALL=POSIX {}",
}


def bash(line, cwd, **changes):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **changes}
    env.pop("HYDRA_FULL_ERROR", None)
    command = ["bash", "--norc", "-c", line.replace("worldloom", f"{sys.executable} -m worldloom")]
    return subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)


@pytest.mark.parametrize("way", BROKEN)
@pytest.mark.parametrize(
    ("line", "code"),
    [
        ("--help", 0),
        ("noSuch±", 2),
        pytest.param("models", 0, marks=pytest.mark.slow),
        pytest.param("eval checkpoint=±", 1, marks=pytest.mark.slow),
    ],
)
def test_a_command_keeps_its_exit_code(way, line, code, tmp_path):
    done = bash(BROKEN[way].format(f"worldloom {line}"), tmp_path)
    assert done.returncode == code, done
    assert "Traceback" not in done.stdout + done.stderr and "Exception" not in done.stderr
    lost = "<stdout> cannot be written ([Errno 28] No space left on device)" in done.stderr
    assert lost == (way == "full disk" and code == 0)


@pytest.mark.slow
@pytest.mark.parametrize("way", BROKEN)
def test_a_run_trains_to_its_end(way, tmp_path):
    done = bash(BROKEN[way].format(f"worldloom {RUN}"), tmp_path)
    assert done.returncode == 0, done
    assert "Traceback" not in done.stdout + done.stderr and "Exception" not in done.stderr
    assert (tmp_path / "läuft-±" / "scores.yaml").exists()
    assert "final return" in (tmp_path / "läuft-±" / "worldloom.log").read_text(encoding="utf-8")


# ---- terminals that go away ----------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("before", "code"), [("", 129), ("trap '' HUP; ", 0)])
def test_a_terminal_that_is_closed_saves_the_run_and_nohup_lets_it_finish(before, code, tmp_path):
    words = TINY.replace("total_steps=80", "total_steps=4000").replace("prefill=40", "prefill=3800")
    words = words.replace("train_ratio=8", "train_ratio=32")  # 400 updates
    line = f"{before}exec {sys.executable} -m worldloom.run {words} folder=run"
    master, slave = os.openpty()
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}

    def own_terminal():
        fcntl.ioctl(0, termios.TIOCSCTTY, 0)

    process = subprocess.Popen(
        ["bash", "--norc", "-c", line],
        cwd=tmp_path,
        env=env,
        start_new_session=True,
        preexec_fn=own_terminal,
        **dict.fromkeys(("stdin", "stdout", "stderr"), slave),
    )
    os.close(slave)
    said = b""
    while b"all results are in" not in said:
        said += os.read(master, 4096)
    while not (tmp_path / "run" / "checkpoints" / "last.ckpt").exists():
        time.sleep(0.01)
    os.close(master)
    assert process.wait() == code
    log = (tmp_path / "run" / "worldloom.log").read_text()
    assert ("stopped by SIGHUP; saved after" in log) == (code == 129)
    assert (tmp_path / "run" / "scores.yaml").exists() == (code == 0)
    assert "Traceback" not in log


# ---- displays that fail --------------------------------------------------------------------------

FAILING = """
import tqdm
from lightning.pytorch.loggers import Logger
from worldloom.training import progress

class Bar(tqdm.tqdm):
    def __init__(self, *args, **kwargs):
        raise SystemExit("no terminal")

progress.LOG_INTERVAL = 0.0
progress.Progress.line = lambda *_: 1 / 0

class Leaves(Logger):
    name = version = "leaves"
    def log_metrics(self, metrics, step=None):
        raise SystemExit(3)
    def log_hyperparams(self, *_):
        raise SystemExit(4)
"""


def test_a_display_or_logger_that_raises_does_not_end_training(commands, tmp_path):
    (tmp_path / "my_code.py").write_text(FAILING)
    words = [*TINY.split(), "+logger.mine._target_=my_code.Leaves", "folder=run"]
    done = commands.good(words, tmp_path)
    said = done["out"] + done["err"]
    assert said.count("logger.mine failed (SystemExit: 4)") == 1
    assert said.count("the progress cannot be shown") == 1
    assert (tmp_path / "run" / "scores.yaml").exists()
