"""Checkpoint files: written atomically, verified when they are read.

A run has two of them: `last.ckpt` and the one before, `previous.ckpt`. Both are zip files written
by torch.save, in which every record has a CRC-32, and both list the replay files that they need.
In a run of several processes they contain the state of the first one and list the files with the
parts of the others. A part is written under a new name before the checkpoint that lists it.
"""

import contextlib
import errno
import itertools
import logging
import os
from collections.abc import Callable, Container, Mapping
from pathlib import Path
from typing import Any, BinaryIO

import torch

from worldloom.errors import escape
from worldloom.files import atomic_write, read_tensors
from worldloom.ranks import Ranks
from worldloom.trees import map_tree

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
DATA = "ReplayDataModule"  # key under which Lightning stores the data module's state
PARTS = "parts"  # key of the names of the parts, in the order of the ranks, and their folder


class DamagedCheckpoint(ValueError):
    """A checkpoint that cannot be read or has changed since it was written."""


def copy_to_cpu(tree: Any) -> Any:
    """Copy nested data; each tensor gets its own memory, even if it was a view of a larger one."""
    return map_tree(
        lambda x: x.detach().to("cpu", copy=True) if isinstance(x, torch.Tensor) else x, tree
    )


def find_objects(tree: Any) -> str:
    """Return the type of the first object in nested data that checkpoints cannot contain, or ""."""
    if isinstance(tree, Mapping):
        tree = [*tree, *tree.values()]
    if isinstance(tree, list | tuple | set):
        return next(filter(None, map(find_objects, tree)), "")
    plain = tree is None or type(tree) in (bool, int, float, complex, str, bytes)
    return "" if plain or isinstance(tree, torch.Tensor) else type(tree).__name__


def write_checkpoint(file: Path, content: Any, keep_as: Path | None = None) -> None:
    """Write tensors and plain data with torch.save, atomically.

    keep_as: second name under which the file that is being replaced stays available.

    Raises:
        OSError: the file cannot be written; both names are unchanged.
    """
    file.parent.mkdir(parents=True, exist_ok=True)
    for left in file.parent.glob(f".{file.name}.*.tmp"):  # by a process that was killed
        left.unlink(missing_ok=True)
    with atomic_write(file) as stream:
        sink: Any = _Sink(stream)
        torch.save(content, sink)
        sink.sync()
        for path in filter(None, (file, keep_as)):
            _move_folder(path)
        if keep_as is not None and file.exists():
            _link(file, keep_as)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a run's checkpoint after verifying its checksums.

    Raises:
        DamagedCheckpoint: the file is truncated or changed, or contains anything other than tensors
            and plain data.
    """
    return _read(path, lambda checkpoint: (checkpoint["state_dict"], checkpoint[DATA]["updates"]))


def read_part(checkpoint: Path, name: str) -> dict[str, Any]:
    """Return a part of a checkpoint: what differs between processes, of one of them.

    Raises:
        DamagedCheckpoint: the part is missing or damaged.
    """
    path = checkpoint.parent / PARTS / Path(name).name
    try:
        return _read(path, lambda part: (part[DATA]["updates"], part["callbacks"]))
    except FileNotFoundError:
        raise DamagedCheckpoint(f"{path}, a part of {checkpoint}, is missing") from None


def keep_parts(folder: Path, names: Container[str]) -> None:
    """Delete all files of parts in a folder with checkpoints, except for these."""
    for path in (folder / PARTS).glob("*"):
        if path.name not in names:
            path.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # it does not exist, or is not empty
        (folder / PARTS).rmdir()


def _read(path: Path, check: Callable[[Any], Any]) -> dict[str, Any]:
    """Return tensors and plain data after verifying checksums and, with `check`, the content."""
    try:
        checkpoint = read_tensors(path, verify=True)
        check(checkpoint)
    except FileNotFoundError:
        raise
    except Exception as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise DamagedCheckpoint(f"{path} is not a complete checkpoint of a run: {reason}") from None
    return checkpoint


def has_checkpoint(folder: Path) -> bool:
    """Return whether a checkpoint exists; a run killed right after its start may have none."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def find_damage(folder: Path) -> str:
    """Return why no checkpoint of a folder can be read, or "" if one can or there is none."""
    reports = [_verify(folder / name, lambda _: [], Ranks())[1] for name in (LAST, PREVIOUS)]
    usable = any(not problems for problems in reports)
    return "" if usable else "; ".join(filter(None, itertools.chain(*reports)))


