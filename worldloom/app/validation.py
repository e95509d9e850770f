"""What a whole configuration must be like before anything is built from it."""

import inspect
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.errors import suggest
from worldloom.presets import (
    aliases,
    config_dir,
    file_name,
    load_preset,
    override_preset,
    preset_names,
    read_choice,
)
from worldloom.training.config import EvaluationConfig, TrainingConfig, field_names

SECTIONS = {"training": TrainingConfig, "evaluation": EvaluationConfig}


def require_valid(cfg: DictConfig, choices: Mapping[str, Any]) -> None:
    """Raise ValueError for an unknown or impossible setting, before anything is built.

    choices: {group: name} as chosen on the command line, as far as it is known.
    """
    top, groups = top_level()
    for key in map(str, cfg):
        if key not in top:
            raise ValueError(f"unknown key '{key}'{instead(key, top)}")
    for key in top:
        if key not in cfg:
            off = " (null leaves out a part of it: logger.csv=null)" if key in groups else ""
            raise ValueError(f"'{key}' was left out; expected it in every run; drop ~{key}{off}")
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        example = "my_pkg.MyClass" if missing[0].endswith("_target_") else "…"
        raise ValueError(f"{', '.join(missing)} is not set; add {missing[0]}={example}")
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    for name in groups:
        if not isinstance(plain[name], dict):
            raise ValueError(f"{name} is {plain[name]!r}; expected keys: write {name}.KEY=VALUE")
    for name, example in _base().items():  # such as checkpoint: {every: 10min}
        if isinstance(example, dict):
            if not isinstance(plain[name], dict):
                raise ValueError(f"{name} is {shown(plain[name])}; expected {_wanted(example)}")
            _require_known(name, plain[name], example)
    for name, cls in SECTIONS.items():
        checked_section(name, plain[name], cls)
    for name in groups:
        if name not in (*SECTIONS, "model"):
            _check_kinds(name, plain[name], _reference(name, plain[name], choices.get(name)))
    check_env_section(plain["env"])
    _check_data(plain)
    _require_known("data", plain["data"], {k for s in _choices("data").values() for k in s})
    _require_integer("seed", cfg.seed, 0, "an integer from 0 to 4294967295", limit=2**32)
    if cfg.threads is not None:
        _require_integer("threads", cfg.threads, 1, "at least 1, or null for all cores")
    _check_texts(plain)
    _check_model(plain["model"], choices.get("model"))
    for name in ("trainer", "optimizer", "planner"):
        _check_call(name, plain[name])
    _check_optimizer(plain["optimizer"])
    for name, method in (("logger", "log_metrics"), ("callbacks", "on_fit_start")):
        for key, part in plain[name].items():
            if part is not None:
                _check_call(f"{name}.{key}", part, method)


def checked_section(name: str, values: Mapping[str, Any], cls: type) -> Any:
    """Make a settings class from a section of a configuration, its types checked.

    name: of the section, "" for what a command takes without one.

    Raises:
        ValueError: names the key, what is wrong with it and what was expected.
    """
    _require_known(name, values, field_names(cls))
    dotted = f"{name}." if name else ""
    try:
        merged: Any = OmegaConf.to_container(OmegaConf.merge(OmegaConf.structured(cls), values))
    except OmegaConfBaseException as error:
        key = str(getattr(error, "full_key", ""))
        raise ValueError(wrong_type(f"{dotted}{key}", values.get(key), str(error))) from None
    if missing := sorted(key for key, value in merged.items() if value == "???"):
        raise ValueError(f"{', '.join(missing)} is not set; add {dotted}{missing[0]}=…")
    try:
        return cls(**merged)
    except ValueError as error:
        raise ValueError(f"{dotted}{error}") from None


def _check_texts(plain: Mapping[str, Any]) -> None:
    """Check what is a name or a path."""
    for key in ("name", "folder", *(("init_from",) if plain["init_from"] is not None else ())):
        if not isinstance(plain[key], str) or not plain[key].strip():
            raise ValueError(
                f"{key} is {shown(plain[key])}; expected a {'name' * (key == 'name') or 'path'}"
            )
    source = plain["init_from"]
    if source is not None and plain["resume"] is None and not Path(source).expanduser().exists():
        raise ValueError(f"init_from: no file or folder {source!r}; check the path")


