"""Writing and reading the checkpoint of a run, in one process or in several."""

import logging
import secrets
import shutil
import tempfile
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lightning.fabric.plugins.io import CheckpointIO

from worldloom.ranks import RankError
from worldloom.training.checkpoint_files import (
    DATA,
    LAST,
    PARTS,
    PREVIOUS,
    copy_to_cpu,
    keep_parts,
    read_checkpoint,
    read_part,
    write_checkpoint,
)
from worldloom.training.redistribution import redistribute

if TYPE_CHECKING:
    from worldloom.training.datamodule import ReplayDataModule

log = logging.getLogger(__name__)

SAME = ("state_dict", "optimizer_states", "lr_schedulers")  # in all ranks, so not in parts
POLL_SECONDS = 0.05  # between two exchanges of ranks that wait for a checkpoint


@dataclass
class Saving:
    """A checkpoint that is being written.

    content: of this rank's file, if it writes one. state: of its data module.
    part: the file of this rank, until last.ckpt lists it. names: of the parts of all ranks above 0.
    """

    path: Path
    content: dict[str, Any]
    state: dict[str, Any]
    part: Path | None = None
    names: list[str] = field(default_factory=list)

    @property
    def is_last(self) -> bool:
        """Return whether a run resumes from it; otherwise it was asked for by another callback."""
        return self.path.name == LAST


