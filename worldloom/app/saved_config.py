"""What the configuration of a run may contain, and what a file may make worldloom execute.

Everything that a run folder or a dataset says about code passes through here. Such files are read
as plain data (`worldloom.files.read_yaml`), resolved, and then judged: a value that would import
code which is not part of worldloom is accepted only if the user repeats it on the command line.
"""

import functools
import os
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.app.command_line import join_lines
from worldloom.app.compose import key_of, quote_value
from worldloom.app.run_dir import WRITTEN
from worldloom.app.validation import RUNNING, build_settings, validate_env
from worldloom.datasets.folder import read_about
from worldloom.errors import quote
from worldloom.files import read_shipped, reject_interpolations
from worldloom.memory import require_memory
from worldloom.presets import config_dir
from worldloom.training.config import EvaluationConfig

# Keys to which Hydra and the environments give a meaning of their own, at any depth.
RESERVED = ("_target_", "_args_", "_partial_", "_recursive_", "_convert_")
# The only places where worldloom's own configurations have them.
PLACES = re.compile(
    r"(?:(model|env|optimizer|planner|trainer)|(callbacks|logger)\.\w+|"
    rf"(trainer)\.strategy(?:\.timeout)?)\.({'|'.join(RESERVED)})"
)
THREAD_BYTES = 2**20  # lower limit of the memory of a thread
# Sections whose classes write files, and the names of arguments that say where.
WRITERS = re.compile(r"(callbacks|logger|trainer)\.")
WHERE = re.compile(r"(folder|dir|dirpath|path|root|location|uri|url)$")
REFERENCE = re.compile(r"(?<!\\)\$\{[A-Za-z_][\w.]*\}")


class ResolvedConfig(NamedTuple):
    """The configuration of a run, in two forms.

    saved: as config.yaml records it. Interpolations between keys are kept, so that an override on
        resume changes the values that are computed from it too.
    plain: with every interpolation replaced by its value; everything is built from it.
    """

    saved: dict[str, Any]
    plain: dict[str, Any]


def resolve_config(cfg: DictConfig) -> ResolvedConfig:
    """Resolve a composed configuration; paths become absolute, a dataset may add its environment.

    Raises:
        ValueError: the dataset names an environment that the user has to name.
    """
    plain: Any = OmegaConf.to_container(cfg, resolve=True)
    saved = _keep_references(OmegaConf.to_container(cfg, resolve=False), plain)
    plain |= {"folder": str(plain["folder"]), "resume": None}
    if plain["init_from"] is not None:
        plain["init_from"] = str(Path(plain["init_from"]).expanduser().resolve())
    adopt_dataset_env(plain)
    saved["env"].pop("from_data", None)
    saved |= {key: plain[key] for key in ("folder", "resume", "init_from")}
    if "path" in plain["data"]:
        saved["data"]["path"] = plain["data"]["path"]
        saved["env"] = plain["env"]
    return ResolvedConfig(saved, plain)


def _keep_references(raw: Any, resolved: Any) -> Any:
    """Return a configuration in which ${section.key} remains and other interpolations do not."""
    if isinstance(raw, dict):
        return {key: _keep_references(raw[key], resolved[key]) for key in raw}
    if isinstance(raw, list):
        return [_keep_references(*pair) for pair in zip(raw, resolved, strict=True)]
    return raw if has_only_references(raw) else resolved


def has_only_references(value: Any) -> bool:
    """Return whether all interpolations in a value are references to other keys, ${section.key}.

    Resolvers such as ${oc.env:KEY} are not, nor relative, nested and escaped interpolations.
    """
    return "${" not in REFERENCE.sub("", str(value))


