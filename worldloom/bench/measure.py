"""Measurements of updates by phase, decisions, sampling and logging, and of the machine's rate."""

import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from resource import RUSAGE_SELF, getrusage
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import torch
from omegaconf import DictConfig, OmegaConf
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from worldloom.acting import Actor
from worldloom.app.command_line import parse_settings
from worldloom.app.compose import compose_config
from worldloom.cuda_graphs import WARM_UP, Recorder
from worldloom.devices import require_device
from worldloom.factory import create_world_model
from worldloom.presets import file_name, load_preset
from worldloom.protocol import Batch, context_rows, split_result
from worldloom.random_batches import RandomData
from worldloom.records import import_target
from worldloom.replay.buffer import ReplayBuffer
from worldloom.timing import REST, Timer, phase
from worldloom.training.loggers import MetricsCSV, TensorBoard
from worldloom.training.metrics import RunningMeans
from worldloom.training.precision import computing_in
from worldloom.trees import to_device

INDENT = "  "  # in front of the names of an update's phases


@dataclass
class BenchConfig:
    """Settings of a measurement; everything is timed `repeats` times.

    batch, length: B sequences of T rows that are trained on; None for the preset's own values.
    envs: environments that act at once.
    obs: shape of an observation, such as 24 or "3,64,64".
    actions: number of actions or, if `discrete`, of choices ("3,4" for two choices at once).
    precision: "32-true" or "bf16-mixed", as `trainer.precision` of a run, which also determines the
        precision of its decisions (`Actor`).
    matrix: rows of the square matrices whose product gives the machine's rate.
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
    precision: str = "32-true"
    matrix: int = 2048

    def __post_init__(self) -> None:
        """Parse shapes and fill in the preset's values; raise ValueError for a wrong value."""
        if self.precision not in ("32-true", "bf16-mixed"):
            raise ValueError(f"precision is {self.precision!r}; expected 32-true or bf16-mixed")
        training = self.compose_run().training
        self.batch = training.batch_size if self.batch is None else self.batch
        self.length = training.sequence_length if self.length is None else self.length
        self.obs, actions = _parse_sizes("obs", self.obs), _parse_sizes("actions", self.actions)
        self.actions = actions if len(actions) > 1 else actions[0]
        for name in ("batch", "length", "envs", "repeats", "threads", "matrix"):
            _parse_sizes(name, getattr(self, name))

    def compose_run(self) -> DictConfig:
        """Return the configuration of a run with this model."""
        load_preset(self.model)  # for its error message
        return compose_config(f"model={file_name(self.model)}", "~experiment")

    @property
    def spaces(self) -> tuple[Any, Any, bool]:
        """Arguments that a model is built with."""
        return self.obs, self.actions, self.discrete

    @property
    def decisions_per_update(self) -> float:
        """Environment steps that a run collects for each update."""
        assert self.batch is not None and self.length is not None
        ratio = self.compose_run().training.train_ratio
        return 1.0 if ratio is None else self.batch * self.length / ratio


def read_settings(args: Sequence[str]) -> tuple[BenchConfig, dict[str, Any]]:
    """Return the settings and the model's hyperparameters (model.KEY=VALUE) of a command line.

    Raises:
        ValueError: an unknown setting or a wrong value.
    """
    keys = [arg.lstrip("+") for arg in args]
    model = [key.removeprefix("model.") for key in keys if key.startswith("model.")]
    own = [arg for arg in args if not arg.lstrip("+").startswith("model.")]
    hyperparameters: Any = OmegaConf.to_container(OmegaConf.from_cli(model))
    return parse_settings(own, BenchConfig), hyperparameters


@dataclass(frozen=True)
class Measurement:
    """Results of `measure`.

    seconds: by name; names of an update's phases are indented, and the phases sum to "update".
    rates: FLOP/s of matrix products.
    flops: floating-point operations of one update and, under the same names, of its phases.
    peak_bytes: peak memory; on a GPU what torch allocated, else that of the process.
    """

    seconds: dict[str, list[float]]
    rates: list[float]
    flops: dict[str, float]
    peak_bytes: int

    @property
    def floor(self) -> float:
        """Seconds that an update's operations take at the rate of the median matrix product."""
        return self.flops["update"] / median(self.rates)

    @property
    def share(self) -> float:
        """Share of the machine's rate that the median update attains."""
        return self.floor / median(self.seconds["update"])

    def table(self) -> str:
        """Return all figures, one per line."""
        rows: list[tuple[str, str, float, list[Any]]] = [
            *((name, "ms", 1e3, seconds) for name, seconds in self.seconds.items()),
            ("matrix product", "GFLOP/s", 1e-9, self.rates),
            ("floor = work / rate", "ms", 1e3, [self.floor]),
            ("share = floor / update", "%", 1e2, [self.share]),
            ("peak memory", "MB", 1e-6, [self.peak_bytes]),
        ]
        lines = [f"{'':<32}{'median':>12}{'min':>12}{'max':>12}{'GFLOP':>12}"]
        for name, unit, scale, values in rows:
            columns = [f(values) * scale for f in (median, min, max)][: 3 if len(values) > 1 else 1]
            if name in self.flops and len(columns) == 3:
                columns.append(self.flops[name] * 1e-9)
            line = f"{name.replace('_', ' '):<24}{unit:<8}"
            lines.append(line + "".join(f"{x:>12,.3f}" for x in columns))
        return "\n".join(lines)


