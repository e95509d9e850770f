"""The folder of a run: its files, its format, and that only one process writes it."""

import contextlib
import fcntl
import itertools
import logging
import os
import re
import shutil
import stat
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from filelock import FileLock, Timeout
from omegaconf import OmegaConf

from worldloom.errors import quote
from worldloom.files import check_format, read_yaml, write_text, write_yaml

log = logging.getLogger(__name__)

# The configuration; the final scores, which only a finished run has; the lock of the writing run;
# what the run printed.
CONFIG, SCORES, LOCK, LOG = "config.yaml", "scores.yaml", ".lock", "worldloom.log"
LOGS = "worldloom*.log"  # of all processes
# Folders next to the checkpoints, of replay files and of parts; worthless without a checkpoint.
UNFINISHED = ("replay", "parts")
# Version of the configuration, the checkpoints and the scores of a run; config.yaml records it.
FORMAT = 2
# Folders that this process has claimed, and whether they are new.
_claimed: dict[Path, bool] = {}
EXAMPLE = "runs/cartpole/2026-01-01_00-00-00"
WRITTEN = "expected a file written by python -m worldloom.run; restore it from a copy"


def find_run(path: Path) -> Path:
    """Return the folder of a run from its own path or from that of a file or folder in it."""
    if path.suffix == ".ckpt":
        return path.parent.parent
    inside = path.name in ("checkpoints", CONFIG) or (
        path.name == "model" and ((path.parent / CONFIG).exists() or not path.exists())
    )
    return path.parent if inside else path


def read_config(run: Path) -> dict[str, Any]:
    """Return the configuration of a run, with its interpolations unresolved.

    Raises:
        ValueError: the folder is not a run of this format, contains links that point outside, or
            its configuration is damaged.
    """
    file = run / CONFIG
    if not file.is_file():
        near = sorted(run.parent.glob(f"*/{CONFIG}"), reverse=True)
        example = next((file.parent for file in near if describes_run(file)), EXAMPLE)
        raise ValueError(
            f"{run} contains no {CONFIG}; expected a folder written by python -m worldloom.run, "
            f"such as {example}"
        )
    reject_links(run)
    saved = read_yaml(file, WRITTEN, interpolations=True)
    if (run / "model.safetensors").is_file() and "env" not in (saved or ()):
        raise ValueError(
            f"{run} is a saved model without a run; expected a folder written by python -m "
            "worldloom.run; to act with the model name an environment, env=…, or load it with "
            f"worldloom.create_world_model({str(run)!r})"
        )
    wanted = {"env": Mapping, "model": Mapping, "planner": Mapping, "threads": int | None}
    for key, kind in wanted.items():
        if not isinstance(saved, dict) or key not in saved or not isinstance(saved[key], kind):
            held = f"{key} {saved[key]!r}" if key in (saved or ()) else f"no {key!r}"
            raise ValueError(f"{file} is not the configuration of a run: it has {held}; {WRITTEN}")
    fix = "use it with the version that wrote it, or train again"
    check_format(file, saved.pop("format", None), FORMAT, fix)
    return saved


def describes_run(config: Path) -> bool:
    """Return whether a config.yaml is that of a run, and not that of a saved model."""
    with contextlib.suppress(OSError):
        return re.search(rb"^env:", config.read_bytes(), re.MULTILINE) is not None
    return False


def write_config(run: Path, config: Mapping[str, Any]) -> None:
    """Write the configuration of a run, with the version of its format."""
    write_yaml(run / CONFIG, config, FORMAT)


def write_scores(run: Path, scores: Mapping[str, float], step: int) -> None:
    """Write the final scores of a run, which make it finished."""
    write_text(run / SCORES, OmegaConf.to_yaml({**scores, "step": step}))


