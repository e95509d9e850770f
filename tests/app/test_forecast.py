"""The line before training: the number of updates is right, and measuring changes nothing."""

import csv
import re
import sys
from types import SimpleNamespace

import pytest
import torch

from worldloom import run
from worldloom.app import forecast
from worldloom.app.task import Task
from worldloom.factory import create_world_model

TINY = [
    *("threads=1", "env.workers=0", "env.num_envs=2", "model.deter=16", "model.units=8"),
    *("model.hidden=8", "model.classes=4", "model.stoch=4", "training.batch_size=2"),
    *("training.sequence_length=4", "training.total_steps=60", "training.train_ratio=8"),
    *("training.anneal=0", "training.warmup=1", "training.log_every=5", "evaluation.every=0"),
    *("evaluation.episodes=1", "data.capacity=1000", "~callbacks.open_loop"),
]
QUIET = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
LINE = r"(\d+) updates to come, about [\d.]+ minutes \(\d+ ms for an update, \d+ ms to act in 2 env"


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Train in this process: (folder, what was printed)."""

    def call(name, *words):
        folder = f"hydra.run.dir={tmp_path / name}"
        monkeypatch.setattr(sys, "argv", ["run.py", *TINY, *QUIET, folder, *words])
        run.main()
        return tmp_path / name, capsys.readouterr().out

    return call


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        found = list(csv.DictReader(file))
    clocks = ("fps/", "timings/", "seconds")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in found]


def test_measuring_changes_nothing(train, monkeypatch):
    with_it, out = train("with")
    updates = int(re.search(LINE, out)[1])
    assert abs(updates - int(rows(with_it)[-1]["updates"])) <= 2  # one step of two environments
    monkeypatch.setattr(forecast.Forecast, "on_train_start", lambda *_: None)
    without, out = train("without")
    assert "to come" not in out
    assert rows(with_it) == rows(without)
    weights = [(f / "model" / "model.safetensors").read_bytes() for f in (with_it, without)]
    assert weights[0] == weights[1]


def test_a_resumed_run_counts_what_is_left(train, monkeypatch):
    folder, out = train("run")
    before = int(re.search(LINE, out)[1])
    more = [f"resume={folder}", "training.total_steps=100"]
    monkeypatch.setattr(sys, "argv", ["run.py", *more, *QUIET])
    run.main()
    log = (folder / "worldloom.log").read_text()
    left = int(re.findall(LINE, log)[1])
    # Each estimate is off by at most one step of two environments.
    assert abs(left - 40) <= 2 and abs(before + left - int(rows(folder)[-1]["updates"])) <= 4


@pytest.mark.parametrize("broken", ["__deepcopy__", "compute_loss", "memory"])
def test_a_model_that_cannot_be_measured_is_trained(train, monkeypatch, broken):
    from worldloom.models.dreamerv3 import DreamerV3

    def fail(*_):
        raise RuntimeError("not with me")

    if broken == "memory":
        monkeypatch.setattr(forecast, "LARGEST", 10)
    elif broken == "compute_loss":
        monkeypatch.setattr(forecast, "measure_seconds", fail)
    else:
        monkeypatch.setattr(DreamerV3, "__deepcopy__", fail, raising=False)
    _, out = train("run")
    assert re.search(r"^\d+ updates to come$", out, re.MULTILINE) and "final return" in out


def test_smaller_presets_are_named():
    obs, actions = SimpleNamespace(shape=(3,)), SimpleNamespace(action_dim=2, discrete=False)
    task = Task(obs, actions, None)
    with torch.device("meta"):
        model = create_world_model("dreamerv3:size12m", (3,), 2, device="meta")
    named = forecast.Forecast(task)._advise(model)
    assert named == "faster: model=dreamerv3_size1m, model=dreamerv3_tiny"


def test_times_are_readable():
    assert forecast.describe_time(90) == "1.5 minutes"
    assert forecast.describe_time(10_800) == "3.0 hours"
