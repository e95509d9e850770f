"""A process that runs environments, and the pipe between it and its parent.

Each request (name, argument) gets one answer (done, value). If done is False, value is (summary,
traceback, EnvError or None) of an exception and the process ends. The process also ends when its
pipe is closed, so it does not outlive its parent. During a long request it sends (None, None) as a
heartbeat.
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
from typing import Any, NamedTuple

import numpy as np

from worldloom.envs.contract import EnvError, explain_exception
from worldloom.envs.replayable import LocalVectorEnv
from worldloom.starting import SIGNALS, safe_output

# Time allowed for making the environments, even if the timeout of a step is shorter.
START_SECONDS = 120.0
CLOSE_SECONDS = 5.0  # time that a process has to end before it is killed
HEARTBEAT_SECONDS = 0.25


class Crash(NamedTuple):
    """A process died, raised or did not answer; reason is one line, trace may be empty.

    error: what its environment did, if a new one would not help.
    """

    reason: str
    trace: str = ""
    error: EnvError | None = None


class EnvProcess:
    """The parent's handle of a process that runs the environments `indices`.

    make_envs: pickled function that makes these environments, stepped together.
    waiting: whether an answer is pending, or the process was never started or has ended.
    crashes: number of crashes since one of its episodes ended. restarts: number of replacements.
        Both are counted by the caller.
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

    def __str__(self) -> str:
        numbers = ", ".join(map(str, self.indices))
        return f"environment{'s' * (len(self.indices) > 1)} {numbers}"

    def start(self) -> None:
        """Start a process with new environments; requests can be sent at once."""
        # A forked process hangs if its parent has rendered before.
        methods = multiprocessing.get_all_start_methods()
        method = "forkserver" if "forkserver" in methods else "spawn"
        context: Any = multiprocessing.get_context(method)
        if method == "forkserver":
            context.set_forkserver_preload([__name__])  # imported once for all processes
        # A new pipe, so that late messages from the previous process are dropped.
        pipe, theirs = context.Pipe()
        arguments = (theirs, self._make_envs, self.indices.start, dict(os.environ))
        process = context.Process(target=_run_envs, args=arguments, daemon=True)
        with _prepare_parent():
            process.start()
        theirs.close()
        self._process, self._pipe = process, pipe
        self._limit = max(self._timeout, START_SECONDS)

    def make_ready(self) -> None:
        """Replace the process if it owes the answer to an interrupted request.

        That answer might be taken for the answer to the next request.
        """
        if self.waiting:
            EnvProcess.stop([self], 0.0)
            self.start()

    def ask(self, name: str, argument: Any = None) -> None:
        """Send a request; if the process is dead, `answer` reports it."""
        self.waiting, self._asked = True, time.monotonic()
        with suppress(OSError):
            self._pipe.send((name, argument))

    def answer(self) -> Any:
        """Wait for the answer to the last request; return a Crash if it does not come in time."""
        done = None
        while done is None:
            try:
                if not self._pipe.poll(max(0.0, self._asked + self._limit - time.monotonic())):
                    return Crash(f"no answer within {self._limit:g} seconds")
                done, value = self._pipe.recv()
            except (EOFError, OSError):
                return Crash(self._describe_death())
            self._asked = time.monotonic()
        self.waiting, self._limit = False, self._timeout
        return value if done else Crash(*value)

    def _describe_death(self) -> str:
        if self._process is None:
            return "the process was ended because it could not be saved"
        self._process.join(1.0)  # the pipe closes shortly before the exit code is known
        code = self._process.exitcode or 0
        if code >= 0:
            return f"the process ended with exit code {code}"
        name = {s.value: s.name for s in signal.Signals}.get(-code, f"signal {-code}")
        return f"the process was killed by {name}" + " (out of memory?)" * (name == "SIGKILL")

    @staticmethod
    def stop(processes: Iterable["EnvProcess"], patience: float = CLOSE_SECONDS) -> None:
        """End processes by closing their pipes; kill those that still run after `patience`."""
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
def _prepare_parent() -> Iterator[None]:
    """Hide the main script from a new process, and limit numpy in the process to one thread.

    The process would run the script a second time, without need: cloudpickle sends what the script
    defines by value. The fork server reads OMP_NUM_THREADS once, when it imports numpy; a value
    set by the user is kept.
    """
    main, threads = sys.modules["__main__"], os.environ.get("OMP_NUM_THREADS")
    sys.modules["__main__"] = ModuleType("__main__")
    os.environ["OMP_NUM_THREADS"] = threads or "1"
    try:
        yield
    finally:
        sys.modules["__main__"] = main
        if threads is None:
            del os.environ["OMP_NUM_THREADS"]


@safe_output()
def _run_envs(pipe: Any, make_envs: bytes, first: int, environ: dict[str, str]) -> None:
    """Make environments and answer the parent's requests; the main function of the process.

    first: number of the first environment.
    """
    for number in SIGNALS:
        # Signals to the process group are handled by the parent. SIG_IGN would be inherited by
        # simulators that an environment starts as programs.
        signal.signal(number, lambda *_: None)
    if sys.stderr is not None:
        faulthandler.enable()
    os.environ.update(environ)  # a fork server has the variables of its start
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    threading.Thread(target=_end_with_parent, daemon=True).start()
    done, value = _attempt(lambda: pickle.loads(make_envs)())
    envs = value if done else None
    if envs is not None:
        envs.first = first
    try:
        while done:
            request = pipe.recv()
            done, value = _attempt(_answer, envs, *request, _make_heartbeat(pipe))
            pipe.send((done, value))
        if envs is None:
            pipe.send((done, value))
    except (EOFError, OSError):
        pass  # the parent has closed the pipe, or is dead
    if envs is not None:
        _attempt(envs.close)  # nobody waits for an answer


def _end_with_parent() -> None:
    """End the process when its parent ends, even in the middle of a step that never returns."""
    parent: Any = multiprocessing.parent_process()
    parent.join()
    time.sleep(CLOSE_SECONDS)
    os._exit(1)


def _attempt(fn: Callable[..., Any], *args: Any) -> tuple[bool, Any]:
    try:
        return True, fn(*args)
    except BaseException as error:
        cause = error.__cause__ or error
        lines = traceback.format_exception(type(cause), cause, cause.__traceback__, chain=False)
        trace = "".join(lines[1:])  # without the heading
        if not isinstance(error, EnvError):
            return False, (explain_exception(error), trace, None)
        return False, (error.fact, trace, error if error.fatal else None)


def _make_heartbeat(pipe: Any) -> Callable[[], None]:
    """Return a function that sends a heartbeat unless the last one was sent just before."""
    last = time.monotonic()

    def beat() -> None:
        nonlocal last
        if time.monotonic() > last + HEARTBEAT_SECONDS:
            last = time.monotonic()
            pipe.send((None, None))

    return beat


def _answer(envs: LocalVectorEnv, name: str, argument: Any, beat: Callable[[], None]) -> Any:
    """Execute a request; reset, step and restore return the five parts of a step."""
    if name == "spaces":
        return envs.single_observation_space, envs.single_action_space
    if name == "save":
        return envs.save()
    if name == "step":
        *arrays, infos = envs.step(argument)
    elif name == "restore":
        *arrays, infos = envs.restore(argument, beat)
    else:
        obs, infos = envs.reset(seed=argument)
        arrays = [obs, np.zeros(envs.num_envs), *np.zeros((2, envs.num_envs), bool)]
    return *arrays, infos
