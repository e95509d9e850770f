"""The frame of every command: usage, settings, and one-line error messages."""

import os
import re
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import fields
from pathlib import Path
from typing import Any, ClassVar

from hydra._internal.hydra import Hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException, OverrideParseException
from hydra.experimental.callback import Callback
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, read_write
from omegaconf.errors import OmegaConfBaseException

import worldloom
from worldloom import starting
from worldloom.app.compose import (
    LAUNCHERS,
    SWEEPS,
    Overrides,
    compose_config,
    hint_launcher,
    key_of,
)
from worldloom.app.help import list_choices
from worldloom.app.hints import find_bare_word, find_dashes, hint_choice, hint_key
from worldloom.app.run_dir import claim_folder, make_new_folder, reject_links, remove_empty
from worldloom.app.sweep_folder import require_idle
from worldloom.app.validation import RENAMED, SECTIONS, build_settings, suggest_key, top_level_keys
from worldloom.envs.contract import guarding_exit
from worldloom.errors import escape, quote, suggest
from worldloom.memory import keep_freed_memory
from worldloom.presets import config_dir, extra_dirs

# Errors that a user can cause. Any other error is a bug and keeps its traceback.
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
# Keys with which commands name a run.
RUN_KEYS = ("checkpoint", "policy", "resume", "run")
PATHS = (*RUN_KEYS, "init_from", "out", "data.path", "hydra.run.dir")


class _Stop(BaseException):
    """Carries a user error past Hydra, which would print an extra line for any Exception."""


@contextmanager
def _passing_hydra() -> Iterator[None]:
    """Raise user errors so that Hydra, which turns those of a callback into warnings, stops."""
    try:
        yield
    except USER_ERRORS as error:
        raise _Stop from error


class FolderCheck(Callback):
    """Claim the folder of a run, and check that of a sweep, before Hydra writes into it.

    claims: held until `release`.
    created: the folders that are created for the command, the innermost first.
    """

    claims: ClassVar[ExitStack] = ExitStack()
    created: ClassVar[list[Path]] = []

    def on_run_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Claim the folder of a single run; a run of the same second gets another one."""
        folder = self._find(config, "hydra.run.dir")
        raw: Any = OmegaConf.to_container(config.hydra.run, resolve=False)
        with _passing_hydra():
            if "${now:" in raw["dir"]:
                folder = make_new_folder(folder)
                FolderCheck.created[:1] = [folder]
                with read_write(config.hydra.run):
                    config.hydra.run.dir = str(folder)
            self.claims.enter_context(claim_folder(folder, config.resume is not None))

    def on_multirun_start(self, config: DictConfig, **kwargs: Any) -> None:
        """Check the folder of a sweep, which contains those of its jobs."""
        folder = self._find(config, "hydra.sweep.dir")
        with _passing_hydra():
            reject_links(folder)
            require_idle(folder)  # Hydra replaces multirun.yaml before `hold_sweep`

    @classmethod
    def release(cls) -> None:
        """Release the folder, and delete it if nothing was written into it."""
        cls.claims.close()
        remove_empty(cls.created)

    def _find(self, config: DictConfig, key: str) -> Path:
        HydraConfig.instance().set_config(config)  # for ${hydra:...} in the name of the folder
        folder = Path(str(OmegaConf.select(config, key))).absolute()
        with _passing_hydra():
            for path in (folder, *folder.parents):
                if path.exists() and not path.is_dir():
                    raise ValueError(f"{path} is a file; choose another folder")
        FolderCheck.created = [path for path in (folder, *folder.parents) if not path.exists()]
        return folder


@starting.safe_output()
def run_command(
    usage: str, command: Callable[[Overrides], None], needs_arguments: bool = True
) -> None:
    """Run a command with the arguments of the process; the `main` of every command but `run`.

    --help, or no arguments where some are needed, prints the usage. Errors that the user can fix
    end the process with one line and exit code 1.
    """
    args = tuple(sys.argv[1:])
    if (needs_arguments and not args) or {"-h", "--help"} & {*args}:
        print(usage)
        sys.exit(0 if args else 2)
    print_version(args)
    keep_freed_memory()
    with print_errors():
        args = take_config_dir(args)
        if slip := find_dashes(args):
            raise ValueError(f"{slip[0]}; write {slip[1]}={slip[2]}")
        starting.end()
        reject_empty(Overrides(args))
        command(Overrides(args))


def reject_empty(overrides: Overrides) -> None:
    """Raise ValueError for a path without a value, as from a variable that is not set."""
    for key in PATHS:
        if overrides.value(key) == "":
            raise ValueError(f"{key} is empty; expected a path, or leave {key} out")


def take_config_dir(args: Sequence[str]) -> tuple[str, ...]:
    """Remove --config-dir from the arguments; the files in its folder become choices of groups.

    Raises:
        ValueError: there is no such folder.
    """
    extra_dirs.clear()
    rest, left = [], iter(args)
    for arg in left:
        flag, equals, value = arg.partition("=")
        if flag not in ("--config-dir", "-cd"):
            rest.append(arg)
            continue
        value = value if equals else next(left, "")
        folder = Path(value).expanduser().absolute()
        if not value or not folder.is_dir():
            raise ValueError(
                f"--config-dir is {value!r}; expected a folder with files such as env/my_env.yaml"
            )
        extra_dirs[:] = [folder]
    return tuple(rest)


def print_version(args: Sequence[str]) -> None:
    """Print worldloom's version and exit if the arguments contain --version."""
    if "--version" in args:
        print(f"worldloom {worldloom.__version__}")
        sys.exit()


