"""`worldloom sweep`: the numbers of its tables, in each format."""

import csv
import io
import json
import subprocess
import sys

import pytest

from worldloom.app.compose import Overrides
from worldloom.sweep import sweep_command

TINY = ("model=dreamerv3_tiny", "training.total_steps=400")
TASKS = {"CartPole-v1": [10, 20, 30, 50], "Pendulum-v1": [-400, -300, -200, -100]}


@pytest.fixture
def sweep(tmp_path, make_run):
    """Two tasks, four seeds each, one of which failed; scores are those of TASKS."""
    for task, scores in TASKS.items():
        for seed, score in enumerate(scores):
            done = {"step": 400, "final/return": float(score)} if seed else None
            rows = [(300, {"eval/return": float(score)})]
            log = None if seed else "error: a|b\n"
            name = f"{task}-seed{seed}"
            make_run(name, *TINY, f"env.id={task}", seed=seed, rows=rows, scores=done, log=log)
    return tmp_path


def printed(capsys, *args):
    sweep_command(Overrides(tuple(map(str, args))))
    return capsys.readouterr().out


def test_groups_are_statistics_over_seeds(sweep, capsys):
    tables = json.loads(printed(capsys, sweep, "format=json"))
    assert len(tables["jobs"]) == 8
    first, second, both = tables["groups"]
    assert (first["task"], first["runs"], first["counted"]) == ("CartPole-v1", 4, 3)
    assert (first["mean"], second["mean"], first["gap"]) == (100 / 3, -200, None)  # without seed 0
    assert both["mean"] == pytest.approx((4 / 9 + 1 / 2) / 2)
    tables = json.loads(printed(capsys, sweep, "format=json", "unfinished=true"))
    first, second, both = tables["groups"]
    assert (first["runs"], first["counted"]) == (4, 4)
    assert (first["mean"], first["iqm"]) == (27.5, 25.0)
    assert first["std"] == pytest.approx((875 / 3) ** 0.5)
    assert 10 <= first["low"] < 25 < first["high"] <= 50
    assert second["mean"] == -250
    # Normalised by task: 0, 1/4, 1/2, 1 and 0, 1/3, 2/3, 1; the middle half of all eight.
    assert (both["task"], both["runs"], both["std"]) == ("all (normalised)", 8, None)
    assert both["iqm"] == pytest.approx((1 / 4 + 1 / 3 + 1 / 2 + 2 / 3) / 4)
    args = "format=json", "range=[-480,20]", "unfinished=true"
    first, second, both = json.loads(printed(capsys, sweep, *args))["groups"]
    # Normalised: 0.98, 1, 1.02, 1.06 and 0.16, 0.36, 0.56, 0.76; above 1 nothing is missing.
    assert both["mean"] == pytest.approx((1.015 + 0.46) / 2)
    assert first["gap"] == pytest.approx(0.02 / 4) and second["gap"] == pytest.approx(0.54)
    assert both["gap"] == pytest.approx((0.02 + 4 - 1.84) / 8)


def test_one_run_is_counted_in_the_singular(sweep, capsys):
    assert printed(capsys, sweep / "CartPole-v1-seed1").startswith("1 run: 1 finished\n")


def test_unfinished_runs_count_only_if_that_is_asked_for(sweep, make_run, capsys):
    """A killed run with a high score, and a group that has no finished run yet."""
    make_run("killed", *TINY, "env.id=CartPole-v1", seed=9, rows=[(50, {"eval/return": 1e6})])
    new = (*TINY, "env.id=CartPole-v1", "training.train_ratio=7")
    make_run("new", *new, rows=[(50, {"eval/return": 70.0})])
    rows = json.loads(printed(capsys, sweep, "format=json"))["groups"]
    found = {
        (row["task"], row["group"]): (row["runs"], row["counted"], row["mean"]) for row in rows
    }
    assert found["CartPole-v1", "train_ratio=7"] == (1, 0, None)
    assert found["CartPole-v1", "train_ratio=128"] == (5, 3, 100 / 3)
    assert ("all (normalised)", "train_ratio=7") not in found
    text = printed(capsys, sweep)
    note = "unfinished runs that are not counted: 4; unfinished=true counts present scores\n"
    assert text.endswith(f"\n{note}")
    assert text.startswith("10 runs: 6 finished, 2 interrupted, 2 failed\n\n")
    text = printed(capsys, sweep, "unfinished=true", "table=groups")
    assert text.endswith("unfinished runs that are counted: 4, with scores of earlier steps\n")
    rows = json.loads(printed(capsys, sweep, "format=json", "unfinished=true"))["groups"]
    assert [row["counted"] for row in rows[:3]] == [5, 1, 4]


def test_formats_have_the_same_numbers(sweep, capsys):
    jobs = list(csv.DictReader(io.StringIO(printed(capsys, sweep, "format=csv"))))
    assert jobs[0]["error"] == "a|b" and jobs[0]["state"] == "failed"
    assert jobs[1]["job"] == "CartPole-v1 run seed=1" and float(jobs[1]["score"]) == 20
    text = printed(capsys, sweep, "format=csv", "table=groups")
    groups = list(csv.DictReader(io.StringIO(text)))
    assert [float(row["mean"]) for row in groups[:2]] == [100 / 3, -200] and groups[2]["std"] == ""
    lines = printed(capsys, sweep).splitlines()
    assert lines[0] == "8 runs: 6 finished, 2 failed" and max(map(len, lines[:11])) <= 80
    assert lines[3].split()[3:] == ["failed", "300/400", "10.00", "eval", "0:18:00"]
    names = "CartPole-v1 run seed=0, Pendulum-v1 run seed=0"  # once, as the errors are equal
    assert lines[11] == f"failed: {names}: a|b (log: {sweep}/CartPole-v1-seed0/worldloom.log)"
    assert lines[13].split()[:5] == ["task", "group", "runs", "counted", "mean"]
    table = printed(capsys, sweep, "format=markdown").split("\n\n")[1].splitlines()[:-1]
    assert {line.count("|") for line in table} == {7} and table[1][:3] == "| -"


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["format=xml"], "format is 'xml'; expected text, csv, markdown, json"),
        (["range=[5,1]"], "range is "),
        (["range=[a,b]"], "range is "),
        (["metrics=return"], "unknown key 'metrics'"),
    ],
)
def test_wrong_settings_are_named(sweep, args, message):
    with pytest.raises(ValueError) as raised:
        sweep_command(Overrides((str(sweep), *args)))
    assert str(raised.value).startswith(message)
    with pytest.raises(ValueError, match=r"no run has a score 'retrun' \(did you mean 'return'"):
        sweep_command(Overrides((str(sweep), "metric=retrun")))
    with pytest.raises(ValueError, match="no folder was named"):
        sweep_command(Overrides(("format=csv",)))


def test_it_starts_without_torch_and_matplotlib(sweep):
    code = (
        f"import sys; from worldloom import plot, sweep; sys.argv = ['sweep', {str(sweep)!r}]\n"
        "sweep.main(); print([n for n in ('torch', 'lightning', 'matplotlib') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"
