"""Count environment steps and updates of a program that has this folder in its PYTHONPATH.

Python imports `sitecustomize` at its start, also in processes that a program spawns. So every
program keeps its own command line and all are measured alike: a step is a call of dm_control's
Environment.step, an update a call of Tensor.backward. A process writes its two counts, integers of
8 bytes, to a file that is named by its id, in the folder COUNTS.

r2dreamer needs two changes to run without a GPU: no float16 autocast, and no pinned memory. A third
change favours it: NO_IMAGES=1 leaves out the image that it renders in each step even if it observes
the state.
"""

import contextlib
import mmap
import os
import sys
from importlib.machinery import PathFinder
from struct import pack_into, unpack_from

STEPS, UPDATES = 0, 8  # offsets in the file
files = {}  # by process, because a fork must not continue the counts of its parent


def count(offset, function):
    """Return a function that also counts its calls."""

    def counted(*args, **kwargs):
        result, here = function(*args, **kwargs), os.getpid()
        if here not in files:
            with open(os.path.join(os.environ["COUNTS"], str(here)), "w+b") as file:
                file.write(bytes(16))
                file.flush()
                files[here] = mmap.mmap(file.fileno(), 16)
        pack_into("q", files[here], offset, unpack_from("q", files[here], offset)[0] + 1)
        return result

    return counted


def count_steps(control):
    control.Environment.step = count(STEPS, control.Environment.step)


def count_updates(tensor):
    tensor.Tensor.backward = count(UPDATES, tensor.Tensor.backward)


def compute_in_float32(dreamer):
    dreamer.autocast = lambda **_: contextlib.nullcontext()


def leave_unpinned(parallel):
    class Unpinned(parallel.TensorDict):
        def pin_memory(self, *_, **__):
            return self

    parallel.TensorDict = Unpinned


def render_nothing(dmc):
    import numpy as np

    if os.environ.get("NO_IMAGES") == "1":
        dmc.DeepMindControl.render = lambda env, *_, **__: np.zeros((*env._size, 3), np.uint8)


class AfterImport:
    """A finder that calls a function with each of certain modules after it has been imported."""

    hooks = {  # noqa: RUF012
        "dm_control.rl.control": count_steps,
        "torch._tensor": count_updates,
        "dreamer": compute_in_float32,
        "envs.parallel": leave_unpinned,
        "envs.dmc": render_nothing,
    }

    @classmethod
    def find_spec(cls, name, path=None, target=None):
        hook = cls.hooks.get(name)
        spec = PathFinder.find_spec(name, path, target) if hook else None
        if spec is not None:
            run = spec.loader.exec_module
            spec.loader.exec_module = lambda module: (run(module), hook(module))
        return spec


if "COUNTS" in os.environ:
    sys.meta_path.insert(0, AfterImport)
