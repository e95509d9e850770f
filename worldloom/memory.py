"""Memory of tensors that were freed, kept for the next ones."""

import ctypes
import os
import sys

# Numbers of glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Blocks above this size still come from the system and go back to it: a replay's arrays, say, of
# which nothing is there before it is written.
LARGEST = 1 << 28
LARGEST_BEFORE = 1 << 25  # older glibc takes no more than that


def keep_freed_memory() -> None:
    """Let this process reuse what tensors free, where glibc would return it to the system.

    Otherwise a training step on a CPU waits for the system to clear the same pages again and again:
    a tenth to a third of its time. The price is that memory which was used once stays taken until
    the process ends. Does nothing without glibc, and where the user has set MALLOC_TRIM_THRESHOLD_,
    MALLOC_MMAP_THRESHOLD_ or anything of glibc.malloc in GLIBC_TUNABLES.
    """
    if not sys.platform.startswith("linux") or "glibc.malloc" in os.getenv("GLIBC_TUNABLES", ""):
        return
    if any(f"MALLOC_{name}_THRESHOLD_" in os.environ for name in ("TRIM", "MMAP")):
        return
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    # One threshold without the other would make things worse: setting any of them ends glibc's own
    # adaptation of both.
    if mallopt and (mallopt(MMAP_THRESHOLD, LARGEST) or mallopt(MMAP_THRESHOLD, LARGEST_BEFORE)):
        mallopt(TRIM_THRESHOLD, 2**31 - 1)
