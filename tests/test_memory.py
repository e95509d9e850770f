"""What a process keeps of the memory that tensors free; counted by the kernel, in page faults."""

import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="glibc and Linux only")

# Fills and frees eight times 16 MB, round after round; prints the page faults of the last rounds.
PROGRAM = """
import resource, sys, torch
from worldloom.memory import keep_freed_memory
if "keep" in sys.argv:
    keep_freed_memory()
for rounds in range(12):
    if rounds == 8:
        before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
    kept = [torch.ones(1 << 22) for _ in range(8)]
    del kept
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""


def faults(*words, **environment):
    command = [sys.executable, "-c", PROGRAM, *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment)
    return int(done.stdout)


def test_freed_memory_is_used_again():
    assert faults("keep") < 1000


def test_the_user_has_the_last_word():
    assert faults("keep", MALLOC_TRIM_THRESHOLD_="131072") > 20_000
