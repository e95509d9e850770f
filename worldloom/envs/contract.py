"""What environments return and raise: one place reads it, in this process and in workers alike.

Values whose meaning is clear are converted. Anything else is an `EnvError`, in one line. NaN and
infinity are a `Fault`, which ends an episode but not the run.
"""

import logging
import math
import numbers
import os
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from worldloom.envs.time_limit import TookTooLong

log = logging.getLogger(__name__)

# Give up after this many consecutive faults of an environment without a finished episode.
MAX_FAULTS = 3
FLOAT32_MAX = float(np.finfo(np.float32).max)
NUMBERS = (float, int, np.bool_, numbers.Real)  # the frequent ones first
STEP_PARTS = "(obs, reward, terminated, truncated, info)"
# Modules whose functions call environments.
CALLERS = ("worldloom.envs.replayable", "worldloom.envs.vector", "worldloom.check.environment")
PACKAGE = f"{Path(__file__).parents[1]}{os.sep}"

_reported: set[str] = set()


class EnvError(ValueError):
    """An environment raised an exception, or returned something that cannot be used.

    problem: what it did, without its name; index: its number, None if it is the only one.
    fatal: whether a new copy of the environment would not help.
    fix: what to do about it.
    """

    def __init__(
        self, problem: str, index: int | None = None, fatal: bool = True, fix: str = ""
    ) -> None:
        name = "the environment" if index is None else f"environment {index}"
        self.fact = f"{name} {problem}"
        super().__init__(f"{self.fact}; {fix}" if fix else self.fact)
        self.problem, self.index, self.fatal, self.fix = problem, index, fatal, fix

    def __reduce__(self) -> tuple[Any, ...]:
        """Describe a copy, without the cause, which may be anything."""
        return type(self), (self.problem, self.index, self.fatal, self.fix)

    def at(self, index: int) -> "EnvError":
        """Return the same error with the number of the environment."""
        return type(self)(self.problem, index, self.fatal, self.fix)


class Fault(Exception):
    """An environment returned NaN or infinity; the message says where, without its name."""


def raise_failure(error: BaseException, call: str, limit: float = math.inf) -> NoReturn:
    """Raise the EnvError for an exception of any type that an environment has raised.

    Errors of worldloom itself, and Ctrl-C, are raised again unchanged.

    call: what the environment was doing, for the message: "in step".
    limit: seconds after which a TookTooLong was raised.
    """
    frames = traceback.extract_tb(error.__traceback__)
    if isinstance(error, TookTooLong):
        raise EnvError(
            f"took longer than {limit:g} seconds {call}{_find_place(frames[:-1])}",
            fix="fix an endless loop, or raise env.timeout",
        ) from error
    ours = bool(frames) and frames[-1].filename.startswith(PACKAGE)
    if type(error).__module__.startswith("worldloom."):
        raise error
    if ours and isinstance(error, ValueError | TypeError | ImportError):
        raise error
    handler = signal.getsignal(signal.SIGINT)
    if isinstance(error, KeyboardInterrupt) and handler is signal.default_int_handler:
        raise error
    text = explain_exception(error)
    if isinstance(error, ValueError) and "values to unpack" in text:
        text += f", but step has to return {STEP_PARTS}, and reset (obs, info)"
    exits = isinstance(error, SystemExit)
    fix = "raise an exception if it cannot continue" if exits else "fix it"
    fix += " (HYDRA_FULL_ERROR=1 shows the whole traceback)"
    raise EnvError(f"raised {text} {call}{_find_place(frames)}", fatal=exits, fix=fix) from error


def explain_exception(error: BaseException) -> str:
    """Return the type and message of any exception in one line, even if it has no message."""
    try:
        message = _shorten(str(error), 400)
    except BaseException:
        message = "its message cannot be shown"
    name = type(error).__name__
    return f"{name}: {message}" if message else name


def _find_place(frames: list["traceback.FrameSummary"]) -> str:
    """Return the innermost line outside of worldloom and installed packages, or of any code."""
    own = [f for f in frames if "site-packages" not in f.filename and PACKAGE not in f.filename]
    for frame in (own or frames)[-1:]:
        return f" ({Path(frame.filename).name}:{frame.lineno})"
    return ""


def report_once(notes: list[tuple[str, str]]) -> None:
    """Log notes about environments, (kind, text); each kind once in this process."""
    for kind, text in notes:
        if kind not in _reported:
            _reported.add(kind)
            log.warning("%s", text)


