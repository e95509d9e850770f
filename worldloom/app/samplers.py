"""Samplers and pruners of Optuna, by their names."""

import inspect
import math
import re
import warnings
from collections.abc import Mapping
from typing import Any

import numpy as np

from worldloom.app.command_line import join_lines
from worldloom.app.search_config import SearchConfig, split_named
from worldloom.app.search_space import Range
from worldloom.app.validation import build_settings, check_arguments
from worldloom.errors import suggest

# Samplers that cannot be chosen by name.
UNUSABLE = {
    "CmaEsSampler": "stores Python objects (pickle) in the study, and worldloom never runs code "
    "from a folder; use GPSampler or TPESampler",
    "PartialFixedSampler": "is not needed; fix a setting by an override: training.batch_size=16",
}
# Samplers whose draws continue one sequence, which the seed alone decides.
SEQUENCES = ("GridSampler", "QMCSampler")
# Samplers that try each combination of a finite space once.
EXHAUSTIVE = ("GridSampler", "BruteForceSampler")


def read_search(section: Mapping[str, Any]) -> SearchConfig:
    """Return the validated settings of a search.

    Raises:
        ValueError: an unknown key, or an impossible value.
        ImportError: Optuna, or a package that the sampler needs, is not installed.
    """
    settings: SearchConfig = build_settings("search", section, SearchConfig)
    if not settings.parse_space():
        raise ValueError(
            "search.space is empty; add a setting to vary, such as "
            "'search.space.training.learning_rate={low: 1e-4, high: 1e-2, log: true}'"
        )
    try:
        import optuna
    except ImportError:
        raise ImportError(
            "a search needs the package optuna; pip install 'worldloom[sweep]'"
        ) from None
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=make_sampler(settings, 0))
    trial = study.ask()
    for key, part in settings.parse_space().items():
        part.suggest(trial, key)
    make_pruner(settings)
    return settings


def count_trials(settings: SearchConfig) -> int:
    """Return the number of trials; an exhaustive sampler may have fewer combinations."""
    if split_named(settings.sampler)[0] not in EXHAUSTIVE:
        return settings.trials
    return min(settings.trials, math.prod(map(len, list_grid(settings).values())))


def make_sampler(settings: SearchConfig, number: int) -> Any:
    """Return the sampler that draws the values of a trial.

    The seed and the number of the trial determine its random numbers, so that neither a continued
    study nor several processes repeat draws.
    """
    import optuna

    name, arguments = split_named(settings.sampler)
    if name in UNUSABLE:
        raise ValueError(f"search.sampler: {name} {UNUSABLE[name]}")
    if "seed" in arguments:
        raise ValueError("search.sampler.seed is not used; write search.seed=…")
    if name == "GridSampler":
        arguments["search_space"] = list_grid(settings)
    elif name == "BruteForceSampler":
        list_grid(settings)
    given = [settings.seed] if name in SEQUENCES else [settings.seed, number]
    seed = int(np.random.SeedSequence(given).generate_state(1)[0])
    return _create("search.sampler", optuna.samplers, "Sampler", name, {**arguments, "seed": seed})


def make_pruner(settings: SearchConfig) -> Any:
    """Return the pruner that stops bad trials early."""
    import optuna

    name, arguments = split_named(settings.pruner)
    if "wrapped_pruner" in arguments:
        within = SearchConfig(settings.space, pruner=arguments["wrapped_pruner"])
        arguments["wrapped_pruner"] = make_pruner(within)
    return _create("search.pruner", optuna.pruners, "Pruner", name, arguments)


def list_grid(settings: SearchConfig) -> dict[str, list[Any]]:
    """Return all values of each setting of the space.

    Raises:
        ValueError: a setting has infinitely many.
    """
    grid = {}
    for key, part in settings.parse_space().items():
        values = part.list_values()
        if values is None or (isinstance(part, Range) and part.log):
            raise ValueError(
                f"search.sampler is {split_named(settings.sampler)[0]}, which tries all values, "
                f"but search.space.{key} is {part}; expected a step or choices"
            )
        grid[key] = values
    return grid


def _create(path: str, module: Any, kind: str, name: str, arguments: dict[str, Any]) -> Any:
    """Create a sampler or a pruner; raise ValueError for an unknown name or argument."""
    names = [n for n in module.__all__ if n.endswith(kind) and not n.startswith("Base")]
    names = [n for n in names if n not in UNUSABLE]
    if name not in names:
        near = suggest(name, names) or suggest(f"{name}{kind}", names)
        raise ValueError(f"{path} is {name!r}{near}; expected one of {', '.join(names)}")
    cls = getattr(module, name)
    given = {key: value for key, value in arguments.items() if key not in ("seed", "search_space")}
    given.pop("wrapped_pruner", None)
    check_arguments(path, given, cls)
    takes = inspect.signature(cls).parameters
    for key in given:
        if re.search(r"Callable|\bBase[A-Z]", str(takes[key].annotation)):
            raise ValueError(f"{path}.{key} takes a Python object, not a value; leave it out")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # some are experimental
            return cls(**arguments)
    except (TypeError, ValueError) as error:
        raise ValueError(f"{path}: {join_lines(error)}") from None
