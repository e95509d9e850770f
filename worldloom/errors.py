"""Texts for messages: argument checks, suggestions, and strings from files made safe to show."""

import difflib
import math
import os
import shlex
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


def require_computable(name: str, value: object) -> None:
    """Raise ValueError for a finite number with which tensors cannot compute.

    A number beyond 1e30 overflows in float32 products such as learning_rate / (1 - beta), and an
    integer must fit into 64 bits.
    """
    if isinstance(value, int):
        require(abs(value) < 2**63, name, value, "an integer of at most 64 bits")
    if isinstance(value, float) and math.isfinite(value):
        require(abs(value) <= 1e30, name, value, "a number of at most 1e30, for float32")


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


def escape(text: object) -> str:
    r"""Return a text on one line, without characters that control a terminal or its layout.

    Control characters, also line breaks, and invisible ones such as those that reverse the
    direction of writing become escapes such as \x1b and \u202e.
    """
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def quote(*words: object) -> str:
    """Return words of a command line as bash reads them back: the only place that quotes them.

    Words with control or invisible characters become $'...', so that no character of a pasted
    line acts on the terminal.
    """
    return " ".join(map(_quote_word, map(str, words)))


def _quote_word(word: str) -> str:
    if word.isprintable():
        return shlex.quote(word)
    parts = []
    for c in word:
        code = "".join(f"\\x{byte:02x}" for byte in os.fsencode(c))
        parts.append(f"\\{c}" if c in "'\\" else c if c.isprintable() else code)
    return f"$'{''.join(parts)}'"
