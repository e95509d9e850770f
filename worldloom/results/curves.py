"""The numbers of figures: curves over seeds, performance profiles, probabilities of improvement."""

import csv
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.results.runs import Job
from worldloom.results.statistics import (
    Scores,
    bootstrap_interval,
    mean,
    performance_profile,
    probability_of_improvement,
)
from worldloom.results.tables import Rows, normalize

# {name of an x-axis: (column of metrics.csv, factor)}
AXES = {
    "steps": ("step", 1.0),
    "frames": ("frames", 1.0),
    "updates": ("updates", 1.0),
    "hours": ("seconds", 1 / 3600),
}
CELLS = 50  # parts of the x-axis in which the points of a run are averaged
BANDS = ("bootstrap", "std", "none")
PUBLISHED = Path(__file__).with_name("published.csv")


def choose_metric(jobs: Sequence[Job]) -> str:
    """Return eval/return if every group has a run with two evaluations, else episode/return."""
    counts: dict[tuple[str, str], int] = {}
    for job in jobs:
        place, count = (job.task, job.group), np.sum(~np.isnan(job.columns("eval/return")[0]))
        counts[place] = max(counts.get(place, 0), int(count))
    return "eval/return" if counts and min(counts.values()) > 1 else "episode/return"


def compute_curves(jobs: Sequence[Job], axis: str, metric: str, band: str) -> Rows:
    """Return the mean curve of each group and task with its band, as rows with x in order.

    Runs have their points at different positions. The x-axis of a task is divided into 50 equal
    cells; the points of a run in a cell become one point, at their mean position and value, and
    between them the run is interpolated linearly. Up to one cell before its first and after its
    last point a run keeps that value, because runs end at slightly different positions. A curve
    ends where fewer than half of its runs have a value; `runs` counts those that have one.

    band: "bootstrap" for the 95 % interval of the mean over runs, "std" for one standard deviation
        of a sample to each side, or "none".
    """
    rows: Rows = []
    for task in dict.fromkeys(job.task for job in jobs):
        points = [(job.group, _points(job, axis, metric)) for job in jobs if job.task == task]
        points = [(group, found) for group, found in points if found.size]
        if not points:
            continue
        end = max(found[0].max() for _, found in points)
        edges = np.linspace(0, end, CELLS + 1)
        for group in dict.fromkeys(group for group, _ in points):
            runs = [_average_cells(found, edges) for name, found in points if name == group]
            grid = np.unique(np.concatenate([found[0] for found in runs]))
            if len(runs) > 1:
                grid = np.unique([*edges, *(found[0][i] for found in runs for i in (0, -1))])
            table = np.array([_interpolate(grid, found, edges[1]) for found in runs])
            for x, values in zip(grid, table.T, strict=True):
                held = values[~np.isnan(values)]
                if len(held) * 2 >= len(runs):
                    low, high = _spread(held, band)
                    row = {"task": task, "group": group, "x": float(x), "mean": held.mean()}
                    rows.append({**row, "low": low, "high": high, "runs": len(held)})
    return rows


def _points(job: Job, axis: str, metric: str) -> np.ndarray:
    """Return the points of a run's curve, sorted by position: [2, N]."""
    column, factor = AXES[axis]
    x, y = job.columns(column, metric)
    known = ~np.isnan(x) & ~np.isnan(y)
    order = np.argsort(x[known], kind="stable")
    return np.stack([x[known][order] * factor, y[known][order]])


def _average_cells(points: np.ndarray, edges: np.ndarray) -> np.ndarray:
    """Return the mean position and value of the points in each cell that has any: [2, M]."""
    cells = np.searchsorted(edges, points[0])  # a point on an edge belongs to the cell before it
    return np.stack([points[:, cells == cell].mean(axis=1) for cell in np.unique(cells)], axis=1)


def _interpolate(grid: np.ndarray, points: np.ndarray, reach: float) -> np.ndarray:
    """Return the values of a run at positions; NaN beyond `reach` from its ends."""
    x, y = points
    inside = (grid >= x[0] - reach) & (grid <= x[-1] + reach)
    return np.where(inside, np.interp(grid, x, y), np.nan)