def _check_kinds(name: str, given: Mapping[str, Any], known: Mapping[str, Any]) -> None:
    """Hold values to the kind of those in conf/: a flag, a whole number, a number, a list."""
    for key, example in known.items():
        path, value = f"{name}.{key}", given.get(key, example)
        if isinstance(example, dict) and isinstance(value, dict):
            _check_kinds(path, value, example)
            continue
        kinds = {bool: bool, int: int, float: int | float, list: list | tuple, dict: dict | None}
        kind: Any = kinds.get(type(example))
        if kind is None or path == "data.capacity" or name == "trainer":  # which take words too
            continue
        flag = isinstance(value, bool) and not isinstance(example, bool)
        if flag or not isinstance(value, kind):
            raise ValueError(f"{path} is {shown(value)}; expected {_wanted(example)}")
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"{path} is {value}; expected a finite number such as {example}")


def check_env_section(env: Mapping[str, Any]) -> None:
    """Check what every environment is made and run with."""
    for key in ("num_envs", "action_repeat", "frame_stack", "image_size", "time_limit"):
        value, off = env.get(key), ", or null" if key in ("image_size", "time_limit") else ""
        if key in env and value is not None and (type(value) is not int or value < 1):
            raise ValueError(f"env.{key} is {value!r}; expected a whole number of at least 1{off}")
    workers, timeout = env.get("workers", 0), env.get("timeout", 1)
    if workers != "auto" and (type(workers) is not int or workers < 0):
        raise ValueError(f"env.workers is {shown(workers)}; expected auto, or a number from 0")
    if isinstance(timeout, bool) or not isinstance(timeout, int | float) or not timeout > 0:
        raise ValueError(f"env.timeout is {shown(timeout)}; expected seconds, above 0")
    texts = {f"env.{key}": env[key] for key in ("id", "task", "game") if key in env}
    patterns = {f"env.obs.{key}": x for key, x in (env.get("obs") or {}).items() if x is not None}
    for key, value in {**texts, **patterns}.items():
        if not isinstance(value, str):
            wanted = "a regular expression" if key in patterns else "a name, see conf/env"
            raise ValueError(f"{key} is {shown(value)}; expected {wanted}")


def _check_data(plain: Mapping[str, Any]) -> None:
    """Check what the replay is to hold, as far as it is known before there is a model."""
    data, training = plain["data"], plain["training"]
    capacity = data.get("capacity")
    if not isinstance(path := data.get("path", ""), str):
        raise ValueError(f"data.path is {shown(path)}; expected a path, or an id of Minari")
    number = isinstance(capacity, int | float) and not isinstance(capacity, bool)
    if number and math.isfinite(capacity) and capacity >= 1:
        length, envs = training["sequence_length"], plain["env"].get("num_envs", 1)
        if "path" not in data and capacity < length * envs:
            raise ValueError(
                f"data.capacity is {capacity}; expected at least {length * envs}, for {envs} "
                f"environments with a sequence of {length} steps each; raise it, or lower "
                "training.sequence_length or env.num_envs"
            )
    elif capacity is not None and not isinstance(capacity, str):
        raise ValueError(
            f"data.capacity is {shown(capacity)}; expected steps such as 100000, or memory such as "
            "2GB"
        )
    steps, total = training["random_steps"], training["total_steps"]
    if "path" not in data and steps >= total:
        raise ValueError(
            f"training.random_steps is {steps}; expected fewer than total_steps = {total}; lower "
            "it, or raise training.total_steps"
        )


def _check_call(name: str, part: Any, has: str = "") -> None:
    """Hold the keys of a part to what its `_target_` takes.

    has: a method that classes must have; else they are none of lightning's.
    """
    from worldloom.factory import import_target

    if not isinstance(part, dict) or not isinstance(part.get("_target_"), str):
        held = "" if isinstance(part, dict) else f"{name} is {shown(part)}; "
        raise ValueError(
            f"{held}{name}._target_ is not set; expected {name}._target_=my_pkg.MyClass and its "
            "arguments"
        )
    try:
        target = import_target(part["_target_"])
    except ValueError as error:
        raise ValueError(f"{name}._target_: {error}") from None
    if inspect.isclass(target) and not hasattr(target, has or "__init__"):
        raise ValueError(
            f"{name}._target_ is {part['_target_']}, which has no {has}; expected a class derived "
            f"from lightning.pytorch's {'Callback' if has == 'on_fit_start' else 'Logger'}"
        )
    try:
        takes = inspect.signature(target).parameters
    except ValueError:  # it does not say what it takes
        return
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        _require_known(name, [key for key in part if not key.startswith("_")], takes)


