"""Saving a run: when checkpoints are due."""

import copy
import errno
import logging
import os
import time
from pathlib import Path
from typing import Any

from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.utilities.exceptions import SIGTERMException

from worldloom.records import to_plain
from worldloom.timing import phase
from worldloom.training.checkpoint_files import LAST, find_objects
from worldloom.training.checkpoint_io import ThreadedCheckpointIO
from worldloom.training.config import parse_interval
from worldloom.training.interruption import Interrupted
from worldloom.training.module import WorldModelModule
from worldloom.training.randomness import random_state, set_random_state

log = logging.getLogger(__name__)

RETRY_SECONDS = 60.0  # after a checkpoint that could not be written
LAST_TRIES, LAST_PAUSE = 12, 5.0  # of the final one, and the seconds between them


class Checkpoints(Callback):
    """Save the run at its start, at regular intervals, at its end and when it is interrupted.

    Must be the last callback, so that a checkpoint includes what the other callbacks did after an
    update. Random states are saved as well and restored right before the first update. In several
    processes the first one decides when to save, and all save together.

    folder: folder of the checkpoints.
    every: interval between two checkpoints, such as "10 minutes" or "500 updates".
    """

    def __init__(self, folder: str | Path, every: str = "10 minutes") -> None:
        self.file = Path(folder) / LAST
        self.minutes, self.updates = parse_interval(every)
        self.random: dict[str, Any] | None = None
        self._due = 0.0
        self._failed = False
        self._cause = ""  # of the failure
        self._folder: int | None = None  # descriptor of the run's folder
        self._unsaved: set[str] = set()

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Make the trainer write and read checkpoints through `ThreadedCheckpointIO`."""
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        # A folder that is open keeps its number, so that another one at its path is noticed.
        run = self.file.parent.parent
        self._folder = os.open(run, os.O_RDONLY) if run.is_dir() else None
        io: Any = ThreadedCheckpointIO(data, self.state_key, self._require_folder)
        trainer.strategy.checkpoint_io = io
        if io.ranks.size > 1:  # Lightning's own calls it in the first process only
            trainer.strategy.save_checkpoint = io.save_checkpoint  # type: ignore[method-assign]
        data.wait_for_writer = lambda: self._wait(trainer)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the run's folder."""
        if self._folder is not None:
            os.close(self._folder)
            self._folder = None

    def _require_folder(self) -> None:
        """Raise FileNotFoundError if the run's folder is no longer at its path."""
        path = self.file.parent.parent
        if self._folder is not None:
            held = os.fstat(self._folder)
            if not (path.is_dir() and os.path.samestat(held, path.stat())):
                text = "the run's folder was moved or deleted"
                raise FileNotFoundError(errno.ENOENT, text, str(path))

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the untrained run, so that every run has a checkpoint; or restore random states."""
        if self.random is None:
            self.save(trainer)
        else:
            set_random_state(self.random)
            self._schedule()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save if a checkpoint is due."""
        assert isinstance(pl_module, WorldModelModule)
        io: Any = trainer.strategy.checkpoint_io
        if io.advance():
            self._wait(trainer)  # reports an error
        due = time.monotonic() > self._due or (
            self.updates and pl_module.updates % self.updates == 0 and not self._failed
        )
        if io.ranks.decide(bool(due)):
            self.save(trainer)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Save the finished run."""
        self.save(trainer, wait=True)

    def on_exception(
        self, trainer: Trainer, pl_module: LightningModule, exception: BaseException
    ) -> None:
        """Save the state before an interruption, unless an update is incomplete or not finite.

        Several processes save only if all of them have agreed to stop.
        """
        data: Any = trainer.datamodule  # type: ignore[attr-defined]
        if not isinstance(trainer.strategy.checkpoint_io, ThreadedCheckpointIO):
            return  # before `setup`
        if data.ranks.size > 1:
            if trainer.training and data.stopping:
                self.save(trainer, wait=True)
            return
        good = not isinstance(exception, FloatingPointError)
        if isinstance(exception, Interrupted):
            good = exception.between
        elif not isinstance(exception, Exception):
            good = isinstance(exception, SIGTERMException)  # Lightning's, raised between updates
        if trainer.training and good:
            self.save(trainer, wait=True)
        else:
            self._wait(trainer)

    def on_save_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Leave out the states of callbacks that contain more than tensors and plain data."""
        for key, state in list(checkpoint["callbacks"].items()):
            if find_objects(state):
                checkpoint["callbacks"][key] = state = to_plain(state)
            if found := find_objects(state):
                del checkpoint["callbacks"][key]
                if key not in self._unsaved:
                    log.warning(
                        "the state of the callback %s is not saved: it contains %s; expected "
                        "tensors, numbers, strings, lists and dicts",
                        *(key, found),
                    )
                self._unsaved.add(key)

    def on_load_checkpoint(
        self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]
    ) -> None:
        """Restore users' callbacks, except those that reject their state, with a warning.

        Called after this hook of the other callbacks and before Lightning restores states.
        """
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            state = checkpoint["callbacks"].get(callback.state_key)
            if state is None or type(callback).__module__.startswith("worldloom."):
                continue
            del checkpoint["callbacks"][callback.state_key]
            try:
                callback.load_state_dict(copy.deepcopy(state))
            except Exception as error:
                log.warning(
                    "the callback %s cannot restore its saved state (%s: %s), so it starts without",
                    *(type(callback).__name__, type(error).__name__, error),
                )

    def state_dict(self) -> dict[str, Any]:
        """Return the random states of torch, NumPy and Python."""
        return {"random": random_state()}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Keep the random states until training starts."""
        self.random = state_dict["random"]

    def save(self, trainer: Trainer, wait: bool = False) -> None:
        """Save a checkpoint; training continues while it is written, unless `wait` is true."""
        with phase("checkpoint"):
            self._wait(trainer)
            self._schedule()
            trainer.save_checkpoint(self.file, weights_only=False)
            if wait and not self._wait(trainer):
                self._retry(trainer)

    def _retry(self, trainer: Trainer) -> None:
        """Try again to write the final checkpoint for a while; then keep it elsewhere."""
        io: Any = trainer.strategy.checkpoint_io
        for _ in range(LAST_TRIES):
            time.sleep(LAST_PAUSE)
            trainer.save_checkpoint(self.file, weights_only=False)
            if self._wait(trainer):
                return
        raise OSError(f"{self.file} could not be written: {self._cause}; {io.keep_elsewhere()}")

    def _schedule(self) -> None:
        self._due = time.monotonic() + 60 * self.minutes

    def _wait(self, trainer: Trainer) -> bool:
        """Wait for the last checkpoint; return whether it, if any, was written.

        If it could not be written, warn once and retry later.
        """
        io: Any = trainer.strategy.checkpoint_io
        try:
            if io.wait() and self._failed:
                self._failed = False
                log.warning("checkpoints can be written again")
        except OSError as error:
            self._cause = error.strerror or str(error)
            if not self._failed:
                full = error.errno in (errno.ENOSPC, errno.EDQUOT)
                log.warning(
                    "the checkpoint could not be written: %s (%s); training continues, and writing "
                    "is retried every minute; %s",
                    *(self.file, self._cause),
                    "the previous one is intact; free some disk space" if full else "correct that",
                )
            self._failed = True
            self._due = time.monotonic() + RETRY_SECONDS
            return False
        return True
