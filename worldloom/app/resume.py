"""Resuming: which run `resume=...` continues, and which settings it may change."""

import itertools
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from worldloom.app.compose import Overrides, compose_config, key_of, quote_value
from worldloom.app.run_dir import (
    CONFIG,
    SCORES,
    find_run,
    is_claimed,
    number_folders,
    read_config,
    read_scores,
)
from worldloom.app.saved_config import (
    format_command,
    require_trusted,
    resolve_config,
    resolve_saved,
)
from worldloom.errors import escape
from worldloom.presets import choice_files, read_choice
from worldloom.trees import flatten_tree

# What a run cannot change any more, with the exceptions within it.
FIXED: dict[str, tuple[str, ...]] = {
    "seed": (),
    "init_from": (),
    "env": ("workers", "timeout"),
    "model._target_": (),
    "optimizer._target_": (),
    "data.path": (),
    "data.capacity": (),
}
# Groups of which another choice can be made on resume.
CHOICES = ("trainer", "logger", "callbacks", "planner", "evaluation")
# Groups whose parts can be dropped on resume.
PARTS = ("callbacks", "logger")
HYDRA_CHECK = {"folder_check": {"_target_": "worldloom.app.command_line.FolderCheck"}}


def resume_arguments(overrides: Overrides, scratch: Path) -> tuple[str, ...] | None:
    """Translate `resume=...` into the arguments to run Hydra with; None if the run is finished.

    The configuration of the resumed run is written to the folder `scratch`, from which Hydra reads
    it.

    Raises:
        ValueError: there is no such run, or it cannot be changed in that way.
    """
    source, rest = overrides.value("resume"), overrides.without("resume").with_precision()
    if source in (None, "null"):
        return rest.with_implied().args
    if any(arg in ("-m", "--multirun") for arg in overrides):
        raise ValueError(
            "resume=… continues one run, but -m was given; a sweep needs no resume=…: the same "
            "command again reads its finished runs and continues the others"
        )
    if source == "auto":
        found, damaged = find_unfinished(rest)
        if found is None:
            print("resume=auto: no unfinished run of this configuration; starting a new one")
            return _avoid(rest.with_implied(), damaged).args
        folder, rest = found, Overrides(())
        saved = read_config(folder)
    else:
        if elsewhere := rest.select(r"(folder|hydra\.run\.dir)$").args:
            raise ValueError(
                f"a resumed run stays in its folder, but {elsewhere[0]} was given; leave it out, "
                "or copy the folder and resume the copy"
            )
        folder = find_run(Path(str(source)).expanduser())
        saved, rest = _with_parts(read_config(folder), rest)
        require_trusted(resolve_saved(saved, folder / CONFIG), rest)
    merged, rest = _with_choices(saved, rest)
    _write_scratch(merged, folder.resolve(), scratch)
    given = Overrides(()) if source == "auto" else overrides.without("resume")
    if is_finished(folder, resolve_saved(saved, folder / CONFIG), given):
        return None
    if source == "auto":
        print(f"resume=auto: continuing {folder}")
    return ("--config-path", str(scratch.resolve()), "--config-name", "config", *rest)


def _write_scratch(config: dict[str, Any], folder: Path, scratch: Path) -> None:
    hydra = {
        "run": {"dir": str(folder)},
        "job": {"name": "worldloom", "chdir": False},
        "output_subdir": None,
        "callbacks": HYDRA_CHECK,
    }
    whole = {
        "defaults": ["_self_", {"override hydra/job_logging": "stdout"}],
        "sweep": None,  # which the first runs of format 2 lack
        **config,
        **{"folder": str(folder), "resume": str(folder), "hydra": hydra},
    }
    (scratch / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(whole)))


def _avoid(overrides: Overrides, damaged: list[Path]) -> Overrides:
    """Replace the folder of a new run by another one if a damaged run is in it."""
    given = overrides.value("hydra.run.dir")
    if given is None or Path(given) not in damaged:
        return overrides
    free = next(path for path in number_folders(Path(given)) if not path.exists())
    print(f"its folder is {free}; {given} stays as it is")
    return Overrides(
        (*overrides.without("hydra.run.dir"), f"hydra.run.dir={quote_value(str(free))}")
    )


