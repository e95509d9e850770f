"""Ctrl-C while a command starts: print one line instead of the traceback of an import.

Imports take seconds, and some of them swallow KeyboardInterrupt.
"""

import os
import signal
import sys
from collections.abc import Callable
from typing import Any

# Called before the process ends.
cleanups: list[Callable[[], object]] = []


def is_command() -> bool:
    """Return whether `python -m worldloom...` is importing this package."""
    args = sys.orig_argv
    module = args[args.index("-m") + 1] if sys.argv[:1] == ["-m"] and "-m" in args else ""
    return module.split(".")[0] == "worldloom"


def begin() -> None:
    """End the process on Ctrl-C from now on."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _stop)


def end() -> None:
    """Raise KeyboardInterrupt on Ctrl-C from now on, as Python does by default."""
    if signal.getsignal(signal.SIGINT) is _stop:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _stop(*_: Any) -> None:
    os.write(2, b"stopped by SIGINT\n")
    for cleanup in cleanups:
        cleanup()
    os._exit(130)
