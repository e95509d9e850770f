"""Searches: real processes of the runner, whose jobs are a small program instead of a training.

tests/test_sweeps.py has a search of real runs, and tests/app/test_search_settings.py the settings.
"""

import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from tests.app.test_sweeps import BEGIN, add_program
from worldloom.app.sweep_folder import open_search, read_jobs
from worldloom.app.sweep_jobs import Job, Runner

optuna = pytest.importorskip("optuna")

# `python -m worldloom.run` of the jobs: it writes the evaluations x, 2 x, ... 5 x and scores 5 x.
# From the third on it waits while the file `slow` exists; with x < 0.5 also while `hold` exists.
JOB = (
    BEGIN
    + """stopped = []
for number in (signal.SIGINT, signal.SIGTERM):
    signal.signal(number, lambda number, _: stopped.append(number))
with open("starts", "a") as file:
    print(json.dumps(sys.argv[1:]), file=file)
if "resume" not in given:
    (folder / "config.yaml").write_text(json.dumps(given))
given = json.loads((folder / "config.yaml").read_text())
x = float(given["x"])
if Path("broken").exists() and eval(Path("broken").read_text()):
    print("error: x is unlucky")
    sys.exit(1)
file = folder / "metrics.csv"
if not file.exists():
    file.write_text("step,eval/return\\n")
while (done := len(file.read_text().splitlines()) - 1) < 5:
    with file.open("a") as rows:
        rows.write(f"{100 * (done + 1)},{x * (done + 1)}\\n")
    while not stopped and done >= 2 and (
        Path("slow").exists() or (Path("hold").exists() and x < 0.5)
    ):
        time.sleep(0.01)
    if stopped:
        print(f"stopped by {signal.Signals(stopped[0]).name}; saved")
        sys.exit(128 + stopped[0])
score = given.get("score") or 5 * x
(folder / "scores.yaml").write_text(f"step: 500\\nfinal/return: {score}\\n")
"""
)
FOLDER = Path("runs/s")
RANDOM = {"space": {"x": {"low": 0.0, "high": 1.0}}, "sampler": "RandomSampler", "trials": 6}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with the program of the jobs."""
    monkeypatch.chdir(add_program(tmp_path, JOB))
    return tmp_path


def drive(settings=RANDOM, most=1, runs=("",), folder=FOLDER):
    """Run a search as the launcher does; return it."""
    from worldloom.app.samplers import read_search
    from worldloom.app.search import Search

    def make_jobs(number, values):
        return [
            Job(
                (name := f"trial{number}{run.replace('=', '')}"),
                folder / name,
                folder / "logs" / f"{name}.log",
                values,
                [],
                OmegaConf.create({"trainer": {}}),
                [f"hydra.run.dir={folder / name}", f"x={values['x']}", run],
                [f"resume={folder / name}"],
            )
            for run in runs
        ]

    settings = read_search(settings)
    about = {"metric": settings.metric, "command": ["env=dmc"], "seeds": ["1", "2"]}
    sweep = open_search(folder, ["x"], settings.describe(), about)
    search = Search(sweep, settings, make_jobs)
    runner = Runner(sweep, most, search)
    try:
        runner.run()
    finally:
        search.close()
    search.signal = runner.signal
    return search


@pytest.fixture
def start():
    """Run a search in a process of its own; what is left of it after the test is stopped."""
    started = []

    def call(*args):
        started.append(multiprocessing.get_context("fork").Process(target=drive, args=args))
        started[-1].start()
        return started[-1]

    yield call
    for process in started:
        process.kill()
        process.join()


def wait_for(condition):
    end = time.monotonic() + 200
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.01)


def rows(number):
    file = FOLDER / f"trial{number}" / "metrics.csv"
    return len(file.read_text().splitlines()) - 1 if file.exists() else 0


def scores(search):
    return {trial.number: trial.value for trial in search.study.list_trials("COMPLETE")}


def states(folder=FOLDER):
    return {name: job["state"] for name, job in read_jobs(folder).items()}


def starts():
    return [json.loads(line) for line in Path("starts").read_text().splitlines()]


def undisturbed(count=6):
    """The scores of a search that nothing has disturbed."""
    from worldloom.app.samplers import make_sampler, read_search

    settings, drawn = read_search(RANDOM), {}
    for number in range(count):
        study = optuna.create_study(sampler=make_sampler(settings, number))
        drawn[number] = 5 * study.ask().suggest_float("x", 0.0, 1.0)
    return drawn


def test_trials_are_run_once_and_more_extend_the_search(place, capfd):
    first = drive(RANDOM | {"trials": 2})
    said = capfd.readouterr().out.splitlines()
    assert said[0] == "search runs/s: 0 of 2 trials done" and said[2] == "trial0: started"
    assert said[3].endswith("min; 1 of 2 trials done)")
    again = drive(RANDOM | {"trials": 4})
    assert capfd.readouterr().out.startswith("search runs/s: 2 of 4 trials done (2 finished)\n")
    assert scores(first).items() <= scores(again).items() and scores(again) == undisturbed(4)
    assert len(starts()) == 4 and states() == dict.fromkeys(
        ["trial0", "trial1", "trial2", "trial3"], "finished"
    )
    best = max(undisturbed(4), key=undisturbed(4).get)
    x = undisturbed(4)[best] / 5
    assert again.report() == [
        "4 of 4 trials done (4 finished); results: runs/s",
        f"best: trial{best}, return {5 * x:.6g}: x={x}",
        "to train it again with other seeds:",
        f"python -m worldloom.run -m env=dmc x={x} seed=1,2",
    ]


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"space": {"x": {"low": 0.0, "high": 2.0}}}, "another search.space.x (there: {low: 0.0,"),
        ({"space": {"y": {"low": 0.0, "high": 2.0}}}, "another search.space.x"),
        ({"direction": "minimize"}, "search.direction (there: maximize; now: minimize)"),
        ({"sampler": {"name": "TPESampler", "n_startup_trials": 3}}, "another search.sampler"),
        ({"seed": 1}, "another search.seed (there: 0; now: 1)"),
    ],
)
def test_a_folder_of_another_search_is_rejected(tmp_path, changed, message):
    from worldloom.app.samplers import read_search

    path, about = tmp_path / "s", {"metric": "return"}
    settings = read_search(RANDOM)
    open_search(path, ["x"], settings.describe(), about)
    other = read_search(RANDOM | changed)
    with pytest.raises(ValueError) as error:
        open_search(path, list(other.space), other.describe(), about)
    assert message in str(error.value)


def test_killed_searches_end_with_the_scores_of_an_undisturbed_one(place, start):
    Path("slow").touch()
    search = start()
    wait_for(lambda: rows(0) == 3)
    search.kill()  # the job saves
    search.join()
    search = start()
    wait_for(lambda: rows(0) == 4)  # it is resumed
    (job,) = Path(f"/proc/{search.pid}/task/{search.pid}/children").read_text().split()
    os.kill(int(job), signal.SIGKILL)  # the next trial begins
    wait_for(lambda: rows(1) == 3)
    assert states()["trial0"] == "failed"
    (job,) = Path(f"/proc/{search.pid}/task/{search.pid}/children").read_text().split()
    search.kill()
    os.kill(int(job), signal.SIGKILL)
    search.join()
    wait_for(lambda: states()["trial1"] == "interrupted")
    Path("slow").unlink()
    assert scores(drive(most=2)) == undisturbed()
    resumed = [words for words in starts() if words[0].startswith("resume=")]
    assert len(resumed) == 3 and set(states().values()) == {"finished"}


def test_a_signal_stops_a_search_which_continues(place, start):
    Path("slow").touch()
    search = start()
    wait_for(lambda: rows(0) == 3)
    os.kill(search.pid, signal.SIGINT)
    search.join()
    assert states() == {"trial0": "interrupted"}
    Path("slow").unlink()
    assert scores(drive()) == undisturbed()


def test_trials_that_were_asked_but_not_started_are_started(place):
    from worldloom.app.samplers import read_search
    from worldloom.app.study import Study

    settings = read_search(RANDOM)
    open_search(FOLDER, ["x"], settings.describe(), {"metric": "return"})
    study = Study(FOLDER, settings)
    study.ask()
    study.study.ask()  # killed before its values were drawn
    assert scores(drive()) == undisturbed()


def test_two_processes_share_the_trials_of_a_search(place, start):
    Path("slow").touch()
    workers = [start(), start()]
    wait_for(lambda: len(list(FOLDER.glob("trial*/metrics.csv"))) == 2)
    assert [*states().values()] == ["running", "running"]
    Path("slow").unlink()
    for worker in workers:
        worker.join()
        assert worker.exitcode == 0
    assert len(starts()) == 6
    assert scores(drive()) == undisturbed() and len(starts()) == 6


def test_a_process_takes_over_the_trial_of_another_one_that_is_killed(place, start):
    Path("slow").touch()
    first, second = start(), start()
    wait_for(lambda: len(list(FOLDER.glob("trial*/metrics.csv"))) == 2)
    first.kill()
    first.join()
    Path("slow").unlink()
    second.join()
    assert scores(drive()) == undisturbed()


def test_failed_trials_count_and_nan_is_a_failure(place, capfd):
    Path("broken").write_text("folder.name == 'trial1'")
    search = drive(RANDOM | {"trials": 3})
    out = capfd.readouterr().out
    assert "trial1: failed: x is unlucky" in out and "log: runs/s/logs/trial1.log" in out
    assert search.study.list_trials("FAIL")[0].number == 1 and len(scores(search)) == 2
    Path("broken").unlink()
    assert len(scores(drive(RANDOM | {"trials": 3}))) == 2  # it is not run again
    assert [*states().values()] == ["finished", "failed", "finished"]
    search = drive(RANDOM | {"trials": 1}, runs=("score=.nan",), folder=Path("runs/nan"))
    assert "trial0: failed: final/return is nan" in capfd.readouterr().out
    assert not scores(search) and len(search.study.list_trials("FAIL")) == 1
    with pytest.raises(ChildProcessError, match="no trial has a score"):
        search.require_result()


def test_a_failed_run_stops_the_other_runs_of_its_trial(place):
    Path("broken").write_text("folder.name == 'trial0score1'")
    Path("slow").touch()
    search = drive(RANDOM | {"trials": 1}, most=2, runs=("score=1", "other=2", "more=3"))
    assert len(search.study.list_trials("FAIL")) == 1 and len(starts()) == 2
    assert [*states().values()] == ["failed", "interrupted", "interrupted"]


def test_bad_trials_are_pruned_and_stay_so(place, capfd):
    Path("hold").touch()
    space = {"x": {"choices": [0.9, 0.8, 0.1, 0.6, 0.7]}}
    settings = {"space": space, "sampler": "GridSampler", "trials": 5}
    settings["pruner"] = {"name": "ThresholdPruner", "lower": 0.5, "n_warmup_steps": 250}
    search = drive(settings)
    out = capfd.readouterr().out
    assert "pruned with 0.3 at step 300" in out
    assert sorted(scores(search).values()) == [3.0, 3.5, 4.0, 4.5]
    pruned = search.study.list_trials("PRUNED")
    assert [trial.params["x"] for trial in pruned] == ["0.1"]
    name = f"trial{pruned[0].number}"
    assert states()[name] == "pruned" and rows(pruned[0].number) == 3
    assert "stopped by SIGTERM; saved" in (FOLDER / "logs" / f"{name}.log").read_text()
    Path("hold").unlink()
    drive(settings)
    assert len(starts()) == 5 and states()[name] == "pruned"


def test_the_runs_of_a_trial_are_scored_by_their_mean(place):
    search = drive(RANDOM | {"trials": 2}, most=2, runs=("score=1.0", "score=4.0"))
    assert scores(search) == {0: 2.5, 1: 2.5}
