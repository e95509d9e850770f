"""The command line's manners: typed settings, and one readable line for what a user got wrong."""

import os
import re
import shutil
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, InstantiationException, OverrideParseException
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.app.validation import (
    SECTIONS,
    instead,
    require_valid,
    top_level,
    wrong_type,
)
from worldloom.errors import suggest
from worldloom.presets import config_dir

# What a user can cause; anything else is our bug and keeps its traceback.
USER_ERRORS = (
    HydraException,
    OmegaConfBaseException,
    ValueError,
    TypeError,
    ImportError,
    OSError,
    FloatingPointError,
    MemoryError,
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
    choices = HydraConfig.get().runtime.choices if HydraConfig.initialized() else {}
    require_valid(cfg, choices)


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
    """Let a user's mistake end a single run; of a sweep it ends one job, as Hydra does it.

    A new folder in which nothing was trained yet goes with it.
    """
    folder = Path(HydraConfig.get().runtime.output_dir)
    begun = folder if _held(folder) <= {".hydra", "worldloom.log"} else None
    try:
        yield
    except USER_ERRORS as error:
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        if begun is not None:
            _forget(begun)
        raise _Stop from error


def _held(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()} if folder.is_dir() else {"not ours"}


def _forget(folder: Path) -> None:
    """Delete the folder of a run that ended before there was anything in it to keep."""
    files = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    if {file.parts[0] for file in files} <= {".hydra", "worldloom.log", "config.yaml", ".lock"}:
        shutil.rmtree(folder)


def explain(error: BaseException) -> str:
    """Return one line that says what was wrong, what was expected and how to fix it."""
    text, cause = str(error), error.__cause__
    if isinstance(error, ChildProcessError):
        return text  # with the traceback of a worker process, which is the user's to read
    if "Config group override must be a string" in text:
        return (
            "a group takes the name of a choice, such as trainer=gpu; only the recipe can be left "
            "out: '~experiment'"
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return one_line(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _unknown_key(match[1])
    if match := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        return _unknown_key(match[1])
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _unknown_option(match[1])
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"{match[1]} is {match[2]}, and commas separate the values of a sweep; write "
            f"'{match[1]}=[{match[2]}]' for a list, '{match[1]}=\"{match[2]}\"' for a text, or "
            "add -m to run one after the other"
        )
    if match := re.search(r"Error merging override (\S+)", text):
        key, _, value = match[1].lstrip("+").partition("=")
        return wrong_type(key, value, str(cause or error))
    if isinstance(error, OverrideParseException):
        return (
            f"cannot read {error.override!r}; expected GROUP=CHOICE or SECTION.KEY=VALUE, without "
            "spaces around the = and with quotes around a value that holds spaces, commas, "
            "brackets or the like: 'data.path=\"my data\"'"
        )
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"'{match[1]}' is not there, but other settings are taken from it; put it back"
    if isinstance(error, InstantiationException):
        key = re.search(r"full_key: (\S+)", text)
        return f"{key[1] if key else 'a _target_'}: {one_line(cause or error)}"
    if isinstance(error, OmegaConfBaseException):
        key = re.search(r"full_key: (\S+)", text)
        return f"{key[1] if key else 'the configuration'}: {text.splitlines()[0]}"
    return one_line(error)


def one_line(error: BaseException) -> str:
    """Return the message of an error without line breaks, or what there is if it has none."""
    text = str(error)
    return " ".join(line.strip() for line in text.splitlines() if line.strip()) or repr(error)


def _unknown_key(key: str) -> str:
    parent, dot, name = key.rpartition(".")
    try:
        node: Any = OmegaConf.select(_composed_groups(), parent) if parent else _composed_groups()
    except USER_ERRORS:
        node = None
    if not isinstance(node, DictConfig):
        top = top_level()[0]
        near = suggest(parent.split(".")[0], top)
        return f"unknown key '{key}'; there is no section '{parent}'{near}"
    if name in node:
        if isinstance(node[name], DictConfig):
            return f"{key} is no single value; set its keys one by one: {key}.KEY=VALUE"
        return f"'{key}' cannot be set where {parent} is left out; drop ~{parent}"
    add = f"; to add a key write +{key}=…" if parent and parent not in (*SECTIONS, "data") else ""
    return f"unknown key '{key}'{instead(name, [str(key) for key in node], parent + dot)}{add}"


def _unknown_option(path: str) -> str:
    group, _, name = path.rpartition("/")
    files = sorted(file.stem for file in (config_dir() / group).glob("*.yaml"))
    options = [file for file in files if not file.endswith("_base")]
    options += ["default"] * (group in SECTIONS)
    if not options:
        groups = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
        return f"unknown group '{group}'; groups: {', '.join(groups)}"
    hint = suggest(name, options)
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
