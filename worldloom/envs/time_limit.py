"""The time that an environment in this process may take for one call."""

import math
import signal
import sys
import threading
from types import FrameType
from typing import Any

SECONDS = 120.0  # for a reset or step, unless env.timeout is set


class TookTooLong(BaseException):
    """A call did not return in time; not an Exception, which environments may catch."""


class TimeLimit:
    """Context manager that raises TookTooLong in a block that takes longer than `seconds`.

    It uses SIGALRM, so it acts in the main thread only, not on Windows, not in a program that uses
    this signal itself, not under a debugger, and not in code outside of Python that never returns.
    """

    def __init__(self, seconds: float) -> None:
        self.seconds = seconds
        alarm: Any = getattr(signal, "SIGALRM", None)
        usable = alarm is not None and math.isfinite(seconds)
        in_main = threading.current_thread() is threading.main_thread()
        if usable and in_main and signal.getsignal(alarm) is signal.SIG_DFL:
            signal.signal(alarm, _raise)
        self._acts = usable and signal.getsignal(alarm) is _raise
        self._started = False

    def __enter__(self) -> None:
        """Start the time, which repeats each second in case the environment catches all errors."""
        self._started = self._acts and threading.current_thread() is threading.main_thread()
        if self._started:
            signal.setitimer(signal.ITIMER_REAL, self.seconds, 1.0)

    def __exit__(self, *_: object) -> None:
        """Stop the time."""
        if self._started:
            signal.setitimer(signal.ITIMER_REAL, 0.0)


def _raise(number: int, frame: FrameType | None) -> None:
    if sys.gettrace() is None and "debugpy" not in sys.modules:
        raise TookTooLong
