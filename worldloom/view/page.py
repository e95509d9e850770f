"""One self-contained HTML file: markup, style, scripts and data."""

import base64
import hashlib
import html
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

FOLDER = Path(__file__).parent
SCRIPTS = ("data.js", "charts.js", "parts.js", "panels.js", "plans.js", "playback.js")


def assemble(
    title: str,
    data: Mapping[str, Any],
    markup: str = "page.html",
    styles: Sequence[str] = ("page.css",),
    scripts: Sequence[str] = SCRIPTS,
    connects: bool = False,
) -> str:
    """Join markup, styles and scripts of this folder and the data into one file.

    A policy in the file allows these scripts and styles alone, by their hashes, and pictures
    inside the file, but no connection.

    title: any text. data: plain data, in which any text may occur.
    connects: allow connections to the server that the page comes from.
    """
    style = "\n".join((FOLDER / name).read_text() for name in styles)
    sources = [(FOLDER / name).read_text() for name in scripts]
    hashes = " ".join(map(_hash, sources))
    policy = (
        f"default-src 'none'; img-src data:; style-src {_hash(style)}; script-src {hashes}; "
        f"base-uri 'none'; form-action 'none'{'; connect-src ' + repr('self') if connects else ''}"
    )
    parts = {
        "title": html.escape(title),
        "policy": html.escape(policy),
        "style": f"<style>{style}</style>",
        "data": write_json(data),
        "scripts": "\n".join(f"<script>{source}</script>" for source in sources),
    }
    # Split, not replaced one after the other: data may contain the name of another part.
    first, *rest = (FOLDER / markup).read_text().split("{{")
    names = (piece.partition("}}") for piece in rest)
    return first + "".join(parts[name] + text for name, _, text in names)


def write_json(data: Any) -> str:
    """Return JSON that is safe in a script element: it contains no <, > or &."""
    text = json.dumps(data, allow_nan=False, separators=(",", ":"))
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")


def _hash(text: str) -> str:
    digest = hashlib.sha256(text.encode()).digest()
    return f"'sha256-{base64.b64encode(digest).decode()}'"
