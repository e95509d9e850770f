"""Read the recorded numbers of the official implementations, and compare with them.

The data's own README (shared/reference/README.md) defines the format. A folder is named by its path
below `ROOT`, such as dreamerv3/vec_cont; what is special to a family stands in its own module.
"""

import fnmatch
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from tests.reference.report import COMPARED, FOLDER, LEFT_OUT, MISSING, NOISE
from worldloom.training.compile import compile_networks

HERE = Path(__file__).resolve().parent
ROOT = Path(os.environ.get("WORLDLOOM_REFERENCE") or HERE / "data")
# Device to test: experiments/gpu runs these tests with WORLDLOOM_DEVICE=cuda.
DEVICE = torch.device(os.environ.get("WORLDLOOM_DEVICE") or "cpu")
if DEVICE.type != "cpu":
    torch.set_default_device(DEVICE)
    torch.backends.cudnn.allow_tf32 = False
# WORLDLOOM_COMPILE=1 tests compiled networks.
COMPILED = bool(os.environ.get("WORLDLOOM_COMPILE"))
DTYPES = {"float64": torch.float64, "float32": torch.float32}

# The README's table: the allowed deviation max|a - b| / max|b| of one array.
TOLERANCES = {
    "forward": {"float64": 1e-9, "float32": 1e-5},
    "planning": {"float64": 1e-9, "float32": 2e-4},  # small differences feed back
    "logprob": {"float64": 1e-9, "float32": 5e-3},  # log(1 - a^2 + 1e-6) loses digits near +-1
    "gradient": {"float64": 1e-9, "float32": 1e-4},
    "update": {"float64": 1e-9, "float32": 3e-3},  # of the representation losses
    "state": {"float64": 1e-6, "float32": 3e-3},  # all that follows an optimiser step
    "logprob after a step": {"float64": 1e-6, "float32": 5e-3},
    "moment": {"float64": 1e-6, "float32": 5e-2},
    "float32 mean": {"float64": 1e-6, "float32": 1e-5},  # of the official code, in both
}
# Of image encoders: where two pixels that max pooling compares are equal up to rounding, the
# processor decides which of them gets the gradient. On one without AVX-512 that is one of 110,592
# squares of dreamerv3/image, whose pixels differ by 1e-8 of the largest value.
POOLED = {"gradient": 5e-3, "moment": 1e-1}
ZERO_GRADIENT = 1e-7  # allowed, absolutely, of a gradient that is zero in exact arithmetic

FOLDER[str(ROOT)] = None


# Files -------------------------------------------------------------------------------------------


def agent_folders(family: str) -> list[str]:
    """Name the folders of a family that hold an agent, whatever they are called."""
    configs = (ROOT / family).glob("*/config.json")
    return sorted(
        f"{family}/{f.parent.name}" for f in configs if (f.parent / "params.npz").is_file()
    )


def load(*parts: str) -> dict[str, np.ndarray]:
    """Return all arrays of a file of the reference, or skip the test if there is no such file."""
    path = ROOT.joinpath(*parts)
    if not path.is_file():
        MISSING["/".join(parts)] = None
        pytest.skip(f"{path} is not there")
    with np.load(path, allow_pickle=False) as file:
        return {name: file[name] for name in file.files}


class UnsupportedOption(ValueError):
    """The reference uses an option of the official code that worldloom does not have."""


@dataclass
class Recording:
    """One file in one precision: inputs and noise by name, and the outputs to be reproduced."""

    folder: str
    file: str
    precision: str

    def __post_init__(self) -> None:
        arrays = load(self.folder, self.file)
        self.arrays = {k: v for k, v in arrays.items() if not k.startswith("out/")}
        # In double there are only outputs; the inputs are the float32 values, widened.
        source = arrays if self.precision == "float32" else load(self.folder, "f64", self.file)
        self.outputs = {k[4:]: v for k, v in source.items() if k.startswith("out/")}

    @property
    def dtype(self) -> torch.dtype:
        return DTYPES[self.precision]

    def group(self, prefix: str) -> dict[str, np.ndarray]:
        """Return the inputs below a prefix."""
        return below(self.arrays, prefix)

    def compare(
        self,
        ours: Mapping[str, Tensor | float],
        kind: Callable[[str], str],
        zero: Callable[[str], bool] = lambda name: False,
        left_out: Mapping[str, str] | None = None,
        at_least: int = 1,
        noise: Mapping[str, "Noise"] | None = None,
    ) -> None:
        """Fail unless every output of the file is among ours and agrees.

        kind(name) is a row of TOLERANCES; zero(name) marks arrays that are compared absolutely;
        left_out {pattern: reason} documents what is not compared; noise: see `Noise`.
        """
        title = f"{self.folder}/{self.file} {self.precision}"
        compare(title, self.outputs, ours, self.precision, kind, zero, left_out, at_least, noise)

    def noise_floor(self, name: str) -> float:
        """Return how much float32 rounding alone changes an array of the official code."""
        path = (ROOT / self.folder).with_name("noise_floor.json")
        floors = json.loads(path.read_text()) if path.is_file() else {}
        entry = floors.get(f"{Path(self.folder).name}/{self.file}", {}).get(name)
        return entry[1] if entry else 0.0


