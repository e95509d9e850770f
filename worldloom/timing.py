"""Named phases of an update, whose time can be measured.

    with phase("imagine"):
        ...

marks a phase, in a model or anywhere else. It costs almost nothing unless a `Timer` is active in
the same thread, which adds up the time spent in each phase: a run has one for its `timings/…`, and
`python -m worldloom.bench` for its table. Under torch.profiler the phases appear in the trace.
Phases inside code that torch.compile traces are ignored: mark the call of the compiled function.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

REST = "other"  # name of the time outside all phases


class Timer:
    """Add up the time spent in each phase while the timer is active: `with Timer() as timer: …`.

    Time in nested phases counts only for the innermost one, so that all phases, with "other" for
    the time outside, sum to the total. A backward pass counts for the phase that it is called in.

    read: returns the time so far in seconds, or another quantity that only grows.
    """

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        self.read = read
        self._spent: dict[str, float] = {}
        self._inside = [REST]
        self._before: Timer | None = None

    def __enter__(self) -> "Timer":
        """Activate the timer in this thread; a timer that was active before pauses."""
        self._before = _active.get()
        _active.set(self)
        self.begin()
        return self

    def __exit__(self, *error: Any) -> None:
        """Deactivate the timer and continue the previous one."""
        _active.set(self._before)

    def begin(self) -> None:
        """Start to count now."""
        self._last = self.read()

    def mark(self) -> None:
        """Add the time since the last mark to the innermost phase."""
        now, name = self.read(), self._inside[-1]
        self._spent[name] = self._spent.get(name, 0.0) + now - self._last
        self._last = now

    def flush(self) -> dict[str, float]:
        """Return the time spent in each phase since the last flush, ordered by their ends."""
        self.mark()
        spent, self._spent = self._spent, {}
        return spent

    def enter(self, name: str) -> None:
        """Start a phase."""
        self.mark()
        self._inside.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self.mark()
        self._inside.pop()


class EventTimer(Timer):
    """Add up the seconds that a GPU spends, using events in its stream; only `flush` waits.

    Work of the host counts only while the GPU is idle.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        # Recorded events with the phase that each one ends; the first is already counted.
        self._waiting: deque[tuple[str, Any]] = deque()

    def begin(self) -> None:
        """Start to count now."""
        self._waiting.clear()
        self._record()

    def mark(self) -> None:
        """Record an event and count the events that the GPU has reached."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # events in a graph are replayed with it and cannot be queried
        self._record()
        self._count()

    def flush(self) -> dict[str, float]:
        """Wait for the GPU; return the seconds of every phase since the last flush."""
        self._record()
        self._waiting[-1][1].synchronize()
        self._count()
        spent, self._spent = self._spent, {}
        return spent

    def _record(self) -> None:
        event = self._event()
        event.record()
        self._waiting.append((self._inside[-1], event))

    def _count(self) -> None:
        while len(self._waiting) > 1 and self._waiting[1][1].query():
            start, (name, end) = self._waiting.popleft()[1], self._waiting[0]
            self._spent[name] = self._spent.get(name, 0.0) + start.elapsed_time(end) / 1e3


class _Phase:
    """A phase with an active timer or profiler."""

    def __init__(self, name: str, timer: Timer | None, profiled: bool) -> None:
        self._name, self._timer = name, timer
        self._named = torch.profiler.record_function(name) if profiled else None

    def __enter__(self) -> None:
        if self._timer is not None:
            self._timer.enter(self._name)
        if self._named is not None:
            self._named.__enter__()

    def __exit__(self, *error: Any) -> None:
        if self._named is not None:
            self._named.__exit__(*error)
        if self._timer is not None:
            self._timer.leave()


# Threads start without a timer, so that their work does not count for the thread that has one.
_active: ContextVar[Timer | None] = ContextVar("_active", default=None)


def phase(name: str) -> AbstractContextManager[None]:
    """Return a context manager for the phase `name`, in lower case with underscores."""
    if torch.compiler.is_compiling():
        return nullcontext()
    timer, profiled = _active.get(), torch.autograd._profiler_enabled()
    if timer is None and not profiled:
        return nullcontext()
    return _Phase(name, timer, profiled)


def timer_for(device: torch.device) -> Timer:
    """Return the timer of a run on this device."""
    return EventTimer() if device.type == "cuda" else Timer()
