"""Tables of jobs and of groups, as text, CSV, Markdown or JSON."""

import csv
import io
import json
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worldloom.app.sweep_folder import FAILED, FINISHED, INTERRUPTED, RUNNING, WAITING
from worldloom.errors import escape, list_names
from worldloom.results.runs import Job
from worldloom.results.statistics import (
    bootstrap_interval,
    interquartile_mean,
    mean,
    optimality_gap,
)

Rows = list[dict[str, Any]]
NUMBERS = ("steps", "score", "time", "runs", "counted", "mean", "std", "iqm", "gap")


def tabulate_jobs(jobs: Sequence[Job]) -> Rows:
    """Return one row per run."""
    return [
        {
            "job": job.name,
            "state": job.state,
            "steps": job.step,
            "total": job.total,
            "score": job.score,
            "of": job.kind,
            "seconds": job.seconds,
            "folder": str(job.folder),
            "log": str(job.log),
            "error": job.error,
        }
        for job in jobs
    ]


def is_counted(job: Job, unfinished: bool) -> bool:
    """Return whether a run counts in statistics: with its final score, or also with an earlier one.

    unfinished: whether the present scores of unfinished runs count.
    """
    return (unfinished or job.state == FINISHED) and not math.isnan(job.score)


def collect_scores(jobs: Sequence[Job], unfinished: bool) -> dict[str, dict[str, np.ndarray]]:
    """Return {group: {task: scores [runs]}} of the runs that count; see `is_counted`."""
    held: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        if is_counted(job, unfinished):
            held.setdefault(job.group, {}).setdefault(job.task, []).append(job.score)
    return {g: {t: np.array(values) for t, values in tasks.items()} for g, tasks in held.items()}


def normalize(
    scores: Mapping[str, Mapping[str, np.ndarray]], ends: Sequence[float] | None
) -> dict[str, dict[str, np.ndarray]]:
    """Scale scores so that tasks can be compared: 0 and 1 are the `ends`.

    ends: the lowest and the highest score, the same for all tasks. None for the lowest and highest
        score of any run of each task.
    """
    scaled: dict[str, dict[str, np.ndarray]] = {group: {} for group in scores}
    for task in dict.fromkeys(task for tasks in scores.values() for task in tasks):
        every = np.concatenate([tasks[task] for tasks in scores.values() if task in tasks])
        low, high = (every.min(), every.max()) if ends is None else ends
        for group, tasks in scores.items():
            if task in tasks:
                scaled[group][task] = (tasks[task] - low) / ((high - low) or 1.0)
    return scaled


def tabulate_groups(
    jobs: Sequence[Job], ends: Sequence[float] | None = None, unfinished: bool = False
) -> Rows:
    """Return one row per task and group: statistics of the scores over seeds.

    `counted` of the `runs` count. `low` and `high` are the 95 % stratified bootstrap interval of
    the interquartile mean, and `std` is that of a sample; both need two runs. `gap` is the
    optimality gap of normalised scores, which needs `ends`. With several tasks, further rows have
    the normalised scores of all tasks, for the groups that have counted runs of each task.

    ends: see `normalize`. unfinished: see `is_counted`.
    """
    scores = collect_scores(jobs, unfinished)
    scaled = normalize(scores, ends)
    known = [job for job in jobs if job.config]
    tasks = list(dict.fromkeys(job.task for job in known))
    groups = list(dict.fromkeys(job.group for job in known))
    rows = []
    for task in tasks:
        for group in groups:
            members = sum((job.task, job.group) == (task, group) for job in known)
            if members:
                held = [scores[group][task]] if task in scores.get(group, {}) else []
                normal = [scaled[group][task]] if held and ends else []
                rows.append(_describe_group(task, group, members, held, normal))
    for group in groups:
        if len(tasks) > 1 and len(scores.get(group, {})) == len(tasks):
            held, members = list(scaled[group].values()), sum(job.group == group for job in known)
            normal = held if ends else []
            rows.append(_describe_group("all (normalised)", group, members, held, normal))
    return rows


def _describe_group(
    task: str, group: str, runs: int, scores: Sequence[np.ndarray], normal: Sequence[np.ndarray]
) -> dict[str, Any]:
    """Return the row of a group. normal: the scores on a common scale, if there is one."""
    several = max(map(len, scores), default=0) > 1
    low, high = bootstrap_interval(interquartile_mean, scores) if several else (np.nan, np.nan)
    return {
        "task": task,
        "group": group,
        "runs": runs,
        "counted": sum(map(len, scores)),
        "mean": float(mean(scores)) if scores else np.nan,
        "std": float(scores[0].std(ddof=1)) if several and len(scores) == 1 else np.nan,
        "iqm": float(interquartile_mean(scores)) if scores else np.nan,
        "low": float(low),
        "high": float(high),
        "gap": float(optimality_gap(normal)) if normal else np.nan,
    }


