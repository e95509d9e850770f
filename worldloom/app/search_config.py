"""Settings of a search."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from worldloom.app.search_space import Space, parse_space
from worldloom.errors import require, require_positive


@dataclass
class SearchConfig:
    """A search for good settings: the `search` section.

    Attributes:
        space: what is varied: {low, high}, with log or step, or {choices} for each setting.
        trials: number of trials, with those of earlier commands in the same folder.
        metric: what is scored: return for final/return, and eval/return for the pruner.
        direction: maximize or minimize.
        sampler: class in optuna.samplers, or {name: CLASS, ARGUMENT: VALUE}.
        pruner: class in optuna.pruners, or {name: CLASS, ARGUMENT: VALUE}; None for no pruning.
        seed: seed of the sampler.
    """

    space: dict[str, Any] = field(default_factory=dict)
    trials: int = 20
    metric: str = "return"
    direction: str = "maximize"
    sampler: str | dict[str, Any] = "TPESampler"
    pruner: str | dict[str, Any] | None = None
    seed: int = 0

    def __post_init__(self) -> None:
        """Raise ValueError for a value outside its range."""
        require_positive(trials=self.trials)
        directions = ("maximize", "minimize")
        known = self.direction in directions
        require(known, "direction", self.direction, "maximize or minimize")
        require(0 <= self.seed < 2**32, "seed", self.seed, f"an integer from 0 to {2**32 - 1}")

    def parse_space(self) -> Space:
        """Return the settings to vary, by key; see `parse_space` for the errors."""
        return parse_space(self.space)

    def describe(self) -> dict[str, str]:
        """Return what all trials of a study have in common, as text by key."""
        parts: dict[str, Any] = {f"space.{key}": part for key, part in self.parse_space().items()}
        parts |= {key: getattr(self, key) for key in ("metric", "direction", "seed")}
        for key in ("sampler", "pruner"):
            name, arguments = split_named(getattr(self, key))
            parts[key] = f"{name} {arguments}" if arguments else name
        return {f"search.{key}": str(value) for key, value in parts.items()}


def split_named(setting: Any) -> tuple[str, dict[str, Any]]:
    """Return the class and the arguments that a sampler or pruner setting names."""
    if setting is None:
        return "NopPruner", {}
    if isinstance(setting, Mapping):
        arguments = {str(key): value for key, value in setting.items()}
        return str(arguments.pop("name", "")), arguments
    return str(setting), {}
