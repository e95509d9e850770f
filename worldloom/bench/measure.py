"""Measure updates by phase, what a run does beside them, and the rate of matrix products."""

import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from worldloom.acting import Actor
from worldloom.app.compose import composed
from worldloom.check.data import RandomData
from worldloom.factory import create_world_model, import_target
from worldloom.presets import file_name, load_preset
from worldloom.protocol import Batch, ReplayField, split_result
from worldloom.timing import REST, Timer, phase

PARTS = "  "  # in front of the name of a phase that is part of an update


@dataclass
class BenchConfig:
    """What to time, `repeats` times: `batch` sequences of `length` rows that are trained on.

    batch, length: None for the preset's own, as in `python -m worldloom.run model=…`.
    envs: environments that act at once.
    obs: shape of an observation, also as 24 or "3,64,64"; actions: their number, of choices if
    `discrete` ("3,4" for two of them); matrix: rows of the matrices that measure the rate.
    """

    model: str = "dreamerv3:size1m"
    batch: int | None = None
    length: int | None = None
    obs: Any = 24
    actions: Any = 6
    discrete: bool = False
    envs: int = 16
    repeats: int = 5
    threads: int = field(default_factory=torch.get_num_threads)
    device: str = "cpu"
    matrix: int = 2048

    def __post_init__(self) -> None:
        """Read shapes, fill in the preset's; raise ValueError for a size below 1."""
        training = self.run_settings().training
        self.batch = training.batch_size if self.batch is None else self.batch
        self.length = training.sequence_length if self.length is None else self.length
        self.obs, actions = _sizes("obs", self.obs), _sizes("actions", self.actions)
        self.actions = actions if len(actions) > 1 else actions[0]
        for name in ("batch", "length", "envs", "repeats", "threads", "matrix"):
            _sizes(name, getattr(self, name))

    def run_settings(self) -> DictConfig:
        """Return the configuration of a run with this model."""
        load_preset(self.model)  # for its message, if there is no such preset
        return composed(f"model={file_name(self.model)}", "~experiment")

    @property
    def spaces(self) -> tuple[Any, Any, bool]:
        """What a model is built with."""
        return self.obs, self.actions, self.discrete

    @property
    def decisions(self) -> float:
        """Decisions that a run makes for every update."""
        assert self.batch is not None and self.length is not None
        ratio = self.run_settings().training.train_ratio
        return 1.0 if ratio is None else self.batch * self.length / ratio


@dataclass(frozen=True)
class Measurement:
    """Seconds of updates and of what belongs to them, FLOP/s of matrix products, FLOPs.

    seconds: by name; those of an update's phases begin with two spaces and sum to "update".
    flops: of one update, and of its phases under the same names.
    peak_bytes: the most memory held, on a GPU as torch counts it, else by the whole process.
    """

    seconds: dict[str, list[float]]
    rates: list[float]
    flops: dict[str, float]
    peak_bytes: int

    @property
    def floor(self) -> float:
        """Seconds that the update's work takes at the rate of the median matrix product."""
        return self.flops["update"] / median(self.rates)

    @property
    def share(self) -> float:
        """Share of the machine's rate that the median update attains."""
        return self.floor / median(self.seconds["update"])

    def table(self) -> str:
        """Return all figures, one a line."""
        rows: list[tuple[str, str, float, list[Any]]] = [
            *((name, "ms", 1e3, seconds) for name, seconds in self.seconds.items()),
            ("matrix product", "GFLOP/s", 1e-9, self.rates),
            ("floor = work / rate", "ms", 1e3, [self.floor]),
            ("share = floor / update", "%", 1e2, [self.share]),
            ("peak memory", "MB", 1e-6, [self.peak_bytes]),
        ]
        lines = [f"{'':<32}{'median':>12}{'min':>12}{'max':>12}{'GFLOP':>12}"]
        for name, unit, scale, values in rows:
            shown = [f(values) * scale for f in (median, min, max)][: 3 if len(values) > 1 else 1]
            if name in self.flops and len(shown) == 3:
                shown.append(self.flops[name] * 1e-9)
            line = f"{name.replace('_', ' '):<24}{unit:<8}"
            lines.append(line + "".join(f"{x:>12,.3f}" for x in shown))
        return "\n".join(lines)


