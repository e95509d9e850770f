"""Runs are read from their folders in every state, and named by what differs."""

import math
import shutil

import numpy as np
import pytest
from filelock import FileLock
from omegaconf import OmegaConf

from worldloom.app.metrics_csv import read_columns
from worldloom.results.labels import label_jobs
from worldloom.results.runs import read_jobs

TINY = ("model=dreamerv3_tiny", "env.id=CartPole-v1", "training.total_steps=400")
ERROR = "Traceback (most recent call last):\n  File\nValueError: bad\nerror: bad\n"


def read(*paths, **kwargs):
    jobs = read_jobs(paths, **kwargs)
    label_jobs(jobs)
    return {job.folder.name: job for job in jobs}


def test_states_steps_and_scores(tmp_path, make_run):
    rows = [(100, {"eval/return": 5.0}), (150, {"episode/return": 1.0}), (200, {"loss/loss": 2})]
    final = [(200, {"final/return": 6.5})]
    make_run("sweep/done", *TINY, rows=rows + final, scores={"step": 200, "final/return": 6.5})
    make_run("sweep/busy", *TINY, rows=rows)
    make_run("sweep/killed", *TINY, rows=[(i, {"episode/return": i}) for i in range(1, 31)])
    make_run("sweep/broken", *TINY, log=f"all results are in x\nupdates\n{ERROR}")
    make_run("sweep/bug", *TINY, rows=rows, log="Traceback (most recent call last):\nKeyError: 'a'")
    make_run("sweep/resumed", *TINY, rows=rows, log=f"{ERROR}resuming x\nall results are in x\n")
    make_run("sweep/again", *TINY, rows=rows, log=f"{ERROR}all results are in x\nupdates 3\n")
    (tmp_path / "sweep" / "busy" / ".lock").touch()
    with FileLock(tmp_path / "sweep" / "busy" / ".lock"):
        jobs = read(tmp_path / "sweep")
    found = {name: (job.state, job.step, job.score, job.kind) for name, job in jobs.items()}
    assert found["done"] == ("finished", 200, 6.5, "final")
    assert found["busy"] == ("running", 200, 5.0, "eval")
    assert found["killed"] == ("interrupted", 30, np.mean(range(11, 31)), "episode")
    assert found["resumed"][0] == found["again"][0] == "interrupted"
    assert found["broken"][:2] == ("failed", 0) and math.isnan(jobs["broken"].score)
    assert (jobs["broken"].error, jobs["bug"].error) == ("bad", "KeyError: 'a'")
    assert jobs["busy"].seconds == 720 and jobs["busy"].total == 400 and not jobs["busy"].error


def test_half_written_files_and_models_are_no_obstacle(tmp_path, make_run):
    run = make_run(
        "a/b/c/run", *TINY, rows=[(10, {"eval/return": 1.0}), (20, {"eval/return": 2.0})]
    )
    file = run / "metrics.csv"
    whole = file.read_bytes()
    for cut in range(len(whole)):
        file.write_bytes(whole[:cut])
        assert read_columns(file, ["eval/return"])["eval/return"].tolist() in (
            [],
            [1.0],
            [1.0, 2.0],
        )
    file.write_bytes(whole + b"30,30,60,15,1,0,3")
    assert read(tmp_path)["run"].score == 2.0
    (run / "model").mkdir()
    (run / "model" / "config.yaml").write_text("model: {}\n")
    (tmp_path / "saved").mkdir()
    shutil.copy(run / "model" / "config.yaml", tmp_path / "saved")
    assert [job.folder for job in read_jobs([tmp_path])] == [run]
    assert [job.folder for job in read_jobs([run / "model", tmp_path / "a", run])] == [run]
    (run / "config.yaml").write_text("env: {\n")
    (run / "metrics.csv").unlink()
    (run / "worldloom.log").write_text(ERROR)
    job = read(tmp_path)["run"]
    assert (job.name, job.state, job.error, job.config) == ("run", "failed", "bad", {})
    for path, text in ((tmp_path / "saved", "contains no runs"), (tmp_path / "x", "no folder")):
        with pytest.raises(ValueError, match=text):
            read_jobs([path])


def test_another_metric_is_scored(tmp_path, make_run):
    make_run("run", *TINY, rows=[(10, {"eval/return": 1.0, "eval/success": 0.5})])
    assert read(tmp_path, metric="success")["run"].score == 0.5


