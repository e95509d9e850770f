"""Stopping a run between two updates, unfinished: by signals, and by limits of time and updates."""

import signal
import threading
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

from lightning.pytorch.callbacks import Timer
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from worldloom.starting import handling_signals, write_error


class Interrupted(BaseException):
    """Raised when a signal stops the run.

    between: whether the run stopped between two updates or environment steps, in a complete state.
    """

    def __init__(self, number: int, between: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.between = number, between

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe a copy: one rank's interruption is raised in all ranks."""
        return type(self), (self.number, self.between)

    @property
    def exit_code(self) -> int:
        """Return the exit code that shells report for a process ended by this signal."""
        return 128 + self.number


class Paused(Interrupted):
    """Raised between two updates when a limit stops the run, which is not an error."""

    def __init__(self, reason: str) -> None:
        BaseException.__init__(self, f"stopped by {reason}")
        self.reason, self.between = reason, True

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe a copy."""
        return type(self), (self.reason,)


class Limits:
    """The limits `trainer.max_time` and `trainer.max_steps`, which leave a run unfinished.

    With Lightning's own limits the run would count as finished.

    max_time: time, as in `lightning.Trainer`; None for no limit. It counts from the first check, so
        that a start which takes long still makes progress.
    max_steps: updates of the whole run; None or -1 for no limit.

    Raises:
        ValueError: `max_time` is not a duration.
    """

    def __init__(self, max_time: Any = None, max_steps: int | None = None) -> None:
        self.max_time, self.max_steps = max_time, -1 if max_steps is None else max_steps
        try:
            seconds = None if max_time is None else Timer(max_time).time_remaining()
        except (MisconfigurationException, TypeError, AttributeError):
            raise ValueError(
                f"trainer.max_time is {max_time!r}; expected days, hours, minutes and seconds such "
                "as 00:12:00:00, or a key such as +trainer.max_time.hours=12"
            ) from None
        self._seconds = float("inf") if seconds is None else seconds
        self._end: float | None = None

    def check(self, data: Any) -> None:
        """Raise Paused if a limit is reached and the data module has more to train on.

        Does nothing in the thread that collects during an update, which has to end first.
        """
        if threading.current_thread() is not threading.main_thread():
            return
        if data.updates >= self.max_steps > -1 and not data.complete:
            raise Paused(f"trainer.max_steps={self.max_steps}")
        now = time.monotonic()
        self._end = now + self._seconds if self._end is None else self._end
        if now > self._end and not data.complete:
            raise Paused(f"trainer.max_time={self.max_time}")


def asks_to_stop(check: Callable[[], None]) -> bool:
    """Return whether `check` raises Interrupted; evaluations call this after every step."""
    try:
        check()
    except Interrupted:
        return True
    return False


class Interruption:
    """Record the first signal; `check` raises it where the run can stop safely.

    doing: what happens until then, for the line that is printed.

    A second Ctrl-C stops immediately, unless it follows within a second: torchrun sends its
    processes a SIGINT that the terminal has sent them already.
    """

    def __init__(self, doing: str = "finishing the update, then saving") -> None:
        self.doing = doing
        self.number: int | None = None
        self._received = 0.0

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.number is not None:
            raise Interrupted(self.number)

    def listening(self) -> AbstractContextManager[None]:
        """Handle the signals inside a block."""
        return handling_signals(self._receive)

    def _receive(self, number: int, frame: Any) -> None:
        if self.number is not None:
            repeated = number == self.number and time.monotonic() < self._received + 1
            if number == signal.SIGINT and not repeated:
                raise Interrupted(number, between=False)
            return
        self.number, self._received = number, time.monotonic()
        name = signal.Signals(number).name
        # Not print: the signal may have interrupted a print.
        write_error(f"\n{name}: {self.doing}; Ctrl-C stops now\n")