@dataclass
class Noise:
    """Elements of an array that float32 does not determine; the float64 test decides them.

    mask: where a gradient was below the rounding noise of the official code. A normalising
    optimiser divides such a gradient by its own size, so its rounding error becomes a step of up
    to one learning rate. At most one element of an array may deviate for this reason, by at most
    `limit`.
    """

    mask: np.ndarray
    limit: float

    def explains(self, ours: Tensor | float, theirs: np.ndarray, allowed: float) -> bool:
        """Return whether all but one element agree, and that one is noise within the limit."""
        error = np.abs(
            torch.as_tensor(ours).detach().cpu().double().numpy() - theirs.astype(np.float64)
        )
        worst = np.unravel_index(error.argmax(), error.shape)
        others = np.delete(error.ravel(), error.argmax())
        small = others.max(initial=0.0) <= allowed * np.abs(theirs).max()
        return bool(small and self.mask[worst] and error[worst] <= self.limit)


def below(arrays: Mapping[str, Any], prefix: str) -> dict[str, Any]:
    """Return the entries whose name starts with prefix/, without it."""
    return {k[len(prefix) + 1 :]: v for k, v in arrays.items() if k.startswith(prefix + "/")}


def tensor(value: np.ndarray, dtype: torch.dtype) -> Tensor:
    """Copy an array; floats become dtype, everything else keeps its type."""
    result = array(np.array(value))
    return result.to(dtype) if result.is_floating_point() else result


def array(value: np.ndarray) -> Tensor:
    """Return an array as a tensor on the tested device."""
    return torch.from_numpy(value).to(DEVICE)


def prepare(model: nn.Module, precision: str) -> Any:
    """Move a model to the tested device and precision, and compile its networks if asked to."""
    model.to(DEVICE, DTYPES[precision])
    if COMPILED:
        torch._dynamo.reset()
        compile_networks(model)
    return model


# Comparison --------------------------------------------------------------------------------------


def compare(
    title: str,
    recorded: Mapping[str, np.ndarray],
    ours: Mapping[str, Tensor | float],
    precision: str,
    kind: Callable[[str], str],
    zero: Callable[[str], bool] = lambda name: False,
    left_out: Mapping[str, str] | None = None,
    at_least: int = 1,
    noise: Mapping[str, Noise] | None = None,
) -> None:
    """Fail unless every recorded array is among ours and agrees; see `Recording.compare`."""
    problems = []
    noise = noise or {}
    skipped = []
    for name, theirs in recorded.items():
        if name not in ours:
            if any(fnmatch.fnmatchcase(name, pattern) for pattern in left_out or {}):
                skipped.append(name)
            else:
                problems.append(f"{name}: nothing of ours is compared with it")
            continue
        limit = ZERO_GRADIENT if zero(name) else TOLERANCES[kind(name)][precision]
        if precision == "float32" and "enc/cnn" in name:
            limit = max(limit, POOLED.get(kind(name), limit))
        error = deviation(ours[name], theirs, absolute=zero(name))
        if not error <= limit and name in noise and noise[name].explains(ours[name], theirs, limit):
            NOISE.setdefault(title, []).append(f"{name} ({error:.2e})")
        elif not error <= limit:
            problems.append(f"{name}: deviates by {error:.2e}, allowed {limit:.0e}")
    count = len(recorded) - len(skipped)
    COMPARED[title] = count
    if skipped:
        LEFT_OUT[title] = skipped
    assert count >= at_least, f"{title} holds only {count} arrays to compare"
    shown = problems[:30] + ["..."] * (len(problems) > 30)
    assert not problems, f"{title}: {len(problems)} of {len(recorded)}\n" + "\n".join(shown)


def deviation(ours: Tensor | float, theirs: np.ndarray, absolute: bool = False) -> float:
    """Return max|a - b| / max|b|, or infinity for another shape or NaN."""
    a = torch.as_tensor(ours).detach().cpu().double().numpy()
    b = np.asarray(theirs, np.float64)
    if a.shape != b.shape:
        return float("inf")
    if not b.size:
        return 0.0
    worst = np.abs(a - b).max()
    # An array of zeros has no scale: it must be met exactly.
    size = 1.0 if absolute else np.abs(b).max()
    if worst == 0:
        return 0.0
    return float(worst / size) if size and np.isfinite(worst) else float("inf")


def norm(tensors: Mapping[str, Tensor]) -> Tensor:
    """Return the global norm of several tensors."""
    return torch.stack([t.double().square().sum() for t in tensors.values()]).sum().sqrt()
