"""Weights in bfloat16 for mixed precision on a CPU, each cast once.

Autocast casts a weight again at each use if it is frozen or a slice of a parameter.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor

from worldloom.nn.products import is_tracing

# Weight and its cast, by address and shape of the weight.
_casts: ContextVar[dict[Any, tuple[Tensor, Tensor]] | None] = ContextVar("casts", default=None)


def is_mixed_on_cpu(x: Tensor) -> bool:
    """Return True if products with x are computed in bfloat16 on a CPU, and nothing is traced.

    torch's own autocast serves GPUs, torch.compile and torch.func, and leaves float64 alone.
    """
    if x.device.type != "cpu" or not torch.is_autocast_enabled("cpu") or x.dtype == torch.float64:
        return False
    return torch.get_autocast_dtype("cpu") == torch.bfloat16 and not is_tracing()


@contextmanager
def cast_once() -> Iterator[None]:
    """Keep the results of `cast` in a block, in which weights may not change."""
    if is_tracing() or _casts.get() is not None:
        yield
        return
    token = _casts.set({})
    try:
        yield
    finally:
        _casts.reset(token)


def cast(weight: Tensor) -> Tensor:
    """Return a float32 weight in bfloat16; other dtypes unchanged.

    Inside `cast_once` each weight is cast once, whether the first use needs its gradient or not.
    """
    if weight.dtype != torch.float32:
        return weight
    kept = _casts.get()
    if kept is None:
        return weight.bfloat16()
    key = weight.data_ptr(), weight.shape
    if key not in kept or (weight.requires_grad and not kept[key][1].requires_grad):
        with torch.enable_grad():
            kept[key] = weight, weight.bfloat16()
    found = kept[key][1]
    return found if weight.requires_grad else found.detach()
