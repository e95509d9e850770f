"""What the commands share that act with a finished run: its configuration, environment, model."""

import functools
import re
import shlex
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.acting import Actor
from worldloom.app.compose import composed, one_line, with_implied
from worldloom.app.run_dir import CONFIG, WRITTEN, read_config, stands_alone
from worldloom.app.task import Task
from worldloom.app.validation import check_env_section, checked_section
from worldloom.errors import suggest
from worldloom.factory import create_world_model
from worldloom.presets import config_dir
from worldloom.saving import get_config


def read_run(path: Path) -> dict[str, Any]:
    """Return the configuration of a run: of its folder, the model folder or a checkpoint in it.

    Raises:
        ValueError: there is none, or it is not what `worldloom.run` writes.
    """
    run = path.parent if path.name in ("model", CONFIG) else path
    run = path.parent.parent if path.suffix == ".ckpt" else run
    return resolve_saved(read_config(run), run / CONFIG)


def resolve_saved(saved: Mapping[str, Any], file: Path | str) -> dict[str, Any]:
    """Return a configuration read from a file with each ${key} replaced by what it stands for.

    Only ${key} and ${section.key} are: a resolver such as ${oc.env:KEY} reads what is none of the
    file's business, and what is put together from parts cannot be judged before it is used. For the
    same reason a `_target_` has to be written out. `folder` becomes the one that the file lies in.
    """
    for key, value in _leaves(saved):
        if not stands_alone(value) or (key.endswith("_target_") and "${" in str(value)):
            raise ValueError(
                f"{key} in {file} holds {value!r}, which would look outside of it or is put "
                "together from parts; expected a value, or the key of another one such as "
                "${training.learning_rate}; put the value there instead"
            )
    for key in ("defaults", "hydra"):
        if key in saved:
            raise ValueError(f"{file} has {key!r}, which would choose other files; take it out")
    here = {"folder": str(Path(file).parent)} if "folder" in saved else {}
    try:
        plain: Any = OmegaConf.to_container(OmegaConf.create({**saved, **here}), resolve=True)
    except OmegaConfBaseException as error:
        raise ValueError(f"{file} cannot be resolved ({one_line(error)}); {WRITTEN}") from None
    return plain


def require_trusted(config: Mapping[str, Any], said: Sequence[str]) -> None:
    """Refuse a configuration out of a file that names code which is not part of worldloom.

    Whoever made a file must not choose which code is run. Every `_target_` in it must be one of
    those in conf/, and no environment's id may import a module ("module:id"), unless the user has
    said the same.

    config: of a run, or some sections of it. said: words of the command line, KEY=VALUE.

    Raises:
        ValueError: gives the words that say it.
    """
    known = {
        key.lstrip("+"): value.strip("'\"") for key, _, value in (w.partition("=") for w in said)
    }
    foreign = foreign_code(resolve_saved(config, "the configuration"))
    if words := [f"{key}={value}" for key, value in foreign.items() if known.get(key) != value]:
        raise ValueError(
            f"the saved configuration names code that is not part of worldloom; if you trust it, "
            f"say so by adding: {' '.join(words)}"
        )


def foreign_code(config: Mapping[str, Any]) -> dict[str, str]:
    """Return what in a configuration would import code that is not worldloom's, {key: value}."""
    return {key: value for key, value in _leaves(config) if _imports(key, value)}


def _imports(key: str, value: Any) -> bool:
    if not key.endswith("_target_"):
        return key.startswith("env.") and ":" in str(value)  # an id such as "module:id"
    # Hydra builds whatever has a _target_, at any depth; ours stand in these places only.
    place = re.fullmatch(
        r"(model|env|optimizer|planner|trainer)\._target_|(callbacks|logger)\.\w+\._target_", key
    )
    return value is not None and (
        place is None or value not in shipped_targets(place[1] or place[2])
    )


def command(name: str, *words: str, config: Mapping[str, Any]) -> str:
    """Return a command line for a run, with what has to be said again to trust its code."""
    foreign = foreign_code({key: config[key] for key in ("model", "env")})
    words = (*words, *(f"{key}={value}" for key, value in foreign.items()))
    return f"python -m worldloom.{name} {shlex.join(words)}"


@functools.cache
def shipped_targets(group: str) -> frozenset[str]:
    """Return every `_target_` that the files of a group in conf/ name."""
    files = (config_dir() / group).glob("*.yaml")
    leaves = (leaf for file in files for leaf in _leaves(_yaml(file)))
    targets = {str(value) for key, value in leaves if key.endswith("_target_")}
    return frozenset(targets - {"???", "None"})


