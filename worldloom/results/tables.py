"""Tables of jobs and of groups, as text, CSV, Markdown or JSON."""

import csv
import io
import json
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from worldloom.app.run_dir import LOG
from worldloom.results.runs import FINISHED, Job
from worldloom.results.statistics import bootstrap_interval, interquartile_mean, mean

Rows = list[dict[str, Any]]
NUMBERS = ("steps", "score", "time", "runs", "finished", "mean", "std", "iqm")


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
            "error": job.error,
        }
        for job in jobs
    ]


def collect_scores(jobs: Sequence[Job]) -> dict[str, dict[str, np.ndarray]]:
    """Return {group: {task: scores [runs]}} of the runs that have a score."""
    held: dict[str, dict[str, list[float]]] = {}
    for job in jobs:
        if not math.isnan(job.score):
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


def tabulate_groups(jobs: Sequence[Job], ends: Sequence[float] | None = None) -> Rows:
    """Return one row per task and group: statistics of the scores over seeds.

    `low` and `high` are the 95 % stratified bootstrap interval of the interquartile mean, and `std`
    is that of a sample; both need two runs. With several tasks, further rows have the normalised
    scores of all tasks, for the groups that have runs of each task.

    ends: see `normalize`.
    """
    scores = collect_scores(jobs)
    parts = {
        (task, group): ([held[task]], [j for j in jobs if (j.task, j.group) == (task, group)])
        for task in dict.fromkeys(job.task for job in jobs)
        for group, held in scores.items()
        if task in held
    }
    tasks = {task for task, _ in parts}
    if len(tasks) > 1:
        for group, scaled in normalize(scores, ends).items():
            if len(scaled) == len(tasks):
                members = [job for job in jobs if job.group == group]
                parts["all (normalised)", group] = list(scaled.values()), members
    rows = []
    for (task, group), (held, members) in parts.items():
        together = np.concatenate(held)
        several = max(map(len, held)) > 1
        low, high = bootstrap_interval(interquartile_mean, held) if several else (np.nan, np.nan)
        rows.append(
            {
                "task": task,
                "group": group,
                "runs": len(together),
                "finished": sum(job.state == FINISHED for job in members),
                "mean": float(mean(held)),
                "std": float(held[0].std(ddof=1)) if several and len(held) == 1 else np.nan,
                "iqm": float(interquartile_mean(held)),
                "low": float(low),
                "high": float(high),
            }
        )
    return rows


def write_csv(rows: Rows) -> str:
    """Return rows as CSV; a value that does not exist is empty."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else [], lineterminator="\n")
    writer.writeheader()
    writer.writerows({key: _plain(value, "") for key, value in row.items()} for row in rows)
    return text.getvalue()


def write_json(tables: Mapping[str, Rows]) -> str:
    """Return tables as a JSON object; a value that does not exist is null."""
    plain = {
        name: [{key: _plain(value, None) for key, value in row.items()} for row in rows]
        for name, rows in tables.items()
    }
    return json.dumps(plain, indent=1, ensure_ascii=False)


def _plain(value: Any, nothing: Any) -> Any:
    return nothing if value is None or value != value else value


def write_table(rows: Rows, markdown: bool = False) -> str:
    """Return rows as aligned text or as a Markdown table; empty columns are left out."""
    cells = [_shorten(row) for row in rows]
    names = [name for name in cells[0] if any(row[name] for row in cells)]
    lines = [names, *([row[name] for name in names] for row in cells)]
    if markdown:
        lines = [[text.replace("|", "\\|") for text in line] for line in lines]
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
        total, seconds, folder, error = map(shown.pop, ("total", "seconds", "folder", "error"))
        shown["steps"] = f"{row['steps']:,}" + (f"/{total:,}" if total else "")
        minutes, rest = divmod(round(0 if math.isnan(seconds) else seconds), 60)
        shown["time"] = f"{minutes // 60}:{minutes % 60:02}:{rest:02}"
        shown["error"] = f"{error} ({folder}/{LOG})" if error else ""
    else:
        ends = [_round(shown.pop(name)) for name in ("low", "high")]
        shown["95 % interval of iqm"] = " to ".join(filter(None, ends))
    return {key: _round(v) if isinstance(v, float) else str(v) for key, v in shown.items()}


def _round(number: float) -> str:
    """Return a number with four significant digits, and at least the digits before the point."""
    if math.isnan(number):
        return ""
    digits = 3 - math.floor(math.log10(abs(number))) if number else 1
    return f"{number:,.{min(max(digits, 0), 4)}f}"
