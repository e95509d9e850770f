"""How many rows a replay may hold, and whether the machine has the memory for them."""

import math
import os
import re
from pathlib import Path

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


def require_memory(steps: int, bytes_per_step: int) -> None:
    """Refuse a replay that is larger than the memory which is left."""
    needed, available = steps * bytes_per_step, available_memory()
    if needed > available:
        raise ValueError(
            f"a replay of {steps} steps needs {needed / 1e9:.1f} GB ({bytes_per_step} bytes per "
            f"step) but the machine has {available / 1e9:.1f} GB available; lower data.capacity, "
            f"for example to {int(0.8 * available / bytes_per_step)}"
        )


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
