"""The line printed before training: the remaining updates and the expected time."""

import copy
import statistics
import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer

from worldloom.acting import Actor
from worldloom.app.task import Task
from worldloom.devices import usable_devices
from worldloom.errors import list_names
from worldloom.factory import build_model
from worldloom.presets import file_name, load_preset, preset_names
from worldloom.protocol import split_result
from worldloom.random_batches import RandomData
from worldloom.records import import_target
from worldloom.saving import get_config
from worldloom.training.randomness import random_state, set_random_state

LONG = 3.0  # hours after which smaller models are named, on a machine without a GPU
LARGEST = 1 << 30  # bytes of a model that is copied to measure it
FEWEST = 20  # updates; measuring would cost a shorter run a large part of its time


class Forecast(Callback):
    """Print the updates to come and the expected time, measured on a copy of the model.

    Weights and random states stay as they are. A model that is large, cannot be copied or fails on
    random data is not measured, nor is a run of few updates.
    """

    def __init__(self, task: Task) -> None:
        self.task = task

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Measure and print, once a resumed run has its counters."""
        if not trainer.is_global_zero:
            return
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        model: Any = pl_module.model
        updates = max(0, data.expected_updates - data.updates)
        line, before = f"{updates:,} updates to come", random_state()
        try:
            # In several processes a loss may wait for the others.
            worth = updates >= FEWEST and _size(model) < LARGEST
            if trainer.world_size == 1 and worth:
                seconds, costs = self._measure(trainer, model, data)
                line += f", about {describe_time(seconds)} ({costs})"
                if seconds > LONG * 3600 and usable_devices() == ["cpu"]:
                    line += f"; {self._advise(model)}"
        except Exception:  # a custom model may fail on random data
            pass
        finally:
            set_random_state(before)
        print(line, flush=True)

    def _measure(self, trainer: Trainer, model: Any, data: Any) -> tuple[float, str]:
        """Return the expected seconds of the rest of the run, and the costs they consist of."""
        actor = None if data.collector is None else copy.deepcopy(data.collector.actor)
        device = next(model.parameters()).device
        copied: Any = copy.deepcopy(model) if actor is None else actor.model.to(device)
        plugin: Any = trainer.precision_plugin
        rows = data.sequence_length + data.buffer.context_rows
        random = RandomData.for_model(copied, *self.task.spaces, data.batch_size, rows)
        fields = getattr(copied, "replay_fields", None) or {}
        batch = random.batch(ends=False) | random.replay_inputs(fields, data.batch_size, rows)
        batch = plugin.convert_input(batch)

        def update() -> None:
            with plugin.forward_context():
                loss = split_result(copied.compute_loss(dict(batch)))[0]["loss"]
            loss.backward()
            copied.zero_grad()

        each = measure_seconds(update, random.device)
        seconds = each * max(0, data.expected_updates - data.updates)
        costs = f"{1e3 * each:,.0f} ms for an update"
        if actor is not None:
            envs = data.buffer.num_envs
            acting = measure_seconds(_steps(actor, random.obs(envs), envs), random.device)
            seconds += acting * max(0, data.total_steps - data.env_steps) / envs
            costs += f", {1e3 * acting:,.0f} ms to act in {envs} environments"
        return seconds, costs

    def _advise(self, model: Any) -> str:
        """Return the overrides that select smaller models of the same family, the largest first."""
        smaller = []
        arguments = (get_config(model) or {}).get("arguments", {})
        for name in preset_names():
            preset = load_preset(name)
            same = _represents(preset) == _represents(arguments)
            if same and isinstance(model, import_target(preset["_target_"])):
                with torch.device("meta"):
                    size = _size(build_model(preset, *self.task.spaces))
                if size < 0.8 * _size(model):
                    smaller.append((size, f"model={file_name(name)}"))
        names = [name for _, name in sorted(smaller, reverse=True)]
        return f"faster: {list_names(names, 2)}" if names else "faster with a GPU: trainer=gpu"


def _represents(arguments: Mapping[str, Any]) -> Any:
    """Return the name of DreamerV3's representation; None for other models and a user's own."""
    option = arguments.get("representation")
    return option.get("name") if isinstance(option, Mapping) else option


def _steps(actor: Actor, obs: Any, envs: int) -> Callable[[], None]:
    """Return a function that acts for one step in an episode, which its first call begins."""
    memory, first = None, torch.ones(envs, dtype=torch.bool)

    def act() -> None:
        nonlocal memory
        _, memory = actor(obs, first if memory is None else ~first, memory)

    return act


def measure_seconds(work: Callable[[], object], device: torch.device) -> float:
    """Return the median seconds of a call of `work`: of up to three calls in about a second.

    The first call is a warm-up, unless it takes more than a second.
    """

    def once() -> float:
        start = time.perf_counter()
        work()
        if device.type != "cpu":
            torch.accelerator.synchronize(device)
        return time.perf_counter() - start

    first = once()
    seconds = [first] if first > 1 else [once()]
    while sum(seconds) < 0.2 and len(seconds) < 3:
        seconds.append(once())
    return statistics.median(seconds)


def describe_time(seconds: float) -> str:
    """Return seconds as minutes or, from two hours on, as hours."""
    return f"{seconds / 3600:,.1f} hours" if seconds >= 7200 else f"{seconds / 60:,.1f} minutes"


def _size(model: torch.nn.Module) -> int:
    """Return the bytes of a model's parameters."""
    return sum(p.numel() * p.element_size() for p in model.parameters())
