"""`worldloom plot`: its numbers, its files, and its errors."""

import csv
import math
import sys

import numpy as np
import pytest

from worldloom.app.compose import Overrides
from worldloom.plot import plot_command
from worldloom.results.curves import choose_metric, compute_curves
from worldloom.results.figures import find_end
from worldloom.results.labels import label_jobs
from worldloom.results.runs import read_jobs

TINY = ("model=dreamerv3_tiny", "env.id=CartPole-v1", "training.total_steps=1000")


def curve(points, name="eval/return"):
    return [(step, {name: float(value)}) for step, value in points]


def jobs_in(folder):
    jobs = read_jobs([folder])
    label_jobs(jobs)
    return jobs


def at(rows, x):
    """Return the row at a position."""
    return next(row for row in rows if row["x"] == pytest.approx(x))


def plot(*args):
    plot_command(Overrides(tuple(map(str, args))))


def numbers(file):
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_a_single_run_is_drawn_as_it_is(tmp_path, make_run):
    make_run("run", *TINY, rows=curve([(0, 1), (500, 2), (1000, 4)]))
    rows = compute_curves(jobs_in(tmp_path), "steps", "eval/return", "bootstrap")
    assert [(row["x"], row["mean"], row["runs"]) for row in rows] == [
        (0, 1, 1),
        (500, 2, 1),
        (1000, 4, 1),
    ]
    assert all(math.isnan(row["low"]) for row in rows)
    hours = compute_curves(jobs_in(tmp_path), "hours", "eval/return", "none")
    assert [row["x"] for row in hours] == pytest.approx([0, 0.5, 1])  # 3.6 seconds per step
    frames = compute_curves(jobs_in(tmp_path), "frames", "eval/return", "none")
    assert [row["x"] for row in frames] == [0, 1000, 2000]


def test_runs_with_different_positions_are_interpolated(tmp_path, make_run):
    make_run("0", *TINY, seed=0, rows=curve([(0, 0), (1000, 10)]))
    make_run("1", *TINY, seed=1, rows=curve([(0, 0), (500, 10), (995, 20)]))
    jobs = jobs_in(tmp_path)
    rows = compute_curves(jobs, "steps", "eval/return", "std")
    middle = at(rows, 500)
    assert (middle["mean"], middle["runs"]) == (7.5, 2)  # 5 and 10
    assert [middle["low"], middle["high"]] == pytest.approx([7.5 - 12.5**0.5, 7.5 + 12.5**0.5])
    assert at(rows, 1000)["mean"] == 15 and at(rows, 1000)["runs"] == 2  # held for one cell
    bootstrap = at(compute_curves(jobs, "steps", "eval/return", "bootstrap"), 500)
    assert (bootstrap["low"], bootstrap["high"]) == (5, 10)


def test_a_curve_ends_where_fewer_than_half_of_its_runs_are(tmp_path, make_run):
    for seed, end in enumerate((200, 200, 600, 1000, 0)):
        make_run(str(seed), *TINY, seed=seed, rows=curve([(100, seed), (end, seed)][: 2 * end]))
    rows = compute_curves(jobs_in(tmp_path), "steps", "eval/return", "none")
    assert at(rows, 200)["runs"] == 4 and at(rows, 200)["mean"] == 1.5
    assert at(rows, 400)["runs"] == 2 and at(rows, 400)["mean"] == 2.5
    assert max(row["x"] for row in rows) == 620  # one cell of 20 after the end of seed 2


def test_evaluations_are_drawn_if_each_group_has_them(tmp_path, make_run):
    for seed in range(2):
        make_run(f"a{seed}", *TINY, seed=seed, rows=curve([(0, 1), (500, 2)][: 2 - seed]))
    assert choose_metric(jobs_in(tmp_path)) == "eval/return"  # although one run has failed early
    make_run("b", *TINY, "training.train_ratio=8", rows=curve([(9, 9)], "episode/return"))
    assert choose_metric(jobs_in(tmp_path)) == "episode/return"


def test_many_episodes_become_means_of_cells(tmp_path, make_run):
    values = np.random.default_rng(0).normal(size=1000)
    points = zip(range(1, 1001), values, strict=True)
    make_run("run", *TINY, rows=curve(points, "episode/return"))
    jobs = jobs_in(tmp_path)
    assert choose_metric(jobs) == "episode/return"
    rows = compute_curves(jobs, "steps", "episode/return", "none")
    assert len(rows) == 50
    assert [row["mean"] for row in rows] == pytest.approx(values.reshape(50, 20).mean(axis=1))
    assert rows[0]["x"] == pytest.approx(10.5)


@pytest.fixture
def sweep(tmp_path, make_run):
    """Two groups of three seeds on two tasks of DeepMind Control."""
    for task in ("cup-catch", "walker-walk"):
        for i, model in enumerate(("dreamerv3_size1m", "tdmpc2_1m")):
            for seed in range(3):
                rows = curve([(x, x * (1 + i + seed / 10)) for x in (100, 30_000, 60_000)])
                name, args = f"sweep/{task}{model}{seed}", ("env=dmc", f"env.task={task}")
                scores = {"step": 60_000, "final/return": 100.0 * i + seed}
                make_run(name, f"model={model}", *args, seed=seed, rows=rows, scores=scores)
    return tmp_path / "sweep"


