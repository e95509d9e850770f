"""Collect what is wrong, in words."""

import traceback
import warnings
from pathlib import Path
from typing import Any

from torch import Tensor

from worldloom.check.trees import clone, differing, identical, layout, leaves, some
from worldloom.random_batches import RandomData

# The arguments of each method, and what it returns.
SIGNATURES: dict[str, tuple[tuple[str, ...], str]] = {
    "encode": (("obs",), "LatentState"),
    "predict": (("state", "action"), "LatentState"),
    "observe": (("state", "action", "obs"), "LatentState"),
    "decode": (("state",), "dict"),
    "imagine": (("initial_state", "actions"), "Trajectory"),
    "compute_loss": (("batch",), "dict"),
    "policy": (("state", "deterministic"), "Tensor"),
    "after_update": ((), "None"),
    "replay_values": (("state",), "dict"),
}
OPTIONAL = ("policy", "after_update", "replay_values")
KEEP_BATCH_FIRST = "keep the batch axis (after time, where there is one) and every other in place"


class ProtocolError(ValueError):
    """What breaks the WorldModel protocol; `problems` holds one string per finding."""

    def __init__(self, name: str, problems: list[str]) -> None:
        self.problems = problems
        lines = [f"  {number}. {problem}" for number, problem in enumerate(problems, 1)]
        places = f"{len(lines)} place{'s' if len(lines) > 1 else ''}"
        super().__init__("\n".join([f"{name} breaks the WorldModel protocol in {places}:", *lines]))


def signature(method: str) -> str:
    """Write a method's signature as its author would."""
    arguments, result = SIGNATURES[method]
    return f"{method}({', '.join(['self', *arguments])}) -> {result}"


class Report:
    """A model, the data it is called with, the problems that showed and remarks about the rest."""

    def __init__(self, model: Any, data: RandomData) -> None:
        self.model = model
        self.data = data
        self.problems: list[str] = []
        self.remarks: list[str] = []
        self.first_error: Exception | None = None

    def add(self, where: str, got: str, expected: str, fix: str) -> None:
        """Note a problem, once."""
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

        Reports an exception, and then returns None; and whatever was altered in its arguments.
        """
        inputs = dict(zip(SIGNATURES[method][0], args, strict=False))
        kept = clone(inputs)
        try:
            with self.data.seeded(), warnings.catch_warnings():
                warnings.simplefilter("ignore")  # a model may warn of data that are only random
                result = getattr(self.model, method)(*args, **options)
        except Exception as error:
            self.first_error = self.first_error or error
            given = some(f"{name} {layout(value)}" for name, value in leaves(kept).items())
            got = f"raised {type(error).__name__}{_place(error)}: {' '.join(str(error).split())}"
            self.add(method, got, f"{signature(method)} for {given}", "make it take these")
            return None
        altered = differing(kept, inputs, identical)
        if altered:
            fix = "work on a copy: x = x + 1 rather than x += 1"
            self.add(method, f"changed its input {some(altered)}", "inputs left alone", fix)
        return result

    def tensor(
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
        """Report all in which a value is not the tensor it should be; true if nothing.

        Args:
            where: method that returned it.
            name: what it is called there.
            value: what came back.
            shape: with None for an axis of any length.
            more: any further axes may follow.
            floating: it must have a floating dtype.
            finite: it must hold neither NaN nor infinity.
            unit: it must lie in [0, 1].
            fix: what to do about a wrong shape.
        """
        before, wanted = len(self.problems), _in_words(shape, more)
        if not isinstance(value, Tensor):
            self.add(where, f"{name} is {layout(value)}", f"a tensor {wanted}", "return a tensor")
            return False
        sizes = value.shape[: len(shape)] if more else value.shape
        if len(sizes) != len(shape) or any(
            wanted not in (None, size) for size, wanted in zip(sizes, shape, strict=True)
        ):
            self.add(where, f"{name} has shape {list(value.shape)}", wanted, fix)
        if value.device != self.data.device:
            fix = "make what it comes from a parameter or buffer, or create it on obs.device"
            self.add(where, f"{name} is on {value.device}", f"{self.data.device}", fix)
        elif floating and not value.is_floating_point():
            self.add(
                where, f"{name} is {value.dtype}", "a floating dtype", "convert it by .float()"
            )
        elif finite and not value.isfinite().all():
            fix = "look for a division by zero, or the log or root of something not positive"
            self.add(where, f"{name} holds NaN or infinity", "finite numbers", fix)
        elif unit and not ((value >= 0) & (value <= 1)).all():
            low, high = value.min().item(), value.max().item()
            got = f"{name} reaches from {low:.3g} to {high:.3g}"
            self.add(where, got, "probabilities in [0, 1]", "put a sigmoid on its logits")
        return len(self.problems) == before


def _in_words(shape: tuple[int | None, ...], more: bool) -> str:
    sizes = ["n" if size is None else str(size) for size in shape] + ["..."] * more
    return f"[{', '.join(sizes)}]" if sizes else "[] (a scalar)"


def _place(error: Exception) -> str:
    """Say in which line of the model's code an exception began, leaving out torch's own."""
    frames = traceback.extract_tb(error.__traceback__)[1:]
    own = [frame for frame in frames if "site-packages" not in frame.filename]
    return f" in {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