def read_scores(run: Path) -> dict[str, Any]:
    """Return the final scores of a run and the "step" at its end.

    Raises:
        ValueError: scores.yaml is damaged.
    """
    file, advice = run / SCORES, "delete it and resume the run, which evaluates the model again"
    scores = read_yaml(file, advice)
    numbers = isinstance(scores, dict) and all(type(x) in (int, float) for x in scores.values())
    # The step is the last line, so it is missing if the file was cut off.
    if not numbers or "step" not in scores or not file.read_bytes().endswith(b"\n"):
        raise ValueError(f"{file} is damaged: expected numbers, and the step of the end; {advice}")
    return dict(scores)


def reject_links(folder: Path) -> None:
    """Raise ValueError if anything in a folder is a link to the outside, or not a regular file.

    Programs that open such a file for writing would overwrite the file that the link points to. A
    hard link is one if the file has further names outside of the folder.
    """
    root = os.path.realpath(folder)
    linked: dict[tuple[int, ...], list[str]] = {}  # names by device, inode and number of names
    for parent, folders, files in os.walk(root):
        for name in (*folders, *files):
            path = os.path.join(parent, name)
            if Path(path).match("wandb/*/logs/debug-core.log"):
                continue  # W&B links its log in the user's cache
            target = os.path.realpath(path)
            if os.path.islink(path) and os.path.commonpath([root, target]) != root:
                raise ValueError(
                    f"{path} is a link to {target}, outside of the run's folder; replace the link "
                    "by a copy of the file or folder, or choose another folder"
                )
            if os.path.exists(path) and not (os.path.isfile(path) or os.path.isdir(path)):
                raise ValueError(f"{path} is neither a file nor a folder; delete it")
            with contextlib.suppress(FileNotFoundError):
                found = os.lstat(path)
                if stat.S_ISREG(found.st_mode) and found.st_nlink > 1:
                    key = found.st_dev, found.st_ino, found.st_nlink
                    linked.setdefault(key, []).append(path)
    for (*_, count), paths in linked.items():
        if count > len(paths):
            raise ValueError(
                f"{paths[0]} has another name outside of the run's folder (a hard link), where it "
                f"would change too; use a copy: {quote('cp', '-r', folder, f'{folder}-copy')}"
            )


@contextmanager
def claim_folder(folder: Path, resumes: bool) -> Iterator[bool]:
    """Hold the lock of a run's folder, which only one process may write.

    Yields whether the folder is new: it contains a log at most. Inside the block, the process may
    claim the folder again. A folder that is rejected is not touched.

    Raises:
        ValueError: another process writes it, it contains a run that would be overwritten, or it
            cannot be written.
    """
    path = folder.absolute()
    if path in _claimed:
        yield _claimed[path]
        return
    reject_links(folder)
    busy = (
        f"{folder} is being written by another run; wait for it, stop it, or choose another "
        "folder: hydra.run.dir=…"
    )
    if is_claimed(folder):
        raise ValueError(busy)
    _require_free(folder, resumes)
    with hold_lock(folder, busy, "make sure that no second run writes it"):
        _require_free(folder, resumes)
        _claimed[path] = all(x.name == LOCK or x.match(LOGS) for x in folder.iterdir())
        try:
            yield _claimed[path]
        finally:
            is_new = _claimed.pop(path)
            if is_new and [x.name for x in folder.glob("*")] == [LOCK]:  # nothing was started
                (folder / LOCK).unlink()


def _require_free(folder: Path, resumes: bool) -> None:
    # A run that was killed before it wrote its configuration has nothing to lose.
    if not resumes and (folder / CONFIG).exists():
        raise ValueError(
            f"{folder} already contains a run, which would be overwritten; continue it with "
            f"{quote(f'resume={folder}')}, or choose another folder: hydra.run.dir=…"
        )


def make_new_folder(folder: Path) -> Path:
    """Make a folder that did not exist, with a suffix if it is taken: NAME, NAME-2, NAME-3, ..."""
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        for path in number_folders(folder):
            with contextlib.suppress(FileExistsError):
                path.mkdir()
                return path
    except OSError as error:
        raise _cannot_write(folder, error) from error
    raise AssertionError


