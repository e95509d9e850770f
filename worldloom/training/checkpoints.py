"""Checkpoints: when a run is saved, and how no kill and no full disk can damage what was saved.

A run has two of them, `last.ckpt` and the one before, `previous.ckpt`. Both are zip files of
torch.save, in which every record has its CRC-32; both name the files of the replay that belong to
them, with theirs.
"""

import errno
import logging
import os
import time
import zipfile
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, BinaryIO, Protocol

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.fabric.plugins.io import CheckpointIO
from lightning.pytorch.utilities.exceptions import SIGTERMException

from worldloom.replay.chunks import flush_to_disk
from worldloom.timing import phase
from worldloom.training.config import parse_interval
from worldloom.training.interruption import Interrupted
from worldloom.training.module import WorldModelModule
from worldloom.training.randomness import random_state, set_random_state

log = logging.getLogger(__name__)

LAST, PREVIOUS = "last.ckpt", "previous.ckpt"
RETRY_SECONDS = 60.0  # after a checkpoint that could not be written
DATA = "ReplayDataModule"  # under which Lightning saves the data module's state


class Damaged(ValueError):
    """A checkpoint that cannot be read, or not as it was written."""


class Data(Protocol):
    """What writing checkpoints needs of a data module."""

    def finish(self, state: dict[str, Any]) -> None:
        """Write what a state of this module still needs on disk, and name it in the state."""

    def keep(self, states: list[dict[str, Any]]) -> None:
        """Delete what none of these states needs."""


class CheckpointFiles(CheckpointIO):
    """Write checkpoints in a thread, while training goes on; read only what is whole.

    A checkpoint is copied, written under a temporary name, flushed to the disk, and then renamed,
    so that at every moment there is a complete one.
    """

    def __init__(self, data: Data) -> None:
        self.data = data
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[None] | None = None
        self._states: list[dict[str, Any]] = []  # of the data, in last.ckpt and previous.ckpt

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Begin to write; `busy` and `wait` tell how it goes."""
        self.wait()
        self._writing = self._pool.submit(self._write, _copied(checkpoint), Path(path))

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the tensors and the plain data of a checkpoint; no code in it is run."""
        checkpoint = read_checkpoint(Path(path))
        self._states = [checkpoint[DATA]]
        return checkpoint

    def teardown(self) -> None:
        """End the thread."""
        self._pool.shutdown()

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        Path(path).unlink(missing_ok=True)

    @property
    def busy(self) -> bool:
        """Tell whether a checkpoint is still being written."""
        return self._writing is not None and not self._writing.done()

    def wait(self) -> bool:
        """Wait until nothing is being written; tell whether something was since the last call.

        Raises:
            OSError: it could not be written, for example because the disk is full.
        """
        if self._writing is None:
            return False
        writing, self._writing = self._writing, None
        writing.result()
        return True

    def _write(self, checkpoint: dict[str, Any], path: Path) -> None:
        state = checkpoint[DATA]
        temporary = path.with_suffix(".tmp")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self.data.finish(state)
            with temporary.open("wb") as file:
                sink: Any = _Sink(file)
                torch.save(checkpoint, sink)
                sink.sync()
            if path.name == LAST and path.exists():
                _link(path, path.with_name(PREVIOUS))
            os.replace(temporary, path)
        except BaseException:
            temporary.unlink(missing_ok=True)
            raise
        if path.name == LAST:
            self._states = [*self._states[-1:], state]
        flush_to_disk(path.parent)
        if path.name == LAST:
            self.data.keep(self._states)


def read_checkpoint(path: Path) -> dict[str, Any]:
    """Return a checkpoint after its check sums were compared.

    Raises:
        Damaged: it is cut off, changed, or holds something else than tensors and plain data.
    """
    try:
        with zipfile.ZipFile(path) as file:
            if record := file.testzip():
                raise Damaged(f"{path} is damaged: the check sum of {record} differs")
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        checkpoint["state_dict"], checkpoint[DATA]["updates"]
    except (FileNotFoundError, Damaged):
        raise
    except Exception as error:
        reason = " ".join(str(error).split(". ")[0].split())
        raise Damaged(f"{path} is no whole checkpoint of a run: {reason}") from None
    return checkpoint


def has_checkpoint(folder: Path) -> bool:
    """Tell whether there is one, whole or not; a run that was killed at its very start has none."""
    return any((folder / name).exists() for name in (LAST, PREVIOUS))


