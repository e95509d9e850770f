"""Replay capacity: number of rows, and the memory and disk that they need."""

import logging
import math
import os
import re
import shutil
from pathlib import Path

from worldloom.memory import available_memory, format_bytes, total_memory

log = logging.getLogger(__name__)

FILL = 0.9  # fraction of the free memory or disk that a replay may use
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}


def rows_per_stream(capacity: int | float | str, bytes_per_step: int, num_envs: int) -> int:
    """Return the rows per stream for a capacity in steps or in bytes, such as "2GB"."""
    steps = capacity
    if isinstance(capacity, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([MGT]i?B)\s*", capacity, re.IGNORECASE)
        if match is None:
            raise ValueError(
                f"capacity is {capacity!r}; set data.capacity to steps such as 100000 or to a size "
                f"such as '2GB' or '1.5GiB'"
            )
        steps = float(match[1]) * BYTES[match[2].upper()] / bytes_per_step
    rows = int(steps) // num_envs
    if rows < 1:
        raise ValueError(
            f"capacity {capacity} is less than one step for each of {num_envs} envs "
            f"({bytes_per_step} bytes per step); raise data.capacity"
        )
    return rows


def fit_rows(
    rows: int,
    num_envs: int,
    in_memory: int,
    on_disk: int = 0,
    folder: Path | None = None,
    own: int = 0,
    shrink: bool = False,
) -> int:
    """Return the rows per stream after checking that memory and disk are large enough for them.

    The processes of a run on this machine share both. Each of several jobs of a sweep at a time
    (WORLDLOOM_JOBS) may use its share of all memory, since others may not have used theirs yet.

    in_memory, on_disk: bytes per step; folder: of the files; own: bytes of this run's files in the
    folder, which count as free; shrink: if the rows do not fit, return the number that does.

    Raises:
        ValueError: memory or disk are too small, and `shrink` is false or no row fits.
    """
    sharers = int(os.environ.get("LOCAL_WORLD_SIZE", 1))
    jobs = int(os.environ.get("WORLDLOOM_JOBS", 1))
    each = f" for each of {sharers} processes" if sharers > 1 else ""
    share = total_memory() // jobs if jobs > 1 else math.inf
    memory = min(available_memory(), share) // sharers
    of_jobs = f", shared by {jobs} jobs" if jobs > 1 else ""
    room = [(in_memory, memory, f"the machine has {{:.1f}} GB available{each}{of_jobs}")]
    if folder is not None and on_disk:
        free = f"the disk of {folder} has {{:.1f}} GB free{each}"
        room.append((on_disk, (free_disk(folder) + own) // sharers, free))
    fit, problem = rows, ""
    for size, free_bytes, where in room:
        if num_envs * rows * size > FILL * free_bytes:
            most = int(FILL * free_bytes / size) // num_envs
            if most < fit:
                fit = most
                problem = (
                    f"a replay of {rows * num_envs} steps needs {rows * num_envs * size / 1e9:.1f} "
                    f"GB ({size} bytes per step) but {where.format(free_bytes / 1e9)}"
                )
    if problem and not (shrink and fit):
        raise ValueError(f"{problem}; lower data.capacity, for example to {fit * num_envs}")
    if problem:
        log.warning("%s; the replay keeps the newest %d steps instead", problem, fit * num_envs)
    return fit


def describe_resources(
    steps: int,
    bytes_in_memory: int,
    bytes_on_disk: int = 0,
    folder: Path | None = None,
    own: int = 0,
) -> str:
    """Return one line with the memory and disk that a replay needs and that are available.

    bytes_in_memory, bytes_on_disk: per step; own: bytes of this run's files in the folder, which
    count as free.
    """
    needs = []
    if folder is not None and bytes_on_disk:
        needs.append((bytes_on_disk, "on disk", f"{format_bytes(free_disk(folder) + own)} free"))
    needs.append((bytes_in_memory, "in memory", f"{format_bytes(available_memory())} available"))
    parts = [
        f"{size:,} bytes = {format_bytes(steps * size)} {where} ({there})"
        for size, where, there in needs
    ]
    return f"replay: {steps:,} steps x " + ", x ".join(parts)


def free_disk(folder: Path) -> int:
    """Return the free bytes on the disk of a folder, which need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free