def resolve_saved(saved: Mapping[str, Any], file: Path | str) -> dict[str, Any]:
    """Return a configuration read from a file, with each ${section.key} replaced by its value.

    `folder` becomes the folder in which the file is located.

    Raises:
        ValueError: it contains interpolations other than references, one in a reserved key such as
            `_target_`, or `defaults`, `hydra` or a flag, which are no settings of a run.
    """
    for key in map(str, saved):
        if key in ("defaults", "hydra") or not re.fullmatch(r"[A-Za-z_]\w*", key):
            raise ValueError(f"{file} has {key!r}, which is no setting of a run; delete it")
    for key, value in _leaves(saved):
        if "${" in key or not has_only_references(value) or ("${" in str(value) and _reserved(key)):
            raise ValueError(
                f"{key} in {file} is {value!r}; expected a value, or a reference to another key "
                "such as ${training.learning_rate}; replace it by its value"
            )
    located = {**saved, "folder": str(Path(file).parent)}
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create(located), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{file} cannot be resolved ({join_lines(error)}); {WRITTEN}") from None
    reject_interpolations(plain, file)  # references may have been joined to one
    try:
        if isinstance(plain.get("env"), dict):
            validate_env(plain["env"])
        threads = plain.get("threads") or 0
        require_memory(THREAD_BYTES * threads, f"{threads=}")
        build_settings("evaluation", plain.get("evaluation") or {}, EvaluationConfig)
    except ValueError as error:
        raise ValueError(f"{file}: {error}") from error
    return plain


def require_trusted(config: Mapping[str, Any], overrides: Iterable[str]) -> None:
    """Reject a resolved configuration from a file that names foreign code or writes elsewhere.

    Every `_target_` must be one that conf/ has in the same section, no value of the environment may
    import a module ("module:id"), and callbacks, loggers and trainer must write to the folder of
    the run, unless the user gives the same override.

    Raises:
        ValueError: gives the overrides that are missing.
    """
    given = {key_of(arg): arg.partition("=")[2].strip("'\"") for arg in overrides}
    foreign = find_foreign_code(config)
    missing = {k: v for k, v in foreign.items() if given.get(k, "").lower() != f"{v}".lower()}
    if missing:
        raise ValueError(
            "worldloom never imports third-party code just because a saved file names it; if you "
            f"trust it, add: {quote(*_overrides(missing))}"
        )
    if places := {k: v for k, v in find_foreign_places(config).items() if k not in given}:
        raise ValueError(
            "worldloom never writes outside of the run's folder just because a saved file says so; "
            f"if you want that, add: {quote(*_overrides(places))}"
        )


