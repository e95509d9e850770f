"""Updates as CUDA graphs: the kernels of an update are recorded once and then launched together.

An update has two graphs, one for the loss and its gradients, one for the optimiser's step. What the
host does between them stays as it is: it reads whether loss and gradients are finite, clips them if
Lightning has to, and calls callbacks. A rejected update therefore changes nothing, as without
graphs, and the host waits for the device once in an update.

A graph repeats kernels, not Python. What the host does in `compute_loss` would be missing from it,
so a model whose loss depends on that is recognised and trained without graphs; one update is
computed both ways, and the results must agree.
"""

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from worldloom.cuda_graphs import (
    WARM_UP,
    CannotCaptureError,
    Recorder,
    host_state,
    is_close,
    record_graph,
    require_device_only,
)
from worldloom.trees import flatten_tree, map_tree

log = logging.getLogger(__name__)

KEYS, MODES = ("capture", "compile"), ("auto", "on", "off")  # of trainer
Gradients = list[tuple[nn.Parameter, Tensor]]


class CapturedLoss:
    """The loss of a model and its gradients, as one graph.

    record: how to record, for tests.
    reason: why nothing is recorded; "" before that is known, and if it works.
    """

    def __init__(self, model: nn.Module, record: Recorder = record_graph) -> None:
        self.model, self.record = model, record
        self.reason = ""
        self.gradients: Gradients = []  # that the graph overwrites
        self._seen = 0
        self._replay: Callable[[], None] | None = None
        self._run: Callable[[], dict[str, Any]] = dict
        self._verified = False
        self._batch: dict[str, Tensor] = {}
        self._result: dict[str, Any] = {}

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any] | None:
        """Return what `compute_loss` returns for a batch; `attach` then sets the gradients.

        Returns None if the caller has to compute the loss: during the warm-up, for a batch of
        another shape than the recorded one, and if the model cannot be recorded.
        """
        if self.reason:
            return None
        self._seen += 1
        if self._seen <= WARM_UP:
            return None
        try:
            if self._replay is None:
                self._capture(batch)
                return None
            leaves = flatten_tree(batch)
            if _shapes(leaves) != _shapes(self._batch):
                return None
            for name, tensor in self._batch.items():
                tensor.copy_(leaves[name], non_blocking=True)
            if not self._verified:
                self._verify()
                self._verified = True
        except (CannotCaptureError, RuntimeError) as error:
            self.model.zero_grad(set_to_none=True)
            self.gradients, self._batch, self._result = [], {}, {}
            self.reason = (str(error).splitlines() or [type(error).__name__])[0]
            log.warning("updates are not recorded as CUDA graphs: %s", self.reason)
            return None
        self._replay()
        return self._result

    def attach(self) -> None:
        """Set the parameters' gradients to those that the graph has computed."""
        for parameter, gradient in self.gradients:
            parameter.grad = gradient

    def is_attached(self) -> bool:
        """Return whether the parameters have these gradients, and no other parameter has one."""
        if not self.gradients:
            return False
        held = sum(p.grad is not None for p in self.model.parameters())
        return held == len(self.gradients) and all(p.grad is g for p, g in self.gradients)

    def _capture(self, batch: dict[str, Any]) -> None:
        """Record the loss of a batch.

        Raises:
            CannotCaptureError: a graph would lack a part of the update.
        """
        static = map_tree(torch.clone, batch)
        self._batch = flatten_tree(static)

        def run() -> dict[str, Any]:
            # A weight that was cast outside the graph would keep its value in it.
            torch.clear_autocast_cache()
            result = self.model.compute_loss(static)  # type: ignore[operator]
            result["loss"].backward()
            torch.clear_autocast_cache()
            return _detach(result)

        self._run = run
        with self._undone():
            host = host_state(self.model)
            run()
            require_device_only("compute_loss", host, host_state(self.model))
        with self._undone():
            self._replay, self._result = self.record(run)
            self.gradients = _gradients(self.model)

    def _verify(self) -> None:
        """Compare the graph with the loss of the next batch, at other weights.

        Raises:
            CannotCaptureError: they differ.
        """
        weights = [p.detach() for p in self.model.parameters()]
        kept = [weight.clone() for weight in weights]
        try:
            for weight in weights:
                weight.mul_(1.01)
            with self._undone():
                expected, wanted = self._run(), _gradients(self.model)
            with self._undone():
                assert self._replay is not None
                self._replay()
                self._require_equal(expected, wanted)
        finally:
            for weight, before in zip(weights, kept, strict=True):
                weight.copy_(before)

    @contextmanager
    def _undone(self) -> Iterator[None]:
        """Undo what a block does to buffers, gradients and the device's random numbers."""
        buffers = {name: x.clone() for name, x in self.model.named_buffers()}
        device = next(self.model.parameters()).device
        self.model.zero_grad(set_to_none=True)
        try:
            with torch.random.fork_rng([device] if device.type == "cuda" else []):
                yield
        finally:
            self.model.zero_grad(set_to_none=True)
            with torch.no_grad():
                for name, buffer in self.model.named_buffers():
                    buffer.copy_(buffers[name])

    def _require_equal(self, losses: dict[str, Any], wanted: Gradients) -> None:
        """Raise CannotCaptureError if the graph's loss or gradients are not the expected ones."""
        names = {id(p): name for name, p in self.model.named_parameters()}
        found = {id(p): gradient for p, gradient in self.gradients}
        pairs = [("loss", losses["loss"], self._result["loss"])]
        pairs += [(names[id(p)], g, found.get(id(p), torch.zeros_like(g))) for p, g in wanted]
        for name, right, graph in pairs:
            if not is_close(graph, right):
                raise CannotCaptureError(f"the recorded {name} differs from the computed one")


