"""The Optuna study of a search: a journal that several processes may write.

The journal consists of JSON lines, and reading it creates plain data only. (CmaEsSampler alone
would unpickle a part of it, so it cannot be chosen.)
"""

import os
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.trial import FrozenTrial, TrialState

from worldloom.app.command_line import join_lines
from worldloom.app.samplers import make_pruner, make_sampler
from worldloom.app.search_config import SearchConfig

JOURNAL = "study.journal"


class JournalLock:
    """Lock of a journal that is free as soon as its process is killed."""

    def __init__(self, file: Path) -> None:
        self.file, self.lock = file, FileLock(file.with_name(f".{file.name}.lock"))

    def acquire(self) -> bool:
        """Wait for the lock; remove what a full disk left of a last line."""
        with suppress(NotImplementedError):  # the file system has no locks
            self.lock.acquire()
        with self.file.open("rb+") as file:
            size = file.seek(0, os.SEEK_END)
            if size:
                file.seek(size - 1)
                if file.read(1) != b"\n":
                    file.seek(0)
                    file.truncate(file.read().rfind(b"\n") + 1)
        return True

    def release(self) -> None:
        """Release the lock."""
        self.lock.release()


class Study:
    """The trials of a search, and what its sampler and pruner decide about them.

    Raises:
        ValueError: the journal is damaged.
    """

    def __init__(self, folder: Path, settings: SearchConfig) -> None:
        self.settings, self.space = settings, settings.parse_space()
        file = folder / JOURNAL
        direction: Any = settings.direction
        try:
            lock: Any = JournalLock(file)
            backend = JournalFileBackend(str(file), lock)
            self.study = optuna.create_study(
                storage=JournalStorage(backend),
                study_name="search",
                direction=direction,
                pruner=make_pruner(settings),
                load_if_exists=True,
            )
        except OSError:
            raise
        except Exception as error:
            raise ValueError(
                f"{file} is not a journal of Optuna ({join_lines(error)}); restore it from a copy, "
                "or use another sweep=NAME"
            ) from None

    def list_trials(self, *states: str) -> list[FrozenTrial]:
        """Return all trials, or those with these states, such as "COMPLETE"."""
        wanted = [TrialState[state] for state in states] if states else None
        return self.study.get_trials(deepcopy=False, states=wanted)

    def ask(self) -> tuple[optuna.Trial, dict[str, Any]]:
        """Return a new trial, and the value of each setting.

        A trial that a user has added to the study, with `enqueue_trial`, is the next one.
        """
        added = self.list_trials("WAITING")
        with self._sampling(added[0].number if added else len(self.list_trials())):
            return self._suggest(self.study.ask())

    def resume(self, trial: FrozenTrial) -> tuple[optuna.Trial, dict[str, Any]]:
        """Return a trial that another process has asked for, and its values.

        Values that the process was killed before drawing are drawn now.
        """
        with self._sampling(trial.number):
            return self._suggest(optuna.Trial(self.study, trial._trial_id))

    def report(self, trial: optuna.Trial, value: float, step: int) -> bool:
        """Record an evaluation; return whether the pruner stops the trial."""
        trial.report(value, step)
        return trial.should_prune()

    def tell(self, number: int, state: str, score: float | None = None) -> None:
        """Record the end of a trial: "COMPLETE" with its score, "PRUNED" or "FAIL"."""
        self.study.tell(number, score, TrialState[state])

    def best(self) -> FrozenTrial | None:
        """Return the complete trial with the best score; the first of several."""
        sign = 1 if self.settings.direction == "maximize" else -1
        found = [trial for trial in self.list_trials("COMPLETE") if trial.value is not None]
        return max(found, key=lambda trial: sign * (trial.value or 0.0), default=None)

    def _suggest(self, trial: optuna.Trial) -> tuple[optuna.Trial, dict[str, Any]]:
        return trial, {key: part.suggest(trial, key) for key, part in self.space.items()}

    @contextmanager
    def _sampling(self, number: int) -> Iterator[None]:
        """Draw with the sampler of a trial inside the block.

        Outside, a sampler has nothing to do; exhaustive ones would stop a loop that there is not.
        """
        idle, self.study.sampler = self.study.sampler, make_sampler(self.settings, number)
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                yield
        finally:
            self.study.sampler = idle
