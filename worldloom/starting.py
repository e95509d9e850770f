"""What surrounds every command: Ctrl-C while it starts, and an output that nobody reads.

Imports take seconds, and some of them swallow KeyboardInterrupt, so Ctrl-C prints one line instead
of the traceback of an import. Behind `| head`, a command ends silently.
"""

import ctypes
import os
import select
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; the signal of schedulers and `kill`; those that SLURM can send before a time limit
# (sbatch --signal=USR1@90), of which submitit uses the last.
STOPPING = ("SIGINT", "SIGTERM", "SIGUSR1", "SIGUSR2")
SIGNALS = [getattr(signal, name) for name in STOPPING if hasattr(signal, name)]
# Called before the process ends.
cleanups: list[Callable[[], object]] = []


def is_command() -> bool:
    """Return whether `python -m worldloom...` is importing this package."""
    args = sys.orig_argv
    module = args[args.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in args else ""
    return module.split(".")[0] == "worldloom"


def has_others() -> bool:
    """Return whether torchrun, srun or another process has started this one as one of several.

    On a machine after the first one, NODE_RANK and MASTER_ADDR tell it.
    """
    env = os.environ
    if "RANK" in env:
        return int(env.get("WORLD_SIZE", 1)) > 1
    if "SLURM_PROCID" in env and int(env.get("SLURM_NTASKS", 1)) > 1:
        return env.get("SLURM_JOB_NAME") not in ("bash", "interactive")
    return "MASTER_ADDR" in env and int(env.get("NODE_RANK", 0)) > 0


def end_with_parent() -> None:
    """Ask Linux to send SIGTERM when the process of worldloom that has started this one ends.

    That process names itself in WORLDLOOM_PARENT.
    """
    parent = os.environ.pop("WORLDLOOM_PARENT", None)
    if parent is None or sys.platform != "linux":
        return
    ctypes.CDLL(None).prctl(1, signal.SIGTERM)  # PR_SET_PDEATHSIG
    if os.getppid() != int(parent):
        os._exit(1)


def begin() -> None:
    """End the process on Ctrl-C from now on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def end() -> None:
    """Raise KeyboardInterrupt on Ctrl-C from now on, as Python does by default."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def handling_signals(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Handle the signals that stop a run with a function, inside the block."""
    before = {number: signal.signal(number, handler) for number in SIGNALS}
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


@contextmanager
def reading_head() -> Iterator[None]:
    """End the process silently, with the exit code 141 of SIGPIPE, if nobody reads its stdout."""
    try:
        try:
            yield
        finally:
            if sys.stdout is not None:
                sys.stdout.flush()
    except BrokenPipeError:
        if not discard(sys.stdout):
            raise
        sys.exit(141)


def discard(stream: Any) -> bool:
    """Return whether nobody reads a stream any more, and send what is written to it nowhere."""
    poll = select.poll()
    poll.register(stream.fileno(), 0)
    if not poll.poll(0):  # the broken pipe is another one
        return False
    nowhere = os.open(os.devnull, os.O_WRONLY)
    os.dup2(nowhere, stream.fileno())
    os.close(nowhere)
    return True


def _stop(*_: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        os.write(2, b"stopped by SIGINT\n")
    for cleanup in cleanups:
        cleanup()
    os._exit(130)