def describe_value(value: Any) -> str:
    """Return any value as a short text on one line."""
    if isinstance(value, np.ndarray) and value.size > 4:
        return f"an array of {value.dtype} of shape {value.shape}"
    try:
        return _shorten(repr(value), 80)
    except BaseException:
        return f"an object of type {type(value).__name__}"


def _shorten(text: str, most: int) -> str:
    line = " ".join(text.split())
    return line if len(line) <= most else f"{line[: most - 3]}..."


def to_array(value: Any) -> np.ndarray | None:
    """Return a value as an array of numbers or bools, or None if it is anything else."""
    try:
        if hasattr(value, "detach"):  # a tensor of torch, which may be on a GPU
            value = value.detach().cpu().numpy()
        array = np.asarray(value)
    except Exception:
        return None
    return array if array.dtype.kind in "fiub" else None


def _read_number(value: Any) -> float | None:
    """Return a number, or the only element of an array, as a float; None for anything else."""
    try:
        if isinstance(value, NUMBERS):
            return float(value)
    except OverflowError:  # a very large int
        return math.inf
    array = to_array(value)
    return float(array.item()) if array is not None and array.size == 1 else None


def _read_reward(value: Any) -> float:
    reward = _read_number(value)
    if reward is None:
        raise EnvError(
            f"returned {describe_value(value)} as the reward; expected a number; "
            "return float(reward)"
        )
    return reward


def _read_flag(name: str, value: Any) -> bool:
    if isinstance(value, np.bool_):
        return bool(value)
    number = _read_number(value)
    if number not in (0.0, 1.0):
        raise EnvError(
            f"returned {describe_value(value)} as {name}; expected True or False; "
            f"return bool({name})"
        )
    return bool(number)


def read_step(result: Any) -> tuple[Any, float, bool, bool, Any]:
    """Return the five parts of a step, with the reward and the flags as plain numbers and bools.

    Raises:
        EnvError: there are not five, or the reward or a flag is something else.
    """
    if not isinstance(result, (tuple, list)) or len(result) != 5:
        size = f"{len(result)} values" if isinstance(result, tuple) else describe_value(result)
        raise EnvError(
            f"returned {size} from step; expected {STEP_PARTS}, as in gymnasium; a time limit sets "
            "truncated, the end of the task terminated"
        )
    obs, reward, terminated, truncated, info = result
    if type(reward) is not float:
        reward = _read_reward(reward)
    if type(terminated) is not bool:
        terminated = _read_flag("terminated", terminated)
    if type(truncated) is not bool:
        truncated = _read_flag("truncated", truncated)
    return obs, reward, terminated, truncated, info


def read_reset(result: Any) -> tuple[Any, Any]:
    """Return the observation and the info of a reset, or raise EnvError if it is anything else."""
    if isinstance(result, tuple | list) and len(result) == 2:
        obs, info = result
        if info is None or isinstance(info, Mapping):
            return obs, info or {}
    what = f"{len(result)} values" if isinstance(result, tuple) else describe_value(result)
    raise EnvError(
        f"returned {what} from reset; expected (obs, info) with a dict as info, as in gymnasium "
        "and in gym since version 0.26"
    )


def require_finite(reward: float) -> None:
    """Raise Fault for a reward that is NaN or infinite as float32."""
    if not -FLOAT32_MAX <= reward <= FLOAT32_MAX:
        raise Fault(f"returned {reward} as the reward; expected a finite number")


def read_success(info: Any, notes: list[tuple[str, str]]) -> float | None:
    """Return info["success"] as a number, or None if there is none.

    info belongs to the environment, so nothing else in it is read, and nothing in it is an error.

    notes: gets a note about a value that is not a number.
    """
    try:
        value = info["success"]
    except Exception:
        return None
    number = _read_number(value)
    if number is not None and math.isfinite(number):
        return number
    if value is not None:
        text = describe_value(value)
        notes.append(
            (
                "success",
                f"info['success'] is {text}; expected True or False at the end of an episode; "
                "such episodes have no success",
            )
        )
    return None


@contextmanager
def guarding_exit() -> Iterator[None]:
    """Let an environment of this process that calls os._exit raise SystemExit, inside the block.

    The process would end without a message, and with an exit code that may be 0.
    """
    leave, process = os._exit, os.getpid()

    def leave_or_raise(status: int) -> NoReturn:
        frame: Any = sys._getframe(1)
        while frame is not None and os.getpid() == process:
            if frame.f_globals.get("__name__") in CALLERS:
                raise SystemExit(f"os._exit({status})")
            frame = frame.f_back
        leave(status)

    os._exit = leave_or_raise
    try:
        yield
    finally:
        os._exit = leave
