"""The folder of a run: what lies where in it, and that only one process writes it."""

import logging
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

log = logging.getLogger(__name__)

# The configuration; the final scores, which only a finished run has; the lock of who writes.
WRITTEN = "expected what python -m worldloom.run wrote; restore it from a copy"
CONFIG, SCORES, LOCK = "config.yaml", "scores.yaml", ".lock"


def read_config(run: Path) -> dict[str, Any]:
    """Return the configuration of a run, with its interpolations.

    Raises:
        ValueError: there is none, or it is not what `worldloom.run` writes.
    """
    file = run / CONFIG
    if not file.is_file():
        near = sorted(path.parent for path in run.parent.glob(f"*/{CONFIG}"))
        example = near[-1] if near else "runs/cartpole/2026-01-01_00-00-00"
        raise ValueError(
            f"{run} holds no {CONFIG}; expected a folder that python -m worldloom.run wrote, such "
            f"as {example}"
        )
    try:
        saved: Any = OmegaConf.to_container(OmegaConf.load(file))
    except (YAMLError, OmegaConfBaseException, OSError, ValueError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is no YAML ({reason}); {WRITTEN}") from None
    wanted = {"env": Mapping, "model": Mapping, "planner": Mapping, "threads": int | None}
    for key, kind in wanted.items():
        if not isinstance(saved, dict) or key not in saved or not isinstance(saved[key], kind):
            held = f"{key} {saved[key]!r}" if key in (saved or ()) else f"no {key!r}"
            raise ValueError(f"{file} is not the configuration of a run: it has {held}; {WRITTEN}")
    return saved


@contextmanager
def claimed(folder: Path, resumes: bool) -> Iterator[None]:
    """Hold a run's folder, which only one process may write.

    Raises:
        ValueError: another process writes it, or there is a run in it that would be overwritten.
    """
    # Whoever only looks whether a run lives (`is_claimed`) holds its lock for a moment.
    lock = FileLock(folder / LOCK, timeout=1)
    folder.mkdir(parents=True, exist_ok=True)
    try:
        lock.acquire()
    except Timeout:
        raise ValueError(
            f"{folder} is being written by another run; wait for it, stop it, or choose another "
            "folder: hydra.run.dir=…"
        ) from None
    except NotImplementedError:
        log.warning("%s knows no locks: make sure that no second run writes it", folder)
    try:
        # One that was killed before it wrote its configuration has nothing to lose.
        if not resumes and (folder / CONFIG).exists():
            raise ValueError(
                f"{folder} already holds a run, which would be overwritten; continue it with "
                f"resume={folder}, or choose another folder: hydra.run.dir=…"
            )
        yield
    finally:
        lock.release()


def begin_anew(folder: Path) -> None:
    """Clear what a run left that was killed before its first checkpoint, if there was one.

    Raises:
        ValueError: there is something else among its checkpoints.
    """
    checkpoints = folder / "checkpoints"
    left = [path for path in checkpoints.glob("*") if path.suffix != ".tmp"]
    if others := [path.name for path in left if path.name != "replay"]:
        raise ValueError(
            f"{checkpoints} holds {', '.join(others)}, but neither last.ckpt nor previous.ckpt, so "
            "this run cannot go on; begin a new one, from its model if it has one: init_from=…"
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    if (folder / CONFIG).exists():
        (folder / "metrics.csv").unlink(missing_ok=True)


def is_claimed(folder: Path) -> bool:
    """Tell whether a living process writes this run."""
    try:
        with FileLock(folder / LOCK, timeout=0):
            return False
    except Timeout:
        return True
    except NotImplementedError:
        return False


def stands_alone(value: Any) -> bool:
    """Tell whether all that a value of a configuration stands for are other keys, ${section.key}.

    Not what a resolver finds elsewhere, ${oc.env:KEY}, nor keys that are put together from parts.
    """
    return "${" not in re.sub(r"\$\{[A-Za-z_][\w.]*\}", "", str(value))


def write_text(file: Path, text: str) -> None:
    """Write a file under a temporary name, then rename it, so that there is never half of it."""
    temporary = file.with_name(f".{file.name}")
    temporary.write_text(text)
    os.replace(temporary, file)
