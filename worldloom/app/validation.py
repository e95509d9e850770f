"""Validation of a composed configuration before anything is built from it."""

import functools
import importlib.util
import inspect
import logging
import math
import re
import types
import typing
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import MISSING, dataclass, fields
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from worldloom.app.hints import hint_key
from worldloom.app.unsupported import TRAINER, require_family, require_strategy, require_supported
from worldloom.errors import require, require_computable, suggest
from worldloom.presets import (
    aliases,
    choice_files,
    config_dir,
    file_name,
    load_preset,
    override_preset,
    preset_names,
    read_choice,
)
from worldloom.training.config import (
    CheckpointConfig,
    DataConfig,
    EnvConfig,
    EvaluationConfig,
    TrainingConfig,
)
from worldloom.trees import flatten_tree

log = logging.getLogger(__name__)

SECTIONS = {
    "training": TrainingConfig,
    "evaluation": EvaluationConfig,
    "data": DataConfig,
    "checkpoint": CheckpointConfig,
}
# Keys of the env section that configure how environments are run, not which.
RUNNING = ("num_envs", "workers", "timeout")
# Keys that had another name before format 1 of runs.
RENAMED = {
    "env.repeat": "env.action_repeat",
    "env.stack": "env.frame_stack",
    "env.size": "env.image_size",
    "data.online": "data.online_queue",
}
# Packages that loggers, and classes derived from them, need.
PACKAGES = {"WandbLogger": "wandb", "MLFlowLogger": "mlflow"}
# What an annotation may allow, and its name in messages.
KINDS: dict[Any, str] = {
    bool: "true or false",
    int: "a whole number",
    float: "a number",
    str: "a string",
    list: "a list",
    dict: "keys with values",
}


