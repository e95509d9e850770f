"""The command `worldloom plot`: curves over seeds, performance profiles, comparisons.

usage: worldloom plot FOLDER... [out=plot.png] [kind=curves|profile|improvement]
       [x=steps|frames|updates|hours] [metric=eval/return] [band=bootstrap|std|none]
       [published=dreamerv3,tdmpc2] [range=[0,1000]] [unfinished=true]

Reads all runs in the folders, at any depth, also while they are trained. The suffix of out= is the
format (.png, .svg, .pdf); the numbers are written to a .csv of the same name, and out=NAME.csv
writes nothing else and needs no matplotlib.

kind=curves draws the mean over seeds against environment steps (updates in offline runs), one panel
per task; metric is eval/return if each group has evaluations, or else episode/return. published=...
adds published curves, over frames. kind=profile draws the share of runs above each score, and
kind=improvement the probability that a run of one group scores more than one of another. Both use
the scores of `worldloom sweep`; a profile of several tasks normalises them: 0 and 1 are range=[...]
or the lowest and highest score of each task.
"""

import functools
import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from worldloom.app.command_line import parse_settings, run_command
from worldloom.app.compose import Overrides
from worldloom.errors import list_names, require, suggest
from worldloom.files import write_text
from worldloom.results import curves, figures
from worldloom.results.runs import Job, list_columns
from worldloom.results.tables import Rows, collect_scores, describe_count, write_csv
from worldloom.sweep import open_jobs, require_range, split_folders

KINDS = ("curves", "profile", "improvement")
SUFFIXES = (".png", ".svg", ".pdf", ".csv")  # of out=
# The numbers of a figure, the function that draws it, and its height in rows of panels.
Figure = tuple[Rows, Callable[[Any], None], float]


@dataclass
class PlotConfig:
    """What to draw; the usage describes the settings."""

    out: str = "plot.png"
    kind: str = "curves"
    x: str | None = None
    metric: str | None = None
    band: str = "bootstrap"
    published: str | None = None
    range: list[float] | None = None
    unfinished: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown choice."""
        file = Path(self.out).expanduser()
        known = file.suffix in SUFFIXES
        require(known, "out", self.out, f"a name that ends in {', '.join(SUFFIXES)}")
        require(file.parent.is_dir(), "out", self.out, "a file in a folder that exists")
        require(self.kind in KINDS, "kind", self.kind, ", ".join(KINDS))
        require(self.x in (None, *curves.AXES), "x", self.x, ", ".join(curves.AXES))
        require(self.band in curves.BANDS, "band", self.band, ", ".join(curves.BANDS))
        if self.published is not None:
            held = self.x in (None, "frames")
            require(held, "x", self.x, "frames, because published curves are over frames")
            self.x = "frames"
        require_range(self.range)


def plot_curves(jobs: list[Job], settings: PlotConfig) -> Figure:
    """Return the figure of curves."""
    metric, axis = settings.metric or curves.choose_metric(jobs), settings.x or "steps"
    rows = curves.compute_curves(jobs, axis, metric, settings.band)
    if not rows:
        raise ValueError(
            f"no run has points of {metric} yet{suggest(metric, list_columns(jobs))}; expected a "
            "column of metrics.csv with values, such as metric=episode/return"
        )
    drawn = {(row["task"], row["group"]) for row in rows}
    if missing := [job.name for job in jobs if (job.task, job.group) not in drawn]:
        print(f"not drawn, without points of {metric}: {list_names(missing)}")
    if settings.published:
        end = max(row["x"] for row in rows)
        rows += curves.read_published(jobs, settings.published.split(","), end)
    labels = {"steps": "environment steps", "frames": "frames (simulator steps)"}
    xlabel = labels.get(axis, f"{axis} of training" if axis == "hours" else axis)
    if axis == "steps" and any(job.offline for job in jobs):
        both = "environment steps (offline: updates)"
        xlabel = "updates" if all(job.offline for job in jobs) else both
    ylabel = {"eval": "evaluation ", "episode": "training "}.get(metric.partition("/")[0])
    ylabel = metric if ylabel is None else ylabel + metric.partition("/")[2]
    panels = len({row["task"] for row in rows})
    draw = functools.partial(figures.draw_curves, rows=rows, xlabel=xlabel, ylabel=ylabel)
    return rows, draw, math.ceil(panels / figures.count_columns(panels))


def plot_scores(jobs: list[Job], settings: PlotConfig) -> Figure:
    """Return the figure of a performance profile or of probabilities of improvement."""
    scores = collect_scores(jobs, settings.unfinished)
    note = describe_count(jobs, settings.unfinished)
    if not scores:
        raise ValueError(f"no run has a final score yet; {note or 'wait for the first evaluation'}")
    if note:
        print(note)
    if settings.kind == "profile":
        rows = curves.compute_profiles(scores, settings.range)
        tasks = {task for held in scores.values() for task in held}
        name = "normalised score" if settings.range or len(tasks) > 1 else "score"
        return rows, functools.partial(figures.draw_profiles, rows=rows, xlabel=name), 1
    rows = curves.compute_improvements(scores)
    if not rows:
        raise ValueError(
            f"kind=improvement compares groups with a task in common, but these runs form "
            f"{len(scores)} group(s): {', '.join(scores)}; add the folder of another sweep"
        )
    return rows, functools.partial(figures.draw_improvements, rows=rows), max(0.3, len(rows) / 9)


def plot_command(overrides: Overrides) -> None:
    """Write the figure and its numbers as the command line describes."""
    folders, args = split_folders(overrides)
    settings = parse_settings(args, PlotConfig)
    curve, metric = settings.kind == "curves", (settings.metric or "return").rpartition("/")[2]
    jobs = [job for job in open_jobs(folders, "return" if curve else metric) if job.config]
    make = plot_curves if curve else plot_scores
    rows, draw, height = make(jobs, settings)
    out = Path(settings.out).expanduser()
    numbers = out.with_suffix(".csv")
    if out != numbers:
        figures.save_figure(out, draw, height)
        print(out)
    write_text(numbers, write_csv(rows))
    print(numbers)


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), plot_command)


if __name__ == "__main__":
    main()
