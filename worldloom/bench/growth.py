"""How the cost of an update or a decision grows with what it is about."""

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from statistics import linear_regression, median
from typing import Any

from worldloom.bench.measure import BenchConfig, Trained, context_rows, random_batch
from worldloom.presets import aliases, load_preset, preset_names

STEEP = 1.1  # an exponent above this is more than noise
FACTORS = (1 / 8, 1 / 4, 1 / 2, 1, 2)
HORIZONS = (4, 8, 16, 32, 64)
PLANS = (1, 2, 4, 8, 16)
ENVS = (1, 2, 4, 8, 16, 32)
MOST_SIZES = 5
# A hyperparameter that is a horizon, and whether updates imagine so far or decisions plan so far.
IMAGINES, PLANS_AHEAD = "imag_length", "horizon"

Case = tuple[float, Callable[[], float]]  # a size, and what returns the seconds of one call there


@dataclass(frozen=True)
class Growth:
    """Median seconds of an "update" or a "decision" at each of several sizes of `axis`."""

    axis: str
    of: str
    sizes: list[float]
    seconds: list[float]

    @property
    def exponent(self) -> float:
        """The power of the size that fits all of them best."""
        return fitted_exponent(self.sizes, self.seconds)

    @property
    def last(self) -> float:
        """The power of the size between the two largest, where what is constant weighs least."""
        return fitted_exponent(self.sizes[-2:], self.seconds[-2:])


def fitted_exponent(sizes: Sequence[float], seconds: Sequence[float]) -> float:
    """Return b of the law a * size^b that fits best, by least squares of the logarithms."""
    return linear_regression([math.log(x) for x in sizes], [math.log(x) for x in seconds]).slope


def grow(config: BenchConfig, **overrides: Any) -> list[Growth]:
    """Measure how the costs of a preset grow, each of them in turns over its sizes."""
    trained = Trained(config, **overrides)
    found = [
        _measured("batch", "update", _batches(trained, config), config),
        _measured("length", "update", _lengths(trained, config), config),
        *_horizons(config, overrides),
        *_presets(config, overrides),
    ]
    if trained.acts():
        found.append(_measured("environments", "decision", _envs(trained, config), config))
    return found


def growth_table(grown: Sequence[Growth]) -> str:
    """Return sizes, milliseconds and exponents, two lines for each axis."""
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


def _measured(axis: str, of: str, cases: list[Case], config: BenchConfig) -> Growth:
    """Time all cases in turns, after one to warm up."""
    rounds = [[run() for _, run in cases] for _ in range(config.repeats + 1)][1:]
    medians = [median(each) for each in zip(*rounds, strict=True)]
    return Growth(axis, of, [size for size, _ in cases], medians)


def _update(trained: Trained, config: BenchConfig) -> Callable[[], float]:
    batch = random_batch(trained.model, config)
    return lambda: trained.update(batch)["update"]


def _decision(trained: Trained, config: BenchConfig, envs: int = 1) -> Callable[[], float]:
    return lambda: median(trained.decide(config, envs, 3))


def _scaled(middle: int | None) -> Iterator[int]:
    """Return sizes from an eighth to twice the middle, or from 1 if it is less than 8."""
    assert middle is not None
    low = max(1, middle * FACTORS[0])
    return (round(low * factor / FACTORS[0]) for factor in FACTORS)


def _batches(trained: Trained, config: BenchConfig) -> list[Case]:
    sizes = _scaled(config.batch)
    return [(size, _update(trained, replace(config, batch=size))) for size in sizes]


def _lengths(trained: Trained, config: BenchConfig) -> list[Case]:
    """Lengthen sequences; a model without context makes one step less than there are rows."""
    assert config.length is not None
    first = 0 if context_rows(getattr(trained.model, "replay_fields", None) or {}) else 1
    sizes = _scaled(config.length - first)
    return [(size, _update(trained, replace(config, length=size + first))) for size in sizes]


def _envs(trained: Trained, config: BenchConfig) -> list[Case]:
    return [(size, _decision(trained, config, size)) for size in ENVS]


def _horizons(config: BenchConfig, overrides: dict[str, Any]) -> Iterator[Growth]:
    """Measure a model with a horizon of imagination in its update, or of planning in decisions."""
    known = load_preset(config.model)
    small = _smaller(config)
    if IMAGINES in known:
        models = [(x, Trained(config, **{**overrides, IMAGINES: x})) for x in HORIZONS]
        cases: list[Case] = [(x, _update(model, small)) for x, model in models]
        yield _measured("horizon of imagination", "update", cases, config)
    elif PLANS_AHEAD in known:
        models = [(x, Trained(config, **{**overrides, PLANS_AHEAD: x})) for x in PLANS]
        cases = [(x, _decision(model, config)) for x, model in models]
        yield _measured("horizon of planning", "decision", cases, config)


def _presets(config: BenchConfig, overrides: dict[str, Any]) -> Iterator[Growth]:
    """Measure the presets of the same family one by one: together they may not fit into memory."""
    name = aliases().get(config.model, config.model)
    family = [each for each in preset_names() if each.split(":")[0] == name.split(":")[0]]
    sizes, seconds = [], []
    for each in [x for x in family if not x.endswith(":tiny")][:MOST_SIZES]:
        smaller = _smaller(replace(config, model=each))
        trained = Trained(smaller, **overrides)
        size = sum(p.numel() for p in trained.model.parameters() if p.requires_grad)
        seconds += _measured("", "", [(size, _update(trained, smaller))], config).seconds
        sizes.append(size)
        del trained
    yield Growth("parameters", "update", sizes, seconds)


def _smaller(config: BenchConfig) -> BenchConfig:
    """Take an eighth of the batch, where every case is a model of its own."""
    assert config.batch is not None
    return replace(config, batch=max(1, config.batch // 8))
