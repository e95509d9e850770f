"""Install each extra of worldloom into an empty environment, and use what it brings.

usage: python experiments/install/extras.py WHEEL [EXTRA ...] [--with torch==2.13.0]
       [--python python3.11] [--install 'pip --python {python} install'] [--folder FOLDER]
       [--out extras.csv]

WHEEL is the file that `python -m build` writes. EXTRA is one of those in pyproject.toml, or `all`,
which is all of them in one environment; the default is every extra, and then `all`. For each, a
virtual environment is created in FOLDER and removed at the end, the wheel is installed with that
extra, and commands outside of the checkout step an environment of the suite, write with the logger,
read the dataset, and so on; for `all`, `worldloom doctor` has to import everything. The result and
the versions of the packages go into one row of the CSV file, in which rows of other extras stay.
Exits with 1 if a check failed.
"""

import argparse
import csv
import os
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
TIMEOUT = 1800.0  # seconds for one command
COLUMNS = ("extra", "result", "python", "torch", "packages")
# A training of a few updates.
SHORT = (
    "model=dreamerv3_tiny env.id=CartPole-v1 env.workers=0 training.total_steps=200 "
    "training.prefill=100 training.batch_size=4 evaluation.episodes=1 callbacks.open_loop.every=0"
)
RECORD = """
import gymnasium, h5py, minari, numpy
env = gymnasium.make("Pendulum-v1", max_episode_steps=50)
buffers, rows = [], {"observations": [], "actions": [], "rewards": [], "timeouts": []}
for seed in range(4):
    obs, actions, rewards = [env.reset(seed=seed)[0]], [], []
    for _ in range(50):
        actions.append(env.action_space.sample())
        next_obs, reward, _, _, _ = env.step(actions[-1])
        obs.append(next_obs)
        rewards.append(float(reward))
    ends = [False] * 49 + [True]
    buffers.append(
        minari.data_collector.EpisodeBuffer(
            observations=numpy.stack(obs),
            actions=numpy.stack(actions),
            rewards=rewards,
            terminations=[False] * 50,
            truncations=ends,
        )
    )
    for name, values in zip(rows, (obs[:-1], actions, rewards, ends)):
        rows[name] += list(values)
spaces = {"observation_space": env.observation_space, "action_space": env.action_space}
minari.create_dataset_from_buffers("pendulum/random-v0", buffers, **spaces)
with h5py.File("data.hdf5", "w") as file:
    for name, values in rows.items():
        file[name] = numpy.asarray(values, bool if name == "timeouts" else "float32")
    file["terminals"] = numpy.zeros(200, bool)
"""


@dataclass(frozen=True)
class Check:
    """Commands that use what an extra brings.

    packages: the distributions whose versions are recorded.
    commands: arguments of the environment's Python.
    writes: a glob of files that the commands have to leave: a logger that fails stops no run.
    """

    packages: tuple[str, ...]
    commands: tuple[str, ...]
    writes: str | None = None


def _steps(*calls: str) -> tuple[str, ...]:
    """Return a command that checks environments, each made by SUITE.make_env(...)."""
    lines = ["from worldloom import check_env"]
    lines += [f"from worldloom.envs.suites import {call.partition('.')[0]}" for call in calls]
    lines += [f"check_env({call}, steps=50)" for call in calls]
    return (f"-c {shlex.quote('; '.join(lines))}",)


def _trains(overrides: str, folder: str = "run") -> str:
    return f"-m worldloom run {SHORT} folder={folder} {overrides}"


