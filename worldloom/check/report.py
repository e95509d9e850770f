"""The findings of a check, and the comparisons of tensors that lead to them."""

import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from worldloom.errors import list_names
from worldloom.protocol import SIGNATURES, LatentState, format_signature
from worldloom.random_batches import RandomData
from worldloom.trees import flatten_tree, map_tree

KEEP_BATCH_FIRST = "keep the batch axis (after time, where there is one) and every other in place"


class ProtocolError(ValueError):
    """A model breaks the WorldModel protocol; `problems` has one string per finding."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.problems = problems
        lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        places = f"{len(lines)} place{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{name} breaks the WorldModel protocol in {places}:", *lines]))


class Report:
    """A model, the data it is called with, its problems, and remarks, which are only warnings."""

    def __init__(self, model: Any, data: RandomData) -> None:
        self.model = model
        self.data = data
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.first_error: Exception | None = None

    def add(self, where: str, got: str, expected: str, fix: str) -> None:
        """Record a problem, once."""
        text = f"{where}: {got}; expected {expected}. Fix: {fix}"
        if text not in self.problems:
            self.problems.append(text)

    def finish(self) -> None:
        """Raise the problems, with the first exception as their cause; else warn of remarks."""
        name = type(self.model).__name__
        if self.problems:
            raise ProtocolError(name, self.problems) from self.first_error
        for remark in self.remarks:
            warnings.warn(f"{name}: {remark}", stacklevel=3)

    def call(self, method: str, *args: Any, **options: Any) -> Any:
        """Call a method, always under the same torch seed, and return its result.

        An exception is reported, and the result is then None. Arguments that the method has
        modified are reported too.
        """
        inputs = dict(zip(SIGNATURES[method][0], args, strict=False))
        before = copy_tensors(inputs)
        try:
            with self.data.seeded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a model may warn because the data are random
                result = getattr(self.model, method)(*args, **options)
        except Exception as error:
            self.first_error = self.first_error or error
            given = list_names(f"{k} {describe(v)}" for k, v in name_leaves(before).items())
            got = f"raised {type(error).__name__}{_place(error)}: {' '.join(str(error).split())}"
            expected = f"{format_signature(method)} for {given}"
            self.add(method, got, expected, "accept these arguments")
            return None
        if altered := find_differences(before, inputs, are_identical):
            fix = "work on a copy: x = x + 1 rather than x += 1"
            got = f"changed its input {list_names(altered)}"
            self.add(method, got, "unchanged inputs", fix)
        return result

    def require_tensor(
        self,
        where: str,
        name: str,
        value: Any,
        shape: tuple[int | None, ...],
        *,
        more: bool = False,
        floating: bool = True,
        finite: bool = True,
        unit: bool = False,
        fix: str = KEEP_BATCH_FIRST,
    ) -> bool:
        """Report every way in which a value differs from the expected tensor; return if it is fine.

        Args:
            where: method that returned the value.
            name: name of the value in its result.
            value: the value.
            shape: expected shape, with None for an axis of any length.
            more: whether further axes may follow.
            floating: whether the dtype must be floating-point.
            finite: whether NaN and infinity are problems.
            unit: whether all values must be in [0, 1].
            fix: advice for a wrong shape.
        """
        before, expected = len(self.problems), _format_shape(shape, more)
        if not isinstance(value, Tensor):
            got = f"{name} is {describe(value)}"
            self.add(where, got, f"a tensor {expected}", "return a tensor")
            return False
        sizes = value.shape[: len(shape)] if more else value.shape
        if len(sizes) != len(shape) or any(
            wanted not in (None, size) for size, wanted in zip(sizes, shape, strict=True)
        ):
            self.add(where, f"{name} has shape {list(value.shape)}", expected, fix)
        if value.device != self.data.device:
            fix = "make its source a parameter or buffer, or create it on obs.device"
            self.add(where, f"{name} is on {value.device}", f"{self.data.device}", fix)
        elif floating and not value.is_floating_point():
            got = f"{name} is {value.dtype}"
            self.add(where, got, "a floating dtype", "convert it with .float()")
        elif finite and not value.isfinite().all():
            fix = "look for a division by zero, or the log or root of a number that is not positive"
            self.add(where, f"{name} contains NaN or infinity", "finite numbers", fix)
        elif unit and not ((value >= 0) & (value <= 1)).all():
            low, high = value.min().item(), value.max().item()
            got = f"{name} ranges from {low:.3g} to {high:.3g}"
            self.add(where, got, "probabilities in [0, 1]", "apply a sigmoid to its logits")
        return len(self.problems) == before


def name_leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """Flatten nested dicts and latent states into {"name.key.key": leaf}; None has no leaves."""
    leaves = flatten_tree(_as_dicts(tree), ".", prefix=name)
    return {key: leaf for key, leaf in leaves.items() if leaf is not None}


def copy_tensors(tree: Any) -> Any:
    """Copy every tensor of nested dicts and latent states."""

    def copy(leaf: Any) -> Any:
        if isinstance(leaf, LatentState):
            return leaf.map(torch.Tensor.clone)
        return leaf.clone() if isinstance(leaf, Tensor) else leaf

    return map_tree(copy, tree)


def find_differences(one: Any, other: Any, same: Callable[[Any, Any], bool]) -> list[str]:
    """Return the names of the leaves that only one tree has, or that are not `same` in both."""
    a, b = name_leaves(one), name_leaves(other)
    missing = a.keys() ^ b.keys()
    return sorted(missing | {name for name in a.keys() & b.keys() if not same(a[name], b[name])})


def are_identical(a: Any, b: Any) -> bool:
    """Return whether two leaves have the same dtype, shape and values; NaN equals NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return describe(a) == describe(b) and torch.equal(a.nan_to_num(), b.nan_to_num())


def are_close(a: Tensor, b: Tensor) -> bool:
    """Return whether two tensors differ only by rounding."""
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)


def describe(value: Any) -> str:
    """Return dtype and shape of a tensor, or the type of another value."""
    if not isinstance(value, Tensor):
        name = type(value).__name__
        return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def _as_dicts(tree: Any) -> Any:
    if isinstance(tree, LatentState):
        return vars(tree)
    return {k: _as_dicts(v) for k, v in tree.items()} if isinstance(tree, dict) else tree


def _format_shape(shape: tuple[int | None, ...], more: bool) -> str:
    sizes = ["n" if size is None else str(size) for size in shape] + ["..."] * more
    return f"[{', '.join(sizes)}]" if sizes else "[] (a scalar)"


def _place(error: Exception) -> str:
    """Return the line of the model's code in which an exception occurred, leaving out torch's."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" in {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