def number_folders(folder: Path) -> Iterator[Path]:
    """Yield the names of a folder and of those that take its place: NAME, NAME-2, NAME-3, ..."""
    yield folder
    for number in itertools.count(2):
        yield folder.with_name(f"{folder.name}-{number}")


def _cannot_write(folder: Path, error: OSError) -> ValueError:
    return ValueError(
        f"{folder} cannot be written ({error.strerror}); choose another folder, or correct its "
        "permissions"
    )


@contextmanager
def hold_lock(folder: Path, busy: str, care: str, seconds: float = 1) -> Iterator[None]:
    """Make a folder, and hold its lock inside the block.

    busy: the error if another process holds it. care: advice where the file system has no locks.
    seconds: how long to wait for the lock, which readers such as `is_claimed` hold briefly.
    """
    lock = FileLock(folder / LOCK, timeout=seconds)
    try:
        folder.mkdir(parents=True, exist_ok=True)
        lock.acquire()
    except Timeout:
        raise ValueError(busy) from None
    except OSError as error:
        if (folder / LOCK).is_dir():
            raise ValueError(f"{folder / LOCK} is a folder; expected a file; delete it") from None
        raise _cannot_write(folder, error) from error
    except NotImplementedError:
        log.warning("the file system of %s has no locks: %s", folder, care)
    try:
        yield
    finally:
        lock.release()


def is_claimed(folder: Path, name: str = LOCK) -> bool:
    """Return whether a living process writes this run; it changes nothing, not even a time.

    name: of another lock in a folder.
    """
    try:
        with (folder / name).open("rb") as file:
            fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:  # no such file, or no locks
        return False
    return False


def clear_start(folder: Path) -> None:
    """Delete what a run left that was killed before its first checkpoint.

    Raises:
        ValueError: there are other files among its checkpoints.
    """
    checkpoints = folder / "checkpoints"
    left = [path for path in checkpoints.glob("*") if path.suffix != ".tmp"]
    if others := [path.name for path in left if path.name not in UNFINISHED]:
        raise ValueError(
            f"{checkpoints} contains {', '.join(others)}, but neither last.ckpt nor previous.ckpt, "
            "so this run cannot continue; begin a new one, from its model if it has one: "
            "init_from=…"
        )
    shutil.rmtree(checkpoints, ignore_errors=True)
    if (folder / CONFIG).exists():
        (folder / "metrics.csv").unlink(missing_ok=True)


def remove_start(folder: Path, is_new: bool) -> None:
    """Delete what a run wrote that failed before its first update, so that it can begin again.

    Only the process that claimed the folder may call it. A run with a checkpoint or a rejected
    batch is kept.

    is_new: as `claim_folder` yields it; only the configuration is deleted from another folder.
    """
    files = [path.relative_to(folder) for path in folder.rglob("*") if not path.is_dir()]
    if any(f.parts[0] == "checkpoints" and f.parts[1] not in UNFINISHED for f in files):
        return
    (folder / CONFIG).unlink(missing_ok=True)
    known = {CONFIG, LOCK, "metrics.csv", "checkpoints"}
    patterns = (LOGS, "events.out.tfevents.*")
    if is_new and all(f.parts[0] in known or any(map(f.match, patterns)) for f in files):
        shutil.rmtree(folder)


def remove_empty(folders: Sequence[Path]) -> None:
    """Delete new folders, the innermost first, unless they contain a file of a run."""
    for folder in filter(Path.is_dir, folders[:1]):
        inner = [path for path in folder.rglob("*") if path.is_dir()]
        if {path.name for path in folder.rglob("*")} <= {"multirun.yaml", *(p.name for p in inner)}:
            (folder / "multirun.yaml").unlink(missing_ok=True)  # Hydra's, of a sweep
            folders = [*sorted(inner, reverse=True), *folders]
    for folder in folders:
        with contextlib.suppress(OSError):  # it is not empty
            folder.rmdir()