class Trained:
    """A model on random data, with the optimiser of its preset; a Timer counts what it does."""

    def __init__(self, config: BenchConfig, **overrides: Any) -> None:
        kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
        if config.device.split(":")[0] not in kinds:
            offers = " and ".join(kinds)
            raise ValueError(f"device is {config.device!r}; this machine offers {offers}")
        self.device = torch.device(config.device)
        self.model: Any = create_world_model(
            config.model, *config.spaces, self.device, **overrides
        ).train()
        preset = config.run_settings().optimizer
        options = {k: v for k, v in preset.items() if not k.startswith("_")}
        parameters = getattr(self.model, "parameter_groups", self.model.parameters)()
        self.optimizer = import_target(preset["_target_"])(parameters, **options)

    def clock(self) -> float:
        """Return the time in seconds at which the device has done its work."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def update(self, batch: Batch, read: Callable[[], float] | None = None) -> dict[str, float]:
        """Train on a batch once; return what was spent as "update" and its phases.

        read: what to count instead of the device's seconds.
        """
        with Timer(read or self.clock) as timer:
            with phase("loss"):
                losses, self.replay_values = split_result(self.model.compute_loss(batch))
            with phase("backward"):
                losses["loss"].backward()
            with phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
                if hasattr(self.model, "after_update"):
                    self.model.after_update()
            spent = timer.flush()
        del spent[REST]  # the marks themselves
        self.losses = {name: value.detach() for name, value in losses.items()}
        return {"update": sum(spent.values()), **{PARTS + k: v for k, v in spent.items()}}

    def acts(self) -> bool:
        """Tell whether the model has a policy."""
        return callable(getattr(self.model, "policy", None))

    def decide(self, config: BenchConfig, envs: int, repeats: int) -> list[float]:
        """Act in the middle of episodes, `repeats` times; return the seconds of each decision."""
        data = RandomData.for_model(self.model, *config.spaces, envs, 1)
        actor, seconds = Actor(self.model.eval()), []
        _, memory = actor(data.obs(envs), torch.ones(envs, dtype=torch.bool))
        no = torch.zeros(envs, dtype=torch.bool)
        for _ in range(repeats):
            obs, start = data.obs(envs), self.clock()
            _, memory = actor(obs, no, memory)
            seconds.append(self.clock() - start)
        self.model.train()
        return seconds


def measure(config: BenchConfig, **overrides: Any) -> Measurement:
    """Time updates of the preset config.model, with `overrides` of its hyperparameters."""
    trained = Trained(config, **overrides)
    batch = random_batch(trained.model, config)
    square = torch.randn(config.matrix, config.matrix, device=trained.device)
    flops = count_flops(lambda read: trained.update(batch, read))  # warms up too
    torch.mm(square, square)
    rates, updates = [], []
    for _ in range(config.repeats):
        for _ in range(3):
            start = trained.clock()
            torch.mm(square, square)
            rates.append(2 * config.matrix**3 / (trained.clock() - start))
        updates.append(trained.update(batch))
    seconds = {name: [update[name] for update in updates] for name in updates[0]}
    counts = sorted({1, config.envs}) if trained.acts() else []
    acting = [(n, trained.decide(config, n, config.repeats)) for n in counts]
    if acting:
        seconds["collect"] = [config.decisions * each for each in acting[0][1]]
    seconds["sample"] = timed_samples(trained, config)
    seconds["log"] = timed_log(trained.losses, config)
    for n, each in acting:
        seconds[f"policy, {n} env{'s' * (n > 1)}"] = each
    held = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    on_gpu = trained.device.type == "cuda"
    peak = torch.cuda.max_memory_allocated(trained.device) if on_gpu else held
    return Measurement(seconds, rates, flops, peak)


def random_batch(model: Any, config: BenchConfig) -> Batch:
    """Draw B sequences from the middle of episodes, with a row of context if the model uses it."""
    fields = getattr(model, "replay_fields", None) or {}
    assert config.batch is not None and config.length is not None
    lead = (config.batch, config.length + context_rows(fields))
    data = RandomData.for_model(model, *config.spaces, *lead)
    rewards = torch.randn(lead, device=data.device)
    no = torch.zeros_like(rewards, dtype=torch.bool)
    batch = Batch(obs=data.obs(*lead), actions=data.actions(*lead), rewards=rewards)
    batch |= Batch(is_first=no, is_last=no, is_terminal=no)
    return batch | data.replay_inputs(fields, *lead)


def context_rows(fields: Mapping[str, ReplayField]) -> int:
    """Return how many rows are sampled in front of a sequence for a model with these fields."""
    return int(any(not field.every_row for field in fields.values()))


def timed_samples(trained: Trained, config: BenchConfig) -> list[float]:
    """Draw batches from a replay of random rows, ten times as many as are drawn at once.

    The values that the last update returned for the replay are written back.
    """
    from worldloom.replay.buffer import ReplayBuffer, to_device

    assert config.batch is not None and config.length is not None
    fields = getattr(trained.model, "replay_fields", None) or {}
    data = RandomData.for_model(trained.model, *config.spaces, 1, 1)
    width, rows = data.actions(1).shape[-1], config.length + context_rows(fields)
    steps = 10 * config.batch * rows
    buffer = ReplayBuffer(steps + 1, data.obs_shape, width, fields=fields)
    obs, actions = data.obs(steps + 1), data.actions(steps).cpu()
    assert isinstance(obs, Tensor)
    buffer.add_episode(
        obs.cpu(), actions, torch.zeros(steps), truncations=torch.arange(steps) == steps - 1
    )
    seconds = []
    for _ in range(config.repeats + 1):
        start = trained.clock()
        batch = to_device(buffer.sample(config.batch, rows), trained.device)
        if trained.replay_values:
            buffer.write_fields(batch["index"], trained.replay_values, rows)
        seconds.append(trained.clock() - start)
    return seconds[1:]  # the first one allocates


def timed_log(losses: dict[str, Tensor], config: BenchConfig) -> list[float]:
    """Write metrics as a run does; return the seconds of that for each update of an interval."""
    from worldloom.training.loggers import MetricsCSV, TensorBoard
    from worldloom.training.module import Metrics

    metrics, seconds = Metrics(), []
    updates = config.run_settings().training.log_every
    with TemporaryDirectory() as folder:
        loggers = [TensorBoard(folder), MetricsCSV(Path(folder))]
        for step in range(config.repeats + 1):
            metrics.add(losses)
            start = time.perf_counter()
            means = metrics.flush()
            for logger in loggers:
                logger.log_metrics(means, step)
            seconds.append((time.perf_counter() - start) / updates)
        for logger in loggers:
            logger.finalize("success")
    return seconds[1:]  # the first one makes the files


def count_flops(run: Callable[[Callable[[], float]], dict[str, float]]) -> dict[str, float]:
    """Return the operations of matrix products and convolutions, backward included.

    run: does the work; it gets a function that reads the operations so far, and returns those of
    its parts.
    """
    with FlopCounterMode(display=False) as counter:
        # Counts by module are not wanted, and their hooks fail on views made without gradient.
        counter.mod_tracker.__exit__()
        return run(counter.get_total_flops)


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """Read 24, "3,64,64" or a sequence as sizes of at least 1."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    if not parts or not all(str(part).strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name} is {value!r}; expected whole numbers of at least 1")
    return tuple(int(part) for part in parts)