OFFLINE = "-m worldloom run data=offline model=tdmpc2_tiny env=none training.total_steps=5"
CHECKS = {
    "pixels": Check(("pygame-ce",), _steps("gymnasium.make_env('CartPole-v1', pixels=True)")),
    "box2d": Check(("box2d",), _steps("gymnasium.make_env('LunarLander-v3')")),
    "mujoco": Check(("mujoco",), _steps("gymnasium.make_env('HalfCheetah-v5')")),
    "atari": Check(("ale-py",), _steps("atari.make_env('pong')")),
    "crafter": Check(("crafter",), _steps("crafter.make_env()")),
    "minigrid": Check(("minigrid",), _steps("minigrid.make_env('DoorKey-5x5')")),
    "dmc": Check(
        ("dm-control", "mujoco"),
        _steps("dmc.make_env('walker-walk')", "dmc.make_env('cup-catch', pixels=True)"),
    ),
    "metaworld": Check(("metaworld", "mujoco"), _steps("metaworld.make_env('reach')")),
    "robotics": Check(
        ("gymnasium-robotics", "mujoco"), _steps("robotics.make_env('FetchReach-v4')")
    ),
    "memory-maze": Check(
        ("memory-maze", "dm-control", "mujoco"), _steps("memory_maze.make_env('9x9')")
    ),
    "offline": Check(
        ("h5py", "minari"),
        (
            f"-c {shlex.quote(RECORD)}",
            f"{OFFLINE} data.path=data.hdf5 folder=hdf5",
            f"{OFFLINE} data.path=pendulum/random-v0 folder=minari",
        ),
    ),
    "video": Check(
        ("av",), (_trains(""), "-m worldloom eval checkpoint=run video=film.mp4"), "film.mp4"
    ),
    "wandb": Check(
        ("wandb",),
        (_trains("logger=wandb logger.wandb.offline=true"),),
        "run/wandb/offline-run-*/run-*.wandb",
    ),
    "mlflow": Check(("mlflow",), (_trains("logger=mlflow"),), "run/**/*.db"),
    "sweep": Check(
        ("optuna", "submitit"),
        (
            f"-m worldloom run -m search=dreamerv3 search.trials=2 {SHORT} sweep=search",
            f"-m worldloom run -m hydra/launcher=local seed=0,1 {SHORT} sweep=seeds",
        ),
        "runs/sweeps/seeds/seed1/scores.yaml",
    ),
    "export": Check(
        ("onnx", "onnxscript", "onnxruntime"),
        (_trains(""), "-m worldloom export run policy.onnx"),
        "policy.onnx",
    ),
    "plot": Check(
        ("matplotlib",), (_trains(""), "-m worldloom plot run out=curves.png"), "curves.png"
    ),
    "dev": Check(
        ("pytest", "hypothesis", "ruff", "mypy"),
        (f"-m pytest -q -n 0 -p no:cacheprovider {ROOT}/tests/test_trees.py", "-m ruff --version"),
    ),
    "docs": Check(
        ("zensical", "mkdocstrings-python", "latex2mathml"),
        ("-c 'import latex2mathml.converter, mkdocstrings_handlers.python, zensical'",),
    ),
}
# Extras that consist of others.
GROUPS = {
    "suites": [
        *("pixels", "box2d", "mujoco", "atari", "crafter", "minigrid", "dmc", "metaworld"),
        *("robotics", "memory-maze"),
    ],
    "all": list(CHECKS),
}


def install(wheel: Path, extras: list[str], folder: Path, options: argparse.Namespace) -> Path:
    """Create an environment in `folder`, install the wheel with `extras`; return its Python."""
    call([options.python, "-m", "venv", "--without-pip", str(folder)])
    python = folder / "bin" / "python"
    command = shlex.split(options.install.format(python=python))
    call([*command, *options.requirements, f"worldloom[{','.join(extras)}] @ {wheel.as_uri()}"])
    return python


