"""The command line's manners: typed settings, and one readable line for what a user got wrong."""

import os
import re
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.presets import (
    aliases,
    config_dir,
    file_name,
    load_preset,
    nearest,
    preset_names,
)
from worldloom.training.config import EvaluationConfig, TrainingConfig, field_names

SECTIONS = {"training": TrainingConfig, "evaluation": EvaluationConfig}

# What a user can cause; anything else is our bug and keeps its traceback.
USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    ImportError,
    FileNotFoundError,
    FloatingPointError,
    MemoryError,
    ChildProcessError,
)


class _Stop(BaseException):
    """Carries a user's mistake past Hydra, which adds a line of its own to every Exception."""


def register_schemas() -> None:
    """Make the types of the sections known to Hydra."""
    store = ConfigStore.instance()
    for name, cls in SECTIONS.items():
        store.store(group=name, name="default", node=cls)


def with_implied(words: Sequence[str]) -> list[str]:
    """Return the words of a command line, each after what it implies if nothing else was said.

    The default recipe is one environment's: who names another, or data, leaves it out. Data cannot
    do so in the defaults, because Hydra follows the recipe before it looks at them.
    env._target_=… is an environment of one's own, so the options of another are not for it.
    """
    said = {word.lstrip("+~").partition("=")[0] for word in words}
    full: list[str] = []
    for word in words:
        own = word.startswith("env._target_=")
        if (own or word == "data=offline" or word.startswith("env=")) and "experiment" not in said:
            full += ["~experiment"] * ("~experiment" not in full)
        if own and "env" not in said:
            full.append("env=custom")
        full.append(word)
    return full


def validate(cfg: DictConfig) -> None:
    """Raise ValueError for an unknown or impossible setting, before anything is built."""
    if missing := sorted(OmegaConf.missing_keys(cfg)):
        example = "my_pkg.MyClass" if missing[0].endswith("_target_") else "…"
        raise ValueError(f"{', '.join(missing)} is not set; add {missing[0]}={example}")
    for name, cls in SECTIONS.items():
        for key in cfg[name]:
            if key not in (known := field_names(cls)):
                hint = nearest(str(key), known, f"{name}.") or f"; {name} has {', '.join(known)}"
                raise ValueError(f"unknown key '{name}.{key}'{hint}")
        values: Any = OmegaConf.to_container(cfg[name], resolve=True)
        try:
            cls(**values)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None
    for key in ("num_envs", "repeat", "stack"):
        if (value := cfg.env.get(key)) is not None and not isinstance(value, int):
            raise ValueError(f"env.{key} is {value!r}; expected a whole number")
    _check_model(cfg)
    _require_integer("seed", cfg.seed, 0, "an integer from 0 to 4294967295", limit=2**32)
    if cfg.threads is not None:
        _require_integer("threads", cfg.threads, 1, "at least 1, or null for all cores")


def _check_model(cfg: DictConfig) -> None:
    """Hold the model section to its preset, whose types Hydra does not know."""
    from worldloom.factory import override_preset

    choice = HydraConfig.get().runtime.choices.get("model") if HydraConfig.initialized() else None
    names = [file_name(str(name)) for name in (*preset_names(), *aliases())]
    if choice in names:
        values: Any = OmegaConf.to_container(cfg.model, resolve=True)
        override_preset(load_preset(choice), values, choice)


def _require_integer(
    name: str, value: Any, least: int, wanted: str, limit: int | None = None
) -> None:
    ok = isinstance(value, int) and not isinstance(value, bool)
    if not ok or value < least or (limit is not None and value >= limit):
        raise ValueError(f"{name} is {value!r}; expected {wanted}")


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print a user's mistake as one line and exit with 1; HYDRA_FULL_ERROR=1 shows everything."""
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands errors on instead of printing them
    try:
        yield
    except (_Stop, *USER_ERRORS) as stopped:
        error = stopped.__cause__ if isinstance(stopped, _Stop) else stopped
        assert error is not None
        if before not in (None, "", "0"):
            raise error from error.__cause__
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def job_errors() -> Iterator[None]:
    """Let a user's mistake end a single run; of a sweep it ends one job, as Hydra does it."""
    try:
        yield
    except USER_ERRORS as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        raise _Stop from error


def explain(error: BaseException) -> str:
    """Return one line that says what was wrong, what was expected and how to fix it."""
    text = str(error)
    if isinstance(error, ChildProcessError):
        return text  # with the traceback of a worker process, which is the user's to read
    cause = error.__cause__
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Could not find '([^']+)'", text):
        return _unknown_option(match[1])
    if "Config group override must be a string" in text:
        return "a group takes the name of a choice; to leave a group out write ~GROUP"
    if match := re.search(r"Error merging override (\S+)", text):
        reason = str(cause or error).splitlines()[0]
        return f"{match[1]}: {reason[0].lower()}{reason[1:]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or repr(error)


def _unknown_key(key: str) -> str:
    parent, dot, name = key.rpartition(".")
    try:
        node: Any = OmegaConf.select(_composed_groups(), parent) if parent else _composed_groups()
    except USER_ERRORS:
        node = None
    if not isinstance(node, DictConfig):
        return f"unknown key '{key}'; there is no section '{parent}'"
    names = [str(key) for key in node]
    hint = nearest(name, names, parent + dot)
    if not hint:
        hint = f"; {parent or 'the top level'} has {', '.join(names)}"
    return f"unknown key '{key}'{hint}; to add a key write +{key}=…"


def _unknown_option(path: str) -> str:
    group, _, name = path.rpartition("/")
    files = sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))
    options = [file for file in files if not file.endswith("_base")]
    if not options:
        groups = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
        return f"unknown group '{group}'; groups: {', '.join(groups)}"
    hint = nearest(name, options)
    return f"unknown {group} '{name}'{hint}; choices: {', '.join(options)}"


def _composed_groups() -> DictConfig:
    """Compose the configuration from the group choices on the command line alone."""
    given = [re.fullmatch(r"([\w/]+)=[\w.:-]+", argument) for argument in sys.argv[1:]]
    return composed(*(m[0] for m in given if m and (config_dir() / m[1]).is_dir()))


def composed(*overrides: str) -> DictConfig:
    """Compose the configuration as the command line does with these overrides."""
    register_schemas()
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose(config_name="config", overrides=list(overrides))
