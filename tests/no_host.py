"""What a GPU would wait for: reads of its tensors, and copies between it and the host."""

import traceback

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

CREATE = ("tensor", "as_tensor", "asarray", "new_tensor")
COPY = ("to", "copy_", "type_as", "cpu", "cuda", "numpy")
# Kernels whose result has a size that the host has to learn.
SIZED = ("nonzero", "masked_select", "unique", "_unique2", "bincount", "repeat_interleave")


INDEX = ("__getitem__", "__setitem__")


class HostUse(AssertionError):
    """An operation for which a GPU would have to wait."""


class NoHost(TorchFunctionMode):
    """Run a block on meta tensors and raise HostUse where a GPU would wait for the host.

    Meta tensors have no values: `item`, `bool` and `cpu` raise by themselves; `where` names them.
    """

    def __torch_function__(self, function, types, args=(), kwargs=None):
        name, kwargs = function.__name__, kwargs or {}
        given = [x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)]
        on_device = any(x.is_meta for x in given)
        sized = name in SIZED and "output_size" not in kwargs
        if name == "repeat_interleave":  # by a number, the size is known
            sized &= isinstance(args[1], Tensor)
        if on_device and sized:
            raise HostUse(f"{name}: its result has a size that depends on values{where()}")
        if on_device and name in INDEX and any(map(is_of_host, as_tuple(args[1]))):
            raise HostUse(f"{name}: an index from the host{where()}")
        try:
            if name == "backward":
                return self.run_backward(args[0])
            result = function(*args, **kwargs)
        except HostUse:
            raise
        except (RuntimeError, NotImplementedError) as error:
            if on_device and any(word in str(error) for word in ("meta", "Meta", "data-dependent")):
                raise HostUse(f"{name}: {str(error).splitlines()[0]}{where()}") from error
            raise
        if isinstance(result, Tensor):
            source = args[1] if name == "copy_" else args[0] if args else None
            moved = isinstance(source, Tensor) and source.device != result.device
            data = args[1 if name == "new_tensor" else 0] if name in CREATE else None
            made = name in CREATE and result.is_meta and not isinstance(data, Tensor)
            if made or (name in COPY and moved):
                raise HostUse(f"{name}: a copy between the host and the device{where()}")
        return result

    def run_backward(self, loss):
        """Call torch's engine with this mode, which torch disables in its handler."""
        run = torch.autograd.Variable._execution_engine.run_backward
        with self:
            run((loss,), (torch.ones_like(loss),), False, False, (), True, True)


def as_tuple(index):
    return index if isinstance(index, tuple) else (index,)


def is_of_host(index):
    """Whether a GPU would copy a part of an index from the host."""
    return isinstance(index, list | np.ndarray) or (isinstance(index, Tensor) and not index.is_meta)


def where():
    """Return the line of the caller that is not torch's and not this file's, as text."""
    for frame in reversed(traceback.extract_stack()):
        if "/torch/" not in frame.filename and frame.filename != __file__:
            return f" ({frame.filename}:{frame.lineno}: {frame.line})"
    return ""
