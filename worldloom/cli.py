"""The command line's manners: typed settings, and one readable line for what a user got wrong."""

import os
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.presets import config_dir, nearest
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
)


def register_schemas() -> None:
    """Make the types of the sections known to Hydra."""
    store = ConfigStore.instance()
    for name, cls in SECTIONS.items():
        store.store(group=name, name="default", node=cls)


def validate(cfg: DictConfig) -> None:
    """Raise ValueError for an unknown or impossible setting, before anything is built."""
    for name, cls in SECTIONS.items():
        for key in cfg[name]:
            if key not in (known := field_names(cls)):
                raise ValueError(f"unknown key '{name}.{key}'{nearest(str(key), known)}")
        values: Any = OmegaConf.to_container(cfg[name], resolve=True)
        try:
            cls(**values)
        except ValueError as error:
            raise ValueError(f"{name}.{error}") from None


@contextmanager
def readable_errors() -> Iterator[None]:
    """Print a user's mistake as one line and exit with 1; HYDRA_FULL_ERROR=1 shows everything."""
    full = os.environ.get("HYDRA_FULL_ERROR", "0") not in ("", "0")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # so that Hydra hands errors on instead of printing them
    try:
        yield
    except USER_ERRORS as error:
        if full:
            raise
        print(f"error: {explain(error)}", file=sys.stderr)
        sys.exit(1)


def explain(error: BaseException) -> str:
    """Return one line that says what was wrong, what was expected and how to fix it."""
    text = str(error)
    cause = error.__cause__
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Could not find '([^']+)'", text):
        return _unknown_option(match[1])
    if match := re.search(r"Error merging override (\S+)", text):
        reason = str(cause or error).splitlines()[0]
        return f"{match[1]}: {reason[0].lower()}{reason[1:]}"
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or repr(error)


def _unknown_key(key: str) -> str:
    parent, _, name = key.rpartition(".")
    try:
        node: Any = OmegaConf.select(_composed_groups(), parent) if parent else _composed_groups()
    except USER_ERRORS:
        node = None
    if not isinstance(node, DictConfig):
        return f"unknown key '{key}'; there is no section '{parent}'"
    prefix = f"{parent}." if parent else ""
    names = [str(key) for key in node]
    hint = nearest(key, [prefix + name for name in names])
    if not hint:
        hint = f"; {parent or 'the top level'} has {', '.join(names)}"
    return f"unknown key '{key}'{hint}; to add a key write +{key}=…"


def _unknown_option(path: str) -> str:
    group, _, name = path.rpartition("/")
    options = sorted(f.stem for f in (config_dir() / group).glob("*.yaml"))
    if not options:
        groups = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
        return f"unknown group '{group}'; groups: {', '.join(groups)}"
    hint = nearest(name, options)
    return f"unknown {group} '{name}'{hint}; choices: {', '.join(options)}"


def _composed_groups() -> DictConfig:
    """Compose the configuration from the group choices on the command line alone."""
    choices = [a for a in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w.:-]+", a)]
    GlobalHydra.instance().clear()
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose(config_name="config", overrides=choices)
