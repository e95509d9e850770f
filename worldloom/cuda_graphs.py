"""Recorded functions: the kernels of a call as one CUDA graph, which is launched at once."""

import logging
import pickle
import random
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from worldloom.errors import list_names
from worldloom.protocol import LatentState

log = logging.getLogger(__name__)

WARM_UP = 3  # calls before the recording: they create state and let libraries choose kernels
TOLERANCE = 1e-3  # of a recorded result, relative to its norm; kernels may add up in any order
MOST = 8  # recorded kinds of calls of a function; each keeps its memory

# Records what a function launches on a device: returns a function that launches it again, and the
# function's result, which each launch overwrites.
Recorder = Callable[[Callable[[], Any]], tuple[Callable[[], None], Any]]


class CannotCaptureError(Exception):
    """Calls cannot be recorded; the message says why."""


def record_graph(run: Callable[[], Any]) -> tuple[Callable[[], None], Any]:
    """Record a function as a CUDA graph; see `Recorder`."""
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        result = run()
    return graph.replay, result


class CapturedFunction:
    """A function of tensors and a model's weights, whose calls are recorded by their shapes.

    Arguments and results are tensors, latent states, and dicts and tuples of them; everything else
    among the arguments must be hashable and is part of what is recorded. The function changes
    nothing, and draws random numbers on the device only. The first recorded result of each kind is
    compared with a computed one; where they differ, or nothing can be recorded, calls are computed
    as without recording and the reason is logged once.

    name: of the function, in messages. record: `record_graph`, which needs a GPU, or a test's.
    """

    def __init__(
        self, model: Any, name: str, function: Callable[..., Any], record: Recorder
    ) -> None:
        self.model, self.name, self.function, self.record = model, name, function, record
        self.reason = ""  # why nothing is recorded
        self._seen: dict[Any, int] = {}
        self._graphs: dict[Any, tuple[list[Tensor], Callable[[], None], Any]] = {}
        self._places: tuple[int, ...] = ()  # of the weights that the graphs read

    def __call__(self, *args: Any) -> Any:
        """Return what the function returns."""
        weights = list(_weights(self.model))
        on_gpu = any(x.is_cuda for x in weights)
        if self.reason or not weights or (self.record is record_graph and not on_gpu):
            return self.function(*args)
        places = tuple(x.data_ptr() for x in weights)
        if places != self._places:
            self._seen, self._graphs, self._places = {}, {}, places
        leaves: list[Tensor] = []
        structure = _flatten(args, leaves)
        kind = structure, self.model.training, *((x.shape, x.dtype, x.device) for x in leaves)
        if kind not in self._graphs:
            self._seen[kind] = self._seen.get(kind, 0) + 1
            if self._seen[kind] <= WARM_UP or len(self._graphs) == MOST:
                return self.function(*args)
            try:
                self._graphs[kind] = self._capture(args)
            except (CannotCaptureError, RuntimeError) as error:
                self.reason = (str(error).splitlines() or [type(error).__name__])[0]
                log.warning("decisions are not recorded as CUDA graphs: %s", self.reason)
                return self.function(*args)
        static, launch, result = self._graphs[kind]
        for kept, given in zip(static, leaves, strict=True):
            kept.copy_(given, non_blocking=True)
        launch()
        return _map(torch.clone, result)

    def _capture(self, args: Any) -> tuple[list[Tensor], Callable[[], None], Any]:
        """Record a call and compare its result with a computed one.

        Raises:
            CannotCaptureError: they differ.
        """
        copies = _map(torch.clone, args)
        static: list[Tensor] = []
        _flatten(copies, static)
        device = next(_weights(self.model)).device
        devices = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(devices):
            host = host_state(self.model)
            expected = self.function(*copies)
            require_device_only(self.name, host, host_state(self.model))
        with torch.random.fork_rng(devices):
            launch, result = self.record(lambda: self.function(*copies))
        with torch.random.fork_rng(devices):
            launch()
            found: list[Tensor] = []
            wanted: list[Tensor] = []
            same = _flatten(result, found) == _flatten(expected, wanted)
            if not same or not all(map(is_close, found, wanted)):
                raise CannotCaptureError(f"the recorded result of {self.name} differs")
        return static, launch, result


def host_state(model: nn.Module) -> dict[str, Any]:
    """Return what a graph of a model's function would not change, by name, as comparable values.

    These are plain attributes of its modules, the tensors that its buffers are (a graph changes
    them in place only), and the host's random states.
    """
    numbers = [pickle.dumps(np.random.get_state()), random.getstate()]
    if any(x.device.type != "cpu" for x in _weights(model)):
        numbers.append(torch.get_rng_state().numpy().tobytes())
    state: dict[str, Any] = {"the random numbers": numbers}
    for path, module in model.named_modules():
        dot = f"{path}." if path else ""
        plain = {k: v for k, v in vars(module).items() if isinstance(v, bool | int | float | str)}
        state |= {f"{dot}{name}": value for name, value in plain.items()}
    return state | {name: id(buffer) for name, buffer in model.named_buffers()}


def require_device_only(function: str, before: dict[str, Any], after: dict[str, Any]) -> None:
    """Raise CannotCaptureError if a function has changed the host's state; see `host_state`."""
    changed = [name for name in {**before, **after} if before.get(name) != after.get(name)]
    if changed:
        raise CannotCaptureError(
            f"{function} changes {list_names(changed)} on the host, which a graph does not repeat"
        )


def is_close(found: Tensor, wanted: Tensor) -> bool:
    """Return whether two results are equal up to rounding."""
    if found.shape != wanted.shape:
        return False
    off = (found.double() - wanted.double()).norm()
    return bool(off <= TOLERANCE * wanted.double().norm() + 1e-12)


def _weights(model: nn.Module) -> Any:
    yield from model.parameters()
    yield from model.buffers()


def _map(fn: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply a function to all tensors of arguments or results."""
    if isinstance(tree, Tensor):
        return fn(tree)
    if isinstance(tree, LatentState):
        return tree.map(fn)
    if isinstance(tree, Mapping):
        return {key: _map(fn, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        return tuple(_map(fn, value) for value in tree)
    return tree


def _flatten(tree: Any, leaves: list[Tensor]) -> Any:
    """Append all tensors to `leaves`; return the rest, which is hashable."""
    if isinstance(tree, Tensor):
        leaves.append(tree)
        return Tensor
    if isinstance(tree, LatentState):
        tree = ("state", *vars(tree).values())
    if isinstance(tree, Mapping):
        tree = tuple(item for pair in tree.items() for item in pair)
    if isinstance(tree, tuple):
        return tuple(_flatten(value, leaves) for value in tree)
    return tree