def split_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Tell a command's own settings, {key: value}, from the words about a run's configuration.

    Those are env=…, env.KEY=… and whatever says that code is trusted, SECTION._target_=….
    """
    others = [word for word in words if re.match(r"\+*(env[.=]|[\w.]+\._target_=)", word)]
    for word in words:
        if word not in others and not re.match(r"[A-Za-z_]\w*=", word):
            raise ValueError(
                f"cannot read {word!r}; expected words such as seed=0 and env.KEY=VALUE, without "
                "spaces around the ="
            )
    own: Any = OmegaConf.to_container(OmegaConf.from_cli([w for w in words if w not in others]))
    return own, others


def checked(given: Mapping[str, Any], cls: type) -> Any:
    """Make the settings class of a command from what was given; refuse what it does not know."""
    return checked_section("", given, cls)


def env_section(words: Sequence[str], default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the env section that words of a command line ask for.

    env=GROUP composes it as `python -m worldloom.run` does, without a recipe; without it
    env.KEY=VALUE changes the default.
    """
    if others := [word for word in words if not re.match(r"\+*env[.=]", word)]:
        raise ValueError(
            f"unknown key {others[0].partition('=')[0]!r}; expected env=… and env.KEY=…"
        )
    if default is not None and not any(word.startswith("env=") for word in words):
        # The run's own function, which the user repeats to say that it may be run.
        words = [word for word in words if word != f"env._target_={default.get('_target_')}"]
    section = _composed_env(with_implied(words), default)
    check_env_section(section)
    return section


def _composed_env(words: Sequence[str], default: Mapping[str, Any] | None) -> dict[str, Any]:
    if default is None or any(word.startswith("env=") for word in words):
        env = composed(*{"~experiment": None, **dict.fromkeys(words)}).env
        if missing := sorted(OmegaConf.missing_keys(env)):
            raise ValueError(f"{missing[0]} is not set; add {missing[0]}=…")
        section: Any = OmegaConf.to_container(env, resolve=True)
        return section
    before = OmegaConf.create({"env": dict(default)})
    for word in words:
        key = word.partition("=")[0]
        parent, _, name = key.rpartition(".")
        known = OmegaConf.select(before, parent) or {}
        if name not in known and not word.startswith("+"):
            raise ValueError(f"unknown key '{key}'{suggest(name, map(str, known), f'{parent}.')}")
    given = OmegaConf.from_cli([word.lstrip("+") for word in words])
    changed: Any = OmegaConf.to_container(OmegaConf.merge(before, given))
    return changed["env"]


def opened_run(path: Path, words: Sequence[str]) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the configuration of a run and the env section to act in, both trusted.

    words: what the command line says about its configuration.
    """
    config = read_run(path)
    env_words = [word for word in words if re.match(r"\+*env[.=]", word)]
    for word in words:
        key, _, value = word.partition("=")
        if word not in env_words and OmegaConf.select(OmegaConf.create(config), key) != value:
            raise ValueError(
                f"{word} is not what {path} was trained with; expected the words of its training, "
                "which say that its code may be run; leave this one out"
            )
    section = env_section(env_words, config["env"])
    used = {"env": section, "model": config["model"], "planner": config["planner"]}
    require_trusted(used, words)
    return config, section


def load_actor(path: Path, config: Mapping[str, Any], task: Task) -> Actor:
    """Load the model of a run to act in a task, which need not be the one it was trained on.

    config: of the run, as `opened_run` returns it.
    """
    model: Any = create_world_model(path, allow=(config["model"]["_target_"],)).eval()
    made = get_config(model) or {}
    known = {"obs_shape": task.obs.shape, "action_dim": task.actions.action_dim}
    for name, value in known.items():
        if made.get(name, value) != value:
            raise ValueError(
                f"the model of {path} has {name} {made[name]}, but the environment {value}; choose "
                "the environment that it was trained in"
            )
    return task.build_actor(model, config["planner"])


def _leaves(tree: Any, prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Yield every value of nested dicts and lists with its key, such as callbacks.mine.0.folder."""
    if not isinstance(tree, Mapping | list):
        yield prefix, tree
        return
    for key, value in tree.items() if isinstance(tree, Mapping) else enumerate(tree):
        yield from _leaves(value, f"{prefix}.{key}" if prefix else str(key))


def _yaml(file: Path) -> Any:
    return OmegaConf.to_container(OmegaConf.load(file))
