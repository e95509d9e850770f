"""Stop at the end of an update, not in the middle of it, when a signal asks for it."""

import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

# Ctrl-C; what schedulers and `kill` send; what SLURM sends ahead of a time limit where it was
# asked to (sbatch --signal=USR1@90).
SIGNALS = [
    getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGUSR1") if hasattr(signal, name)
]


class Interrupted(BaseException):
    """A signal stopped the run.

    between: it did so between two updates or two steps of collecting, so there is a state to save.
    """

    def __init__(self, number: int, between: bool = True) -> None:
        super().__init__(f"stopped by {signal.Signals(number).name}")
        self.number, self.between = number, between

    @property
    def exit_code(self) -> int:
        """Return what shells report of a process that the signal ended."""
        return 128 + self.number


class Interruption:
    """Remembers the first signal; `check` raises it where stopping does no harm.

    Ctrl-C once more stops at once: whoever presses it twice does not want to wait.
    """

    def __init__(self) -> None:
        self.number: int | None = None

    def check(self) -> None:
        """Raise Interrupted if a signal has come."""
        if self.number is not None:
            raise Interrupted(self.number)

    @contextmanager
    def listening(self) -> Iterator[None]:
        """Receive the signals inside."""
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
        # Not print, which the signal may have interrupted.
        os.write(2, f"\n{name}: finishing the update, then saving; Ctrl-C stops now\n".encode())