def find_foreign_code(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what in a resolved configuration would run code that is not worldloom's."""
    return {key: value for key, value in _leaves(config) if _is_foreign(key, value)}


def find_foreign_places(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the paths and addresses outside of the run's folder to which a run would write.

    config: resolved; `folder` is that of the run. Only its callbacks, loggers and trainer are
        searched.
    """
    root = os.path.realpath(config.get("folder") or "")
    leaves = ((k, v) for k, v in _leaves(config) if WRITERS.match(k) and isinstance(v, str))
    return {key: value for key, value in leaves if _is_outside(key, value, root)}


def _is_outside(key: str, value: str, root: str) -> bool:
    named = WHERE.search(re.sub(r"(\.\d+)+$", "", key)) is not None
    parts = re.split(r"[/\\]", value)
    if not named and not (value.startswith(("/", "~", "file:")) or ".." in parts):
        return "://" in value
    target = os.path.realpath(os.path.expanduser(value))
    return "://" in value or os.path.commonpath([root, target]) != root


def _is_foreign(key: str, value: Any) -> bool:
    if not _reserved(key):
        return key.startswith("env.") and ":" in str(value)  # gymnasium imports "module:id"
    place = PLACES.fullmatch(key)
    if place is None:
        return True
    shipped = shipped_values(place[1] or place[2] or place[3])
    return value is not None and (place[4], value) not in shipped


def _reserved(key: str) -> bool:
    return any(part in RESERVED for part in key.split("."))


@functools.cache
def shipped_values(group: str) -> frozenset[tuple[str, Any]]:
    """Return each (reserved key, value) in the files of a group in conf/."""
    files = (config_dir() / group).glob("*.yaml")
    # Defaults are files of the same group, so they need not be merged, which takes longer.
    leaves = (leaf for file in files for leaf in _leaves(read_shipped(file)))
    values = {(key.rpartition(".")[2], value) for key, value in leaves if _reserved(key)}
    return frozenset(pair for pair in values if pair[1] not in ("???", None))


def format_command(name: str, *args: str, config: Mapping[str, Any]) -> str:
    """Return a command line for a saved run, with the overrides that its third-party code needs.

    `run` uses the whole configuration, the other commands only what acts.
    """
    trusted = list_trusted(config if name == "run" else acting_sections(config))
    return f"python -m worldloom.{name} {quote(*args, *trusted)}"


def list_trusted(config: Mapping[str, Any]) -> list[str]:
    """Return the overrides that a saved run's third-party code and places to write to need."""
    return _overrides(find_foreign_code(config) | find_foreign_places(config))


def format_allow(config: Mapping[str, Any]) -> str:
    """Return the argument `, allow=(...)` that a run's third-party code needs in Python, or ""."""
    names = tuple(dict.fromkeys(find_foreign_code(acting_sections(config)).values()))
    return f", allow={names}" if names else ""


def acting_sections(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the sections of a run's configuration that are used to act with its model."""
    return {key: config[key] for key in ("model", "planner", "env")}


def adopt_dataset_env(plain: dict[str, Any]) -> None:
    """Set the env section to the environment that the dataset names, if the user named none.

    The path of the dataset becomes absolute.

    Raises:
        ValueError: the environment would run code that is not part of worldloom.
    """
    env, path = plain["env"], plain["data"].get("path")
    wanted = env.pop("from_data", False)
    if path is None:
        return
    folder = Path(str(path)).expanduser()
    if folder.exists():
        plain["data"]["path"] = str(folder.resolve())
    if not wanted:
        return
    found = read_about(folder).get("env", {})
    reject_interpolations(found, folder)
    if not any((env.get("obs") or {}).values()):
        env.pop("obs", None)  # those of the dataset
    plain["env"] = {"_target_": None, **found, **{k: v for k, v in env.items() if k != "_target_"}}
    if plain["env"]["_target_"] is not None and (named := env_overrides(plain["env"])):
        raise ValueError(
            f"{path} names an environment whose code is not part of worldloom; if you trust it, "
            f"add: {named}; or train without one: env=none"
        )


def env_overrides(env: Mapping[str, Any]) -> str:
    """Return the overrides that name an environment, or "" for one that datasets may name.

    Those are worldloom's suites, except env=custom, without values that import a module.
    """
    suite = re.fullmatch(r"worldloom\.envs\.suites\.(\w+)\.make_env", str(env["_target_"]))
    if suite and suite[1] != "custom" and not find_foreign_code({"env": env}):
        return ""
    options = {k: v for k, v in env.items() if k not in ("_target_", "tasks", *RUNNING)}
    named = [f"env={suite[1]}"] if suite else ["env=custom", f"env._target_={env['_target_']}"]
    given = {f"++env.{key}": value for key, value in _leaves(options) if value is not None}
    tasks = [f"++env.tasks={_format(env['tasks'])}"] if "tasks" in env else []
    return quote(*named, *tasks, *_overrides(given))


def _format(value: Any) -> str:
    """Return nested dicts and lists as Hydra reads them in an override."""
    if isinstance(value, Mapping):
        _require_keys(value)
        return "{" + ",".join(f"{key}:{_format(x)}" for key, x in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ",".join(map(_format, value)) + "]"
    return quote_value("null" if value is None else str(value))


def _overrides(values: Mapping[str, Any]) -> list[str]:
    """Return overrides to print."""
    _require_keys(values)
    return [f"{key}={quote_value(str(value))}" for key, value in values.items()]


def _require_keys(values: Mapping[str, Any]) -> None:
    """Raise ValueError for a key that would be read as several arguments."""
    for key in values:
        if not re.fullmatch(r"[\w.+/-]+", str(key)):
            raise ValueError(f"{key!r} is not a key of a configuration; delete it")


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts and lists with its key, such as callbacks.mine.0.folder.

    Unlike `flatten_tree`, it yields both values where {"a.b": 1, "a": {"b": 2}} has one key twice.
    """
    if not isinstance(tree, Mapping | list):
        yield prefix, tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))
