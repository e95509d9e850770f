"""`resume=…`: which run to continue, and with what configuration."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from worldloom.app.build import settled
from worldloom.app.compose import composed, with_implied
from worldloom.app.run_dir import CONFIG, SCORES, is_claimed, read_config
from worldloom.app.saved_config import command, require_trusted, resolve_saved
from worldloom.presets import config_dir
from worldloom.trees import flatten_tree

# What a run cannot change any more, with the keys of it that it can.
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


def resumed_words(words: Sequence[str], scratch: Path) -> list[str] | None:
    """Return the words with which Hydra runs what `resume=…` in `words` means.

    The configuration that is to be run, a saved one or what the words compose, is left in the
    folder `scratch`, which Hydra is told of. None if the run is finished, which is printed then.

    Raises:
        ValueError: there is no such run, or it cannot be changed in that way.
    """
    wanted = _wanted(words)
    rest = [word for word in words if not re.match(r"\+*resume=", word)]
    if wanted is None:
        return with_implied(rest)
    if any(word in ("-m", "--multirun") for word in words):
        raise ValueError(
            "resume=… continues one run, but -m was given; resume the jobs of a sweep one by one, "
            "each by its own folder"
        )
    if wanted == "auto":
        folder = newest_unfinished(rest)
        if folder is None:
            print("resume=auto: no unfinished run of this configuration; a new one begins")
            return with_implied(rest)
        print(f"resume=auto: going on with {folder}")
        rest = []
    else:
        if elsewhere := [w for w in rest if re.match(r"\+*(folder|hydra\.run\.dir)=", w)]:
            raise ValueError(
                f"a resumed run stays in its folder, but {elsewhere[0]} was given; leave it out, "
                "or copy the folder and resume the copy"
            )
        folder = Path(str(wanted)).expanduser()
        folder = folder.parent if folder.name in ("checkpoints", CONFIG, "model") else folder
        folder = folder.parent.parent if folder.suffix == ".ckpt" else folder
    saved = read_config(folder)
    if wanted != "auto":
        require_trusted(resolve_saved(saved, folder / CONFIG), rest)
    merged, rest = _with_choices(saved, rest)
    merged |= {"folder": str(folder.resolve()), "resume": str(folder.resolve())}
    merged["hydra"] = {
        "run": {"dir": str(folder.resolve())},
        "job": {"name": "worldloom", "chdir": False},
    }
    (scratch / CONFIG).write_text(OmegaConf.to_yaml(OmegaConf.create(merged)))
    if wanted != "auto" and finished(folder, resolve_saved(saved, folder / CONFIG), rest):
        return None
    return ["--config-path", str(scratch.resolve()), "--config-name", "config", *rest]


def newest_unfinished(words: Sequence[str]) -> Path | None:
    """Return the newest unfinished run of the configuration that the words compose, if any.

    Runs that a living process still writes are left to it.
    """
    cfg = composed(*with_implied(words))
    cfg.folder = ""  # Hydra, which does not run yet, would say
    wanted = settled(cfg)
    given = [w.partition("=")[2] for w in words if w.startswith("hydra.run.dir=")]
    folders = [Path(given[-1])] if given else list(Path("runs", str(wanted["name"])).glob("*"))
    for folder in sorted(folders, key=_age):
        if not (folder / CONFIG).is_file() or (folder / SCORES).exists():
            continue
        try:
            same = comparable(read_config(folder)) == comparable(wanted)
        except ValueError as error:
            print(f"resume=auto: left out {folder}: {error}")
            continue
        if same and not is_claimed(folder):
            return folder
    return None


def comparable(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return what two runs of the same configuration have in common."""
    return {key: value for key, value in config.items() if key not in ("folder", "resume", "hydra")}


def require_changeable(saved: Mapping[str, Any], wanted: Mapping[str, Any]) -> list[str]:
    """Return what a resumed run changes, as lines to print; refuse by name what it cannot."""
    before, after = flatten_tree(comparable(saved)), flatten_tree(comparable(wanted))
    lines, refused = [], []
    for key in sorted({*before, *after}):
        old, new = before.get(key), after.get(key)
        if old == new:
            continue
        dotted = key.replace("/", ".")
        lines.append(f"{dotted}: {old} -> {new}")
        for fixed, free in FIXED.items():
            if dotted == fixed or dotted.startswith(f"{fixed}."):
                refused += [dotted] * (dotted.removeprefix(f"{fixed}.") not in free)
    if refused:
        raise ValueError(
            f"a resumed run cannot change {', '.join(refused)} ({before_and_after(lines, refused)})"
            "; leave it out, or begin a new run from this one's weights: init_from=<run folder>"
        )
    return lines


def before_and_after(lines: Sequence[str], keys: Sequence[str]) -> str:
    """Return the lines of these keys in one."""
    return ", ".join(line for line in lines if line.split(": ")[0] in keys)


def finished(folder: Path, saved: Mapping[str, Any], words: Sequence[str]) -> bool:
    """Tell, and print, whether a run is finished and these words do not extend it."""
    if not (folder / SCORES).is_file():
        return False
    total = saved["training"]["total_steps"]
    longer = [w.partition("=")[2] for w in words if w.startswith("training.total_steps=")]
    if longer and (not longer[-1].replace("_", "").isdigit() or int(longer[-1]) > total):
        return False
    scores: Any = OmegaConf.to_container(OmegaConf.load(folder / SCORES)) or {}
    result = f", return {scores['eval/return']:.1f}" if "eval/return" in scores else ""
    print(
        f"{folder} is finished: {total:,} steps{result}. To train on:\n"
        + command("run", f"resume={folder}", f"training.total_steps={2 * total}", config=saved)
    )
    return True


def _with_choices(saved: dict[str, Any], words: Sequence[str]) -> tuple[dict[str, Any], list[str]]:
    """Put other choices of groups (trainer=gpu) into a saved configuration; return other words."""
    merged, rest = dict(saved), []
    for word in words:
        group, equals, choice = word.partition("=")
        if not equals or not (config_dir() / group / f"{choice}.yaml").is_file():
            rest.append(word)
        elif group == "env" and _same_env(choice, saved):
            continue  # said once more beside env._target_=…, to trust it
        elif group not in CHOICES:
            raise ValueError(
                f"a resumed run keeps its {group}, but {word} was given; leave it out, or begin a "
                f"new run from this one's weights: init_from=<run folder>; {', '.join(CHOICES)} "
                "can be chosen anew"
            )
        else:
            fresh = composed(word, "~experiment")[group]
            merged[group] = OmegaConf.to_container(fresh, resolve=False)
    return merged, rest


def _wanted(words: Sequence[str]) -> str | None:
    """Return what a command line wants to resume: a folder, "auto", or None."""
    values = [word.partition("=")[2] for word in words if re.match(r"\+*resume=", word)]
    return None if not values or values[-1] in ("", "null") else values[-1].strip("'\"")


def _same_env(choice: str, saved: Mapping[str, Any]) -> bool:
    if choice == "custom":
        return True
    fresh: Any = OmegaConf.load(config_dir() / "env" / f"{choice}.yaml")
    return fresh.get("_target_") == saved["env"]["_target_"]


def _age(folder: Path) -> float:
    """Sort newest first, by when it was last saved."""
    paths = (folder / "checkpoints" / "last.ckpt", folder / CONFIG)
    times = [path.stat().st_mtime for path in paths if path.exists()]
    return -times[0] if times else 0.0
