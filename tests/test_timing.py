"""Where spent time goes, by a clock that the tests move; and that nobody pays who does not ask."""

import threading

import pytest
import torch
from torch import nn

from worldloom import timing
from worldloom.timing import EventTimer, Timer, phase, timer_for


class Clock:
    """Time that only passes when it is told to."""

    now = 0.0

    def __call__(self):
        return self.now

    def spend(self, seconds):
        self.now += seconds


class Marked(nn.Module):
    """A model of a user's own, with phases that nest; it spends whole seconds."""

    def __init__(self, clock):
        super().__init__()
        self.clock = clock
        self.layer = nn.Linear(2, 1)

    def compute_loss(self, x):
        with phase("world_model"):
            self.clock.spend(1)
            hidden = self.layer(x)
        with phase("imagine"):
            self.clock.spend(4)
            with phase("heads"):
                self.clock.spend(16)
            self.clock.spend(64)
        return hidden.sum()


def test_only_the_innermost_phase_counts_and_all_sum_to_the_whole():
    clock = Clock()
    model = Marked(clock)
    with Timer(clock) as timer:
        for _ in range(2):
            clock.spend(256)
            with phase("loss"):
                loss = model.compute_loss(torch.ones(3, 2))
                clock.spend(1024)
            with phase("backward"):
                loss.backward()
        spent = timer.flush()
    assert spent == {
        **{"other": 512, "loss": 2048, "world_model": 2, "imagine": 136, "heads": 32},
        "backward": 0,
    }
    assert sum(spent.values()) == clock.now


def test_a_flush_begins_anew_also_in_the_midst_of_a_phase():
    clock = Clock()
    with Timer(clock) as timer:
        with phase("log"):
            clock.spend(1)
            assert timer.flush() == {"other": 0, "log": 1}
            clock.spend(2)
        assert timer.flush() == {"log": 2, "other": 0}
        assert timer.flush() == {"other": 0}


def test_nobody_listens_before_and_after():
    clock = Clock()
    with phase("before"):
        clock.spend(1)
    with Timer(clock) as outer:
        clock.spend(2)
        with Timer(clock) as inner, phase("a"):
            clock.spend(4)
        with phase("b"):
            clock.spend(8)
        assert inner.flush()["a"] == 4
    with phase("after"):
        clock.spend(16)
    assert outer.flush() == {"other": 4 + 2 + 16, "b": 8}  # "a" is the inner one's
    assert not isinstance(phase("x"), timing._Phase)


def test_an_error_ends_its_phases():
    clock = Clock()
    with Timer(clock) as timer:
        with pytest.raises(KeyError), phase("a"), phase("b"):
            raise KeyError
        clock.spend(1)
        assert timer.flush() == {"other": 1, "a": 0, "b": 0}


def test_other_threads_are_not_listened_to():
    clock = Clock()

    def work():
        with phase("collect"):
            clock.spend(1)

    with Timer(clock) as timer:
        thread = threading.Thread(target=work)
        thread.start()
        thread.join()
        assert timer.flush() == {"other": 1}


def test_phases_are_named_in_a_trace_of_the_profiler():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU]) as profile:
        Marked(Clock()).compute_loss(torch.ones(3, 2))
    names = [event.key for event in profile.key_averages()]
    assert {"world_model", "imagine", "heads"} <= set(names)


def test_compiled_code_has_no_phases_and_is_not_broken_by_them():
    def double(x):
        with phase("inside"):
            return 2 * x

    with Timer() as timer:
        # fullgraph: an operation that cannot be traced would be an error.
        compiled = torch.compile(double, backend="eager", fullgraph=True)
        assert compiled(torch.ones(1)).item() == 2
        assert set(timer.flush()) == {"other"}


# ---- events, as a GPU's stream would record them -------------------------------------------------


class Stream:
    """A device that passes events later than the host records them."""

    def __init__(self):
        self.ms, self.events, self.waits = 0.0, [], 0

    def event(self):
        event = Event(self)
        self.events.append(event)
        return event


class Event:
    def __init__(self, stream):
        self.stream, self.passed = stream, False

    def record(self):
        self.at = self.stream.ms

    def query(self):
        return self.passed

    def synchronize(self):
        self.stream.waits += 1
        for event in self.stream.events:
            event.passed = True

    def elapsed_time(self, end):
        assert self.passed and end.passed, "a GPU cannot tell before it has come there"
        return end.at - self.at


def test_events_are_read_late_and_only_a_flush_waits():
    stream = Stream()
    timer = EventTimer(stream.event)
    with timer:
        with phase("loss"):
            stream.ms += 3
            with phase("imagine"):
                stream.ms += 5
        for event in stream.events[:3]:
            event.passed = True
        with phase("loss"):
            stream.ms += 7
        assert stream.waits == 0 and len(timer._waiting) == 5  # the first ones are counted
        stream.ms += 2
        spent = timer.flush()
        assert spent == pytest.approx({"other": 2e-3, "loss": 10e-3, "imagine": 5e-3})
        assert stream.waits == 1
        stream.ms += 1
        assert timer.flush() == pytest.approx({"other": 1e-3})


def test_a_run_on_a_cpu_reads_the_clock():
    assert type(timer_for(torch.device("cpu"))) is Timer
    assert type(timer_for(torch.device("cuda"))) is EventTimer
