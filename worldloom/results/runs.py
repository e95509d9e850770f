"""Runs in folders: their state, steps, scores and metrics, also while they are trained."""

import logging
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import yaml

from worldloom.app import sweep_folder
from worldloom.app.command_line import join_lines
from worldloom.app.metrics_csv import read_columns, read_header, report_damage, to_number
from worldloom.app.run_dir import CONFIG, LOG, SCORES, describes_run, find_run, read_scores
from worldloom.app.sweep_folder import (
    FAILED,
    FINISHED,
    INTERRUPTED,
    LOGS,
    RECORD,
    decide_state,
)
from worldloom.files import LOADER, read_text, require_plain, require_regular
from worldloom.trees import flatten_tree

log = logging.getLogger(__name__)

EPISODES = 20  # newest training episodes whose mean is the score of a run without evaluations


@dataclass
class Job:
    """One run, or a job of a sweep that is not a run yet.

    folder: of the run.
    source: the folder that the user named; it contains the run, or is the run.
    config: {"section.key": value} of config.yaml, unresolved; empty before it is written.
    state: finished, running, failed, interrupted or waiting.
    error: the last error of a failed run, else "".
    step, total: position on the x-axis (environment steps, or updates offline) and its end.
    score, kind: the score, NaN before the first episode, and "final", "eval" or "episode".
    seconds: of training.
    name: that of the job in its sweep, or what `label_jobs` sets.
    task, group: what `label_jobs` sets. Runs of the same task and group differ in the seed.
    """

    folder: Path
    source: Path
    config: dict[str, Any]
    state: str
    error: str = ""
    step: int = 0
    total: int | None = None
    score: float = float("nan")
    kind: str = ""
    seconds: float = float("nan")
    task: str = ""
    group: str = ""
    name: str = ""
    _columns: dict[str, np.ndarray] = field(default_factory=dict, repr=False)

    @property
    def seed(self) -> Any:
        """The seed of the run, None before its configuration is written."""
        return self.config.get("seed")

    @property
    def log(self) -> Path:
        """The file with what the run printed, or before its folder existed what its job printed."""
        own, of_sweep = self.folder / LOG, self.folder.parent / LOGS / f"{self.folder.name}.log"
        return of_sweep if of_sweep.is_file() and not own.is_file() else own

    @property
    def offline(self) -> bool:
        """Whether the run trains on recorded episodes, so that its steps are updates."""
        return self.config.get("data.path") is not None

    def columns(self, *names: str) -> list[np.ndarray]:
        """Return columns [rows] of metrics.csv as numbers; NaN where a row has no value."""
        if missing := [name for name in names if name not in self._columns]:
            self._columns |= read_columns(self.folder / "metrics.csv", missing)
        return [self._columns[name] for name in names]


def read_jobs(paths: Iterable[Path], metric: str = "return") -> list[Job]:
    """Read all runs in folders, at any depth.

    metric: what is scored: "return" for final/return, eval/return or episode/return.

    Raises:
        ValueError: a path does not exist, or contains no run.
    """
    jobs: dict[Path, Job] = {}
    for path in paths:
        if not path.exists():
            raise ValueError(f"there is no folder {path}; expected a run, or a folder of runs")
        records = find_runs(path).items()
        read = (_read_job(folder, path, metric, record) for folder, record in records)
        found = [job for job in read if job is not None]
        if not found:
            raise ValueError(
                f"{path} contains no runs; expected a folder written by python -m worldloom.run, "
                "or one that contains such folders"
            )
        for job in found:
            jobs.setdefault(job.folder.resolve(), job)
    return list(jobs.values())


def find_runs(path: Path) -> dict[Path, dict[str, Any]]:
    """Return {folder: its record in sweep.yaml, or {}} of all runs and planned jobs in a folder.

    path: a folder of runs, a run, or a file or folder in a run.
    """
    found: dict[Path, dict[str, Any]] = {}
    for parent, folders, files in os.walk(find_run(path)):
        here = Path(parent)
        if RECORD in (*files, *folders):  # a folder of this name is reported
            found |= {here / name: record for name, record in _read_records(here).items()}
        if LOG in files or (CONFIG in files and describes_run(here / CONFIG)):
            found[here] = found.get(here) or _read_records(here.parent).get(here.name, {})
            folders.clear()
        folders.sort(key=_by_number)
    return found


