"""Memory: the allocator of training on a CPU, and how much is available."""

import ctypes
import math
import os
import re
import sys
from pathlib import Path

# Parameter numbers of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Larger blocks still come from the operating system and return to it, so that for example the
# arrays of a replay take no memory before rows are written.
LARGEST = 1 << 28
LARGEST_IN_OLD_GLIBC = 1 << 25  # older versions reject larger thresholds
SMALL = 1 << 24  # bytes that are allocated without looking how many are available
# Memory of a container: limit, usage, statistics and, in these, the page cache that the system
# frees when memory is needed. For control groups of version 2, then of version 1.
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


def keep_freed_memory() -> None:
    """Keep freed tensor memory in the process instead of returning it to the operating system.

    By default glibc returns large freed blocks, and every training step on a CPU waits for the
    kernel to clear the same pages again: a tenth to a third of its time. The price is that the
    process keeps its peak memory until it ends.

    The commands run, eval, collect and bench call this function. Building, loading or using a model
    in Python does not: call it once, before training in a process of your own. It has no effect
    without glibc, or if MALLOC_TRIM_THRESHOLD_, MALLOC_MMAP_THRESHOLD_ or a glibc.malloc setting in
    GLIBC_TUNABLES is set.
    """
    if not sys.platform.startswith("linux") or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", ""):
        return
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # Setting either threshold ends glibc's automatic adjustment of both, so both are set.
    if mallopt and (
        mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_THRESHOLD, LARGEST_IN_OLD_GLIBC)
    ):
        mallopt(TRIM_THRESHOLD, 2**31 - 1)


def available_memory() -> int:
    """Return the bytes that can be allocated without swapping, within a container's limit."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        machine = next(int(x.split()[1]) * 1024 for x in lines if x.startswith("MemAvailable"))
    except (OSError, StopIteration):
        machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return max(0, int(min(machine, _container_memory(), _address_space())))


def total_memory() -> int:
    """Return the bytes of memory of the machine, or of its container."""
    machine = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    return int(min(machine, _container_memory(whole=True)))


def _container_memory(whole: bool = False) -> float:
    """Return the bytes left below the limit of this control group; infinite without a limit.

    whole: return the limit itself.
    """
    for *names, cache in CGROUP_FILES:
        try:
            limit, used, stat = ((CGROUPS / name).read_text() for name in names)
        except OSError:
            continue  # the other version, or no control groups at all
        most = float(limit.replace("max", "inf"))
        found = re.search(rf"^{cache} (\d+)", stat, re.MULTILINE)
        return most if whole else most - int(used) + int(found[1] if found else 0)
    return math.inf


def _address_space() -> float:
    """Return the bytes left below the limit of `ulimit -v`; infinite without a limit."""
    try:
        import resource

        limit = resource.getrlimit(resource.RLIMIT_AS)[0]
        used = int(Path("/proc/self/statm").read_text().split()[0])
    except (ImportError, OSError):
        return math.inf
    return math.inf if limit == resource.RLIM_INFINITY else limit - used * resource.getpagesize()


def format_bytes(size: float) -> str:
    """Format a number of bytes in GB or MB."""
    return f"{size / 1e9:.1f} GB" if size >= 1e8 else f"{size / 1e6:.1f} MB"


def require_memory(size: int, what: str) -> None:
    """Raise ValueError if something needs more bytes than are available.

    what: names the file and what in it takes the memory; the start of the message.
    """
    if size > SMALL and size > (free := available_memory()):
        raise ValueError(
            f"{what} needs {format_bytes(size)} of memory, but {format_bytes(free)} are available; "
            "use a smaller one, or a machine with more memory"
        )