def test_names_are_what_differs(tmp_path, make_run):
    """A model brings its own training, which needs no label; a seed never makes a group.

    A run has only the labels that tell it apart from runs that are otherwise named alike.
    """
    for seed in (0, 10, 2):
        make_run(f"s/tdmpc2-seed{seed}", *TINY[1:], "model=tdmpc2_1m", seed=seed)
    make_run("s/x", *TINY)
    make_run("s/y", *TINY, "training.train_ratio=64")
    make_run("s/z", *TINY, "optimizer=adam", "training.train_ratio=64")
    make_run("s/pendulum", *TINY[:1], "env.id=Pendulum-v1", "model.units=64")
    jobs = read(tmp_path)
    assert list(jobs)[1:4] == ["tdmpc2-seed0", "tdmpc2-seed2", "tdmpc2-seed10"]
    assert {(job.task, job.group) for job in jobs.values()} == {
        ("CartPole-v1", "tdmpc2_1m"),
        ("CartPole-v1", "dreamerv3_tiny train_ratio=128"),
        ("CartPole-v1", "dreamerv3_tiny train_ratio=64 optimizer=LaProp"),
        ("CartPole-v1", "dreamerv3_tiny train_ratio=64 optimizer=Adam"),
        ("Pendulum-v1", "dreamerv3_tiny train_ratio=128"),
    }
    assert jobs["tdmpc2-seed2"].name == "CartPole-v1 tdmpc2_1m seed=2"


def test_a_model_keeps_its_name_when_its_numbers_change(tmp_path, make_run):
    """Two changed weights make r2dreamer no infonce; and a run's name is no setting."""
    short = ["model.imag_length=8", "model.imag_last=8"]
    weights = ["model.loss_scales.barlow=0.8", "model.representation.lambd=8e-3"]
    make_run("s/infonce", "experiment=catch", "model=infonce_size1m", *short)
    own = ["experiment=catch", "model=r2dreamer_size1m", "training.total_steps=8000", *short]
    for seed in (0, 1):
        make_run(f"s/a{seed}", *own, seed=seed)
    make_run("s/b0", *own, *weights)
    make_run("s/b1", "experiment=r2dreamer_catch", seed=1)
    groups = {name: job.group for name, job in read(tmp_path).items()}
    assert groups == {
        "infonce": "infonce_size1m",
        **dict.fromkeys(("a0", "a1"), "r2dreamer_size1m lambd=0.0005"),
        **dict.fromkeys(("b0", "b1"), "r2dreamer_size1m lambd=0.008"),
    }


def test_long_values_are_cut_and_stay_different(tmp_path, make_run):
    for end in (1, 2):
        values = ",".join(map(str, [*range(100_000, 100_020), end]))
        make_run(f"s/{end}", *TINY, f"+env.levels=[{values}]")
    groups = {job.group for job in read(tmp_path).values()}
    assert len(groups) == 2 and max(map(len, groups)) < 50


def test_equal_runs_are_named_by_the_folders_that_the_user_named(tmp_path, make_run):
    make_run("before/0", *TINY)
    make_run("after/1", *TINY)
    make_run("after/2", *TINY, seed=1)
    jobs = read(tmp_path / "before", tmp_path / "after")
    assert [job.group for job in jobs.values()] == ["before", "after", "after"]
    assert {job.group for job in read(tmp_path).values()} == {"run"}  # two of one group


def test_the_jobs_of_a_sweep_are_read_before_they_are_runs(tmp_path, make_run):
    sweep = tmp_path / "sweep"
    make_run("sweep/seed1", *TINY, seed=1, rows=[(10, {"eval/return": 1.0})])
    make_run("sweep/seed2", *TINY, seed=2, scores={"step": 400, "final/return": 2.0})
    states = {"seed0": "failed", "seed1": "failed", "seed2": "running", "seed3": "running"}
    records = {name: {"state": state, "error": "killed"} for name, state in states.items()}
    records["seed4"] = {"state": "waiting"}
    record = {"fixed": {}, "varied": ["seed"], "jobs": records, "format": 1}
    OmegaConf.save(record, sweep / "sweep.yaml")
    with FileLock(sweep / ".lock"):
        assert read(tmp_path)["seed3"].state == "running"
    jobs = read(sweep)
    assert {name: (job.state, job.error) for name, job in jobs.items()} == {
        "seed0": ("failed", "killed"),
        "seed1": ("failed", "killed"),
        "seed2": ("finished", ""),
        "seed3": ("interrupted", ""),
        "seed4": ("waiting", ""),
    }
    assert [job.name for job in jobs.values()] == list(records)
    assert read(sweep / "seed1")["seed1"].error == "killed"
    shutil.copytree(sweep, tmp_path / "copy")
    assert read(tmp_path)["seed1"].name == "run seed=1"  # the names are no longer unique