def parse_settings(args: Sequence[str], cls: type, **defaults: Any) -> Any:
    """Build the settings class of a command from its KEY=VALUE arguments.

    Raises:
        ValueError: an argument has another form, or an unknown key or wrong value.
    """
    for arg in args:
        if not re.match(r"[A-Za-z_]\w*=", arg):
            raise ValueError(
                f"cannot read {arg!r}; expected arguments such as seed=0 and env.KEY=VALUE, "
                "without spaces around the ="
            )
    given: Any = OmegaConf.to_container(OmegaConf.from_cli(list(args)))
    names = [field.name for field in fields(cls)]
    wanted = next((key for key in RUN_KEYS if key in names), None)
    for key in RUN_KEYS:
        if wanted and key in given and key not in names:
            raise ValueError(f"unknown key '{key}'; write {wanted}={given[key]}")
    return build_settings("", {**defaults, **given}, cls)


def split_settings(overrides: Overrides) -> tuple[list[str], Overrides]:
    """Separate the settings of a command from the overrides of a run's configuration.

    The latter are env=NAME, env.KEY=VALUE and SECTION._target_=NAME.
    """
    config = overrides.select(r"env$|env\.|[\w.]+\.[\w.]*_\w+_(\.|$)")
    return [arg for arg in overrides if arg not in config.args], config


def reject_slips(args: Sequence[str]) -> None:
    """Raise ValueError for arguments of `run` that are not overrides, with what to write instead.

    Hydra would print its usage, or name only the first word of several.
    """
    if slip := find_dashes(args) or find_bare_word(args):
        problem, key, value = slip
        composed = compose_config()
        fix = "" if key in composed else hint_key(key, value, composed)
        raise ValueError(problem + (fix or f"; write {key}={value}"))
    overrides = Overrides(tuple(args))
    if launcher := overrides.select("hydra[./]launcher").args * (not SWEEPS & {*args}):
        raise ValueError(
            f"{launcher[0]} is a setting of sweeps, but -m was not given; add -m, also for one run"
        )
    if run := overrides.value("checkpoint"):
        raise ValueError(
            f"checkpoint={run} is not a setting of a run; to continue a run write "
            f"{quote(f'resume={run}')}, to score it: worldloom eval {quote(f'checkpoint={run}')}"
        )


@contextmanager
def composing_once(args: Sequence[str]) -> Iterator[None]:
    """Keep Hydra from composing a configuration twice, the first time only to read hydra.mode.

    It is null unless an argument or a file of the user sets it. Composing takes 0.2 s.
    """
    read_mode = Hydra.get_mode
    if not extra_dirs and not any(key_of(arg) in ("hydra", "hydra.mode") for arg in args):
        setattr(Hydra, "get_mode", lambda *args, **kwargs: None)  # noqa: B010 (mypy rejects it)
    try:
        yield
    finally:
        setattr(Hydra, "get_mode", read_mode)  # noqa: B010


@contextmanager
def print_errors() -> Iterator[None]:
    """Print a user error as one line and exit with code 1.

    With HYDRA_FULL_ERROR=1 the whole traceback is printed instead.
    """
    before = os.environ.get("HYDRA_FULL_ERROR")
    os.environ["HYDRA_FULL_ERROR"] = "1"  # makes Hydra raise errors instead of printing them
    try:
        with guarding_exit():
            yield
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.exit(130)
    except (_Stop, *USER_ERRORS) as stopped:
        error = stopped.__cause__ if isinstance(stopped, _Stop) else stopped
        assert error is not None
        if before not in (None, "", "0"):
            raise error from error.__cause__
        print(f"error: {explain_error(error)}", file=sys.stderr)
        sys.exit(1)
    finally:
        os.environ.pop("HYDRA_FULL_ERROR")
        if before is not None:
            os.environ["HYDRA_FULL_ERROR"] = before


@contextmanager
def stop_on_errors() -> Iterator[None]:
    """End a single run on a user error; in a sweep only the job ends, as Hydra does it."""
    try:
        yield
    except USER_ERRORS as error:
        remove_empty([Path(HydraConfig.get().runtime.output_dir)])
        if HydraConfig.get().mode == RunMode.MULTIRUN:
            raise
        raise _Stop from error