def call(command: list[str], cwd: Path | None = None) -> str:
    """Run a command and return its output; raise RuntimeError with its last line if it fails."""
    short = " ".join(shlex.join(command).split())[:120]
    env = {**os.environ, "PYTHONNOUSERSITE": "1"}
    env.pop("PYTHONPATH", None)
    env["MINARI_DATASETS_PATH"] = str(cwd)
    try:
        done = subprocess.run(
            command, cwd=cwd, env=env, capture_output=True, text=True, timeout=TIMEOUT
        )
    except subprocess.TimeoutExpired as error:
        raise RuntimeError(f"{short}: not done after {TIMEOUT:.0f} s") from error
    if done.returncode:
        lines = (done.stderr + done.stdout).strip().splitlines()
        print("\n".join(lines[-30:]), file=sys.stderr)
        last = done.stderr.strip().splitlines()[-1:] or lines[-1:]
        raise RuntimeError(f"{short}: {' '.join(last)}")
    return done.stdout


def try_extra(wheel: Path, extra: str, options: argparse.Namespace) -> dict[str, str]:
    """Install one extra, run its checks, and return its row of the table."""
    names = GROUPS.get(extra, [extra])
    packages = sorted({package for name in names for package in CHECKS[name].packages})
    row = dict.fromkeys(COLUMNS, "") | {"extra": extra, "result": "passed"}
    folder = Path(options.folder, "worldloom-extra").resolve()
    folder.mkdir(parents=True)
    try:
        extras = names if extra == "all" else [extra]
        python = install(wheel, extras, folder / "venv", options)
        show = (
            "import platform, sys; from importlib.metadata import version; "
            "print(platform.python_version(), *map(version, sys.argv[1:]))"
        )
        printed = call([str(python), "-c", show, "torch", *packages]).split()
        row["python"], row["torch"], *versions = printed
        row["packages"] = ", ".join(map(" ".join, zip(packages, versions, strict=True)))
        if extra == "all":
            report_on_everything(python)
        else:
            for name in names:
                use(python, CHECKS[name], folder / name)
    except RuntimeError as error:
        row["result"] = f"failed: {error}"
    finally:
        shutil.rmtree(folder)
    return row


def use(python: Path, check: Check, folder: Path) -> None:
    """Run the commands of a check in an empty folder; raise RuntimeError if one fails."""
    folder.mkdir()
    for command in check.commands:
        call([str(python), *shlex.split(command)], folder)
    if check.writes and not list(folder.glob(check.writes)):
        raise RuntimeError(f"{check.commands[-1]}: wrote no {check.writes}")


def report_on_everything(python: Path) -> None:
    """Raise RuntimeError if `worldloom doctor` finds a part that is missing or broken."""
    report = call([str(python), "-m", "worldloom", "doctor"]).splitlines()
    if wrong := [line for line in report if "not installed" in line or "broken" in line]:
        raise RuntimeError(" ".join(wrong))


def main() -> None:
    """Run the command line."""
    parser = argparse.ArgumentParser(usage=str(__doc__).partition("usage: ")[2])
    parser.add_argument("wheel", type=Path)
    parser.add_argument("extras", nargs="*")
    parser.add_argument("--with", nargs="+", default=[], dest="requirements")
    parser.add_argument("--python", default=sys.executable)
    parser.add_argument("--install", default="pip --python {python} install --quiet")
    parser.add_argument("--folder", default=tempfile.gettempdir())
    parser.add_argument("--out", type=Path, default=Path(__file__).with_name("extras.csv"))
    options = parser.parse_args()
    if unknown := sorted(set(options.extras) - {*CHECKS, *GROUPS}):
        parser.error(f"unknown extras {unknown}; choose from {[*CHECKS, *GROUPS]}")
    failed = False
    for extra in options.extras or [*CHECKS, *GROUPS]:
        rows = {}
        if options.out.exists():
            with options.out.open(newline="") as file:
                rows = {row["extra"]: row for row in csv.DictReader(file)}
        rows[extra] = row = try_extra(options.wheel.resolve(), extra, options)
        with options.out.open("w", newline="") as file:
            writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows[name] for name in [*CHECKS, *GROUPS] if name in rows)
        print(" | ".join(row.values()), flush=True)
        failed |= row["result"] != "passed"
    sys.exit(failed)


if __name__ == "__main__":
    main()
