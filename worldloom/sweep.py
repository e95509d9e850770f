"""The command `worldloom sweep`: tables of runs and of their statistics over seeds.

usage: worldloom sweep FOLDER... [format=text|csv|markdown|json] [table=jobs|groups]
       [metric=return] [range=[0,1000]] [unfinished=true]

Reads all runs in the folders, at any depth, also while they are trained. The first table has one
row per run: what differs between the runs, state, steps, score and time; errors follow. The score
is final/return, before the end of a run the last eval/return, or else the mean of the last 20
episode/return. The second table has one row per task and group of runs that differ in the seed:
mean, standard deviation, interquartile mean (iqm) and its 95 % stratified bootstrap interval. Only
finished runs count, unless unfinished=true. With several tasks it also has normalised scores of all
tasks, where 0 and 1 are range=[...], or the lowest and highest score of each task; range=[...] also
gives the optimality gap.

Of a search, the best trial follows, with a command that trains it again.

table=jobs or table=groups prints one of them; format=csv prints the jobs unless table=groups is
given. metric=success uses final/success and so on.
"""

import math
import re
from dataclasses import dataclass
from pathlib import Path

from worldloom.app.command_line import parse_settings, run_command
from worldloom.app.compose import Overrides
from worldloom.app.sweep_folder import read_best
from worldloom.errors import require, suggest
from worldloom.results.labels import label_jobs
from worldloom.results.runs import Job, list_columns, read_jobs
from worldloom.results.tables import (
    describe_count,
    describe_errors,
    describe_progress,
    tabulate_groups,
    tabulate_jobs,
    write_csv,
    write_json,
    write_table,
)

FORMATS = ("text", "csv", "markdown", "json")


@dataclass
class SweepConfig:
    """What to print; the usage describes the settings."""

    format: str = "text"
    table: str | None = None
    metric: str = "return"
    range: list[float] | None = None
    unfinished: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for an unknown choice."""
        require(self.format in FORMATS, "format", self.format, ", ".join(FORMATS))
        require(self.table in (None, "jobs", "groups"), "table", self.table, "jobs or groups")
        require_range(self.range)


def require_range(ends: list[float] | None) -> None:
    """Raise ValueError unless the ends of a range of scores are two increasing numbers."""
    numbers = ends is None or all(isinstance(end, int | float) for end in ends)
    holds = ends is None or (numbers and len(ends) == 2 and ends[0] < ends[1])
    require(holds, "range", ends, "the lowest and the highest score, such as range=[0,1000]")


def split_folders(overrides: Overrides) -> tuple[list[Path], list[str]]:
    """Separate the folders on a command line from its KEY=VALUE settings.

    Raises:
        ValueError: there is no folder.
    """
    settings = [arg for arg in overrides if re.match(r"[A-Za-z_]\w*=", arg)]
    folders = [Path(arg).expanduser() for arg in overrides if arg not in settings]
    if not folders:
        raise ValueError("no folder was named; add a run, or a folder of runs such as runs")
    return folders, settings


def open_jobs(folders: list[Path], metric: str) -> list[Job]:
    """Return all runs in the folders, with the names that tell them apart.

    Raises:
        ValueError: a folder contains no run, or no run has a score of this metric.
    """
    jobs = read_jobs(folders, metric)
    label_jobs(jobs)
    if metric != "return" and all(math.isnan(job.score) for job in jobs):
        scored = [n for n in list_columns(jobs) if n.startswith(("final/", "eval/", "episode/"))]
        names = sorted({name.partition("/")[2] for name in scored})
        raise ValueError(
            f"no run has a score {metric!r}{suggest(metric, names)}; these runs have "
            f"{', '.join(names) or 'no scores yet'}"
        )
    return jobs


def sweep_command(overrides: Overrides) -> None:
    """Print the tables as the command line describes."""
    folders, args = split_folders(overrides)
    settings = parse_settings(args, SweepConfig)
    jobs = open_jobs(folders, settings.metric)
    groups = tabulate_groups(jobs, settings.range, settings.unfinished)
    tables = {"jobs": tabulate_jobs(jobs), "groups": groups}
    wanted = settings.table or ("jobs" if settings.format == "csv" else None)
    tables = {name: rows for name, rows in tables.items() if wanted in (None, name)}
    if settings.format == "json":
        print(write_json(tables))
    elif settings.format == "csv":
        print(*map(write_csv, tables.values()), end="")
    else:
        print(describe_progress(jobs))
        notes = {"jobs": describe_errors(jobs)}
        notes["groups"] = [describe_count(jobs, settings.unfinished)]
        for name, rows in tables.items():
            if rows:
                table = write_table(rows, settings.format == "markdown")
                print("", table, *filter(None, notes[name]), sep="\n")
        for folder in folders:
            if best := read_best(folder):
                print("", *best, sep="\n")


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), sweep_command)


if __name__ == "__main__":
    main()
