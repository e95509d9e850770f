"""Columns of the metrics.csv of a run, also while it is written."""

import csv
import functools
import logging
from array import array
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import numpy as np

from worldloom.files import require_regular
from worldloom.memory import require_memory

log = logging.getLogger(__name__)


def read_columns(file: Path, names: Iterable[str]) -> dict[str, np.ndarray]:
    """Return columns [rows] of a metrics.csv; all NaN for a name that it lacks.

    A last line that is being written is left out and, with a warning, lines of another length.
    Without the file, and with a warning if it is no file, columns are empty.

    Raises:
        ValueError: the columns of a file of gigabytes do not fit in memory.
    """
    names, rows, bad = list(names), array("d"), False
    if not _is_readable(file):
        return {name: np.empty(0) for name in names}
    try:
        with file.open(encoding="utf-8", errors="replace") as lines:
            reader = csv.reader(line for line in lines if line.endswith("\n"))
            header = next(reader, [])
            most = file.stat().st_size // max(1, len(header))  # a column takes a byte of a row
            require_memory(8 * len(names) * most, f"{file}, {file.stat().st_size:,} bytes,")
            places = [header.index(name) if name in header else None for name in names]
            for row in reader:
                bad = bad or len(row) != len(header) or any("\ufffd" in text for text in row)
                if len(row) == len(header):
                    rows.extend(np.nan if i is None else to_number(row[i]) for i in places)
        if bad or "step" not in header:
            report_damage(file, "it has lines that are not rows of numbers")
    except (OSError, csv.Error) as error:
        report_damage(file, str(error))
    table = np.array(rows, dtype=float).reshape(-1, len(names))
    return dict(zip(names, table.T, strict=True))


def read_header(file: Path) -> list[str]:
    """Return the names of the columns of a metrics.csv; empty if it cannot be read."""
    with suppress(OSError, csv.Error):
        if _is_readable(file):
            with file.open(encoding="utf-8", errors="replace") as lines:
                return next(csv.reader(lines), [])
    return []


def _is_readable(file: Path) -> bool:
    """Return whether a metrics.csv exists; False, with a warning, for a pipe or a folder."""
    if not file.exists():
        return False
    try:
        require_regular(file)
    except ValueError as error:
        report_damage(file, str(error))
        return False
    return True


def to_number(text: str) -> float:
    """Return a cell as a number; NaN if it is none."""
    try:
        return float(text) if text else np.nan
    except ValueError:
        return np.nan


@functools.cache
def report_damage(file: Path, reason: str) -> None:
    """Warn once that a file of a run is left out."""
    log.warning("warning: %s is damaged and left out: %s", file, reason)