class ThreadedCheckpointIO(CheckpointIO):
    """Write checkpoints in a thread while training continues.

    A checkpoint is copied when it is requested, so later updates do not change it.

    Writing has three stages: the replay files and the parts of the ranks above 0; last.ckpt, which
    lists the parts; deleting what is no longer needed. A stage begins when all ranks have
    completed the one before, so that last.ckpt is replaced only by a checkpoint of which all parts
    exist, and the files of the one before remain until then. If a rank cannot write, the
    checkpoint counts for none. Ranks learn this in `advance`, in their main threads: a rank may
    write as long as its disk needs, while one that hangs or died ends the next exchange.

    random_key: of the callback's state that contains the random states.
    require_folder: raises OSError if the run's folder is gone.
    """

    def __init__(
        self, data: "ReplayDataModule", random_key: str, require_folder: Callable[[], None]
    ) -> None:
        self.data, self.ranks, self._random_key = data, data.ranks, random_key
        self._require_folder = require_folder
        self._pool = ThreadPoolExecutor(1, "checkpoints")
        self._writing: Future[Any] | None = None
        self._stages: list[Callable[[list[Any]], Any]] = []  # after the one that is running
        self._saving: Saving | None = None
        self._ended = True  # in all ranks
        # Of the data, and names of parts, in previous.ckpt and last.ckpt.
        self._states: list[dict[str, Any]] = []
        self._parts: list[list[str]] = []

    def save_checkpoint(
        self, checkpoint: dict[str, Any], path: Any, storage_options: Any = None
    ) -> None:
        """Start to write a checkpoint, in all ranks; `wait` waits for the end.

        Files of Lightning's ModelCheckpoint are complete on return, since loggers may upload them.
        """
        self.wait()
        if self.ranks.rank > 0:
            checkpoint = {name: x for name, x in checkpoint.items() if name not in SAME}
        content = copy_to_cpu(checkpoint)
        state = content[DATA] if Path(path).name == LAST else content.pop(DATA)
        saving = self._saving = Saving(Path(path), content, state)
        self._stages = [
            lambda _: self._prepare(saving),
            lambda names: self._replace(saving, names[1:]),
            lambda _: self._clean(saving),
        ]
        self._ended = False
        if self.ranks.size == 1:
            self._writing = self._pool.submit(lambda: [stage([]) for stage in self._stages])
        else:
            self._writing = self._pool.submit(self._stages.pop(0), [])
        if not saving.is_last:
            self._finish()

    def load_checkpoint(
        self, path: Any, map_location: Any = None, weights_only: bool | None = None
    ) -> dict[str, Any]:
        """Return the tensors and plain data of a checkpoint; no code in the file is executed.

        State and random states are those of this rank, or its share of those of all ranks if their
        number has changed.
        """
        checkpoint = read_checkpoint(Path(path))
        names = checkpoint.pop(PARTS, [])
        ranks, size = self.ranks, 1 + len(names)
        self._states, self._parts = [checkpoint[DATA]], [names]
        if size == ranks.size and ranks.rank == 0:
            return checkpoint
        if size == ranks.size:
            checkpoint |= read_part(Path(path), names[ranks.rank - 1])
            self._states = [checkpoint[DATA]]
            return checkpoint
        parts = [checkpoint, *(read_part(Path(path), name) for name in names)]
        states = [part[DATA] for part in parts]
        checkpoint[DATA], seed = redistribute(states, ranks)
        checkpoint["callbacks"].setdefault(self._random_key, {})["random"] = {"seed": seed}
        files = {name: crc for state in states for name, crc in state["buffer"]["files"].items()}
        self._states = [{"buffer": {"files": files}}]
        log.info("the replay of %d processes is redistributed over %d", size, ranks.size)
        return checkpoint

    def keep_elsewhere(self) -> str:
        """Write the last checkpoint, without the replay's files, to a new folder.

        Returns the end of a message, which names the file.
        """
        assert self._saving is not None
        if self.ranks.rank > 0:
            return "rank 0 names the file with the final state"
        file = Path(LAST)
        try:
            file = Path(tempfile.mkdtemp(prefix="worldloom-"), LAST)
            write_checkpoint(file, self._saving.content)
        except OSError as error:
            if file.is_absolute():
                shutil.rmtree(file.parent, ignore_errors=True)
            return f"nor could the final state be kept elsewhere ({file}: {error})"
        return (
            f"the final state without the replay's files is kept in {file}: score it with "
            f"worldloom eval checkpoint={file} env=…, or begin a run with init_from={file}"
        )

    def teardown(self) -> None:
        """Stop the thread."""
        self._pool.shutdown()

    def remove_checkpoint(self, path: Any) -> None:
        """Delete a checkpoint."""
        if self.ranks.rank == 0:
            Path(path).unlink(missing_ok=True)

    def advance(self) -> bool:
        """Return whether no checkpoint is being written, in any rank; all ranks have to call it.

        Starts the next stage if all ranks have completed one.
        """
        if self._ended or self._writing is None:
            return True
        if self.ranks.size == 1:
            return self._writing.done()
        done = self._writing.done()
        outcomes = self.ranks.gather(_outcome(self._writing) if done else None)
        if None in outcomes:
            return False
        failed = next((rank for rank, (error, _) in enumerate(outcomes) if error), None)
        if failed is None and self._stages:
            names = [name for _, name in outcomes]
            self._writing = self._pool.submit(self._stages.pop(0), names)
            return False
        self._ended = True
        if failed is not None:
            self._fail(f"rank {failed}: {outcomes[failed][0][1]}", outcomes[failed][0][0])
        return True

    def wait(self) -> bool:
        """Wait for the checkpoint that is being written; return whether there was one.

        All ranks have to call it.

        Raises:
            OSError: a rank could not write it, for example because the disk is full.
        """
        if self._writing is None:
            return False
        self._finish()
        writing, self._writing = self._writing, None
        writing.result()
        return True

    def _finish(self) -> None:
        """Wait until a checkpoint is complete or has failed."""
        assert self._writing is not None
        while not self.advance():
            wait([self._writing], POLL_SECONDS if self.ranks.size > 1 else None)

    def _fail(self, text: str, number: int | None) -> None:
        """Delete this rank's part; let `wait` raise the error of a rank.

        number: of an OSError, after which training continues; None for any other error.
        """
        assert self._writing is not None and self._saving is not None
        if self._saving.part is not None:
            self._saving.part.unlink(missing_ok=True)
        own = self._writing.exception()
        if own is None or isinstance(own, OSError):
            error = RankError(text) if number is None else OSError(number, text)
            self._writing = Future()
            self._writing.set_exception(error)

    def _prepare(self, saving: Saving) -> str | None:
        """Write the replay files and, in a rank above 0, its part; return the name of the part."""
        if saving.is_last:
            self._require_folder()
        self.data.finish(saving.state)
        if self.ranks.rank == 0 or not saving.is_last:
            return None
        updates, unique = saving.state["updates"], secrets.token_hex(4)
        name = f"rank{self.ranks.rank}-{updates:09d}-{unique}.part"
        saving.part = saving.path.parent / PARTS / name
        write_checkpoint(saving.part, saving.content)
        return name

    def _replace(self, saving: Saving, names: list[str]) -> None:
        """Write the checkpoint itself, in rank 0."""
        saving.names = names if saving.is_last else []
        if self.ranks.rank == 0:
            parts = {PARTS: saving.names} if saving.names else {}
            keep_as = saving.path.with_name(PREVIOUS) if saving.is_last else None
            write_checkpoint(saving.path, saving.content | parts, keep_as)

    def _clean(self, saving: Saving) -> None:
        """Delete the files that neither last.ckpt nor previous.ckpt needs."""
        saving.part = None
        if saving.is_last:
            self._states = [*self._states[-1:], saving.state]
            self._parts = [*self._parts[-1:], saving.names]
            self.data.keep(self._states)
            if self.ranks.rank == 0:
                keep_parts(saving.path.parent, {name for names in self._parts for name in names})


def _outcome(writing: Future[Any]) -> tuple[tuple[int | None, str] | None, str | None]:
    """Return the error of a stage, if any, as its number and text, and its result."""
    error = writing.exception()
    if error is None:
        return None, writing.result()
    if isinstance(error, OSError):
        return (error.errno, error.strerror or str(error)), None
    return (None, f"{type(error).__name__}: {error}"), None