@dataclass
class RunConfig:
    """The keys of a configuration that belong to no section; conf/config.yaml describes them."""

    name: str
    seed: int
    folder: str
    sweep: str | None = None
    resume: str | None = None
    init_from: str | None = None
    threads: int | None = None
    nonfinite: str = "stop"

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no run can have."""
        known = self.nonfinite in ("stop", "skip")
        require(bool(self.name.strip()), "name", self.name, "a name for the run")
        require(known, "nonfinite", self.nonfinite, "stop or skip")
        require(0 <= self.seed < 2**32, "seed", self.seed, f"an integer from 0 to {2**32 - 1}")
        held = self.threads is None or 1 <= self.threads <= 1024
        require(held, "threads", self.threads, "from 1 to 1024, or null for all cores")
        source = self.init_from
        if source is not None and self.resume is None and not Path(source).expanduser().exists():
            raise ValueError(f"init_from: no file or folder {source!r}; check the path")


def validate_config(cfg: DictConfig, choices: Mapping[str, Any], devices: bool = True) -> None:
    """Raise ValueError for an unknown or impossible setting, before anything is built.

    choices: {group: name} as chosen on the command line, as far as it is known.
    devices: whether the run is to train on this machine, which then needs its devices.
    """
    require_family(choices.get("experiment"), choices.get("model"))
    keys, groups = top_level_keys()
    for key in map(str, cfg):
        if key not in keys:
            hint = hint_key(key, str(cfg[key]), cfg) or suggest_key(key, keys)
            raise ValueError(f"unknown key '{key}'{hint}")
    for key in keys:
        if key not in cfg:
            off = " (null removes a part of it: logger.csv=null)" if key in groups else ""
            raise ValueError(f"'{key}' is missing, but every run needs it; drop ~{key}{off}")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        example = "my_pkg.MyClass" if missing[0].endswith("_target_") else "…"
        raise ValueError(f"{', '.join(missing)} is not set; add {missing[0]}={example}")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for key, value in flatten_tree(plain, ".", lists=True).items():
        require_computable(key, value)
    base = _base_config()
    for name in (*groups, *(key for key in base if isinstance(base[key], dict))):
        if not isinstance(plain[name], dict):
            raise ValueError(
                f"{name} is {format_value(plain[name])}; expected keys: write {name}.KEY=VALUE"
            )
    build_settings("", {k: plain[k] for k in base if not isinstance(base[k], dict)}, RunConfig)
    require_known("data", plain["data"], {k for held in _choices("data") for k in held})
    for name, cls in SECTIONS.items():
        build_settings(name, plain[name], cls)
    validate_env(plain["env"])
    _check_collection(plain)
    _check_model(plain["model"], choices.get("model"))
    for name in ("optimizer", "planner"):
        _check_call(name, plain[name])
    _check_optimizer(plain["optimizer"])
    _check_trainer(plain["trainer"])
    if devices:
        _check_devices(plain["trainer"])
    for name, method in (("logger", "log_metrics"), ("callbacks", "on_fit_start")):
        for key, part in plain[name].items():
            if part is not None:
                _check_call(f"{name}.{key}", part, method)


def validate_env(env: Mapping[str, Any]) -> None:
    """Raise ValueError for an impossible value of the keys that all environments share."""
    shared = {field.name for field in fields(EnvConfig)}
    build_settings("env", {key: value for key, value in env.items() if key in shared}, EnvConfig)


def build_settings(name: str, values: Mapping[str, Any], cls: type) -> Any:
    """Build a settings class from a section of a configuration, after checking the value types.

    name: of the section, "" for the settings of a command.

    Raises:
        ValueError: names the key, what is wrong with it and what was expected.
    """
    dotted, hints = f"{name}." if name else "", typing.get_type_hints(cls)
    known: Any = fields(cls)
    require_known(name, values, [field.name for field in known])
    values = {
        key: str(value) if hints[key] is str and type(value) in (int, float) else value
        for key, value in values.items()
    }
    required = [f.name for f in known if f.default is MISSING and f.default_factory is MISSING]
    if missing := [key for key in required if key not in values]:
        raise ValueError(f"{', '.join(missing)} is not set; add {dotted}{missing[0]}=…")
    for field in known:
        if field.name in values:
            check_type(dotted + field.name, values[field.name], hints[field.name], field.default)
    try:
        return cls(**values)
    except ValueError as error:
        raise ValueError(f"{dotted}{error}") from None


def check_arguments(name: str, values: Mapping[str, Any], target: Any) -> None:
    """Raise ValueError for a value that a class or function does not take, by its signature.

    name: of the section, in front of the keys. Annotations that are not made of plain types are not
    checked.
    """
    try:
        takes = inspect.signature(target).parameters
    except ValueError:  # a builtin without a signature
        return
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        require_known(name, values, takes)
    try:
        hints = typing.get_type_hints(target.__init__ if inspect.isclass(target) else target)
    except Exception:  # annotations that cannot be evaluated, or none
        return
    for key, value in values.items():
        if key in takes and key in hints:
            check_type(f"{name}.{key}", value, hints[key], takes[key].default)


def check_type(path: str, value: Any, annotation: Any, default: Any) -> None:
    """Raise ValueError for a value whose type an annotation such as `int | None` does not allow.

    default: is always allowed, and is the example in the message.
    """
    kinds = _kinds(annotation)
    if not kinds or (value is None and default is None):
        return
    allowed = {*kinds, int} if float in kinds else kinds
    held = list if isinstance(value, tuple) else type(value)
    null = ", or null" if type(None) in kinds else ""
    example = list(default) if isinstance(default, tuple) else default
    such = f" such as {example}" if type(example) in (int, float, list) else ""
    if held not in allowed:
        wanted = " or ".join(KINDS[kind] for kind in KINDS if kind in kinds)
        raise ValueError(f"{path} is {format_value(value)}; expected {wanted}{such}{null}")
    if isinstance(value, float) and not math.isfinite(value):
        raise ValueError(f"{path} is {value}; expected a finite number{such}{null}")


def _kinds(annotation: Any) -> set[Any]:
    """Return the plain types that an annotation allows, or nothing if it allows other types too."""
    union = typing.get_origin(annotation) in (typing.Union, types.UnionType)
    kinds = set()
    for option in typing.get_args(annotation) if union else (annotation,):
        kind = typing.get_origin(option) or option
        kind = {tuple: list, Sequence: list, Mapping: dict}.get(kind, kind)
        if kind not in KINDS and kind is not type(None):
            return set()
        kinds.add(kind)
    return kinds


def _check_collection(plain: Mapping[str, Any]) -> None:
    """Check that a run which collects has room for its sequences and steps left to train."""
    data, training = plain["data"], plain["training"]
    if "path" in data:
        return
    capacity, length = data["capacity"], training["sequence_length"]
    needed = length * plain["env"].get("num_envs", 1)
    if isinstance(capacity, int | float) and capacity < needed:
        raise ValueError(
            f"data.capacity is {capacity}; expected at least {needed}, for {needed // length} "
            f"environments with a sequence of {length} steps each; raise it, or lower "
            "training.sequence_length or env.num_envs"
        )
    total = training["total_steps"]
    if long := [x for x in ("random_steps", "prefill") if (training[x] or 0) >= total]:
        raise ValueError(
            f"{' and '.join(f'training.{name} is {training[name]}' for name in long)}; expected "
            f"fewer than total_steps = {total}; lower them, or raise training.total_steps"
        )


def _check_call(name: str, part: Any, method: str = "") -> None:
    """Check that the class which `_target_` names exists and takes the keys next to it.

    method: one that the class must have; otherwise it is not a Lightning logger or callback.
    """
    from worldloom.records import import_target

    if not isinstance(part, dict) or not isinstance(part.get("_target_"), str):
        held = "" if isinstance(part, dict) else f"{name} is {format_value(part)}; "
        raise ValueError(
            f"{held}{name}._target_ is not set; expected {name}._target_=my_pkg.MyClass and its "
            "arguments"
        )
    try:
        target = import_target(part["_target_"])
    except ValueError as error:
        raise ValueError(f"{name}._target_: {error}") from None
    if inspect.isclass(target) and not hasattr(target, method or "__init__"):
        raise ValueError(
            f"{name}._target_ is {part['_target_']}, which has no {method}; expected a subclass of "
            f"lightning.pytorch's {'Callback' if method == 'on_fit_start' else 'Logger'}"
        )
    require_supported(name, target)
    arguments = {key: value for key, value in part.items() if not key.startswith("_")}
    check_arguments(name, arguments, target)
    for base, package in PACKAGES.items():
        named = any(cls.__name__ == base for cls in getattr(target, "__mro__", ()))
        if named and importlib.util.find_spec(package) is None:
            raise ValueError(
                f"{name} needs the package {package}; pip install 'worldloom[{package}]'"
            )


def _check_optimizer(section: Mapping[str, Any]) -> None:
    """Build the optimizer for one number, so that its own checks run before the model is built."""
    import torch

    from worldloom.records import import_target

    options = {key: value for key, value in section.items() if not key.startswith("_")}
    try:
        import_target(section["_target_"])([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"optimizer: {error}") from None


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    """Reject arguments with which a run would silently train something else, and precisions."""
    from worldloom.training import capture, precision

    _check_call("trainer", {k: v for k, v in trainer.items() if k not in capture.KEYS})
    precision.require_precision(trainer.get("precision"))
    for key in capture.KEYS:
        capture.require_mode(key, trainer.get(key, "auto"))
    for key, (harmless, instead) in TRAINER.items():
        if key in trainer and trainer[key] not in harmless:
            raise ValueError(
                f"trainer.{key} is {format_value(trainer[key])}, which a run does not support; "
                f"leave it out and use {instead}"
            )
    require_strategy(trainer)


def _check_devices(trainer: Mapping[str, Any]) -> None:
    """Check that this machine has the devices to train on."""
    from worldloom.devices import require_accelerator

    if isinstance(accelerator := trainer.get("accelerator", "auto"), str):
        require_accelerator(accelerator, trainer.get("devices", "auto"))


def _check_model(section: Mapping[str, Any], choice: Any) -> None:
    """Check hyperparameters against the preset's values and, of a subclass, its signature."""
    from worldloom.factory import find_own_parameters
    from worldloom.records import import_target, list_parameters

    if choice not in [file_name(str(name)) for name in (*preset_names(), *aliases())]:
        return
    preset = load_preset(choice)
    try:
        own = find_own_parameters(preset, section)
    except ValueError as error:
        raise ValueError(f"model._target_: {error}") from None
    override_preset(preset, section, choice, own)
    if own is None:
        return
    cls = import_target(section["_target_"])
    check_arguments("model", {key: section[key] for key in own if key in section}, cls)
    for name, parameter in list_parameters(cls)[0].items():
        if parameter.default not in (parameter.empty, None, preset.get(name, parameter.default)):
            log.warning(
                "%s has the default %s=%r, but the preset %s passes %r; to change it: model.%s=…",
                *(cls.__name__, name, parameter.default, choice, section[name], name),
            )


