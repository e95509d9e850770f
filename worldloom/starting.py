"""What surrounds every command: Ctrl-C while it starts, signals, and output that cannot be written.

Imports take seconds, and some of them swallow KeyboardInterrupt, so Ctrl-C prints one line instead
of the traceback of an import. Output that cannot be written, as behind `| head`, on a full disk or
after a terminal was closed, neither ends a command nor changes its exit code.
"""

import ctypes
import errno
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from typing import Any

# Ctrl-C; the signal of schedulers and `kill`; that of a terminal that is closed; those that SLURM
# can send before a time limit (sbatch --signal=USR1@90), of which submitit uses the last.
STOPPING = ("SIGINT", "SIGTERM", "SIGHUP", "SIGUSR1", "SIGUSR2")
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
    """End the process on Ctrl-C from now on; let no other file replace a closed stdin or stdout."""
    for number in range(3):
        with suppress(OSError):
            os.fstat(number)
            continue
        os.set_inheritable(os.open(os.devnull, os.O_RDWR), True)  # gets the lowest free number
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def end() -> None:
    """Raise KeyboardInterrupt on Ctrl-C from now on, as Python does by default."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


@contextmanager
def handling_signals(handler: Callable[[int, Any], object]) -> Iterator[None]:
    """Handle the signals that stop a run with a function, inside the block.

    With `nohup`, which ignores SIGHUP, a run survives its terminal.
    """
    hangup = getattr(signal, "SIGHUP", None)
    before = {
        number: signal.signal(number, handler)
        for number in SIGNALS
        if number != hangup or signal.getsignal(number) is not signal.SIG_IGN
    }
    try:
        yield
    finally:
        for number, former in before.items():
            signal.signal(number, former)


class Output:
    """Text stream that drops what cannot be written, and writes all characters in any encoding.

    A full disk is reported once on stderr.
    """

    def __init__(self, stream: Any) -> None:
        self.stream = stream
        self._failed = False
        if getattr(stream, "errors", None) == "strict":
            stream.reconfigure(errors="backslashreplace")

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        """Write a text, or drop it; return its length."""
        self._attempt(self.stream.write, text)
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Write what is still in memory."""
        self._attempt(self.stream.flush)

    def _attempt(self, do: Callable[..., object], *args: str) -> None:
        try:
            do(*args)
        except (OSError, ValueError) as error:  # ValueError: it was closed
            full = getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT)
            if full and not self._failed:
                write_error(f"{self.name} cannot be written ({error}); the command continues\n")
            self._failed = True
            if not full:  # there may be room again later
                self.discard()

    def discard(self) -> None:
        """After a failure, send what is in memory or written later nowhere."""
        if self._failed:
            with suppress(OSError, ValueError):
                nowhere = os.open(os.devnull, os.O_WRONLY)
                os.dup2(nowhere, self.fileno())
                os.close(nowhere)


@contextmanager
def safe_output() -> Iterator[None]:
    """Replace stdout and stderr by an `Output` inside the block."""
    before = sys.stdout, sys.stderr
    sys.stdout, sys.stderr = (  # None if it was closed when Python started
        stream if isinstance(stream, Output) else Output(stream or open(os.devnull, "w"))  # noqa: SIM115
        for stream in before
    )
    try:
        yield
    finally:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            if isinstance(stream, Output):
                stream.discard()  # or the interpreter would fail to write it when it ends
        sys.stdout, sys.stderr = before


def write_error(text: str) -> None:
    """Write to stderr where `print` may not be called, as in the handler of a signal."""
    with suppress(OSError):
        os.write(2, text.encode(errors="backslashreplace"))


def _stop(*_: Any) -> None:
    if os.environ.get("RANK", "0") == "0":
        write_error("stopped by SIGINT\n")
    for cleanup in cleanups:
        cleanup()
    os._exit(130)
