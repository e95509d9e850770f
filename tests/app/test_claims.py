"""Who may write a run's folder: starts in the same second, and what a rejected run leaves alone."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TINY = [
    *("model=dreamerv3_tiny", "env.id=CartPole-v1", "env.workers=0", "threads=1"),
    *("training.total_steps=60", "training.prefill=40", "training.batch_size=2"),
    *("training.sequence_length=8", "evaluation.episodes=1", "callbacks.open_loop.every=0"),
]
# Compose and claim as `worldloom run` does, without training.
CLAIM = """
import sys
from pathlib import Path
import worldloom.run as run
def train(cfg):
    file = Path(cfg.folder) / "config.yaml"
    file.exists() or file.write_text("env: {}")
    print(cfg.folder)
    sys.stdout.flush()
    sys.stdin.readline()  # all are here
    return {}
run.train = train
run.main()
"""


def start(words, cwd):
    env = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    command = [sys.executable, "-c", CLAIM, *words]
    return subprocess.Popen(command, cwd=cwd, env=env, text=True, **pipes)


def state(folder):
    """The bytes and times of everything in a folder."""
    return {
        path.relative_to(folder): (path.is_file() and path.read_bytes(), path.stat().st_mtime_ns)
        for path in [folder, *folder.rglob("*")]
    }


@pytest.mark.slow
def test_runs_of_the_same_second_get_their_own_folders(tmp_path):
    # A name without seconds: all of them are equal.
    words = [*TINY, "hydra.run.dir='runs/x/${now:%Y}'", "hydra.output_subdir=.hydra"]
    processes = [start(words, tmp_path) for _ in range(8)]
    folders = [process.stdout.readline().strip() for process in processes]
    for process in processes:
        _, err = process.communicate("\n")
        assert process.returncode == 0, err
    year = sorted(Path(tmp_path, "runs", "x").iterdir())
    assert len({*folders}) == 8 and sorted(map(Path, folders)) == year
    names = sorted(path.name.partition("-")[2] for path in year)
    assert names == ["", *map(str, range(2, 9))]
    for folder in year:
        assert (folder / ".hydra" / "config.yaml").is_file()
        text = (folder / ".hydra" / "hydra.yaml").read_text()
        assert f"dir: {folder}\n" in text or f"dir: runs/x/{folder.name}\n" in text


def test_a_rejected_run_changes_nothing(commands, tmp_path):
    commands.good([*TINY, "folder=run"], tmp_path)
    before = state(tmp_path / "run")
    for words in (["folder=run"], ["folder=run", "hydra.output_subdir=.hydra"]):
        done = commands.run([*TINY, *words], tmp_path)
        assert done["code"] == 1 and "already contains a run" in done["err"]
        assert len(done["err"].splitlines()) == 1 and state(tmp_path / "run") == before
    (tmp_path / "run" / "scores.yaml").unlink()
    before = state(tmp_path / "run")
    with start(["resume=run"], tmp_path) as process:
        process.stdout.readline()
        held = state(tmp_path / "run")
        for words in (["resume=run"], [*TINY, "folder=run"], [*TINY, "folder=run", "resume=auto"]):
            done = commands.run([*words, "hydra.output_subdir=.hydra"], tmp_path)
            assert done["code"] == 1, done
            assert "written by another run" in done["err"], done
            assert state(tmp_path / "run") == held
        process.communicate("\n")


def test_a_mistake_leaves_no_folder(commands, tmp_path):
    for words in (["folder=new/run"], []):
        done = commands.run([*TINY, *words, "training.batch_size=0"], tmp_path)
        assert done["code"] == 1 and "batch_size is 0" in done["err"]
        assert [path.name for path in tmp_path.iterdir() if path.name[:4] != ".std"] == [], words


def test_a_folder_that_cannot_be_written_is_one_line(commands, tmp_path):
    tmp_path.chmod(0o555)
    inside = tmp_path / "inside"
    inside.mkdir()
    for number in (".stdout", ".stderr"):
        (tmp_path / number).touch()
    for words in (["folder=run"], [], ["-m", "seed=1,2", "folder=run"]):
        done = commands.run([*TINY, *words], tmp_path, unprivileged=True)
        (line,) = done["err"].splitlines()
        assert done["code"] == 1 and line.startswith("error: ") and "run" in line, done
    tmp_path.chmod(0o755)


@pytest.mark.parametrize(
    "line",
    [
        *("run resume=", "run init_from=", "run data=offline data.path=", "eval checkpoint="),
        *("run resume=''", "collect policy= episodes=1 out=o", "collect policy=random out= env=x"),
    ],
)
def test_an_empty_path_is_one_line(commands, tmp_path, line):
    module, *words = line.split()
    done = commands.run(words, tmp_path, module=f"worldloom.{module}")
    (told,) = done["err"].splitlines()
    assert done["code"] == 1 and "is empty; expected a path" in told