def require_known(name: str, given: Iterable[Any], known: Iterable[str]) -> None:
    """Raise ValueError for a key of a section that is not among the known ones."""
    names = [str(key) for key in known]
    for key in given:
        if key not in names:
            dotted = f"{name}." if name else ""
            raise ValueError(f"unknown key '{dotted}{key}'{suggest_key(str(key), names, dotted)}")


def suggest_key(key: str, known: Iterable[Any], prefix: str = "") -> str:
    """Return the end of a message about an unknown key: its new name, the nearest, or all known."""
    names = [str(name) for name in known]
    if new := RENAMED.get(prefix + key):
        return f"; it was renamed: write {new}"
    return suggest(key, names, prefix) or (
        f"; {prefix[:-1] or 'the keys are'}{' has' * bool(prefix)} {', '.join(names) or 'no keys'}"
    )


def format_value(value: Any) -> str:
    """Return a value as a user would write it in YAML."""
    words = {None: "null", True: "true", False: "false"}
    return words[value] if value is None or isinstance(value, bool) else repr(value)


def quote_text(text: str) -> str:
    """Return a text in quotes, as Hydra reads it back in an override."""
    text = re.sub(r"(\\+)(?='|$)", r"\1\1", text)
    return "'" + text.replace("'", r"\'") + "'"


def top_level_keys() -> tuple[list[str], list[str]]:
    """Return the keys of a whole configuration, and those of them that are groups."""
    entries = _read_config()["defaults"]
    groups = [str(key) for entry in entries if isinstance(entry, dict) for key in entry]
    aside = ("experiment", "search")
    groups = [group for group in groups if group not in aside and "hydra" not in group]
    return [*groups, *_base_config()], groups


def _base_config() -> dict[str, Any]:
    """Return the keys that conf/config.yaml itself sets."""
    return {k: v for k, v in _read_config().items() if k not in ("defaults", "hydra")}


@functools.cache
def _read_config() -> dict[str, Any]:
    """Return conf/config.yaml, which callers do not change."""
    held: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "config.yaml"))
    return held


def _choices(group: str) -> list[dict[str, Any]]:
    return [read_choice(file) for file in choice_files(group).values()]