def describe_progress(jobs: Sequence[Job]) -> str:
    """Return how many jobs are in which state."""
    counts = Counter(job.state for job in jobs)
    order = (FINISHED, RUNNING, WAITING, INTERRUPTED, FAILED)
    states = sorted(counts, key=lambda state: order.index(state) if state in order else len(order))
    noun = "run" if len(jobs) == 1 else "runs"
    return escape(f"{len(jobs)} {noun}: " + ", ".join(f"{counts[name]} {name}" for name in states))


def describe_errors(jobs: Sequence[Job]) -> list[str]:
    """Return one line per different error: the failed runs, the error, and the log of the first."""
    failed: dict[str, list[Job]] = {}
    for job in jobs:
        if job.error:
            failed.setdefault(job.error, []).append(job)
    return [
        escape(f"failed: {list_names(job.name for job in held)}: {error} (log: {held[0].log})")
        for error, held in failed.items()
    ]


def describe_count(jobs: Sequence[Job], unfinished: bool) -> str:
    """Return how many unfinished runs the table of groups counts or leaves out; "" if none."""
    count = sum(is_counted(job, True) and job.state != FINISHED for job in jobs)
    if not count:
        return ""
    if unfinished:
        return f"unfinished runs that are counted: {count}, with scores of earlier steps"
    return f"unfinished runs that are not counted: {count}; unfinished=true counts present scores"


def write_csv(rows: Rows) -> str:
    """Return rows as CSV; a value that does not exist is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _safe(_plain(value, "")) for key, value in row.items()} for row in rows)
    return text.getvalue()


def write_json(tables: Mapping[str, Rows]) -> str:
    """Return tables as a JSON object; a value that does not exist is null."""
    plain = {
        name: [{key: _plain(value, None) for key, value in row.items()} for row in rows]
        for name, rows in tables.items()
    }
    return json.dumps(plain, indent=1)  # in ASCII, which contains nothing that acts on a terminal


def _safe(value: Any) -> Any:
    return escape(value) if isinstance(value, str) else value


def _plain(value: Any, nothing: Any) -> Any:
    return nothing if value is None or value != value else value


def write_table(rows: Rows, markdown: bool = False) -> str:
    """Return rows as aligned text or as a Markdown table; empty columns are left out."""
    cells = [_shorten(row) for row in rows]
    names = [name for name in cells[0] if any(row[name] for row in cells)]
    lines = [names, *([row[name] for name in names] for row in cells)]
    if markdown:
        lines = [[text.replace("|", "\\|").replace("<", "&lt;") for text in row] for row in lines]
    widths = [max(map(len, column)) for column in zip(*lines, strict=True)]
    padded = [
        [
            text.rjust(width) if name in NUMBERS else text.ljust(width)
            for text, width, name in zip(line, widths, names, strict=True)
        ]
        for line in lines
    ]
    if not markdown:
        return "\n".join("  ".join(line).rstrip() for line in padded)
    rule = [
        "-" * (width - 1) + (":" if name in NUMBERS else "-")
        for width, name in zip(widths, names, strict=True)
    ]
    return "\n".join(f"| {' | '.join(line)} |" for line in [padded[0], rule, *padded[1:]])


def _shorten(row: Mapping[str, Any]) -> dict[str, str]:
    """Return a row as text for readers: rounded, with some columns joined."""
    shown = dict(row)
    if "state" in row:
        total, seconds, *_ = map(shown.pop, ("total", "seconds", "folder", "log", "error"))
        shown["steps"] = f"{row['steps']:,}" + (f"/{total:,}" if total else "")
        minutes, rest = (0, 0) if math.isnan(seconds) else divmod(round(seconds), 60)
        time = f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
        shown["time"] = "" if math.isnan(seconds) else time
    else:
        low, high, gap = map(shown.pop, ("low", "high", "gap"))
        shown["95 % interval of iqm"] = " to ".join(filter(None, map(_round, (low, high))))
        shown["gap"] = gap
    return {key: _round(v) if isinstance(v, float) else escape(v) for key, v in shown.items()}


def _round(number: float) -> str:
    """Return a number with four significant digits, and at least the digits before the point."""
    if math.isnan(number):
        return ""
    digits = 3 - math.floor(math.log10(abs(number))) if number else 1
    return f"{number:,.{min(max(digits, 0), 4)}f}"
