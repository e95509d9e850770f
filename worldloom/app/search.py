"""A search: trials that Optuna chooses, each a run or several, driven by any number of processes.

Processes share the folder of the search. A process holds the lock of each trial that it runs, so a
trial without a result and without a lock was interrupted, and the next process continues it.
"""

import math
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import optuna
from filelock import FileLock, Timeout

from worldloom.app.command_line import USER_ERRORS, explain_error
from worldloom.app.metrics_csv import read_columns
from worldloom.app.run_dir import SCORES, read_scores
from worldloom.app.samplers import count_trials
from worldloom.app.search_config import SearchConfig
from worldloom.app.search_space import Space, format_override
from worldloom.app.study import Study
from worldloom.app.sweep_folder import LOGS, SweepFolder, describe_best, name_lock
from worldloom.app.sweep_jobs import Job, Source
from worldloom.errors import suggest

QUIET = 2.0  # seconds until the journal is read again, where there was no trial to run
LOOK = 0.5  # seconds between looks at the evaluations of a run
STATES = {"COMPLETE": "finished", "PRUNED": "pruned", "FAIL": "failed"}


@dataclass
class Trial:
    """A trial that this process runs, and whose lock it holds.

    jobs: its runs, which differ in what the command line sweeps. open: names of those that have not
    ended. reported: steps that the pruner knows. seen: state of the files that were read last.
    """

    optuna: optuna.Trial
    values: dict[str, Any]
    lock: FileLock
    is_new: bool
    reported: set[int]
    jobs: list[Job] = field(default_factory=list)
    open: set[str] = field(default_factory=set)
    error: str | None = None
    pruned: bool = False
    seen: list[Any] = field(default_factory=list)
    next_look: float = 0.0

    @property
    def number(self) -> int:
        """Return the number of the trial in the study."""
        return self.optuna.number


