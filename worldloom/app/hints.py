"""Hints for frequent slips on the command line: the override to write instead."""

import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

from worldloom.app.help import list_choices
from worldloom.errors import list_names
from worldloom.presets import choice_files, preset_names, read_choice

# Keys, or KEY=VALUE, that other programs have -> what to write here; {} is the value.
OTHER_KEYS = {
    "lr": "training.learning_rate={}",
    "steps": "training.total_steps={}",
    "max_steps": "training.total_steps={}",
    "epochs": "training.total_steps=…, the number of environment steps",
    "max_epochs": "training.total_steps=…, the number of environment steps",
    "wandb": "logger=wandb",
    "mlflow": "logger=mlflow",
    "device=cpu": "trainer=cpu",
    "device": "trainer=gpu",
    "cuda": "trainer=gpu",
    "gpu": "trainer=gpu",
    "gpus": "trainer=gpu trainer.devices={}",
    "precision=16": "trainer.precision=bf16-mixed",
    "task": "env=dmc env.task={}",
    "game": "env=atari env.game={}",
    "algo": "model={}",
    "config": "experiment={}",
    "configs": "experiment=dreamerv3/{}",
}
# Hydra's flags; those with True are followed by a value.
FLAGS = {
    **dict.fromkeys(("-h", "--help", "--hydra-help", "--version", "--resolve"), False),
    **dict.fromkeys(("-r", "--run", "-m", "--multirun", "--experimental-rerun"), False),
    **dict.fromkeys(("-c", "--cfg", "-p", "--package", "-i", "--info"), True),
    **dict.fromkeys(("-cp", "--config-path", "-cn", "--config-name"), True),
    **dict.fromkeys(("-cd", "--config-dir", "-sc", "--shell-completion"), True),
}


def flags_first(args: Sequence[str]) -> tuple[str, ...]:
    """Return the arguments with Hydra's flags in front; it rejects overrides on both sides."""
    is_flag = [
        arg in FLAGS or FLAGS.get(before, False)
        for before, arg in zip(["", *args], args, strict=False)
    ]
    flags = [arg for arg, first in zip(args, is_flag, strict=True) if first]
    return (*flags, *(arg for arg, first in zip(args, is_flag, strict=True) if not first))


def find_dashes(args: Sequence[str]) -> tuple[str, str, str] | None:
    """Return what is wrong with an option such as --seed 1 or --batch-size=8, its key and value."""
    for arg, following in zip(args, [*args[1:], ""], strict=False):
        flag, equals, value = arg.partition("=")
        if re.match(r"--?[A-Za-z]", flag) and flag not in FLAGS:
            if not equals:
                value = "true" if "=" in following or following[:1] in ("", "-") else following
            return f"there is no option {flag}", flag.lstrip("-").replace("-", "_"), value
    return None


def find_bare_word(args: Sequence[str]) -> tuple[str, str, str] | None:
    """Return what is wrong with `seed 1`, `seed = 1` or the path of a run, its key and value."""
    bare = [
        "=" not in arg[1:] and not re.match(r"[-+~]", arg) and not FLAGS.get(before, False)
        for before, arg in zip(["", *args], args, strict=False)
    ]
    for index in range(len(args)):
        arg, after = args[index], args[index + 1 : index + 3]
        if bare[index] and (Path(arg) / "config.yaml").is_file():
            return f"cannot read {arg!r}, which is the folder of a run", "resume", arg
        if bare[index] and after and bare[index + 1]:
            value = after[-1] if after[0] == "=" else after[0].lstrip("=")
            return f"cannot read {arg!r}, because settings have no spaces", arg, value
    return None


def hint_key(key: str, value: str, config: DictConfig) -> str:
    """Return the end of a message about an unknown key: where it is found, or "".

    config: the composed configuration without the override.
    """
    name = key.rpartition(".")[2]
    if key in (name, f"training.{name}"):
        for known in (f"{name}={value}", name):
            if known in OTHER_KEYS:
                return f"; write {OTHER_KEYS[known].format(value)}"
    group, _, rest = key.partition(".")
    plain: Any = OmegaConf.to_container(config, resolve=False)
    sections = [part for part, held in plain.items() if isinstance(held, dict) and name in held]
    if places := [f"{part}.{name}={value}" for part in sections if part != group]:
        return f"; write {' or '.join(places[:3])}"
    owners = [
        f"{group}={choice}"
        for choice in list_choices(group) * (rest == name)
        if name in _read_choice(group, choice)
    ]
    add = "add it" if len(owners) == 1 else "add one of them"
    return f"; it belongs to {list_names(owners, 4)}: {add}" if owners else ""


def hint_choice(group: str, name: str) -> str:
    """Return the end of a message about an unknown choice of a group, or ""."""
    inside = [choice for choice in list_choices(group) if name.strip("/") in choice.split("/")]
    if inside:  # a folder of choices, or the name of one in a folder
        return f"; write {' or '.join(f'{group}={choice}' for choice in inside)}"
    if group == "env" and re.search(r"-v\d+$", name):
        return f"; write env=gymnasium env.id={name}"
    if re.search(r"\w[.:]\w", name) and group in ("env", "model", "optimizer", "planner"):
        custom = "model=custom " if group == "model" else ""
        return f"; for a custom class or function write {custom}{group}._target_=" + (
            name.replace(":", ".")
        )
    sizes = [preset for preset in preset_names() if preset.startswith(f"{name}:")]
    return f"; add a size: model={', '.join(sizes)}" if sizes and group == "model" else ""


def hint_run(args: Sequence[str]) -> str:
    """Return the run that the arguments seem to name, as in resume=RUN or RUN alone."""
    for arg in args:
        key, equals, value = arg.partition("=")
        if equals and key in ("resume", "run", "path", "policy", "model", "folder"):
            return value
        if not equals and Path(arg).exists():
            return arg
    return "<run folder>"


def _read_choice(group: str, choice: str) -> dict[str, Any]:
    file = choice_files(group).get(choice)
    return read_choice(file) if file else {}
