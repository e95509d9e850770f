"""Argument checks and suggestions of similar names for error messages."""

import difflib
from collections.abc import Iterable


def require(holds: bool, name: str, value: object, expected: str) -> None:
    """Raise ValueError that names a setting, its value and what was expected, unless it holds."""
    if not holds:
        raise ValueError(f"{name} is {value!r}; expected {expected}")


def require_positive(**numbers: float) -> None:
    """Raise ValueError for a number below 1; each is passed under the name of its setting."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; expected at least 1")


def find_similar(
    name: str, choices: Iterable[str], count: int = 1, cutoff: float = 0.5
) -> list[str]:
    """Return up to `count` of the choices that resemble `name`, the most similar first.

    Upper and lower case are not distinguished. cutoff: least similarity, from 0 to 1.
    """
    by_lower = {choice.lower(): choice for choice in choices}
    return [by_lower[x] for x in difflib.get_close_matches(name.lower(), by_lower, count, cutoff)]


def suggest(name: str, choices: Iterable[str], prefix: str = "") -> str:
    """Return " (did you mean 'x'?)" for the most similar choice, or "" if none is similar.

    prefix: put in front of the choice in the message; it does not count for the similarity.
    """
    similar = find_similar(name, map(str, choices))
    return f" (did you mean {prefix + similar[0]!r}?)" if similar else ""


def list_names(names: Iterable[str], most: int = 5) -> str:
    """Return names separated by commas; only the first `most`, with the number of the others."""
    names = list(names)
    more = f" and {len(names) - most} more" if len(names) > most else ""
    return ", ".join(names[:most]) + more
