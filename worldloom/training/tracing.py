"""The first operation that makes NaN or infinity out of finite numbers."""

import math
import traceback
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode, resolve_name


class FirstOperation(TorchFunctionMode):
    """Watch every operation of torch; note the first that makes NaN or infinity of finite inputs.

    found: which it was, where in the code, in which module, and what it read; None if none was.
    """

    def __init__(self, model: nn.Module) -> None:
        super().__init__()
        self.model = model
        self.found: str | None = None
        self._inside: list[str] = []
        self._hooks: list[Any] = []

    def __enter__(self) -> "FirstOperation":
        """Begin to watch."""
        for name, module in self.model.named_modules():

            def enter(*args: Any, name: str = name) -> None:
                self._inside.append(name)

            def leave(*args: Any) -> None:
                self._inside.pop()

            self._hooks.append(module.register_forward_pre_hook(enter))
            self._hooks.append(module.register_forward_hook(leave))
        super().__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        """Cease to watch."""
        super().__exit__(*error)
        for hook in self._hooks:
            hook.remove()

    def __torch_function__(
        self, func: Any, types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        """Run an operation, and look at what it makes."""
        kwargs = kwargs or {}
        # Asked before it runs, for it may write into what it reads.
        watched = self.found is None and is_finite((args, kwargs))
        spans = _spans(args) if watched else ""
        out = func(*args, **kwargs)
        name = (resolve_name(func) or getattr(func, "__name__", str(func))).split(".")[-1]
        # Memory that nobody has written to yet may hold anything.
        if watched and "empty" not in name and not is_finite(out):
            module = f", in the module {self._inside[-1]}" if any(self._inside[-1:]) else ""
            place = _innermost(traceback.extract_stack())
            self.found = f"{name} of {spans or 'finite numbers'}{module}{place}"
        return out


def place_in(trace: str) -> str:
    """Return the innermost line of a printed traceback that is the model's own; "" if none is."""
    places = []
    lines = trace.splitlines()
    for line, code in zip(lines, [*lines[1:], ""], strict=True):
        if line.strip().startswith('File "'):
            file, number = line.split('"')[1], line.split(", line ")[1].split(",")[0]
            if not _ours_or_torchs(file):
                places.append(f"\n           made at {file}:{number}: {code.strip()}")
    return places[-1] if places else ""


def is_finite(value: Any) -> bool:
    """Tell whether all numbers in tensors, sequences and mappings are finite."""
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, float):
        return math.isfinite(value)
    if isinstance(value, Mapping):
        return all(map(is_finite, value.values()))
    if isinstance(value, (tuple, list)):
        return all(map(is_finite, value))
    return True


def _spans(args: Any) -> str:
    """Describe the tensors that an operation reads."""
    texts = []
    for value in args if isinstance(args, (tuple, list)) else ():
        if isinstance(value, Tensor) and value.numel() and not value.is_complex():
            low, high = float(value.detach().min()), float(value.detach().max())
            texts.append(f"{list(value.shape)} from {low:.4g} to {high:.4g}")
    return " and ".join(texts)


def place_of(error: BaseException) -> str:
    """Return the innermost line of the model's own that an error was raised in; "" if none is."""
    return _innermost(traceback.extract_tb(error.__traceback__))


def _innermost(frames: traceback.StackSummary) -> str:
    for frame in reversed(frames):
        if not _ours_or_torchs(frame.filename):
            return f"\n           at {frame.filename}:{frame.lineno}: {frame.line}"
    return ""


def _ours_or_torchs(file: str) -> bool:
    return file == __file__ or file.startswith(str(Path(torch.__file__).parent))
