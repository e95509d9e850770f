"""Time whole updates of a model, and its acting, beside what this machine can multiply.

usage: python -m worldloom.bench [model=dreamerv3:size1m] [model.KEY=VALUE …] [batch=…]
       [length=…] [obs=24 | obs=3,64,64] [actions=6] [discrete=false] [envs=16] [repeats=5]
       [threads=…] [device=cpu] [matrix=2048]

The batch and its optimiser are those of the model's preset. "policy" is one decision for one
environment, from an observation to an action, and one for `envs` of them at once.

The floor of an update is its floating-point operations at the rate of a large matrix product; its
share is floor / median. Both are measured turn by turn, so that other load slows both down.
"""

import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from itertools import pairwise
from resource import RUSAGE_SELF, getrusage
from statistics import median
from typing import Any

import torch
from omegaconf import OmegaConf
from torch.utils.flop_counter import FlopCounterMode

from worldloom.acting import Actor
from worldloom.check.data import RandomData
from worldloom.cli import composed, readable_errors
from worldloom.factory import create_world_model, import_target
from worldloom.presets import file_name, load_preset
from worldloom.protocol import Batch
from worldloom.validation import checked_section


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
        load_preset(self.model)  # for its message, if there is no such preset
        training = composed(f"model={file_name(self.model)}", "~experiment").training
        self.batch = training.batch_size if self.batch is None else self.batch
        self.length = training.sequence_length if self.length is None else self.length
        self.obs, actions = _sizes("obs", self.obs), _sizes("actions", self.actions)
        self.actions = actions if len(actions) > 1 else actions[0]
        for name in ("batch", "length", "envs", "repeats", "threads", "matrix"):
            _sizes(name, getattr(self, name))


@dataclass(frozen=True)
class Measurement:
    """Seconds of updates and of their parts, FLOP/s of matrix products, FLOPs of one update.

    peak_bytes: the most memory held, on a GPU as torch counts it, else by the whole process.
    """

    seconds: dict[str, list[float]]
    rates: list[float]
    flops: int
    peak_bytes: int

    @property
    def floor(self) -> float:
        """Seconds that the update's work takes at the rate of the median matrix product."""
        return self.flops / median(self.rates)

    @property
    def share(self) -> float:
        """Share of the machine's rate that the median update attains."""
        return self.floor / median(self.seconds["update"])

    def table(self) -> str:
        """Return all figures, one a line."""
        rows: list[tuple[str, str, float, list[Any]]] = [
            *((name, "ms", 1e3, seconds) for name, seconds in self.seconds.items()),
            ("work of an update", "GFLOP", 1e-9, [self.flops]),
            ("matrix product", "GFLOP/s", 1e-9, self.rates),
            ("floor = work / rate", "ms", 1e3, [self.floor]),
            ("share = floor / update", "%", 1e2, [self.share]),
            ("peak memory", "MB", 1e-6, [self.peak_bytes]),
        ]
        lines = [f"{'':<32}{'median':>12}{'min':>12}{'max':>12}"]
        for name, unit, scale, values in rows:
            shown = [f(values) * scale for f in (median, min, max)][: 3 if len(values) > 1 else 1]
            lines.append(f"{name:<24}{unit:<8}" + "".join(f"{x:>12,.3f}" for x in shown))
        return "\n".join(lines)