def _check_optimizer(section: Mapping[str, Any]) -> None:
    """Make the optimizer once, of a single number: its own checks come too late in a run."""
    import torch

    from worldloom.factory import import_target

    options = {key: value for key, value in section.items() if not key.startswith("_")}
    try:
        import_target(section["_target_"])([torch.nn.Parameter(torch.zeros(1))], **options)
    except (ValueError, TypeError) as error:
        raise ValueError(f"optimizer: {error}") from None


def _require_known(name: str, given: Iterable[Any], known: Iterable[str]) -> None:
    for key in given:
        if key not in known:
            dotted = f"{name}." if name else ""
            raise ValueError(f"unknown key '{dotted}{key}'{instead(str(key), known, dotted)}")


def instead(key: str, known: Iterable[str], prefix: str = "") -> str:
    """Return the nearest of the known keys, or all of them, as the end of a message."""
    names = [str(name) for name in known]
    return suggest(key, names, prefix) or (
        f"; {prefix[:-1] or 'the keys are'}{' has' * bool(prefix)} {', '.join(names) or 'no keys'}"
    )


def shown(value: Any) -> str:
    """Write a value as a user would."""
    return "null" if value is None else repr(value)


def _wanted(example: Any) -> str:
    """Say what kind of value an example is."""
    if isinstance(example, bool):
        return "true or false"
    if isinstance(example, dict):
        return f"the keys {', '.join(example)}, one by one"
    kinds = {int: "a whole number", float: "a number", list: "a list"}
    return f"{kinds[type(example)]} such as {example}"


def top_level() -> tuple[list[str], list[str]]:
    """Return the keys of a whole configuration, and those of them that are groups."""
    entries: Any = OmegaConf.load(config_dir() / "config.yaml").defaults
    groups = [str(key) for entry in entries if isinstance(entry, DictConfig) for key in entry]
    groups.remove("experiment")
    return [*groups, *_base()], groups


def _base() -> dict[str, Any]:
    """Return what conf/config.yaml itself holds."""
    held: Any = OmegaConf.to_container(OmegaConf.load(config_dir() / "config.yaml"))
    return {key: value for key, value in held.items() if key not in ("defaults", "hydra")}


def _choices(group: str) -> dict[str, dict[str, Any]]:
    """Return what the choices of a group hold, without those that Hydra knows by type."""
    files = (config_dir() / group).glob("*.yaml")
    return {file.stem: read_choice(file) for file in sorted(files)}


def _reference(group: str, section: Mapping[str, Any], chosen: Any = None) -> dict[str, Any]:
    """Return the choice in conf/ that a section came from, as far as it can be told."""
    file = config_dir() / group / f"{chosen or 'default'}.yaml"
    if file.is_file():
        return read_choice(file)
    target = section.get("_target_")
    same = [held for held in _choices(group).values() if target and held.get("_target_") == target]
    return (same or [{}])[0]


def _check_model(section: Mapping[str, Any], choice: Any) -> None:
    """Hold the model section to its preset, whose types Hydra does not know."""
    names = [file_name(str(name)) for name in (*preset_names(), *aliases())]
    if choice in names:
        override_preset(load_preset(choice), section, choice)


def _require_integer(
    name: str, value: Any, least: int, wanted: str, limit: int | None = None
) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < least or (limit is not None and value >= limit):
        raise ValueError(f"{name} is {shown(value)}; expected {wanted}")


def wrong_type(key: str, value: Any, reason: str) -> str:
    """Say which kind of value a typed key takes, from what OmegaConf says about it."""
    given = value if isinstance(value, str) else shown(value)
    kinds = {"Integer": "a whole number", "Float": "a number", "valid bool": "true or false"}
    wanted = next((kind for word, kind in kinds.items() if word in reason), "another kind of value")
    if "ptional" in reason:  # "field 'x' is not Optional", "Non optional field cannot be …"
        section, _, name = key.rpartition(".")
        example = getattr(SECTIONS.get(section), name, None)
        such = "" if example is None else f" such as {example}"
        return f"{key} is null; expected a value{such}; leave it out for its default"
    if example := getattr(SECTIONS.get(key.split(".")[0]), key.split(".")[-1], None):
        wanted += f" such as {example}" if wanted != "true or false" else ""
    return f"{key} is {given}; expected {wanted}"