class Search(Source):
    """The trials of a search as jobs for a `Runner`.

    make_jobs: returns the runs of a trial from its number and its values; it raises an error for
        values that no run can have.
    """

    def __init__(
        self,
        sweep: SweepFolder,
        settings: SearchConfig,
        make_jobs: Callable[[int, dict[str, Any]], list[Job]],
    ) -> None:
        self.sweep, self.settings, self.make_jobs = sweep, settings, make_jobs
        self.total = count_trials(settings)
        self.trials: dict[int, Trial] = {}
        self.by_job: dict[str, Trial] = {}
        self.left: set[int] = set()  # interrupted while this process ran them
        self._next_take = 0.0
        with sweep.changing():
            self.study = Study(sweep.path, settings)
            self._record_study()
        print(f"search {sweep.path}: {self.count()}{self._describe_states()}", flush=True)

    def take(self) -> list[Job]:
        """Return the runs of the next trial: an interrupted one, or else a new one."""
        while time.monotonic() >= self._next_take:
            with self.sweep.changing():
                trial = self._claim()
            if trial is None:
                self._next_take = time.monotonic() + QUIET
            elif jobs := self._prepare(trial):
                return jobs
        return []

    def watch(self, job: Job) -> None:
        """Report new evaluations of a trial, and stop it if the pruner says so."""
        trial = self.by_job[job.name]
        if self.settings.pruner is None or trial.pruned or time.monotonic() < trial.next_look:
            return
        start = time.monotonic()
        found = self._read_evaluations(trial)
        # A long file is read less often.
        trial.next_look = time.monotonic() + max(LOOK, 50 * (time.monotonic() - start))
        for step, value in found:
            trial.reported.add(step)
            if self.study.report(trial.optuna, value, step):
                self._prune(trial, f"pruned with {value:.1f} at step {step:,}")
                return

    def end(self, job: Job, state: str, error: str | None) -> None:
        """Give the trial its result when the last of its runs has ended.

        After a failure its other runs are stopped. A run that was killed, or stopped by a signal,
        leaves the trial for the next command.
        """
        trial = self.by_job[job.name]
        trial.open.discard(job.name)
        killed = getattr(job.process, "returncode", None) or 0
        if state == "failed" and 0 < killed < 128:
            trial.error = trial.error or error or "failed"
            for other in trial.jobs:
                if other.name in trial.open:
                    other.ending = ("interrupted", f"stopped, because {job.name} failed")
        if trial.open:
            return
        if trial.pruned:
            self._release(trial)
        elif trial.error:
            self._tell(trial, error=trial.error)
        elif all(held.finished for held in trial.jobs):
            self._tell(trial)
        else:
            self.left.add(trial.number)
            self._release(trial)

    def count(self) -> str:
        """Return how many trials have a result."""
        return f"{len(self.study.list_trials(*STATES))} of {self.total} trials done"

    def close(self) -> None:
        """Release the locks of all trials."""
        for trial in list(self.trials.values()):
            self._release(trial)

    def report(self) -> list[str]:
        """Return lines about the trials so far, and how to use the best one."""
        return [
            f"{self.count()}{self._describe_states()}; results: {self.sweep.path}",
            *describe_best(self.sweep.search),
        ]

    def require_result(self) -> None:
        """Raise ChildProcessError if trials were interrupted, or if all of them failed."""
        logs = f"what they printed is in {self.sweep.path / LOGS}"
        if self.left:
            names = ", ".join(f"trial{number}" for number in sorted(self.left))
            raise ChildProcessError(f"{names} stopped before the end; {logs}")
        if self.study.list_trials() and not self.study.best():
            raise ChildProcessError(f"no trial has a score; {logs}")

    def _describe_states(self) -> str:
        """Return " (3 finished, 1 pruned)"."""
        counts = {STATES[state]: len(self.study.list_trials(state)) for state in STATES}
        told = ", ".join(f"{count} {name}" for name, count in counts.items() if count)
        return f" ({told})" if told else ""

    def _claim(self) -> Trial | None:
        """Return a trial that no other process runs; None if there is none left."""
        for held in self.study.list_trials("RUNNING"):
            if held.number in self.trials or held.number in self.left:
                continue
            if lock := self._lock(held.number):
                resumed = self.study.resume(held)
                return Trial(*resumed, lock, False, set(held.intermediate_values))
        if len(self.study.list_trials("RUNNING", *STATES)) >= self.total:
            return None
        asked = self.study.ask()
        lock = self._lock(asked[0].number)
        assert lock is not None  # no process knows this trial yet
        return Trial(*asked, lock, True, set())

    def _lock(self, number: int) -> FileLock | None:
        """Return the lock of a trial, held; None if another process holds it."""
        # `worldloom sweep` holds such a lock for a moment.
        lock = FileLock(self.sweep.path / LOGS / name_lock(number), timeout=0.2)
        Path(lock.lock_file).parent.mkdir(exist_ok=True)
        try:
            with suppress(NotImplementedError):  # the file system has no locks
                lock.acquire()
        except Timeout:
            return None
        return lock

    def _prepare(self, trial: Trial) -> list[Job]:
        """Return the runs of a trial that are not finished; empty if it has a result now."""
        self.trials[trial.number] = trial
        shown = " ".join(f"{key.rpartition('.')[2]}={_short(v)}" for key, v in trial.values.items())
        print(f"trial{trial.number}: {shown}", flush=True)
        try:
            trial.jobs = self.make_jobs(trial.number, trial.values)
        except USER_ERRORS as error:
            self._tell(trial, error=explain_error(error))
            print(f"trial{trial.number}: failed: {trial.error}", flush=True)
            return []
        for job in trial.jobs:
            if trial.is_new and job.folder.exists():
                raise ValueError(
                    f"{job.folder} exists, but the study of the search has no such trial; restore "
                    f"the journal of the study from a copy, or use another sweep=NAME"
                )
            self.by_job[job.name] = trial
        with self.sweep.changing():
            for job in trial.jobs:
                state = "finished" if job.finished else "waiting"
                self.sweep.jobs.setdefault(job.name, {}).update(
                    differs=job.differs, state=state, trial=trial.number
                )
            self.sweep.write()
        jobs = [job for job in trial.jobs if not job.finished]
        trial.open = {job.name for job in jobs}
        if not jobs:
            self._tell(trial)
        return jobs

    def _read_evaluations(self, trial: Trial) -> list[tuple[int, float]]:
        """Return the new (step, score) that all runs of a trial have, averaged over the runs."""
        files = [job.folder / "metrics.csv" for job in trial.jobs]
        seen = [(f.stat().st_size, f.stat().st_mtime_ns) if f.exists() else None for f in files]
        if seen == trial.seen:
            return []
        trial.seen, found = seen, []
        for file in files:
            name = f"eval/{self.settings.metric}"
            columns = read_columns(file, ["step", name])
            pairs = zip(columns["step"], columns[name], strict=True)
            found.append(
                {int(s): float(v) for s, v in pairs if not (math.isnan(v) or math.isnan(s))}
            )
        steps = set(found[0]).intersection(*found[1:]) - trial.reported
        return [(step, sum(held[step] for held in found) / len(found)) for step in sorted(steps)]

    def _prune(self, trial: Trial, reason: str) -> None:
        trial.pruned = True
        with self.sweep.changing():
            self.study.tell(trial.number, "PRUNED")
            for job in trial.jobs:
                if job.name in trial.open:
                    job.ending = ("pruned", reason)
                    self.sweep.jobs[job.name]["state"] = "pruned"
            self.sweep.write()

    def _tell(self, trial: Trial, error: str | None = None) -> None:
        """Give a trial the mean score of its runs, or let it fail; release it."""
        if error is None:
            scores = [self._read_score(job) for job in trial.jobs]
            score = sum(scores) / len(scores)
            if not math.isfinite(score):
                error = f"final/{self.settings.metric} is {score}"
                print(f"trial{trial.number}: failed: {error}", flush=True)
        trial.error = error
        with self.sweep.changing():
            if error is None:
                self.study.tell(trial.number, "COMPLETE", score)
            else:
                self.study.tell(trial.number, "FAIL")
                if not trial.jobs:
                    record = {"differs": trial.values, "state": "failed", "error": error}
                    self.sweep.jobs[f"trial{trial.number}"] = {**record, "trial": trial.number}
            self._record_study()
            self._release(trial)

    def _read_score(self, job: Job) -> float:
        scores = read_scores(job.folder)
        names = [key.removeprefix("final/") for key in scores if key.startswith("final/")]
        if self.settings.metric not in names:
            raise ValueError(
                f"search.metric is {self.settings.metric!r}, but {job.folder / SCORES} has "
                f"{', '.join(names) or 'no scores'}{suggest(self.settings.metric, names)}; use "
                "another metric and another sweep=NAME"
            )
        return float(scores[f"final/{self.settings.metric}"])

    def _release(self, trial: Trial) -> None:
        self.trials.pop(trial.number, None)
        if trial.lock.is_locked:
            trial.lock.release()

    def _record_study(self) -> None:
        """Write the best trial, and results that a killed process has not recorded."""
        for held in self.study.list_trials(*STATES):
            for job in self.sweep.jobs.values():
                if job.get("trial") == held.number and job["state"] in ("waiting", "running"):
                    job["state"] = STATES[held.state.name]
        if best := self.study.best():
            words = write_overrides(self.study.space, best.params)
            about = {"trial": best.number, "score": best.value, "overrides": words}
            self.sweep.search["best"] = about
        self.sweep.write()


def write_overrides(space: Space, values: Mapping[str, Any]) -> list[str]:
    """Return the overrides of a trial; choices are stored as the text of their override."""
    texts = {key: values[key] for key in space if key in values}
    return [f"{k}={v if isinstance(v, str) else format_override(v)}" for k, v in texts.items()]


def _short(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else format_override(value)