def test_published_curves_are_those_of_the_tasks(sweep, tmp_path):
    """The numbers are copied from the official results by hand."""
    plot(sweep, f"out={tmp_path}/p.csv", "published=tdmpc2,dreamerv3")
    rows = numbers(tmp_path / "p.csv")
    found = [row for row in rows if row["group"] == "tdmpc2, published evaluations"]
    assert {row["task"] for row in found} == {"cup-catch", "walker-walk"}
    walker = [row for row in found if row["task"] == "walker-walk"]
    assert [float(row["x"]) for row in walker] == [0, 100_000, 200_000]  # 60,000 steps, repeat 2
    assert any(row["group"] == "dreamerv3, published training episodes" for row in rows)
    assert max(float(row["x"]) for row in rows if row["group"] == "tdmpc2_1m") == 120_000
    with pytest.raises(ValueError, match="published=ppo: there is no published curve"):
        plot(sweep, f"out={tmp_path}/p.csv", "published=ppo")
    with pytest.raises(ValueError, match="x is 'hours'; expected frames"):
        plot(sweep, "published=tdmpc2", "x=hours")


def test_a_panel_ends_at_the_next_published_point():
    runs = [{"group": "mine", "x": x} for x in (1_000.0, 17_000.0)]
    official = [{"group": "tdmpc2, published evaluations", "x": 1e5 * i} for i in range(4)]
    assert find_end(official) == 0 and find_end(runs) == 17_000
    assert find_end([*runs, *official]) == 100_000
    assert find_end([*official, {"group": "mine", "x": 2.5e5}]) == 300_000
    assert find_end([*official, {"group": "mine", "x": 9e5}]) == 900_000


def test_scores_are_compared(sweep, tmp_path):
    plot(sweep, f"out={tmp_path}/i.csv", "kind=improvement")
    (row,) = numbers(tmp_path / "i.csv")
    assert (row["group"], row["over"], row["tasks"]) == ("dreamerv3_size1m", "tdmpc2_1m", "2")
    assert (float(row["mean"]), float(row["high"])) == (0, 0)
    plot(sweep, f"out={tmp_path}/p.csv", "kind=profile", "range=[0,100]")
    rows = [row for row in numbers(tmp_path / "p.csv") if row["group"] == "tdmpc2_1m"]
    assert float(rows[0]["x"]) == 0 and float(rows[-1]["x"]) == 1.02
    assert [float(row["mean"]) for row in rows if float(row["x"]) < 1] == [1.0] * 99
    assert float(rows[-1]["mean"]) == 0


@pytest.mark.parametrize("kind", ["curves", "profile", "improvement"])
def test_figures_and_their_numbers_are_written(sweep, tmp_path, kind):
    pytest.importorskip("matplotlib")
    image = pytest.importorskip("PIL.Image")
    out = tmp_path / "figures"
    out.mkdir()
    plot(sweep, f"out={out}/a.png", f"kind={kind}", "published=tdmpc2")
    plot(sweep, f"out={out}/b.svg", f"kind={kind}")
    assert sorted(path.name for path in out.iterdir()) == ["a.csv", "a.png", "b.csv", "b.svg"]
    with image.open(out / "a.png") as picture:
        assert picture.width == 1200 and len(set(picture.convert("L").tobytes())) > 10
    text = (out / "b.svg").read_text()
    assert "tdmpc2_1m" in text and "dreamerv3_size1m" in text
    assert kind != "curves" or all(
        part in text for part in ("walker-walk", "environment steps", "evaluation return", "60k")
    )


def test_groups_without_points_are_named(sweep, tmp_path, make_run, capsys):
    make_run("sweep/new", *TINY)
    plot(sweep, f"out={tmp_path}/p.csv", "metric=eval/return")
    expected = "not drawn, without points of eval/return: CartPole-v1 dreamerv3_tiny seed=0"
    assert capsys.readouterr().out.splitlines()[0] == expected


def test_without_matplotlib_the_numbers_are_written(sweep, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install 'worldloom\[plot\]'.*out=plot.csv"):
        plot(sweep, f"out={tmp_path}/p.png")
    plot(sweep, f"out={tmp_path}/p.csv")
    assert len(numbers(tmp_path / "p.csv")) > 10


def test_nothing_to_draw_is_explained(tmp_path, make_run):
    make_run("run", *TINY)
    for kind, text in (("curves", "no run has points of episode/return yet"), ("profile", "score")):
        with pytest.raises(ValueError, match=text):
            plot(tmp_path, f"out={tmp_path}/p.csv", f"kind={kind}")
    make_run("other", *TINY, rows=curve([(1, 1)]))
    with pytest.raises(ValueError, match=r"no run has a final score yet; .*1; unfinished=true"):
        plot(tmp_path, f"out={tmp_path}/p.csv", "kind=improvement")
    with pytest.raises(ValueError, match="compares groups with a task in common"):
        plot(tmp_path, f"out={tmp_path}/p.csv", "kind=improvement", "unfinished=true")
    with pytest.raises(ValueError, match=r"no run has points of eval/retrun .*'eval/return'"):
        plot(tmp_path, f"out={tmp_path}/p.csv", "metric=eval/retrun")
    for wrong in ("out=plot", "out=a.foo", "out=no/a.png", "kind=bars", "band=iqr", "x=epochs"):
        with pytest.raises(ValueError, match=f"{wrong.partition('=')[0]} is "):
            plot(tmp_path, wrong)
