"""Allocator settings for training on a CPU."""

import ctypes
import os
import sys

# Parameter numbers of mallopt, from glibc's malloc.h.
TRIM_THRESHOLD, MMAP_THRESHOLD = -1, -3
# Larger blocks still come from the operating system and return to it, so that for example the
# arrays of a replay take no memory before rows are written.
LARGEST = 1 << 28
LARGEST_IN_OLD_GLIBC = 1 << 25  # older versions reject larger thresholds


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
