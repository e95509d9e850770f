"""Figures of results, from the rows that `curves` computes. The only user of matplotlib."""

import math
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

from worldloom.files import atomic_write
from worldloom.results.tables import Rows

PUBLISHED = ", published "  # in the names of published curves

# Okabe and Ito's colours, which people with any colour vision can tell apart; wine instead of their
# yellow, which is hard to see on white.
COLORS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000", "#882255")
STYLES = ("-", "--", ":", "-.")
SETTINGS = {
    "font.size": 12,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.grid": True,
    "grid.alpha": 0.3,
    "legend.frameon": False,
    "svg.fonttype": "none",  # text stays text
}
WIDTH, DPI = 12.0, 100  # inches; a PNG is 1200 pixels wide
LINE = 110  # characters that fit into this width


def save_figure(file: Path, draw: Callable[[Any], None], rows: float = 1) -> None:
    """Draw a figure and save it; the suffix of the file is the format.

    rows: height in rows of panels.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        import matplotlib
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError(
            f"figures need matplotlib, which cannot be imported ({error}); install it with "
            "pip install 'worldloom[plot]', or write the numbers only: out=plot.csv"
        ) from error
    with matplotlib.rc_context(SETTINGS):  # type: ignore[arg-type]
        figure = Figure(figsize=(WIDTH, 1.2 + 3.8 * rows), dpi=DPI, layout="constrained")
        draw(figure)
        with atomic_write(file) as stream:
            figure.savefig(stream, format=file.suffix[1:])


def draw_curves(figure: Any, rows: Rows, xlabel: str, ylabel: str) -> None:
    """Draw one panel per task, with a line and a band per group."""
    tasks = list(dict.fromkeys(row["task"] for row in rows))
    columns = count_columns(len(tasks))
    grid = figure.subplots(math.ceil(len(tasks) / columns), columns, squeeze=False).ravel()
    styles = _style(rows)
    labels = {
        group: f"{group} ({_count_runs([row for row in rows if row['group'] == group])})"
        for group in styles
    }
    for axis, task in zip(grid, tasks, strict=False):
        for group, style in styles.items():
            points = [row for row in rows if (row["task"], row["group"]) == (task, group)]
            if points:
                _draw_line(axis, points, labels[group], style)
        axis.set_title(_wrap(task, LINE // columns))
        place = list(grid).index(axis)  # labels are on the outer panels
        axis.set(xlabel=xlabel if place + columns >= len(tasks) else None)
        axis.set(ylabel=ylabel if place % columns == 0 else None)
        axis.xaxis.set_major_formatter(_shorten_tick)
        if end := find_end([row for row in rows if row["task"] == task]):
            axis.set_xlim(-0.02 * end, 1.02 * end)
    for axis in grid[len(tasks) :]:
        axis.set_visible(False)
    _add_legend(figure, len(tasks))


def find_end(rows: Rows) -> float:
    """Return where a panel ends: published curves go on to their first point after all runs.

    It is 0 if no run has a point.
    """
    last = max((row["x"] for row in rows if PUBLISHED not in row["group"]), default=0.0)
    if not last:
        return 0.0
    later: dict[str, float] = {}
    for row in rows:
        if PUBLISHED in row["group"] and row["x"] >= last:
            later[row["group"]] = min(row["x"], later.get(row["group"], math.inf))
    return max((*later.values(), last))


def count_columns(panels: int) -> int:
    """Return the number of columns in which panels are arranged."""
    return min(panels, 3)


def draw_profiles(figure: Any, rows: Rows, xlabel: str) -> None:
    """Draw the performance profile of each group."""
    axis = figure.subplots()
    for group, style in _style(rows).items():
        points = [row for row in rows if row["group"] == group]
        _draw_line(axis, points, f"{group} ({_count_runs(points)})", style)
    axis.set(xlabel=xlabel, ylabel="share of runs with a higher score", ylim=(-0.02, 1.02))
    _add_legend(figure, 1)


def draw_improvements(figure: Any, rows: Rows) -> None:
    """Draw each probability of improvement with its interval."""
    axis = figure.subplots()
    for place, row in enumerate(rows):
        axis.barh(place, row["high"] - row["low"], 0.5, row["low"], color=COLORS[0], alpha=0.35)
        axis.plot([row["mean"]] * 2, [place - 0.25, place + 0.25], color=COLORS[0], linewidth=3)
    axis.axvline(0.5, color="black", linewidth=1)
    names = [_wrap(f"{row['group']}  >  {row['over']}", LINE // 2) for row in rows]
    axis.set_yticks(range(len(rows)), names)
    axis.set_ylim(len(rows) - 0.4, -0.6)
    label = "probability that a run of the first scores more (95 % bootstrap interval)"
    axis.set(xlim=(-0.02, 1.02), xlabel=label)


def _style(rows: Rows) -> dict[str, dict[str, Any]]:
    """Return the colour and line style of each group; published curves are grey."""
    groups = list(dict.fromkeys(row["group"] for row in rows))
    own = [group for group in groups if PUBLISHED not in group]
    styles = {}
    for group in groups:
        place = own.index(group) if group in own else groups.index(group) - len(own)
        color = COLORS[place % len(COLORS)] if group in own else "#777777"
        shift = place // len(COLORS) if group in own else place + 1
        styles[group] = {"color": color, "linestyle": STYLES[shift % len(STYLES)]}
    return styles


def _draw_line(axis: Any, points: Rows, label: str, style: dict[str, Any]) -> None:
    """Draw a line with its band; it is thin where some of the runs have no points."""
    x, y, low, high = ([row[name] for row in points] for name in ("x", "mean", "low", "high"))
    most = max(row["runs"] for row in points)
    whole = [row["mean"] if row["runs"] == most else math.nan for row in points]
    axis.plot(x, y, linewidth=1, **style)
    axis.plot(x, whole, label=label, linewidth=2, marker="o" if len(points) < 4 else None, **style)
    axis.fill_between(x, low, high, color=style["color"], alpha=0.2, linewidth=0)


def _count_runs(points: Rows) -> str:
    """Return the most runs of a group, over its tasks: "3 runs" or "2-3 runs"."""
    tasks = {row.get("task") for row in points}
    counts = {max(row["runs"] for row in points if row.get("task") == task) for task in tasks}
    return f"{'-'.join(map(str, sorted({min(counts), max(counts)})))} run{'s' * (max(counts) > 1)}"


def _add_legend(figure: Any, panels: int) -> None:
    """Add one legend for all panels, below them; a short one of a single panel is inside."""
    entries: dict[str, Any] = {}
    for axis in figure.axes:
        entries |= {
            label: line for line, label in zip(*axis.get_legend_handles_labels(), strict=True)
        }
    names = [_wrap(name, LINE // 2) for name in entries]
    if panels == 1 and len(names) < 6 and max(map(len, names)) <= LINE // 2:
        figure.axes[0].legend(entries.values(), names)
    else:
        columns = max(1, min(len(names), LINE // (max(map(len, names)) + 8)))
        figure.legend(entries.values(), names, loc="outside lower center", ncols=columns)


def _wrap(text: str, width: int) -> str:
    return "\n".join(textwrap.wrap(text, width)) or text


def _shorten_tick(value: float, _: int) -> str:
    """Return 2500000 as 2.5M and 40000 as 40k."""
    for size, letter in ((1e6, "M"), (1e3, "k")):
        if abs(value) >= size:
            return f"{value / size:g}{letter}"
    return f"{value:g}"
