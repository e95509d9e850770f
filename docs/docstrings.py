"""Extension of griffe: lines `name: meaning` of a docstring become a list in the API reference.

griffe reads them as titles of boxes, because it expects names in the sections Args and Attributes.
"""

import re
from typing import Any

import griffe

NAMES = re.compile(r"^([\w*]+(?:, [\w*]+)*): (?=\S)")


def list_names(text: str) -> str:
    """Return a docstring in which each paragraph of lines `name: meaning` is a list."""
    paragraphs = text.split("\n\n")
    return "\n\n".join(_list(p) if NAMES.match(p) else p for p in paragraphs)


def _list(paragraph: str) -> str:
    lines = []
    for line in paragraph.splitlines():
        found = NAMES.match(line)
        lines.append(f"- `{found[1]}`: {line[found.end() :]}" if found else f"  {line.strip()}")
    return "\n".join(lines)


class NamedLists(griffe.Extension):
    """Applies `list_names` to all docstrings."""

    def on_instance(self, *, obj: griffe.Object, **kwargs: Any) -> None:
        """Change the docstring of an object that was read."""
        if obj.docstring:
            obj.docstring.value = list_names(obj.docstring.value)