def find_unfinished(overrides: Overrides) -> tuple[Path | None, list[Path]]:
    """Return the newest unfinished run of the configuration that the overrides compose, if any.

    Runs that a living process still writes are skipped. Where the overrides name the folder, its
    run may be finished. The second value are the damaged runs.
    """
    from worldloom.training.checkpoint_files import find_damage

    overrides = overrides.with_implied()
    cfg = compose_config(*overrides)
    cfg.folder = ""  # Hydra, which is not running yet, would set it
    wanted = resolve_config(cfg).saved
    given = overrides.value("hydra.run.dir")
    folders, damaged = list(Path("runs", str(wanted["name"])).glob("*")), []
    if given is not None:
        folders = list(itertools.takewhile(Path.exists, number_folders(Path(given))))
    for folder in sorted(folders, key=_age):
        if not (folder / CONFIG).is_file() or (given is None and (folder / SCORES).exists()):
            continue
        try:
            same = comparable(read_config(folder)) == comparable(wanted)
            if not same or is_claimed(folder):
                continue
            if damage := find_damage(folder / "checkpoints"):
                raise ValueError(damage)
        except ValueError as error:
            print(escape(f"resume=auto: skipped {folder}: {error}"))
            damaged.append(folder)
            continue
        return folder, damaged
    return None, damaged


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs of the same configuration have in common.

    What trainer.precision=auto has chosen is left out: a run asks for it on any machine.
    """
    from worldloom.training.precision import split_precision

    kept = {key: value for key, value in config.items() if key not in ("folder", "resume", "hydra")}
    if isinstance(trainer := kept.get("trainer"), Mapping) and "precision" in trainer:
        asked = split_precision(trainer["precision"])[0]
        kept["trainer"] = {**trainer, "precision": asked}
    return kept


def require_changeable(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return the changes of a resumed run, as lines to print.

    Raises:
        ValueError: names the changes that a resumed run cannot make.
    """
    before, after = (flatten_tree(comparable(config), ".") for config in (saved, wanted))
    changed = {
        key: f"{key}: {before.get(key)} -> {after.get(key)}"
        for key in sorted({*before, *after})
        if before.get(key) != after.get(key)
    }
    if refused := [key for key in changed if _is_fixed(key)]:
        raise ValueError(
            f"a resumed run cannot change {', '.join(refused)} "
            f"({', '.join(changed[key] for key in refused)}); leave it out, or begin a new run "
            "from this one's weights: init_from=<run folder>"
        )
    return list(changed.values())


def _is_fixed(key: str) -> bool:
    return any(
        key == fixed or (key.startswith(f"{fixed}.") and key.removeprefix(f"{fixed}.") not in free)
        for fixed, free in FIXED.items()
    )


def is_finished(folder: Path, saved: Mapping[str, Any], overrides: Overrides) -> bool:
    """Return whether a run is finished and not extended by the overrides; print how to extend it.

    saved: its resolved configuration.
    """
    if not (folder / SCORES).exists():
        return False
    total = saved["training"]["total_steps"]
    longer = overrides.value("training.total_steps")
    if longer and (not longer.replace("_", "").isdigit() or int(longer) > total):
        return False
    scores = read_scores(folder)
    steps, how = f"{total:,} steps", "To train longer:"
    if scores["step"] < total:  # stopped early, by a callback
        if any(re.match(r"~callbacks\.|\+*callbacks\.(?!\w+\._target_)", arg) for arg in overrides):
            return False
        steps = f"stopped early after {scores['step']:,} of {total:,} steps"
        how = "To continue, drop or change the callback that stopped it ('~callbacks.NAME'):"
    result = f", return {scores['final/return']:.1f}" if "final/return" in scores else ""
    print(
        f"{folder} is finished: {steps}{result}. {how}\n"
        + format_command(
            *("run", f"resume={folder}", f"training.total_steps={2 * total}"), config=saved
        )
    )
    return True


def _with_parts(saved: dict[str, Any], overrides: Overrides) -> tuple[dict[str, Any], Overrides]:
    """Drop ~callbacks.NAME and ~logger.NAME from a saved configuration, and set new classes.

    Done before the configuration is judged, so that a class which is dropped or replaced need not
    be trusted or importable. Returns the other overrides.
    """
    merged, rest = {**saved, **{group: dict(saved[group]) for group in PARTS}}, []
    for arg in overrides:
        group, _, name = key_of(arg).partition(".")
        name, _, key = name.partition(".")
        if group not in PARTS or name not in merged[group]:
            rest.append(arg)
        elif arg == f"~{group}.{name}":
            del merged[group][name]
        else:
            if key == "_target_" and isinstance(merged[group][name], dict):
                merged[group][name] = {**merged[group][name], key: arg.partition("=")[2]}
            rest.append(arg)
    return merged, Overrides(tuple(rest))


def _with_choices(saved: dict[str, Any], overrides: Overrides) -> tuple[dict[str, Any], Overrides]:
    """Put other choices of groups (trainer=gpu) into a saved configuration; return the rest."""
    merged, rest = dict(saved), []
    for arg in overrides:
        group, equals, choice = arg.partition("=")
        names = choice.strip("[]").split(",")  # logger=[wandb,mlflow]
        if not equals or not {*names} <= choice_files(group).keys():
            rest.append(arg)
        elif group == "env" and _is_same_env(choice, saved):
            continue  # repeated next to env._target_=…, to trust it
        elif group not in CHOICES:
            raise ValueError(
                f"a resumed run keeps its {group}, but {arg} was given; leave it out, or begin a "
                f"new run from this one's weights: init_from=<run folder>; {', '.join(CHOICES)} "
                "can be changed"
            )
        else:
            chosen = compose_config(arg, "~experiment")[group]
            merged[group] = OmegaConf.to_container(chosen, resolve=False)
    return merged, Overrides(tuple(rest))


def _is_same_env(choice: str, saved: Mapping[str, Any]) -> bool:
    chosen = read_choice(choice_files("env")[choice])
    return choice == "custom" or chosen.get("_target_") == saved["env"]["_target_"]


def _age(folder: Path) -> float:
    """Return a key that sorts runs by when they were last saved, the newest first."""
    paths = (folder / "checkpoints" / "last.ckpt", folder / CONFIG)
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return -times[0] if times else 0.0