def start_capture(
    mode: str, trainer: Any, model: nn.Module, optimizer: Any, record: Recorder = record_graph
) -> CapturedLoss | None:
    """Prepare to record the updates of a run; return None if they are not to be recorded.

    mode: "off"; "on"; or "auto", on for a GPU. trainer: Lightning's.

    Raises:
        ValueError: mode is "on", but updates of this run cannot be recorded.
    """
    device = next(model.parameters()).device
    if mode == "off" or (mode == "auto" and device.type != "cuda"):
        return None
    reason = ""
    if device.type != "cuda" and record is record_graph:
        reason = f"the run trains on {device.type}, and only CUDA has graphs"
    elif trainer.world_size > 1:
        reason = "several processes exchange gradients while they are computed"
    elif trainer.accumulate_grad_batches > 1:
        reason = "gradients of several batches are accumulated"
    elif getattr(trainer.datamodule, "sync_acting_copy", None) is not None:
        reason = "data.overlap chooses actions in another thread while an update is recorded"
    elif trainer._detect_anomaly:
        reason = "trainer.detect_anomaly checks every operation"
    if reason and mode == "on":
        raise ValueError(f"trainer.capture is on, but {reason}; set trainer.capture=auto or off")
    if reason:
        log.info("updates are not recorded as CUDA graphs: %s", reason)
        return None
    loss = CapturedLoss(model, record)
    optimizer.step = CapturedStep(optimizer, loss, record)
    return loss


def require_mode(key: str, mode: Any) -> str:
    """Return trainer.KEY as "auto", "on" or "off"; YAML reads on and off as booleans.

    Raises:
        ValueError: it is something else.
    """
    mode = {True: "on", False: "off"}.get(mode, mode)
    if mode not in MODES:
        raise ValueError(f"trainer.{key} is {mode}; expected one of {', '.join(MODES)}")
    return mode


class CapturedStep:
    """An optimiser's step as a graph; replaces `optimizer.step`.

    The optimiser has `advance`, which returns parts whose last item contains the numbers that vary
    from step to step, and `apply`, which takes the items of a part (`training.optimizers.LaProp`).
    Others step as always.
    """

    def __init__(self, optimizer: Any, loss: CapturedLoss, record: Recorder = record_graph) -> None:
        self.optimizer, self.loss, self.record = optimizer, loss, record
        self.eager_step = optimizer.step
        self._replay: Callable[[], None] | None = None
        self._numbers = torch.empty(0)  # of all parts, in order, on the device
        self._failed = False

    def __call__(self, closure: Callable[[], Any] | None = None) -> Any:
        """Compute the gradients, then update the parameters; return the closure's value."""
        value = None
        if closure is not None:
            with torch.enable_grad():
                value = closure()
        if self._failed or not (self.loss.is_attached() and hasattr(self.optimizer, "advance")):
            self.eager_step()
            return value
        parts = self.optimizer.advance()
        numbers = [number for part in parts for number in part[-1]]
        parameter = self.loss.gradients[0][0]
        given = torch.tensor(numbers, dtype=parameter.dtype)
        if self._replay is None:
            self._numbers = given.to(parameter.device)
            self._record(parts)
        else:
            given = given.pin_memory() if parameter.is_cuda else given
            self._numbers.copy_(given, non_blocking=True)
        if self._replay is not None:
            self._replay()
        return value

    def _record(self, parts: list[tuple[Any, ...]]) -> None:
        """Record the application of parts; if that fails, apply them, now and ever after."""
        numbers = iter(self._numbers.unbind())
        recorded = [(*part[:-1], tuple(next(numbers) for _ in part[-1])) for part in parts]

        def run() -> None:
            for part in recorded:
                self.optimizer.apply(*part)

        try:
            self._replay, _ = self.record(run)
        except RuntimeError as error:
            self._failed = True
            log.warning("the optimiser's steps are not recorded as CUDA graphs: %s", error)
            for part in parts:
                self.optimizer.apply(*part)


def _gradients(model: nn.Module) -> Gradients:
    """Return the parameters that have a gradient, with it."""
    return [(p, p.grad) for p in model.parameters() if p.grad is not None]


def _detach(tree: Any) -> Any:
    if isinstance(tree, dict):
        return {key: _detach(value) for key, value in tree.items()}
    return tree.detach() if isinstance(tree, Tensor) else tree


def _shapes(leaves: dict[str, Tensor]) -> dict[str, Any]:
    return {name: (leaf.shape, leaf.dtype) for name, leaf in leaves.items()}