class TrainedModel:
    """A model and its preset's optimiser, fed with random data."""

    def __init__(self, config: BenchConfig, **overrides: Any) -> None:
        self.device, self.precision = require_device(config.device), config.precision
        self.model: Any = create_world_model(
            config.model, *config.spaces, self.device, **overrides
        ).train()
        self.fields = getattr(self.model, "replay_fields", None) or {}
        self.context_rows = context_rows(self.fields)
        preset = config.compose_run().optimizer
        options = {k: v for k, v in preset.items() if not k.startswith("_")}
        parameters = getattr(self.model, "parameter_groups", self.model.parameters)()
        self.optimizer = import_target(preset["_target_"])(parameters, **options)

    def clock(self) -> float:
        """Return the time in seconds once the device has finished its work."""
        if self.device.type != "cpu":
            torch.accelerator.synchronize(self.device)
        return time.perf_counter()

    def random_batch(self, config: BenchConfig) -> Batch:
        """Draw sequences [B, T] from the middle of episodes, plus a row of context if used."""
        assert config.batch is not None and config.length is not None
        lead = (config.batch, config.length + self.context_rows)
        data = RandomData.for_model(self.model, *config.spaces, *lead)
        return data.batch(ends=False) | data.replay_inputs(self.fields, *lead)

    def update(self, batch: Batch, read: Callable[[], float] | None = None) -> dict[str, float]:
        """Train on a batch once; return what was spent on "update" and on its phases.

        read: returns what is counted; by default the device's seconds.
        """
        with Timer(read or self.clock) as timer:
            with phase("loss"), computing_in(self.precision, self.device):
                losses, self.replay_values = split_result(self.model.compute_loss(batch))
            with phase("backward"):
                losses["loss"].backward()
            with phase("optimizer"):
                self.optimizer.step()
                self.optimizer.zero_grad()
                if hasattr(self.model, "after_update"):
                    self.model.after_update()
            spent = timer.flush()
        del spent[REST]  # the cost of the marks themselves
        self.losses = {name: value.detach() for name, value in losses.items()}
        return {"update": sum(spent.values()), **{INDENT + k: v for k, v in spent.items()}}

    def can_act(self) -> bool:
        """Return whether the model has a policy."""
        return callable(getattr(self.model, "policy", None))

    def act(
        self, config: BenchConfig, envs: int, repeats: int, record: Recorder | None = None
    ) -> list[float]:
        """Act `repeats` times in the middle of episodes; return the seconds of each decision.

        record: see `Actor`; decisions before and during the recording are not returned.
        """
        data = RandomData.for_model(self.model, *config.spaces, envs, 1)
        actor = Actor(self.model.eval(), precision=self.precision, record=record)
        seconds: list[float] = []
        _, memory = actor(data.obs(envs), torch.ones(envs, dtype=torch.bool))
        no = torch.zeros(envs, dtype=torch.bool)
        for _ in range(repeats + (0 if record is None else WARM_UP + 1)):
            obs, start = data.obs(envs), self.clock()
            _, memory = actor(obs, no, memory)
            seconds.append(self.clock() - start)
        self.model.train()
        return seconds[-repeats:]


def measure(config: BenchConfig, **overrides: Any) -> Measurement:
    """Measure the preset config.model, with `overrides` of its hyperparameters."""
    trained = TrainedModel(config, **overrides)
    batch = trained.random_batch(config)
    square = torch.randn(config.matrix, config.matrix, device=trained.device)
    flops = count_flops(lambda read: trained.update(batch, read))  # the warm-up, too
    torch.mm(square, square)
    rates, updates = [], []
    for _ in range(config.repeats):
        for _ in range(3):
            start = trained.clock()
            torch.mm(square, square)
            rates.append(2 * config.matrix**3 / (trained.clock() - start))
        updates.append(trained.update(batch))
    seconds = {name: [update[name] for update in updates] for name in updates[0]}
    counts = sorted({1, config.envs}) if trained.can_act() else []
    acting = [(n, trained.act(config, n, config.repeats)) for n in counts]
    if acting:
        seconds["collect"] = [config.decisions_per_update * each for each in acting[0][1]]
    seconds["sample"] = time_sampling(trained, config)
    seconds["log"] = time_logging(trained.losses, config)
    for n, each in acting:
        seconds[f"policy, {n} env{'s' * (n > 1)}"] = each
    return Measurement(seconds, rates, flops, _peak_memory(trained.device))


def time_sampling(trained: TrainedModel, config: BenchConfig) -> list[float]:
    """Draw batches from a replay of ten times as many random rows; write the model's fields back.

    The fields are those that the last update returned.
    """
    assert config.batch is not None and config.length is not None
    data = RandomData.for_model(trained.model, *config.spaces, 1, 1)
    width, rows = data.actions(1).shape[-1], config.length + trained.context_rows
    steps = 10 * config.batch * rows
    buffer = ReplayBuffer(steps + 1, data.obs_shape, width, fields=trained.fields)
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


def time_logging(losses: dict[str, Tensor], config: BenchConfig) -> list[float]:
    """Write metrics as a run does; return the seconds per update of a logging interval."""
    metrics, seconds = RunningMeans(), []
    updates = config.compose_run().training.log_every
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
    return seconds[1:]  # the first one creates the files


def count_flops(run: Callable[[Callable[[], float]], dict[str, float]]) -> dict[str, float]:
    """Return the operations of matrix products and convolutions, backward passes included.

    run: does the work; gets a function that reads the operations so far, and returns those of its
        parts.
    """
    with FlopCounterMode(display=False) as counter:
        # Counting by module is not needed, and its hooks fail on views made without gradient.
        counter.mod_tracker.__exit__()
        return run(counter.get_total_flops)


def _peak_memory(device: torch.device) -> int:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    return getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _parse_sizes(name: str, value: Any) -> tuple[int, ...]:
    """Parse 24, "3,64,64" or a sequence as sizes of at least 1."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    if not parts or not all(str(part).strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name} is {value!r}; expected whole numbers of at least 1")
    return tuple(int(part) for part in parts)
