"""Signals that stop a run at the end of an update instead of in the middle of one."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; the signal of schedulers and `kill`; the signal that SLURM can send before a time limit
# (sbatch --signal=USR1@90).
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class Interrupted(BaseException):
    """Raised when a signal stops the run.

    between: whether the run stopped between two updates or environment steps, in a complete state.
    """

    def __init__(self, number: int, between: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.between = number, between

    @property
    def exit_code(self) -> int:
        """Return the exit code that shells report for a process ended by this signal."""
        return 128 + self.number


class Interruption:
    """Record the first signal; `check` raises it where the run can stop safely.

    A second Ctrl-C stops immediately.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal was received."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Handle the signals inside the block."""
        before = {number: signal.signal(number, self._receive) for number in SIGNALS}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _receive(self, number: int, frame: Any) -> None:
        if self.number is not None:
            if number == signal.SIGINT:
                raise Interrupted(number, between=False)
            return
        self.number = number
        name = signal.Signals(number).name
        # Not print: the signal may have interrupted a print.
        os.write(2, f"\n{name}: finishing the update, then saving; Ctrl-C stops now\n".encode())
