"""Freed tensor memory: kept where asked, and nothing of the process changed by library calls."""

import ctypes
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

# Builds, saves and loads models, or keeps freed memory; prints the MB that a block of 64 MB takes
# outside malloc's heap. glibc's own thresholds never exceed 32 MB, so that is 64 MB by default.
LIBRARY = """
import ctypes, logging, os, sys, tempfile, warnings
import numpy, torch, worldloom, worldloom.factory, worldloom.memory

def settings():
    names = [None, *logging.root.manager.loggerDict]
    loggers = {name: logging.getLogger(name) for name in names}
    return {
        "environment": dict(os.environ),
        "logging": {name: (x.level, x.handlers[:]) for name, x in loggers.items()
                    if x.level or x.handlers},
        "warnings": warnings.filters[:],
        "threads": (torch.get_num_threads(), torch.get_num_interop_threads()),
        "defaults": (torch.get_default_dtype(), torch.get_default_device()),
        "gradients": (torch.is_grad_enabled(), torch.is_anomaly_enabled()),
        "precision": torch.get_float32_matmul_precision(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "numpy": numpy.geterr(),
    }

class MallInfo(ctypes.Structure):
    names = "arena ordblks smblks hblks hblkhd usmblks fsmblks uordblks fordblks keepcost"
    _fields_ = [(name, ctypes.c_size_t) for name in names.split()]

def mapped():
    call = ctypes.CDLL(None).mallinfo2
    call.restype = MallInfo
    return call().hblkhd / 2**20

before = settings()
if "keep" in sys.argv:
    worldloom.memory.keep_freed_memory()
else:
    for name, sizes in (
        ("dreamer", dict(units=8, depth=2, deter=8, hidden=8)),
        ("tdmpc", dict(enc_dim=8, mlp_dim=8, latent_dim=16, num_channels=1)),
    ):
        model = worldloom.create_world_model(name, (4,), 2, **sizes)
        with tempfile.TemporaryDirectory() as folder:
            model.save_pretrained(folder)
            worldloom.create_world_model(folder)
    worldloom.list_models()
after = settings()
changed = {key: (old, after[key]) for key, old in before.items() if old != after[key]}
assert not changed, changed
start = mapped()
block = torch.ones(1 << 24)
print(round(mapped() - start))
"""


def output(program, *args, **environment):
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, capture_output=True, text=True, env=environment)
    assert not done.returncode, done.stderr
    return int(done.stdout)


def test_freed_memory_is_used_again():
    assert output(PROGRAM, "keep") < 1000


def test_the_user_has_the_last_word():
    assert output(PROGRAM, "keep", MALLOC_TRIM_THRESHOLD_="131072") > 20_000


@pytest.mark.skipif(
    not hasattr(ctypes.CDLL(None), "mallinfo2"), reason="glibc before 2.33 does not count"
)
def test_library_calls_change_no_setting_of_the_process():
    assert output(LIBRARY) == 64
    assert output(LIBRARY, "keep") == 0