def find_usable(
    folder: Path, damaged: Callable[[dict[str, Any]], list[str]], ranks: Ranks | None = None
) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint of a folder that is intact, including parts and replay files.

    A damaged last.ckpt is renamed, with a warning, and replaced by the previous one. If both
    checkpoints are intact but both need damaged replay files, the last one is returned: the replay
    continues without those rows.

    damaged: returns the damaged files that a state of the data module needs.
    ranks: the processes that resume the run. They share the work and get the same checkpoint.

    Raises:
        ValueError: there is no intact checkpoint.
    """
    ranks = ranks or Ranks()
    last, previous = folder / LAST, folder / PREVIOUS
    found: dict[Path, dict[str, Any]] = {}
    intact: Path | None = None
    for path in (last, previous):
        checkpoint, problems, bad = _verify(path, damaged, ranks)
        if problems:
            for problem in filter(None, problems):
                log.warning("%s", escape(problem))
            continue
        found[path] = checkpoint
        if not bad:
            intact = path
            break
        log.warning("%s needs damaged files of the replay: %s", path, escape(", ".join(bad)))
    if not found:
        raise ValueError(
            f"{folder} contains no intact checkpoint ({LAST}, {PREVIOUS}); start a new run, from "
            "this run's model if it was saved: init_from=<run folder>/model"
        )
    chosen = intact or next(iter(found))
    if chosen == previous:
        log.warning("continuing from the previous checkpoint: %s", previous)
        if ranks.rank == 0:
            if last.exists():
                os.replace(last, last.with_suffix(".damaged"))
            os.replace(previous, last)
        ranks.share(0)  # nobody reads it before
    return last, found[chosen]


def _verify(
    path: Path, damaged: Callable[[dict[str, Any]], list[str]], ranks: Ranks
) -> tuple[dict[str, Any], list[str], list[str]]:
    """Return a checkpoint, why it cannot be used, and its damaged replay files.

    Each rank verifies some of the parts; all return the same. A missing file is the problem "".
    """
    checkpoint: dict[str, Any] = {}
    problems: list[str] = []
    bad: list[str] = []
    try:
        checkpoint = read_checkpoint(path)
        names = [None, *checkpoint.get(PARTS, ())]
        for name in names[ranks.rank :: ranks.size]:
            bad += damaged((checkpoint if name is None else read_part(path, name))[DATA])
    except FileNotFoundError:
        problems = [""]
    except DamagedCheckpoint as error:
        problems = [str(error)]
    reports = ranks.gather((problems, bad))
    problems, bad = ([x for report in reports for x in report[nth]] for nth in range(2))
    return checkpoint, list(dict.fromkeys(problems)), bad


class _Sink:
    """Stream for torch.save that keeps the OSError of a failed write, which torch would replace."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write data; after an error, do nothing."""
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing; torch calls this at the end, where `sync` follows."""

    def sync(self) -> None:
        """Flush everything to the disk, or raise the error of a previous write."""
        if self.error is not None:
            raise self.error
        self.file.flush()
        os.fsync(self.file.fileno())


def _move_folder(path: Path) -> None:
    """Rename a folder that is in the place of a file."""
    if path.is_dir():
        log.warning("%s is a folder and is renamed to %s", path, path.with_suffix(".damaged"))
        os.replace(path, path.with_suffix(".damaged"))


def _link(path: Path, other: Path) -> None:
    """Give a file a second name, atomically; move it if the file system has no hard links."""
    temporary = other.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        temporary = path
    os.replace(temporary, other)