def explain_error(error: BaseException) -> str:
    """Return one line that gives the wrong value, what was expected and how to fix it."""
    if isinstance(error, ChildProcessError):  # contains the traceback of a worker process
        return "\n".join(map(escape, str(error).split("\n")))
    return escape(_explain(error))


def _explain(error: BaseException) -> str:
    text = str(error)
    if "Config group override must be a string" in text:
        return (
            "a group takes the name of a choice, such as trainer=gpu; only the recipe can be "
            "removed: '~experiment'"
        )
    if not isinstance(error, HydraException | OmegaConfBaseException):
        return join_lines(error)
    if match := re.search(r"Could not override '([^']+)'", text):
        return _explain_key(match[1])
    if match := re.search(r"Could not delete from config. '([^']+)' does not exist", text):
        return _explain_key(match[1])
    if match := re.search(r"Could not (?:find|load) '([^']+)'", text):
        return _explain_choice(match[1])
    if match := re.search(r"Ambiguous value for argument '([^=]+)=(.*)'", text):
        return (
            f"{match[1]} is {match[2]}, and commas separate the values of a sweep; write "
            f"'{match[1]}=[{match[2]}]' for a list, '{match[1]}=\"{match[2]}\"' for a text, or "
            "add -m to run one after the other"
        )
    if isinstance(error, OverrideParseException):
        wrong = re.sub(r"^hydra\.(run|sweep)\.dir=", "folder=", error.override)
        if match := re.fullmatch(r"(\+*[A-Za-z_][\w.]*)=([^\s'\"\\[{][^'\"\\]*)", wrong):
            return (
                f"cannot read {wrong!r}; a value with brackets, commas or other characters with a "
                f"meaning needs quotes: '{match[1]}=\"{match[2]}\"'"
            )
        return (
            f"cannot read {wrong!r}; expected GROUP=CHOICE or SECTION.KEY=VALUE, without spaces "
            "around the = and with quotes around a value that contains spaces, commas or "
            "brackets: 'data.path=\"my data\"'"
        )
    if match := re.search(r"Interpolation key '([^']+)' not found", text):
        return f"'{match[1]}' is missing, but other settings are computed from it; put it back"
    if isinstance(error, OmegaConfBaseException):
        key = re.search(r"full_key: (\S+)", text)
        return f"{key[1] if key else 'the configuration'}: {text.splitlines()[0]}"
    return join_lines(error)


def join_lines(error: BaseException) -> str:
    """Return the message of an error without line breaks, or its repr if it has no message."""
    return " ".join(str(error).split()) or repr(error)


def _explain_key(key: str) -> str:
    """Return why Hydra cannot set or delete a key."""
    parent, dot, name = key.rpartition(".")
    if parent == "hydra.launcher":
        return f"unknown key '{key}'{hint_launcher(name, Overrides(tuple(sys.argv[1:])))}"
    try:
        composed = _compose_choices()
        node: Any = OmegaConf.select(composed, parent) if parent else composed
    except USER_ERRORS:
        return f"unknown key '{key}'"
    if isinstance(node, DictConfig) and name in node:
        if isinstance(node[name], DictConfig):
            return f"{key} is not a single value; set its keys one by one: {key}.KEY=VALUE"
        return f"'{key}' cannot be set where {parent} is removed; drop ~{parent}"
    value = Overrides(tuple(sys.argv[1:])).value(key) or "…"
    if key not in RENAMED and (hint := hint_key(key, value, composed)):
        return f"unknown key '{key}'{hint}"
    if parent in ("search.sampler", "search.pruner"):
        return f"{parent} has no keys; write '{parent}={{name: CLASS, {name}: {value}}}'"
    if not isinstance(node, DictConfig):
        near = suggest(parent.split(".")[0], top_level_keys()[0])
        return f"unknown key '{key}'; there is no section '{parent}'{near}"
    can_add = parent and parent not in SECTIONS and key not in RENAMED
    add = f"; to add a key write +{key}=…" if can_add else ""
    return f"unknown key '{key}'{suggest_key(name, node, parent + dot)}{add}"


def _explain_choice(path: str) -> str:
    """Return which choices a group has instead of an unknown one."""
    group, _, name = path.rpartition("/") if path.startswith("hydra/") else path.partition("/")
    options = list(LAUNCHERS) if group == "hydra/launcher" else list_choices(group)
    if not options:
        groups = sorted(folder.name for folder in config_dir().iterdir() if folder.is_dir())
        return f"unknown group '{path.rpartition('/')[0]}'; groups: {', '.join(groups)}"
    if hint := hint_choice(group, name):
        return f"unknown {group} '{name}'{hint}"
    return f"unknown {group} '{name}'{suggest(name, options)}; choices: {', '.join(options)}"


def _compose_choices() -> DictConfig:
    """Compose the configuration from the group choices on the command line alone."""
    given = [arg for arg in sys.argv[1:] if re.fullmatch(r"[\w/]+=[\w/.:-]+", arg)]
    return compose_config(*(arg for arg in given if (config_dir() / key_of(arg)).is_dir()))
