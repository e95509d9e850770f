"""Run commands of worldloom in forks of one process, so that each need not import torch again.

`Commands` is the client that tests use. The server is `python tests/forked_commands.py`. It reads
one JSON object a line from stdin, with the arguments of `fork`, and writes one a line to stdout:
{"code": exit code, "out": ..., "err": ...}. It imports everything once; each command is a fork with
its own working directory, stdin, stdout and stderr that calls the module's main() as
`python -m MODULE WORDS...` does.
"""

import contextlib
import ctypes
import gc
import importlib
import json
import os
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

# What the commands import, and what they import later, where they need it.
COMMANDS = ("run", "eval", "collect", "bench", "diagnose", "envs.check", "export")
LATER = (
    "app.build",
    "app.forecast",
    "app.launch",
    "app.run_log",
    "app.saved_config",
    "envs.suites.gymnasium",
    "factory",
    "models.dreamerv3.official",
    "models.tdmpc2.official",
    "results.labels",
    "training.callbacks",
    "training.checkpoints",
    "training.collector",
    "training.datamodule",
    "training.logger_guard",
    "training.loggers",
    "training.module",
    "training.monitors",
    "training.optimizers",
    "training.pictures",
    "training.progress",
    "view.playback",
)
PACKAGES = (
    *("h5py", "minari", "gymnasium.envs.classic_control", "PIL.ImageFont", "PIL.GifImagePlugin"),
    *("torch.utils.tensorboard", "tensorboard.plugins.hparams.metadata", "torch.profiler"),
)
WORDS = [
    *("experiment=cartpole", "env=gymnasium", "env.id=CartPole-v1", "model=dreamerv3_size1m"),
    *("model.units=8", "training.learning_rate=1e-3", "checkpoint.every=3updates", "name=a-b_c"),
    *("~callbacks.open_loop", "+trainer.max_steps=-1", "optimizer.betas=[0.9,0.999]", "seed=0"),
    *("data.capacity=1000", "env.workers=auto", "init_from=/tmp/a.ckpt", "env.pixels=true"),
]
WAITS = os.WEXITED | os.WNOHANG | os.WNOWAIT
SECONDS = 240  # that a command may take, on a machine with other jobs


class Commands:
    """A server that runs commands in forks. Use it as a context manager."""

    def __init__(self) -> None:
        env = {**os.environ, "OMP_NUM_THREADS": "1"}
        env.pop("HYDRA_FULL_ERROR", None)
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
        self.process = subprocess.Popen([sys.executable, __file__], env=env, text=True, **pipes)

    def __enter__(self) -> "Commands":
        return self

    def __exit__(self, *_: object) -> None:
        self.process.__exit__(None, None, None)  # closes the pipes, and waits until it has ended

    def run(
        self,
        words: Sequence[object],
        cwd: Path,
        kill: tuple[float | str, int] | None = None,
        seconds: int = SECONDS,
        module: str = "worldloom.run",
        path: Path | None = None,
        env: dict[str, str] | None = None,
        unprivileged: bool = False,
    ) -> dict[str, Any]:
        """Run a command and return its exit code, stdout and stderr; the arguments are `fork`'s."""
        request = {"module": module, "words": list(map(str, words)), "folder": str(cwd)}
        request |= {"kill": kill, "seconds": seconds, "path": path and str(path), "env": env}
        request["unprivileged"] = unprivileged
        json.dump(request, self.process.stdin)
        self.process.stdin.write("\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def good(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """Run a command that must succeed."""
        done = self.run(*args, **kwargs)
        assert done["code"] == 0, done["out"] + done["err"]
        return done


def run(module: str, words: list[str]) -> int:
    """Call the command's main() and return its exit code, as the interpreter would."""
    sys.argv = [f"{module.rpartition('.')[2]}.py", *words]
    sys.path.insert(0, os.getcwd())
    try:
        command = importlib.import_module(module)
        if hasattr(command, "__path__"):  # a package
            command = importlib.import_module(f"{module}.__main__")
        command.main()
    except SystemExit as stopped:
        if isinstance(stopped.code, str):
            print(stopped.code, file=sys.stderr)
        return stopped.code if isinstance(stopped.code, int) else int(stopped.code is not None)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def moment(when: float | str, folder: str) -> Callable[[], bool]:
    """Return what tells whether so many seconds are over, or a path was written again."""
    if not isinstance(when, str):
        end = time.monotonic() + when
        return lambda: time.monotonic() > end
    path = Path(folder, when)

    def written() -> int:
        return path.stat().st_mtime_ns if path.exists() else 0

    before = written()
    return lambda: written() > before


def fork(
    module: str,
    words: list[str],
    folder: str,
    kill: tuple[float | str, int] | None = None,
    seconds: int = SECONDS,
    path: str | None = None,
    env: dict[str, str] | None = None,
    unprivileged: bool = False,
) -> dict[str, object]:
    """Run a command in a fork; return its exit code and what it printed.

    kill: (seconds, or a path that the command writes; signal): send the signal after this time, or
        once the path was written again.
    seconds: the command is ended after this time.
    path: a folder to import modules from, as in PYTHONPATH. env: variables to set.
    unprivileged: permissions count, also for root.
    """
    is_time = moment(kill[0], folder) if kill else None
    files = {1: Path(folder) / ".stdout", 2: Path(folder) / ".stderr"}
    child = os.fork()
    if child == 0:
        os.chdir(folder)
        os.environ.update(env or {})
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        for number, file in files.items():
            os.dup2(os.open(file, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), number)
        if path is not None:
            sys.path.insert(0, path)
        if unprivileged:  # gives up all capabilities of root
            header = (ctypes.c_uint32 * 2)(0x20080522, 0)
            assert ctypes.CDLL(None).capset(header, (ctypes.c_uint32 * 6)()) == 0
        signal.alarm(seconds)
        code = run(module, words)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    if kill and is_time:
        while not is_time() and not os.waitid(os.P_PID, child, WAITS):
            time.sleep(0.002)
        os.kill(child, kill[1])  # it is still there, as a zombie at least
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    return {"code": code, "out": files[1].read_text(), "err": files[2].read_text()}


if __name__ == "__main__":
    for name in (*COMMANDS, *LATER):
        importlib.import_module(f"worldloom.{name}")
    for package in PACKAGES:
        with contextlib.suppress(ImportError):
            importlib.import_module(package)
    cli = importlib.import_module("worldloom.app.compose")
    # Hydra looks for its plugins once, and its parser learns from what it reads.
    cli.compose_config(*WORDS)
    validation = importlib.import_module("worldloom.app.validation")
    validation.top_level_keys()
    presets = importlib.import_module("worldloom.presets")
    for name in presets.preset_names():  # they are read once
        presets.load_preset(name)
    gc.freeze()  # what a fork does not touch, it need not copy
    for line in sys.stdin:
        print(json.dumps(fork(**json.loads(line))), flush=True)