def usable(
    folder: Path, damaged: Callable[[dict[str, Any]], list[str]]
) -> tuple[Path, dict[str, Any]]:
    """Return the newest checkpoint in a folder that is whole, down to the replay it needs.

    A damaged last.ckpt is put aside with a warning, and the one before takes its place. Where
    only files of the replay are damaged and both checkpoints need them, the last one is taken:
    the replay leaves those rows out.

    damaged: names the damaged files that a state of the data module needs.

    Raises:
        ValueError: there is none.
    """
    last, previous = folder / LAST, folder / PREVIOUS
    found: dict[Path, dict[str, Any]] = {}
    whole: Path | None = None
    for path in (last, previous):
        try:
            found[path] = read_checkpoint(path)
        except FileNotFoundError:
            continue
        except Damaged as error:
            log.warning("%s", error)
            continue
        if not (bad := damaged(found[path][DATA])):
            whole = path
            break
        log.warning("%s needs damaged files of the replay: %s", path, ", ".join(bad))
    if not found:
        raise ValueError(
            f"{folder} holds no whole checkpoint ({LAST}, {PREVIOUS}); expected what "
            "python -m worldloom.run wrote; begin a new run, from its model if it has one: "
            "init_from=…/model"
        )
    chosen = whole or next(iter(found))
    if chosen == previous:
        log.warning("going on from the checkpoint before: %s", previous)
        if last.exists():
            os.replace(last, last.with_suffix(".damaged"))
        os.replace(previous, last)
    return last, found[chosen]


class Checkpoints(Callback):
    """Save the run at its start, every so often, at its end and when it breaks off.

    Has to be the last callback: what the others do after an update belongs to it. Keeps the
    random states too, and gives them back when the first update is about to begin.

    folder: of the checkpoints.
    every: "10 minutes" or "500 updates", from one checkpoint to the next.
    """

    def __init__(self, folder: str | Path, every: str = "10 minutes") -> None:
        self.file = Path(folder) / LAST
        self.minutes, self.updates = parse_interval(every)
        self.random: dict[str, Any] | None = None
        self._due = 0.0
        self._failed = False

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Let this trainer write and read checkpoints by `CheckpointFiles`."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        trainer.strategy.checkpoint_io = CheckpointFiles(data)
        data.written = lambda: self._wait(trainer)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the untrained run: a folder always has a checkpoint. Or go on where one was."""
        if self.random is None:
            self.save(trainer)
        else:
            set_random_state(self.random)
            self._schedule()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save when it is time."""
        assert isinstance(pl_module, WorldModelModule)
        self._look(trainer)
        if time.monotonic() > self._due or (
            self.updates and pl_module.updates % self.updates == 0 and not self._failed
        ):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run."""
        self.save(trainer, wait=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save what was learned before an interruption; numbers that broke are not worth it."""
        good = not isinstance(exception, FloatingPointError)
        if isinstance(exception, Interrupted):
            good = exception.between
        elif not isinstance(exception, Exception):
            good = isinstance(exception, SIGTERMException)  # Lightning's own, between two updates
        if trainer.training and good:
            self.save(trainer, wait=True)
        else:
            self._wait(trainer)

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of torch, NumPy and Python."""
        return {"random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Remember the random states for the start of training."""
        self.random = state_dict["random"]

    def save(self, trainer: Trainer, wait: bool = False) -> None:
        """Save a checkpoint; training goes on while it is written, unless `wait`."""
        with phase("checkpoint"):
            self._wait(trainer)
            self._schedule()
            trainer.save_checkpoint(self.file, weights_only=False)
            if wait:
                self._wait(trainer, last=True)

    def _schedule(self) -> None:
        self._due = time.monotonic() + 60 * self.minutes

    def _look(self, trainer: Trainer) -> None:
        io: Any = trainer.strategy.checkpoint_io
        if not io.busy:
            self._wait(trainer)

    def _wait(self, trainer: Trainer, last: bool = False) -> None:
        """Wait for the last checkpoint; of a full disk say so once, and try again later."""
        io: Any = trainer.strategy.checkpoint_io
        try:
            if io.wait() and self._failed:
                self._failed = False
                log.warning("checkpoints can be written again")
        except OSError as error:
            if last:
                raise OSError(
                    error.errno, f"{_cause(error)}; the checkpoint before is whole", str(self.file)
                ) from error
            if not self._failed:
                log.warning(
                    "the checkpoint could not be written (%s); training goes on, the one before "
                    "is whole, and it is tried again every minute; free some space",
                    _cause(error),
                )
            self._failed = True
            self._due = time.monotonic() + RETRY_SECONDS


class _Sink:
    """A file for torch.save, which would hide why it could not be written."""

    def __init__(self, file: BinaryIO) -> None:
        self.file = file
        self.error: OSError | None = None

    def write(self, data: Any) -> int:
        """Write data, unless it was in vain before."""
        try:
            if self.error is None:
                self.file.write(data)
        except OSError as error:
            self.error = error
        return len(data)

    def flush(self) -> None:
        """Do nothing; torch calls this when it is done, and `sync` follows."""

    def sync(self) -> None:
        """Flush everything to the disk; raise what went wrong."""
        if self.error is None:
            self.file.flush()
            os.fsync(self.file.fileno())
        else:
            raise self.error


def _copied(value: Any) -> Any:
    """Copy tensors to memory of their own, for training goes on to change them."""
    if isinstance(value, torch.Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value


def _link(path: Path, other: Path) -> None:
    """Give a file a second name, atomically; move it where the file system knows no links."""
    temporary = other.with_suffix(".link")
    temporary.unlink(missing_ok=True)
    try:
        os.link(path, temporary)
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise
        temporary = path
    os.replace(temporary, other)


def _cause(error: OSError) -> str:
    return error.strerror or str(error)
