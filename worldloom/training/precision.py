"""Floating-point precisions in which a world model can be trained."""

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch

from worldloom.devices import bfloat16_features

AUTO = "auto"  # chosen by `choose_precision`
PRECISIONS = ("32-true", "32", "bf16-mixed", "bf16", "bf16-true", "64-true", "64", AUTO)
# Size of a model from which on bf16-mixed is faster than float32 on a CPU.
LEAST_PARAMETERS = 3_000_000


def choose_precision(
    parameters: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> tuple[str, str]:
    """Return the precision of trainer.precision=auto, 32-true or bf16-mixed, and the reason.

    It depends on nothing else, and nothing is measured: the same machine and model have the same
    precision in every run.

    parameters: trained numbers of the model.
    device: on which the model is trained.
    dtype: of its weights.
    """
    if dtype != torch.float32:
        return "32-true", f"the weights are {dtype}".replace("torch.", "")
    if device.type == "cuda":
        with torch.cuda.device(device):
            native = torch.cuda.is_bf16_supported(including_emulation=False)
        name = torch.cuda.get_device_name(device)
        if not native:
            return "32-true", f"{name} does not multiply bfloat16"
        return "bf16-mixed", f"{name} multiplies bfloat16"
    if device.type != "cpu":
        return "32-true", f"bfloat16 is chosen on CUDA GPUs and CPUs, not on {device.type}"
    if not (features := bfloat16_features()):
        return "32-true", "this processor does not multiply bfloat16"
    size = f"the model has {parameters:,} parameters"
    if parameters < LEAST_PARAMETERS:
        return "32-true", f"{size}; on a CPU bf16-mixed is for {LEAST_PARAMETERS:,} and more"
    return "bf16-mixed", f"this processor multiplies bfloat16 ({', '.join(features)}), and {size}"


def split_precision(precision: Any) -> tuple[Any, str]:
    """Return what was asked for and what was chosen: ("auto", "bf16-mixed") of auto:bf16-mixed.

    The second value is "" where nothing was chosen yet, or another precision was asked for.
    """
    asked, _, chosen = str(precision).partition(":")
    return (AUTO, chosen) if asked == AUTO else (precision, "")


def require_precision(precision: Any) -> None:
    """Raise ValueError for float16 and for unknown precisions; None means float32.

    A precision that auto has chosen, as in auto:bf16-mixed, is accepted too.
    """
    asked, chosen = split_precision(precision)
    given = "32-true" if asked is None else chosen or str(asked)
    if given in ("16", "16-mixed", "16-true"):
        raise ValueError(
            f"trainer.precision is {given}, which is float16: losses and gradients of world models "
            "overflow above 65504 and vanish below 6e-8; use trainer.precision=bf16-mixed, which "
            "has the range of float32, or trainer.precision=32-true"
        )
    if given not in PRECISIONS:
        raise ValueError(
            f"trainer.precision is {given}; expected one of {', '.join(PRECISIONS)} (float32: "
            "32-true; mixed bfloat16: bf16-mixed; the faster of both for this machine: auto)"
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
