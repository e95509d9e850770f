"""Devices on which a model can be placed, with one-line errors for those that are missing."""

import re
from pathlib import Path

import torch

from worldloom.errors import suggest

# Features with which a processor multiplies bfloat16, as Linux names them: on x86, and on ARM.
BFLOAT16 = ("amx_bf16", "avx512_bf16", "bf16")
KINDS = ("cpu", "cuda", "mps", "xpu")


def require_device(device: str | torch.device) -> torch.device:
    """Return a device on which tensors can be created.

    Raises:
        ValueError: the device is misspelt or not available; the message lists those that are.
    """
    fix = f"expected one of {', '.join(usable_devices())}"
    try:
        found = torch.device(device)
    except RuntimeError:
        near = " (did you mean 'cuda'?)" if "gpu" in str(device) else suggest(str(device), KINDS)
        raise ValueError(f"device is {str(device)!r}{near}; {fix}") from None
    try:
        torch.empty(0, device=found)
    except Exception as error:  # AssertionError, RuntimeError, ...: each backend has its own
        reason = why_no_gpu() or " ".join(str(error).split(". ")[0].split())
        raise ValueError(f"device {str(device)!r} is not available: {reason}; {fix}") from None
    return found


def usable_devices() -> list[str]:
    """Return the names of all devices of this machine that torch can use."""
    names = ["cpu"]
    if torch.cuda.is_available():
        names += [f"cuda:{index}" for index in range(torch.cuda.device_count())]
    if torch.backends.mps.is_available():
        names.append("mps")
    if torch.xpu.is_available():
        names += [f"xpu:{index}" for index in range(torch.xpu.device_count())]
    return names


def bfloat16_features() -> list[str]:
    """Return the features with which this processor multiplies bfloat16, such as "avx512_bf16".

    The list is empty where torch has no bfloat16 kernels of oneDNN, without which products are
    converted to float32, and on systems other than Linux: the processors of Intel Macs lack such
    features, and torch has no oneDNN for other Macs. Containers see the features of their host.
    """
    try:
        supported = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    except (AttributeError, RuntimeError):
        return []
    has = processor_field("flags|Features").split() if supported else []
    return [feature for feature in BFLOAT16 if feature in has]


def processor_field(name: str) -> str:
    """Return a field of the processor as Linux lists it, such as "vendor_id"; "" if there is none.

    name: regular expression.
    """
    try:
        text = Path("/proc/cpuinfo").read_text()
    except OSError:  # not Linux
        return ""
    found = re.search(rf"^(?:{name})\s*:(.*)$", text, re.MULTILINE)
    return found[1].strip() if found else ""


def why_no_gpu() -> str:
    """Return why torch finds no GPU and how to change that; "" if it finds one."""
    if len(usable_devices()) > 1:
        return ""
    if torch.version.cuda is None and torch.version.hip is None:
        return (
            f"torch {torch.__version__} is a build without GPU support; to use a GPU, install "
            "another build (https://pytorch.org/get-started)"
        )
    return "torch finds no GPU; check the driver with nvidia-smi, and CUDA_VISIBLE_DEVICES"


def require_accelerator(accelerator: str, devices: object) -> None:
    """Raise ValueError if this machine lacks the devices that Lightning's arguments ask for.

    devices: number or list of GPUs, or "auto" or -1 for all.
    """
    backends = {"gpu": ("cuda", "mps"), "cuda": ("cuda",), "mps": ("mps",)}
    names = (*backends, "cpu", "auto", "tpu")
    if accelerator not in names:
        near = suggest(accelerator, names)
        raise ValueError(
            f"trainer.accelerator is {accelerator!r}{near}; expected one of {', '.join(names)}"
        )
    if accelerator not in backends:
        return
    found = [name for name in usable_devices() if name.split(":")[0] in backends[accelerator]]
    if not found:
        reason = why_no_gpu() or f"this machine has {', '.join(usable_devices())}"
        raise ValueError(
            f"trainer.accelerator is {accelerator}, but {reason}; use trainer=cpu, or for several "
            "processes trainer.accelerator=cpu trainer.devices=2"
        )
    indices = devices if isinstance(devices, list | tuple) else []
    count = int(devices) if isinstance(devices, int | str) and str(devices).isdigit() else 0
    if count > len(found) or any(int(index) >= len(found) for index in indices):
        raise ValueError(
            f"trainer.devices is {devices}, but this machine has {len(found)}: {', '.join(found)}"
        )