def _read_records(sweep: Path) -> dict[str, dict[str, Any]]:
    """Return the jobs of the sweep in a folder, by name; empty without one, or if it is damaged."""
    try:
        return sweep_folder.read_jobs(sweep) if (sweep / RECORD).exists() else {}
    except ValueError as error:
        report_damage(sweep / RECORD, str(error))
    return {}


def _by_number(name: str) -> list[Any]:
    """Return the key that sorts seed2 before seed10."""
    return [(int(part), "") if part.isdigit() else (-1, part) for part in re.split(r"(\d+)", name)]


def _read_job(folder: Path, source: Path, metric: str, record: Mapping[str, Any]) -> Job | None:
    """Return a run or a planned job; None if there is neither, as after a failed start."""
    config = flatten_tree(_read_yaml(folder / CONFIG), ".")
    state, error = record.get("state") or decide_state(folder), ""
    if state in (FAILED, INTERRUPTED):
        error = read_error(folder) or str(record.get("error") or "") * (state == FAILED)
        if not (error or config or record):
            return None
        state = FAILED if error else state
    job = Job(folder, source, config, state, error)
    job.name = _name_job(folder, record) if record else ""
    total = config.get("training.total_steps")
    job.total = total if isinstance(total, int) else None
    scores = _read_scores(folder)
    steps, seconds, final, evals, episodes = job.columns(
        *("step", "seconds", f"final/{metric}", f"eval/{metric}", f"episode/{metric}")
    )
    if (numbers := steps[np.isfinite(steps)]).size:
        job.step, job.seconds = int(numbers.max()), float(np.nanmax(seconds))
    if isinstance(step := scores.get("step"), int):
        job.step = step
    if state == FINISHED and f"final/{metric}" in scores:
        final = np.array([to_number(str(scores[f"final/{metric}"]))])
    for kind, values, last in (
        ("final", final if state == FINISHED else final[:0], 1),
        ("eval", evals, 1),
        ("episode", episodes, EPISODES),
    ):
        if len(known := values[~np.isnan(values)]):
            job.score, job.kind = float(known[-last:].mean()), kind
            break
    return job


def _name_job(folder: Path, record: Mapping[str, Any]) -> str:
    """Return the name of a job; that of a trial of a search does not tell its values."""
    values = record.get("differs")
    if record.get("trial") is None or not isinstance(values, dict):
        return folder.name
    texts = {key: f"{v:.4g}" if isinstance(v, float) else v for key, v in values.items()}
    parts = [f"{str(key).rpartition('.')[2]}={text}" for key, text in texts.items()]
    return " ".join([folder.name, *parts])


def _read_yaml(file: Path) -> dict[str, Any]:
    """Return a file of a run; empty if it does not exist or, with a warning, is damaged."""
    try:
        contents = yaml.load(require_plain(read_text(file)), LOADER)
    except FileNotFoundError:
        return {}
    except (OSError, ValueError, yaml.YAMLError) as error:
        report_damage(file, join_lines(error))
        return {}
    if isinstance(contents, dict) and "format" in contents:
        return contents
    report_damage(file, "it has no format, so it was cut off, or is a file of another kind")
    return contents if isinstance(contents, dict) else {}


def _read_scores(folder: Path) -> dict[str, Any]:
    """Return the final scores of a run; empty without any or, with a warning, if damaged."""
    try:
        return read_scores(folder) if (folder / SCORES).exists() else {}
    except ValueError as error:
        report_damage(folder / SCORES, str(error))
    return {}


def read_error(folder: Path) -> str:
    """Return the error with which the newest start of a run ended, according to its log, or ""."""
    try:
        require_regular(folder / LOG)  # a pipe would never open
        with (folder / LOG).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - 2**16))
            text = file.read().decode(errors="replace")
    except (OSError, ValueError):
        return ""
    # What a start prints when everything is built; earlier lines belong to an earlier start.
    newest = re.split(r"^(?:resuming |all results are in )", text, flags=re.MULTILINE)[-1]
    lines = [line for line in newest.splitlines() if line.strip()]
    errors = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")]
    if not errors and any(line.startswith("Traceback (most recent call") for line in lines):
        errors = lines
    return errors[-1].strip() if errors else ""


def list_columns(jobs: Iterable[Job]) -> list[str]:
    """Return the names of all columns in the metrics.csv of runs, sorted."""
    names: set[str] = set()
    for job in jobs:
        names |= {*read_header(job.folder / "metrics.csv")}
    return sorted(names)
