"""Records of constructor calls: the class and the arguments that build a model again."""

import importlib
import inspect
import sys
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.nn.modules.module import (
    register_module_buffer_registration_hook,
    register_module_parameter_registration_hook,
)

from worldloom.memory import available_memory, format_bytes
from worldloom.trees import flatten_tree

# Classes of worldloom, which saved models name by their family. The user has to allow any other.
REGISTERED = {
    "dreamerv3": "worldloom.models.dreamerv3.model.DreamerV3",
    "tdmpc2": "worldloom.models.tdmpc2.model.TDMPC2",
}
TENSORS = 100_000  # that a model may have; the largest presets have a few hundred
# What torch and Python raise for settings that fit no layer.
UNBUILDABLE = (ArithmeticError, LookupError, RuntimeError, TypeError, AttributeError, MemoryError)
VARIADIC = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)


def import_target(target: str) -> Any:
    """Return the class or function with a dotted import path.

    Raises:
        ValueError: it cannot be imported, or is not callable.
    """
    module, _, name = target.rpartition(".")
    try:
        found = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(
            f"cannot import {target!r}: {error}; give the full path, such as my_pkg.MyModel, and "
            "run where my_pkg can be imported"
        ) from error
    if not callable(found):
        raise ValueError(f"{target} is {found!r}; expected the path of a class or a function")
    return found


def find_targets(arguments: Any) -> list[str]:
    """Return the import paths in the recorded arguments of a model, each once, under "_target_"."""
    leaves = flatten_tree(arguments, lists=True).items()
    return list(dict.fromkeys(str(v) for k, v in leaves if k.split("/")[-1] == "_target_"))


def name_target(target: Any, default: str | None = None) -> str:
    """Return the name under which a class or function is recorded.

    It is a key of REGISTERED for exactly these classes. For any other, it is `default`, the import
    path that the user gave, or else the path of its definition.
    """
    names = (getattr(target, name, "") for name in ("__module__", "__qualname__"))
    path = ".".join(names)  # a functools.partial has no name
    families = {path: family for family, path in REGISTERED.items()}
    return families.get(path) or default or path


def record_call(
    target: Any, args: Sequence[Any], kwargs: Mapping[str, Any], name: str | None = None
) -> dict[str, Any]:
    """Return {"model": name, "arguments": {...}} for a call of a class or function.

    The arguments are by name, as plain data where possible. They include the defaults that the
    class itself declares; those of base classes may be replaced by the class.
    """
    parameters, _ = list_parameters(target)
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    given = {**dict(zip(positional, args, strict=False)), **kwargs}
    own = next(_signatures(target), [])
    defaults = {p.name: p.default for p in own if is_plain(p.default)}
    arguments = {**given, **{k: v for k, v in defaults.items() if k not in given}}
    return {"model": name or name_target(target), "arguments": to_plain(arguments)}


def list_parameters(target: Any) -> tuple[dict[str, inspect.Parameter], bool]:
    """Return the parameters of a class or function by name, and whether it takes any others.

    Parameters of base classes are included where `**kwargs` passes arguments on to them.
    """
    found: dict[str, inspect.Parameter] = {}
    for parameters in _signatures(target):
        for parameter in parameters:
            if parameter.kind not in VARIADIC:
                found.setdefault(parameter.name, parameter)
        if not any(p.kind is p.VAR_KEYWORD for p in parameters):
            return found, False
    return found, True


def _signatures(target: Any) -> Iterator[list[inspect.Parameter]]:
    """Yield the parameters of each constructor of a class, its own first, or of a function."""
    if not inspect.isclass(target):
        yield list(inspect.signature(target).parameters.values())
        return
    for base in target.__mro__:
        if base not in (nn.Module, object) and "__init__" in vars(base):
            yield list(inspect.signature(vars(base)["__init__"]).parameters.values())[1:]


