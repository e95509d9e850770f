"""What the commands share that act with a finished run: its configuration, environment, model."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from worldloom.acting import Actor
from worldloom.cli import composed, with_implied
from worldloom.factory import create_world_model
from worldloom.presets import nearest
from worldloom.saving import config_of
from worldloom.task import Task
from worldloom.training.config import field_names


def read_run(path: Path) -> dict[str, Any]:
    """Return the configuration of a run: of its folder, the model folder or a checkpoint in it."""
    run = path.parent if path.name == "model" else path
    run = path.parent.parent if path.suffix == ".ckpt" else run
    if not (run / "config.yaml").is_file():
        raise ValueError(
            f"{run} holds no config.yaml; expected a folder that python -m worldloom.run wrote, "
            "such as runs/cartpole/2026-01-01_00-00-00"
        )
    config: Any = OmegaConf.to_container(OmegaConf.load(run / "config.yaml"))
    return config


def split_words(words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Tell a command's own settings, {key: value}, from the words about the environment."""
    env = [word for word in words if re.match(r"[+]*env[.=]", word)]
    own: Any = OmegaConf.to_container(OmegaConf.from_cli([w for w in words if w not in env]))
    return own, env


def checked(given: Mapping[str, Any], cls: type) -> Any:
    """Make the settings class of a command from what was given; refuse what it does not know."""
    for key in given:
        if key not in (known := field_names(cls)):
            raise ValueError(f"unknown key '{key}'{nearest(key, known)}")
    merged = OmegaConf.merge(OmegaConf.structured(cls), given)
    if missing := sorted(OmegaConf.missing_keys(merged)):
        raise ValueError(f"{', '.join(missing)} is not set; add {missing[0]}=…")
    values: Any = OmegaConf.to_container(merged)
    return cls(**values)


def env_section(words: Sequence[str], default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the env section that words of a command line ask for.

    env=GROUP composes it as `python -m worldloom.run` does, without a recipe; without it
    env.KEY=VALUE changes the default.
    """
    words = with_implied(words)
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
            raise ValueError(f"unknown key '{key}'{nearest(name, map(str, known), f'{parent}.')}")
    given = OmegaConf.from_cli([word.lstrip("+") for word in words])
    changed: Any = OmegaConf.to_container(OmegaConf.merge(before, given))
    return changed["env"]


def load_actor(path: Path, config: Mapping[str, Any], task: Task) -> Actor:
    """Load the model of a run to act in a task, which need not be the one it was trained on."""
    # The user names this run on the command line, as when it was trained: its own model is allowed.
    model: Any = create_world_model(path, allow=(config["model"]["_target_"],)).eval()
    made = config_of(model) or {}
    known = {"obs_shape": task.obs.shape, "action_dim": task.actions.action_dim}
    for name, value in known.items():
        if made.get(name, value) != value:
            raise ValueError(
                f"the model of {path} has {name} {made[name]}, but the environment {value}; choose "
                "the environment that it was trained in"
            )
    return task.build_actor(model, config["planner"])
