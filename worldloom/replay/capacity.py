"""How many rows a replay may hold, and whether the machine has the memory and disk for them."""

import logging
import math
import os
import re
import shutil
from pathlib import Path

log = logging.getLogger(__name__)

FILL = 0.9  # how much of the free memory or disk a replay may take
BYTES = {"MB": 10**6, "GB": 10**9, "TB": 10**12, "MIB": 2**20, "GIB": 2**30, "TIB": 2**40}

# Where a container finds its memory: limit, use, statistics and, in those, the cache of files that
# the system drops as soon as memory is wanted. Control groups of version 2, then of version 1.
CGROUPS = Path("/sys/fs/cgroup")
CGROUP_FILES = (
    ("memory.max", "memory.current", "memory.stat", "inactive_file"),
    (
        "memory/memory.limit_in_bytes",
        "memory/memory.usage_in_bytes",
        "memory/memory.stat",
        "total_inactive_file",
    ),
)


def rows_per_stream(capacity: int | float | str, bytes_per_step: int, num_envs: int) -> int:
    """Return the rows of each of `num_envs` streams for a capacity in steps or in memory."""
    steps = capacity
    if isinstance(capacity, str):
        match = re.fullmatch(r"\s*(\d+\.?\d*)\s*([MGT]i?B)\s*", capacity, re.IGNORECASE)
        if match is None:
            raise ValueError(
                f"capacity is {capacity!r}; set data.capacity to steps such as 100000 or to memory "
                f"such as '2GB' or '1.5GiB'"
            )
        steps = float(match[1]) * BYTES[match[2].upper()] / bytes_per_step
    rows = int(steps) // num_envs
    if rows < 1:
        raise ValueError(
            f"capacity {capacity} holds no step for each of {num_envs} envs ({bytes_per_step} "
            f"bytes per step); raise data.capacity"
        )
    return rows


def fitting_rows(
    rows: int,
    num_envs: int,
    in_memory: int,
    on_disk: int = 0,
    folder: Path | None = None,
    own: int = 0,
    shrink: bool = False,
) -> int:
    """Return the rows of each stream, if memory and disk have room for them.

    in_memory, on_disk: bytes per step; folder: where those on disk go; own: bytes that lie there
    already and count as free, because they are this run's; shrink: return as many rows as fit,
    where those asked for do not.

    Raises:
        ValueError: there is no room, and `shrink` is false or would leave nothing.
    """
    room = [(in_memory, available_memory(), "the machine has {:.1f} GB available")]
    if folder is not None and on_disk:
        free = f"the disk of {folder} has {{:.1f}} GB free"
        room.append((on_disk, free_disk(folder) + own, free))
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
        log.warning("%s; it keeps the newest %d steps instead", problem, fit * num_envs)
    return fit


def resources(
    steps: int,
    bytes_in_memory: int,
    bytes_on_disk: int = 0,
    folder: Path | None = None,
    own: int = 0,
) -> str:
    """Return one line on what a replay will need beside what there is, given bytes per step.

    own: bytes in the folder that are this run's already, which count as free.
    """
    needs = []
    if folder is not None and bytes_on_disk:
        needs.append((bytes_on_disk, "on disk", f"{gigabytes(free_disk(folder) + own)} free"))
    needs.append((bytes_in_memory, "in memory", f"{gigabytes(available_memory())} available"))
    parts = [
        f"{size:,} bytes = {gigabytes(steps * size)} {where} ({there})"
        for size, where, there in needs
    ]
    return f"replay: {steps:,} steps x " + ", x ".join(parts)


def gigabytes(size: float) -> str:
    """Return bytes as text with a unit that suits them."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def free_disk(folder: Path) -> int:
    """Return the bytes that may still be written to a folder, which need not exist yet."""
    there = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(there).free


def available_memory() -> int:
    """Return the bytes that programs can still get without swapping, within a container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        machine = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(machine, _container_memory()))


def _container_memory() -> float:
    """Bytes left below the limit of this control group; infinite where there is none."""
    for *names, cache in CGROUP_FILES:
        try:
            limit, used, stat = ((CGROUPS / name).read_text() for name in names)
        except OSError:
            continue  # the other version, or no control groups at all
        found = re.search(rf"^{cache} (\d+)", stat, re.MULTILINE)
        return float(limit.replace("max", "inf")) - int(used) + int(found[1] if found else 0)
    return math.inf
