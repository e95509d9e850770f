"""One process that runs environments, and the pipe by which its parent talks to it.

Each request (name, argument) gets one answer (done, value). Where done is false the value is
(summary, traceback) and the process ends. A closed pipe ends it too, so it outlives no parent.
While a long request is worked on, (None, None) comes now and then as a sign of life.
"""

import faulthandler
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import ModuleType
from typing import Any

import numpy as np

from worldloom.envs.replayable import LocalVectorEnv

# Of the infos only what `Rows` reads crosses the pipe: a value and its mask, and what a restored
# environment has lost. Others can be huge.
INFOS = ("success", "_success", "lost")
# What making the environments may take at least, however short the timeout of a step.
START_SECONDS = 120.0
# SLURM may send it to all processes of a job, ahead of a time limit; Windows has none.
USER_SIGNALS = [signal.SIGUSR1] if hasattr(signal, "SIGUSR1") else []
# Patience with a process that was asked to end.
CLOSE_SECONDS = 5.0
# Between signs of life.
ALIVE_SECONDS = 0.25


class Crash(Exception):
    """A process died, raised or gave no answer; reason is one line, trace may be empty."""

    def __init__(self, reason: str, trace: str = "") -> None:
        super().__init__(reason)
        self.reason, self.trace = reason, trace


class EnvProcess:
    """The process of environments `indices`, as its parent sees it.

    make_envs: pickled function that makes these environments, stepped together.
    waiting: whether it owes an answer, or was never started or already ended.
    crashes: since an episode of it ended; restarts: all of them. Whoever restarts it counts them.
    """

    def __init__(self, make_envs: bytes, indices: range, timeout: float) -> None:
        self.indices = indices
        self.waiting = True
        self.crashes = self.restarts = 0
        self._make_envs, self._timeout = make_envs, timeout
        self._limit = timeout
        self._asked = 0.0
        self._process: Any = None
        self._pipe: Any = None

    def start(self) -> None:
        """Start a process with new environments; it is ready for a request at once."""
        # Forked ones hang if their parent has rendered before, so they start clean.
        clean = "forkserver" if "forkserver" in multiprocessing.get_all_start_methods() else "spawn"
        context: Any = multiprocessing.get_context(clean)
        if clean == "forkserver":
            context.set_forkserver_preload([__name__])  # imported once for all of them
        # A pipe of its own: what a predecessor may still say is never heard.
        pipe, theirs = context.Pipe()
        arguments = (theirs, self._make_envs, dict(os.environ))
        process = context.Process(target=_work, args=arguments, daemon=True)
        with _hidden_main(), _single_threaded():
            process.start()
        theirs.close()
        self._process, self._pipe = process, pipe
        self._limit = max(self._timeout, START_SECONDS)

    def ask(self, name: str, argument: Any = None) -> None:
        """Send a request; `answer` will notice if nobody is there to hear it."""
        self.waiting, self._asked = True, time.monotonic()
        with suppress(OSError):
            self._pipe.send((name, argument))

    def answer(self) -> Any:
        """Wait for the answer to the last request; raise Crash if there is none in time."""
        done = None
        while done is None:
            try:
                if not self._pipe.poll(max(0.0, self._asked + self._limit - time.monotonic())):
                    raise Crash(f"no answer within {self._limit:g} seconds")
                done, value = self._pipe.recv()
            except (EOFError, OSError):
                raise Crash(self._death()) from None
            self._asked = time.monotonic()
        self.waiting, self._limit = False, self._timeout
        if not done:
            raise Crash(*value)
        return value

    def _death(self) -> str:
        if self._process is None:
            return "the process was ended, for it could not be saved"
        self._process.join(1.0)  # the pipe closes a little before the exit code is known
        code = self._process.exitcode or 0
        if code >= 0:
            return f"the process ended with exit code {code}"
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        return f"the process was killed by {name}" + " (out of memory?)" * (name == "SIGKILL")

    @staticmethod
    def stop(processes: Iterable["EnvProcess"], patience: float = CLOSE_SECONDS) -> None:
        """End processes by closing their pipes; kill those that are still there afterwards."""
        started = [process for process in processes if process._process is not None]
        for process in started:
            process.waiting = True
            process._pipe.close()
        end = time.monotonic() + patience
        for process in started:
            child, process._process = process._process, None
            child.join(max(0.0, end - time.monotonic()))
            if child.exitcode is None:
                child.kill()
                child.join(CLOSE_SECONDS)


@contextmanager
def _hidden_main() -> Iterator[None]:
    """Keep a new process from importing the main script, which would run it a second time.

    Nothing of it is missed: cloudpickle sends what is defined there by value.
    """
    main = sys.modules["__main__"]
    sys.modules["__main__"] = ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


@contextmanager
def _single_threaded() -> Iterator[None]:
    """Give a process one thread for its numbers, unless the user says otherwise.

    The fork server takes this from its environment when it imports numpy, once.
    """
    given = os.environ.get("OMP_NUM_THREADS")
    os.environ["OMP_NUM_THREADS"] = given or "1"
    try:
        yield
    finally:
        if given is None:
            del os.environ["OMP_NUM_THREADS"]


def _work(pipe: Any, make_envs: bytes, environ: dict[str, str]) -> None:
    """Run environments at the parent's requests, in a process of their own."""
    for number in (signal.SIGINT, signal.SIGTERM, *USER_SIGNALS):
        # They go to the whole group, and it is the parent that decides. Not SIG_IGN, which
        # simulators that an environment starts as programs would inherit.
        signal.signal(number, lambda *_: None)
    if sys.stderr is not None:
        faulthandler.enable()
    os.environ.update(environ)  # a fork server has that of when it was started
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    done, value = _attempt(lambda: pickle.loads(make_envs)())
    envs = value if done else None
    try:
        while done:
            request = pipe.recv()
            done, value = _attempt(_answer, envs, *request, _signs_of_life(pipe))
            pipe.send((done, value))
        if envs is None:
            pipe.send((done, value))
    except (EOFError, OSError):
        pass  # the parent has closed the pipe, or is dead
    if envs is not None:
        envs.close()


def _end_with_parent() -> None:
    """End the process even in the middle of a step that never ends."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    time.sleep(CLOSE_SECONDS)
    os._exit(1)


def _attempt(fn: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    try:
        return True, fn(*args)
    except BaseException as error:  # sys.exit in an environment too
        summary = " ".join(f"{type(error).__name__}: {error}".split())
        return False, (summary, traceback.format_exc())


def _signs_of_life(pipe: Any) -> Callable[[], None]:
    """Return a function that tells the parent, if some time has passed, that work goes on."""
    last = time.monotonic()

    def alive() -> None:
        nonlocal last
        if time.monotonic() > last + ALIVE_SECONDS:
            last = time.monotonic()
            pipe.send((None, None))

    return alive


def _answer(envs: LocalVectorEnv, name: str, argument: Any, alive: Callable[[], None]) -> Any:
    """Do what was asked; reset, step and restore answer as a step does."""
    if name == "spaces":
        return envs.single_observation_space, envs.single_action_space
    if name == "save":
        return envs.save()
    if name == "step":
        *arrays, infos = envs.step(argument)
    elif name == "restore":
        *arrays, infos = envs.restore(argument, alive)
    else:
        obs, infos = envs.reset(seed=argument)
        arrays = [obs, np.zeros(envs.num_envs), *np.zeros((2, envs.num_envs), bool)]
    return *arrays, {key: infos[key] for key in INFOS if key in infos}