def measure(config: BenchConfig, **overrides: Any) -> Measurement:
    """Time updates of the preset config.model, with `overrides` of its hyperparameters."""
    kinds = ["cpu"] + ["cuda"] * torch.cuda.is_available()
    if config.device.split(":")[0] not in kinds:
        raise ValueError(f"device is {config.device!r}; this machine offers {' and '.join(kinds)}")
    device = torch.device(config.device)
    spaces = (config.obs, config.actions, config.discrete)
    model = create_world_model(config.model, *spaces, device, **overrides).train()
    preset = composed(f"model={file_name(config.model)}", "~experiment").optimizer
    options = {k: v for k, v in preset.items() if not k.startswith("_")}
    parameters = getattr(model, "parameter_groups", model.parameters)()
    optimizer = import_target(preset["_target_"])(parameters, **options)
    batch = random_batch(model, config)
    square = torch.randn(config.matrix, config.matrix, device=device)
    flops = count_flops(lambda: timed_update(model, optimizer, batch))  # warms up too
    torch.mm(square, square)
    rates, updates = [], []
    for _ in range(config.repeats):
        for _ in range(3):
            start = _clock(device)
            torch.mm(square, square)
            rates.append(2 * config.matrix**3 / (_clock(device) - start))
        updates.append(timed_update(model, optimizer, batch))
    seconds = {name: [update[name] for update in updates] for name in updates[0]}
    for envs in sorted({1, config.envs} if callable(getattr(model, "policy", None)) else ()):
        data = RandomData.for_model(model, *spaces, envs, 1)
        seconds[f"policy, {envs} env{'s' * (envs > 1)}"] = timed_policy(model, data, config.repeats)
    held = getrusage(RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    peak = torch.cuda.max_memory_allocated(device) if device.type == "cuda" else held
    return Measurement(seconds, rates, flops, peak)


def random_batch(model: Any, config: BenchConfig) -> Batch:
    """Draw B sequences from the middle of episodes, with a row of context if the model uses it."""
    latents = getattr(model, "latents", None) or {}
    assert config.batch is not None and config.length is not None
    lead = (config.batch, config.length + bool(latents))
    data = RandomData.for_model(model, config.obs, config.actions, config.discrete, *lead)
    rewards = torch.randn(lead, device=data.device)
    no = torch.zeros_like(rewards, dtype=torch.bool)
    batch = Batch(obs=data.obs(*lead), actions=data.actions(*lead), rewards=rewards)
    batch |= Batch(is_first=no, is_last=no, is_terminal=no)
    if latents:
        batch["context"] = {k: rewards.new_zeros(len(no), *s) for k, (s, _) in latents.items()}
    return batch


def timed_update(model: Any, optimizer: torch.optim.Optimizer, batch: Batch) -> dict[str, float]:
    """Train on a batch once; return the seconds of the "update" and of its parts."""
    device = batch["rewards"].device
    marks = [_clock(device)]
    loss = model.compute_loss(batch.copy())["loss"]  # a copy, for the model may write into it
    marks.append(_clock(device))
    loss.backward()
    marks.append(_clock(device))
    optimizer.step()
    optimizer.zero_grad()
    if hasattr(model, "after_update"):
        model.after_update()
    marks.append(_clock(device))
    names = ("update", "compute_loss", "backward", "optimizer")
    parts = [end - start for start, end in pairwise(marks)]
    return dict(zip(names, [sum(parts), *parts], strict=True))


def timed_policy(model: Any, data: RandomData, repeats: int) -> list[float]:
    """Act in the middle of episodes, `repeats` times; return the seconds of each decision."""
    actor, seconds = Actor(model.eval()), []
    _, memory = actor(data.obs(data.rows), torch.ones(data.rows, dtype=torch.bool))
    no = torch.zeros(data.rows, dtype=torch.bool)
    for _ in range(repeats):
        obs, start = data.obs(data.rows), _clock(data.device)
        _, memory = actor(obs, no, memory)
        seconds.append(_clock(data.device) - start)
    return seconds


def count_flops(run: Callable[[], Any]) -> int:
    """Return the operations of matrix products and convolutions in a call, backward included."""
    with FlopCounterMode(display=False) as counter:
        # Counts by module are not wanted, and their hooks fail on views made without gradient.
        counter.mod_tracker.__exit__()
        run()
    return counter.get_total_flops()


def main() -> None:
    """Run the command line."""
    if {"-h", "--help"} & set(sys.argv):
        sys.exit(print(__doc__))
    with readable_errors():
        own = [word for word in sys.argv[1:] if not word.startswith("model.")]
        given: Any = OmegaConf.to_container(OmegaConf.from_cli(own))
        config = checked_section("", given, BenchConfig)
        torch.set_num_threads(config.threads)
        model = [word.removeprefix("model.") for word in sys.argv[1:] if word not in own]
        overrides: Any = OmegaConf.to_container(OmegaConf.from_cli(model))
        result = measure(config, **overrides)
    print(*(f"{k}={v}" for k, v in vars(config).items()), *(f"model.{word}" for word in model))
    print(result.table())


def _clock(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _sizes(name: str, value: Any) -> tuple[int, ...]:
    """Read 24, "3,64,64" or a sequence as sizes of at least 1."""
    parts = value if isinstance(value, list | tuple) else str(value).split(",")
    if not parts or not all(str(part).strip().isdecimal() and int(part) for part in parts):
        raise ValueError(f"{name} is {value!r}; expected whole numbers of at least 1")
    return tuple(int(part) for part in parts)


if __name__ == "__main__":
    main()
