"""Floating-point precisions in which a world model can be trained."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "bf16-true", "64-true", "64")


def require_precision(precision: Any) -> None:
    """Raise ValueError for float16 and for unknown precisions; None means float32."""
    given = "32-true" if precision is None else str(precision)
    if given in ("16", "16-mixed", "16-true"):
        raise ValueError(
            f"trainer.precision is {given}, which is float16: losses and gradients of world models "
            "overflow above 65504 and vanish below 6e-8; use trainer.precision=bf16-mixed, which "
            "has the range of float32, or trainer.precision=32-true"
        )
    if given not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {given}; expected one of {', '.join(PRECISIONS)} (float32: "
            "32-true; mixed bfloat16: bf16-mixed)"
        )


def computing_in(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Return the context in which Lightning computes a loss in this precision."""
    if precision == "bf16-mixed":
        return torch.autocast(device.type, torch.bfloat16)
    if dtype := parameter_type(precision):
        return _default_type(dtype)
    return nullcontext()


def parameter_type(precision: str) -> torch.dtype | None:
    """Return the dtype of all weights in this precision, or None if weights keep their dtype."""
    return {"bf16-true": torch.bfloat16, "64-true": torch.float64}.get(precision)


@contextmanager
def _default_type(dtype: torch.dtype) -> Iterator[None]:
    before = torch.get_default_dtype()
    torch.set_default_dtype(dtype)
    try:
        yield
    finally:
        torch.set_default_dtype(before)
