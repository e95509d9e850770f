"""Where the time of an update goes: named phases, which cost next to nothing while nobody listens.

    with phase("imagine"):
        ...

marks one, in a model or anywhere else. While a `Timer` listens in the same thread the time spent
there is added up; a run does so for its `timings/…`, `python -m worldloom.bench` for its table.
Under torch.profiler the phases are named in the trace. Code that torch.compile traces has none: put
the marks around what is compiled.
"""

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from contextvars import ContextVar
from typing import Any

import torch

REST = "other"  # what lies in no phase


class Timer:
    """Add up what is spent in each phase, while it listens: `with Timer() as timer: …`.

    Of nested phases only the innermost counts, so that all of them, with "other" for what lies
    outside, sum to the whole. What a backward pass spends on a phase belongs to whoever called it.

    read: returns what is spent so far; seconds, or anything that only grows.
    """

    def __init__(self, read: Callable[[], float] = time.perf_counter) -> None:
        self.read = read
        self._spent: dict[str, float] = {}
        self._inside = [REST]
        self._before: Timer | None = None

    def __enter__(self) -> "Timer":
        """Begin to listen, in this thread; a timer that listened until now pauses."""
        self._before = _listening.get()
        _listening.set(self)
        self.begin()
        return self

    def __exit__(self, *error: Any) -> None:
        """Cease to listen."""
        _listening.set(self._before)

    def begin(self) -> None:
        """Count from here."""
        self._last = self.read()

    def mark(self) -> None:
        """Add what was spent since the last mark to the innermost phase."""
        now, name = self.read(), self._inside[-1]
        self._spent[name] = self._spent.get(name, 0.0) + now - self._last
        self._last = now

    def flush(self) -> dict[str, float]:
        """Return what was spent in every phase since the last flush, in the order of their ends."""
        self.mark()
        spent, self._spent = self._spent, {}
        return spent

    def enter(self, name: str) -> None:
        """Begin a phase."""
        self.mark()
        self._inside.append(name)

    def leave(self) -> None:
        """End the innermost phase."""
        self.mark()
        self._inside.pop()


class EventTimer(Timer):
    """Add up the seconds that a GPU spends, by events in its stream: only a flush waits for it.

    A phase that waits for the host alone counts as far as it leaves the GPU without work.
    """

    def __init__(self, event: Callable[[], Any] | None = None) -> None:
        super().__init__()
        self._event = event or (lambda: torch.cuda.Event(enable_timing=True))
        # Recorded events, each with the phase that ended there; the first is the last one counted.
        self._waiting: deque[tuple[str, Any]] = deque()

    def begin(self) -> None:
        """Count from here."""
        self._waiting.clear()
        self._record()

    def mark(self) -> None:
        """Record an event, and count those that the GPU has passed."""
        if torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing():
            return  # a graph would replay the event, and cannot ask for one
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
    """A phase that somebody listens to."""

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


# A thread begins without a timer, so what it does is not taken for the time of this one.
_listening: ContextVar[Timer | None] = ContextVar("_listening", default=None)


def phase(name: str) -> AbstractContextManager[None]:
    """Return a context whose time counts for the phase `name`, lower case with underscores."""
    if torch.compiler.is_compiling():
        return nullcontext()
    timer, profiled = _listening.get(), torch.autograd._profiler_enabled()
    if timer is None and not profiled:
        return nullcontext()
    return _Phase(name, timer, profiled)


def timer_for(device: torch.device) -> Timer:
    """Return a timer that reads a run's clock: the GPU's where there is one."""
    return EventTimer() if device.type == "cuda" else Timer()