def find_obstacle(model: nn.Module) -> str:
    """Return why a saved model could not be built again and what to change, or "" if it can."""
    cls, config = type(model).__name__, getattr(model, "build_config", None)
    if not isinstance(config, dict):
        return (
            f"the arguments of {cls} were not recorded; derive it from "
            "worldloom.saving.SavableModel instead of torch.nn.Module"
        )
    path, arguments = config["model"], config["arguments"]
    if foreign := [key for key, value in arguments.items() if not is_plain(value)]:
        value = arguments[foreign[0]]
        return (
            f"the argument {foreign[0]} of {cls} is a {type(value).__name__}; expected numbers, "
            "strings, lists, tuples, dicts or None, from which __init__ builds other objects"
        )
    module, _, name = path.rpartition(".")
    if path in REGISTERED or (module != "__main__" and hasattr(sys.modules.get(module), name)):
        return ""
    return (
        f"{cls} is saved as {path}, which other programs cannot import; define the class at the "
        "top of a module, such as my_pkg/models.py, and import it from there (the weights can be "
        "copied to it with worldloom.factory.transfer)"
    )


def is_plain(value: Any) -> bool:
    """Return whether a value consists of None, numbers, strings, lists, tuples and dicts."""
    if isinstance(value, dict):
        return all(type(key) in (str, int) and is_plain(item) for key, item in value.items())
    if type(value) in (list, tuple):
        return all(map(is_plain, value))
    return value is None or type(value) in (bool, int, float, str)


def to_plain(value: Any) -> Any:
    """Copy nested containers, OmegaConf's too, with NumPy's numbers as Python's."""
    if isinstance(value, Mapping):
        return {key: to_plain(item) for key, item in value.items()}
    if isinstance(value, Sequence) and not isinstance(value, str | bytes):
        return (tuple if isinstance(value, tuple) else list)(map(to_plain, value))
    return value.item() if isinstance(value, np.generic) else value


def find_tuples(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[Any, ...]]:
    """Yield the path of every tuple in nested containers, as keys and indices."""
    if isinstance(tree, tuple):
        yield path
    if isinstance(tree, dict | list | tuple):
        for key, value in tree.items() if isinstance(tree, dict) else enumerate(tree):
            yield from find_tuples(value, (*path, key))


def restore_tuples(tree: Any, tuples: list[Any], path: tuple[Any, ...] = ()) -> Any:
    """Return nested containers with a tuple in place of the list at each of the given paths."""
    if isinstance(tree, dict):
        return {key: restore_tuples(value, tuples, (*path, key)) for key, value in tree.items()}
    if isinstance(tree, list):
        items = [restore_tuples(value, tuples, (*path, i)) for i, value in enumerate(tree)]
        return tuple(items) if list(path) in tuples else items
    return tree


class TooLargeError(ValueError):
    """A model that does not fit into memory, or does not fit its weights."""


def build_bounded(
    cls: type[nn.Module], arguments: Mapping[str, Any], most: tuple[int, int] | None = None
) -> nn.Module:
    """Build a model of worldloom, after counting its numbers without allocating them.

    most: numbers and tensors in the file with its weights; None for what fits into memory.

    Raises:
        ValueError: the model has far more of them, or it cannot be built.
    """
    room, counts = available_memory(), [0, 0]
    # Buffers that are not saved, and tensors that are replaced, are counted too.
    limits = (2 * most[0] + 10**6, 2 * most[1] + 1000) if most else (room // 4, TENSORS)

    def count(module: nn.Module, name: str, tensor: torch.Tensor | None) -> None:
        counts[0] += 0 if tensor is None else tensor.numel()
        counts[1] += 1
        if counts[0] > limits[0] or counts[1] > limits[1]:
            has = (
                f"{format_bytes(room)} of memory have room for" if most is None else "the file has"
            )
            numbers, tensors = most or limits
            raise TooLargeError(
                f"the settings of {cls.__name__} need {counts[0]:,} numbers in {counts[1]:,} "
                f"tensors or more, but {has} {numbers:,} in {tensors:,}; use smaller ones"
            )

    for name, value in flatten_tree(arguments, ".").items():
        if name.endswith("layers") and isinstance(value, int) and value > limits[1]:
            raise TooLargeError(f"{name} is {value:,}; expected fewer than {limits[1]:,} layers")
    hooks = [
        register_module_parameter_registration_hook(count),
        register_module_buffer_registration_hook(count),
    ]
    try:
        with torch.device("meta"), torch.random.fork_rng(devices=[]), suppress(*UNBUILDABLE):
            cls(**arguments)
    finally:
        for hook in hooks:
            hook.remove()
    try:
        return cls(**arguments)
    except UNBUILDABLE as error:
        reason = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise ValueError(
            f"{cls.__name__} cannot be built ({reason}); correct its settings"
        ) from error
