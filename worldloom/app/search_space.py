"""Spaces of a search: which settings it varies, within which bounds."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from worldloom.app.validation import format_value, quote_text, suggest_key

RANGE = ("low", "high", "log", "step")
LEAVES = (*RANGE, "choices")
EXPECTED = (
    "expected {low: 1e-4, high: 1e-2}, with log: true or step: … if wanted, or {choices: […]}"
)
WORDS = ("true", "false", "null", "nan", "inf")  # which Hydra does not read as texts


@dataclass(frozen=True)
class Range:
    """Numbers from low to high, both included: whole numbers if both are."""

    low: Any
    high: Any
    log: bool = False
    step: Any = None

    def __str__(self) -> str:
        extra = ", log: true" * self.log + (f", step: {self.step}" if self.step else "")
        return f"{{low: {self.low}, high: {self.high}{extra}}}"

    def suggest(self, trial: Any, key: str) -> Any:
        """Return the value that an Optuna trial has for this key."""
        if isinstance(self.low, int):
            step = 1 if self.step is None else self.step
            return trial.suggest_int(key, self.low, self.high, log=self.log, step=step)
        return trial.suggest_float(key, self.low, self.high, log=self.log, step=self.step)

    def ends(self) -> list[Any]:
        """Return the values whose configurations are validated before the search."""
        return [self.low, self.high]

    def list_values(self) -> list[Any] | None:
        """Return all values; None if there are infinitely many."""
        whole = isinstance(self.low, int)
        if self.step is None and not whole:
            return None
        step = self.step or 1
        count = math.floor((self.high - self.low) / step + 1e-9) + 1
        return [self.low + index * step for index in range(count)]


@dataclass(frozen=True)
class Choices:
    """Some values; lists and dicts among them are written as in an override."""

    values: tuple[Any, ...]

    def __str__(self) -> str:
        return f"{{choices: [{', '.join(map(format_override, self.values))}]}}"

    def suggest(self, trial: Any, key: str) -> Any:
        """Return the value that an Optuna trial has for this key."""
        texts = [format_override(value) for value in self.values]
        return self.values[texts.index(trial.suggest_categorical(key, texts))]

    def ends(self) -> list[Any]:
        """Return the values whose configurations are validated before the search."""
        return list(self.values)

    def list_values(self) -> list[Any] | None:
        """Return all values, as Optuna stores them."""
        return [format_override(value) for value in self.values]


Space = dict[str, Range | Choices]


def parse_space(tree: Any, prefix: str = "") -> Space:
    """Return the settings that a space varies, by their keys in the configuration.

    tree: nested as the configuration, or with dotted keys: {low, high, log, step} or {choices} for
        each setting.

    Raises:
        ValueError: names the setting, what is wrong with it and what was expected.
    """
    space: Space = {}
    for key, node in tree.items() if isinstance(tree, Mapping) else ():
        name, path = f"{prefix}{key}", f"search.space.{prefix}{key}"
        if not isinstance(node, Mapping) or not node:
            raise ValueError(f"{path} is {format_value(node)}; {EXPECTED}")
        nested = any(isinstance(value, Mapping) for value in node.values())
        if nested or not any(part in LEAVES for part in node):
            parts = parse_space(node, f"{name}.")
        elif "choices" in node:
            parts = {name: _parse_choices(path, node)}
        else:
            parts = {name: _parse_range(path, node)}
        if twice := space.keys() & parts.keys():
            raise ValueError(f"search.space has {min(twice)} twice; leave one of them out")
        space |= parts
    return space


def _parse_choices(path: str, node: Mapping[str, Any]) -> Choices:
    values = node["choices"]
    if len(node) > 1:
        other = next(key for key in node if key != "choices")
        raise ValueError(f"{path} has choices and {other}; leave one of them out")
    if not isinstance(values, list) or len(values) < 2:
        raise ValueError(f"{path}.choices is {format_value(values)}; expected at least two values")
    texts = [format_override(value) for value in values]
    if twice := [text for text in texts if texts.count(text) > 1]:
        raise ValueError(f"{path}.choices has {twice[0]} twice; give each value once")
    return Choices(tuple(values))


def _parse_range(path: str, node: Mapping[str, Any]) -> Range:
    for key in node:
        if key not in LEAVES:
            raise ValueError(f"unknown key '{path}.{key}'{suggest_key(key, LEAVES, path + '.')}")
    for key in ("low", "high"):
        if key not in node:
            raise ValueError(f"{path} has no {key}; {EXPECTED}")
    numbers = {key: node[key] for key in ("low", "high", "step") if node.get(key) is not None}
    for key, value in numbers.items():
        if type(value) not in (int, float) or not math.isfinite(value):
            raise ValueError(f"{path}.{key} is {format_value(value)}; expected a number")
    log = node.get("log", False)
    if not isinstance(log, bool):
        raise ValueError(f"{path}.log is {format_value(log)}; expected true or false")
    if any(type(value) is float for value in numbers.values()):
        numbers = {key: float(value) for key, value in numbers.items()}
    found = Range(numbers["low"], numbers["high"], log, numbers.get("step"))
    if found.low >= found.high:
        raise ValueError(f"{path} is {found}; expected low < high")
    if log and found.low <= 0:
        raise ValueError(f"{path}.low is {found.low}; expected more than 0 with log: true")
    if found.step is not None and (log or found.step <= 0):
        wanted = "none with log: true" if log else "more than 0"
        raise ValueError(f"{path}.step is {found.step}; expected {wanted}")
    if found.step is not None and not _divides(found):
        raise ValueError(f"{path} is {found}; expected a step that leads from low to high exactly")
    return found


def _divides(found: Range) -> bool:
    values = found.list_values()
    return values is not None and math.isclose(values[-1], found.high)


def format_override(value: Any) -> str:
    """Return a value as the text that Hydra's overrides read as this value."""
    if isinstance(value, Mapping):
        return f"{{{','.join(f'{key}:{format_override(held)}' for key, held in value.items())}}}"
    if isinstance(value, list | tuple):
        return f"[{','.join(map(format_override, value))}]"
    if value is None or isinstance(value, bool):
        return format_value(value)
    if isinstance(value, int | float):
        return repr(value)
    text = str(value)
    plain = re.fullmatch(r"[A-Za-z_/][\w./+-]*", text, re.ASCII) and text.lower() not in WORDS
    return text if plain else quote_text(text)
