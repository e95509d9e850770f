"""Checks of settings, and the search for a task's name, shared by the suites."""

from collections.abc import Iterable, Mapping
from typing import TypeVar

from worldloom.errors import find_similar

T = TypeVar("T")


def require_pixels(pixels: bool, suite: str) -> None:
    """Raise ValueError if env.pixels is false for a suite without other observations."""
    if not pixels:
        raise ValueError(
            f"env.pixels is false, but {suite} can be observed from images only; leave env.pixels "
            "out"
        )


def find_task(
    tasks: Mapping[str, T],
    spelling: str,
    *,
    given: str,
    suite: str,
    setting: str = "task",
    examples: Iterable[str],
) -> T:
    """Return the task that a suite has under a normalised spelling.

    tasks: {spelling: task}. given: the name as the user wrote it, for the message.
    examples: spellings suggested if none is similar.

    Raises:
        ValueError: the suite has no such task; names similar ones.
    """
    if spelling in tasks:
        return tasks[spelling]
    similar = dict.fromkeys(tasks[x] for x in find_similar(spelling, tasks, 3, 0.4) or examples)
    raise ValueError(
        f"env.{setting} is '{given}', which is not a task of {suite}; expected a name such as "
        f"{', '.join(map(str, similar))}; set env.{setting} to one of them"
    )