def _spread(values: np.ndarray, band: str) -> tuple[float, float]:
    """Return the ends of the band around the mean of values [runs]; NaN for a single run."""
    if len(values) < 2 or band == "none":
        return np.nan, np.nan
    if band == "std":
        deviation = values.std(ddof=1)
        return values.mean() - deviation, values.mean() + deviation
    return bootstrap_interval(mean, [values])


def read_published(jobs: Sequence[Job], algorithms: Sequence[str], end: float) -> Rows:
    """Return published curves over frames for the tasks of the runs, as rows of `compute_curves`.

    The band is one standard deviation over seeds. `published.csv` lists the sources.

    end: position of the last point of the runs; a curve ends with the first point after it.

    Raises:
        ValueError: there is no curve of the algorithm for any of the tasks.
    """
    with PUBLISHED.open(newline="") as file:
        lines = list(csv.DictReader(file))
    rows: Rows = []
    for algorithm in algorithms:
        before = len(rows)
        for job in {job.task: job for job in jobs}.values():
            wanted = (algorithm, *_published_name(job.config))
            curve = [x for x in lines if (x["algorithm"], x["task"], x["obs"]) == wanted]
            later = sum(float(line["frames"]) > end for line in curve)
            for line in curve[: len(curve) - later + 1]:
                center, std = float(line["mean"]), float(line["std"])
                group = f"{algorithm}, published {line['kind']}"
                row = {"task": job.task, "group": group, "x": float(line["frames"])}
                row |= {"mean": center, "low": center - std, "high": center + std}
                rows.append({**row, "runs": int(line["seeds"])})
        if len(rows) == before:
            known = ", ".join(sorted({line["algorithm"] for line in lines}))
            raise ValueError(
                f"published={algorithm}: there is no published curve for the tasks of these runs; "
                f"expected one of {known}, with tasks of env=dmc or env=atari"
            )
    return rows


def _published_name(config: Mapping[str, Any]) -> tuple[str, str]:
    """Return the name of a run's task in published.csv, and rgb or state."""
    target = str(config.get("env._target_"))
    if target == "worldloom.envs.suites.atari.make_env":
        return f"atari_{config['env.game']}", "rgb"
    task = str(config.get("env.task")).lower().replace("-", "_").removeprefix("dmc_")
    task = re.sub("^cup_", "ball_in_cup_", task)
    suite = "dmc_" if target == "worldloom.envs.suites.dmc.make_env" else "unknown_"
    return suite + task, "rgb" if config.get("env.pixels") else "state"


def compute_profiles(
    scores: Mapping[str, Mapping[str, np.ndarray]], ends: Sequence[float] | None
) -> Rows:
    """Return the performance profile of each group, with pointwise 95 % intervals.

    With several tasks, or with `ends`, scores are normalised.
    """
    if ends is not None or len({task for tasks in scores.values() for task in tasks}) > 1:
        scores = normalize(scores, ends)
    every = np.concatenate([runs for tasks in scores.values() for runs in tasks.values()])
    thresholds = np.linspace(every.min(), every.max(), 101)
    rows: Rows = []
    for group, tasks in scores.items():
        held = list(tasks.values())
        shares = performance_profile(held, thresholds)
        low, high = bootstrap_interval(lambda s: performance_profile(s, thresholds), held)
        for values in zip(thresholds, shares, low, high, strict=True):
            numbers = dict(zip(("x", "mean", "low", "high"), map(float, values), strict=True))
            rows.append({"group": group, **numbers, "runs": sum(map(len, held))})
    return rows


def compute_improvements(scores: Mapping[str, Mapping[str, np.ndarray]]) -> Rows:
    """Return the probability that each group improves on each other one, with 95 % intervals.

    Only tasks that both have count; pairs without one are left out.
    """
    rows: Rows = []
    groups = list(scores)
    for i, better in enumerate(groups):
        for worse in groups[i + 1 :]:
            tasks = [task for task in scores[better] if task in scores[worse]]
            pair: list[Scores] = [[scores[name][t] for t in tasks] for name in (better, worse)]
            if tasks:
                low, high = bootstrap_interval(probability_of_improvement, *pair)
                value = float(probability_of_improvement(*pair))
                row = {"group": better, "over": worse, "mean": value}
                rows.append({**row, "low": float(low), "high": float(high), "tasks": len(tasks)})
    return rows
