"""Measure how the cost of an update or a decision grows with batch, length, horizon and size.

usage: python experiments/growth/growth.py [model=dreamerv3:size1m] [model.KEY=VALUE ...]
       [batch=...] [length=...] [repeats=5] [threads=2]   (settings of worldloom.bench)

Prints milliseconds over four doublings or more of each axis and the fitted exponent; 1 is linear.
Constant costs flatten the small sizes, so "last" is the exponent between the two largest sizes.
Batch and length go from an eighth of the preset's (or of batch= and length=) to twice of it. The
horizon and the size need one model per case and use an eighth of the batch.
"""

import math
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression, median
from typing import Any

import torch

from worldloom.bench import BenchConfig, TrainedModel, read_settings
from worldloom.presets import aliases, load_preset, preset_names

STEEP = 1.1  # exponents above this are reported as above linear; lower ones may be noise
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
HORIZONS = (4, 8, 16, 32, 64)
PLANS = (1, 2, 4, 8, 16)
ENVS = (1, 2, 4, 8, 16, 32)
MAX_PRESETS = 5

Case = tuple[float, Callable[[], float]]  # a size, and a function that returns seconds of one call


@dataclass(frozen=True)
class Growth:
    """Median seconds of an "update" or a "decision" at each of several sizes of `axis`."""

    axis: str
    of: str
    sizes: list[float]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """Exponent of the power law that fits all sizes best."""
        return fit_exponent(self.sizes, self.seconds)

    @property
    def last(self) -> float:
        """Exponent between the two largest sizes, where constant costs matter least."""
        return fit_exponent(self.sizes[-2:], self.seconds[-2:])


def fit_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return b of the power law a * size^b, fitted by least squares of the logarithms."""
    return linear_regression([math.log(x) for x in sizes], [math.log(x) for x in seconds]).slope


def measure_growth(config: BenchConfig, **overrides: Any) -> list[Growth]:
    """Measure every axis of a preset; the sizes of an axis take turns."""
    trained = TrainedModel(config, **overrides)
    batches = [(x, time_update(trained, replace(config, batch=x))) for x in scale(config.batch)]
    # Without a row of context, a sequence makes one transition less than it has rows.
    first = 1 - trained.context_rows
    lengths = [
        (x, time_update(trained, replace(config, length=x + first)))
        for x in scale(config.length - first)
    ]
    found = [
        take_turns("batch", "update", batches, config),
        take_turns("length", "update", lengths, config),
        *measure_horizon(config, overrides),
        measure_presets(config, overrides),
    ]
    if trained.can_act():
        envs = [(x, time_decision(trained, config, x)) for x in ENVS]
        found.append(take_turns("environments", "decision", envs, config))
    return found


def format_table(grown: Sequence[Growth]) -> str:
    """Return sizes, milliseconds and exponents: two lines per axis."""
    columns = max(len(each.sizes) for each in grown)
    lines = [f"{'':<{24 + 10 * columns}}{'exponent':>10}{'last':>8}"]
    for each in grown:
        blank = " " * (10 * (columns - len(each.sizes)))
        lines.append(f"{each.axis:<24}" + "".join(f"{x:>10,.4g}" for x in each.sizes))
        ms = "".join(f"{1e3 * x:>10,.4g}" for x in each.seconds)
        powers = f"{each.exponent:>10.2f}{each.last:>8.2f}"
        steep = each.exponent > STEEP and each.axis in ("batch", "length")
        lines.append(f"{f'  ms per {each.of}':<24}{ms}{blank}{powers}{'  above linear' * steep}")
    return "\n".join(lines)


def take_turns(axis: str, of: str, cases: list[Case], config: BenchConfig) -> Growth:
    """Time all cases in turns, after one untimed round."""
    rounds = [[run() for _, run in cases] for _ in range(config.repeats + 1)][1:]
    medians = [median(each) for each in zip(*rounds, strict=True)]
    return Growth(axis, of, [size for size, _ in cases], medians)


def time_update(trained: TrainedModel, config: BenchConfig) -> Callable[[], float]:
    batch = trained.random_batch(config)
    return lambda: trained.update(batch)["update"]


def time_decision(trained: TrainedModel, config: BenchConfig, envs: int = 1) -> Callable[[], float]:
    return lambda: median(trained.act(config, envs, 3))


def scale(middle: int) -> list[int]:
    """Return sizes from an eighth of `middle` to twice of it, the smallest at least 1."""
    low = max(1, middle * FACTORS[0])
    return [round(low * factor / FACTORS[0]) for factor in FACTORS]


def measure_horizon(config: BenchConfig, overrides: dict[str, Any]) -> Iterator[Growth]:
    """Measure imagination in updates (imag_length) or planning in decisions (horizon)."""
    known, small = load_preset(config.model), reduce_batch(config)
    if "imag_length" in known:
        models = [(x, TrainedModel(config, **{**overrides, "imag_length": x})) for x in HORIZONS]
        cases: list[Case] = [(x, time_update(model, small)) for x, model in models]
        yield take_turns("horizon of imagination", "update", cases, config)
    elif "horizon" in known:
        models = [(x, TrainedModel(config, **{**overrides, "horizon": x})) for x in PLANS]
        cases = [(x, time_decision(model, config)) for x, model in models]
        yield take_turns("horizon of planning", "decision", cases, config)


def measure_presets(config: BenchConfig, overrides: dict[str, Any]) -> Growth:
    """Measure the presets of the family one by one: together they may not fit into memory."""
    family = aliases().get(config.model, config.model).split(":")[0]
    names = [name for name in preset_names() if name.split(":")[0] == family]
    sizes, seconds = [], []
    for name in [x for x in names if not x.endswith(":tiny")][:MAX_PRESETS]:
        small = reduce_batch(replace(config, model=name))
        trained = TrainedModel(small, **overrides)
        size = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
        seconds += take_turns("", "", [(size, time_update(trained, small))], config).seconds
        sizes.append(size)
        del trained
    return Growth("parameters", "update", sizes, seconds)


def reduce_batch(config: BenchConfig) -> BenchConfig:
    """Take an eighth of the batch."""
    return replace(config, batch=max(1, config.batch // 8))


if __name__ == "__main__":
    settings, hyperparameters = read_settings(sys.argv[1:])
    torch.set_num_threads(settings.threads)
    print(*sys.argv[1:])
    print(format_table(measure_growth(settings, **hyperparameters)))
