"""trainer.precision=auto in runs: chosen once, recorded, and kept on resume on another machine."""

import os
import signal
import sys

import pytest
import torch
from torch import nn

from tests.app.test_forecast import QUIET, TINY
from tests.app.test_sweeps import JOB, add_program, starts
from worldloom import load_run, run
from worldloom.app.auto_precision import resolve_precision
from worldloom.app.compose import compose_config
from worldloom.app.forecast import Forecast
from worldloom.app.resume import comparable, require_changeable
from worldloom.app.run_dir import read_config
from worldloom.app.saved_config import ResolvedConfig
from worldloom.app.validation import validate_config
from worldloom.ranks import Ranks
from worldloom.training import precision
from worldloom.training.checkpoint_files import read_checkpoint

NEW, OLD = ["amx_bf16"], []  # features of two machines


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine with these features; a model of ten parameters is large."""
    monkeypatch.setattr(precision, "LEAST_PARAMETERS", 10)
    return lambda features: monkeypatch.setattr(precision, "bfloat16_features", lambda: features)


@pytest.fixture
def train(monkeypatch, capsys, tmp_path):
    """Train in this process: what was printed, and the precision of Lightning's trainer.

    stop: send a signal after two updates, which saves the run.
    """
    monkeypatch.chdir(tmp_path)

    def call(*words, stop=False):
        found, updates = [], []

        def begin(self, trainer, module):
            assert trainer.datamodule.collector.actor.precision == trainer.precision
            found.append(trainer.precision)

        def end(self, trainer, module, *_):
            updates.append(module.updates)
            if stop and len(updates) == 2:
                os.kill(os.getpid(), signal.SIGTERM)

        monkeypatch.setattr(Forecast, "on_train_start", begin)
        monkeypatch.setattr(Forecast, "on_train_batch_end", end)
        monkeypatch.setattr(sys, "argv", ["run.py", *words, *QUIET])
        if stop:
            with pytest.raises(SystemExit):
                run.main()
        else:
            run.main()
        return capsys.readouterr().out, *found

    return call


def test_the_choice_is_recorded_and_kept_on_another_machine(train, machine, tmp_path):
    words, folder = [*TINY, "trainer.precision=auto", "name=auto"], tmp_path / "run"
    machine(NEW)
    out, used = train(*words, f"folder={folder}", stop=True)
    assert used == "bf16-mixed" and "trainer.precision=auto is bf16-mixed: this processor" in out
    assert read_config(folder)["trainer"]["precision"] == "auto:bf16-mixed"
    saved = read_checkpoint(folder / "checkpoints" / "last.ckpt")["hyper_parameters"]
    assert saved["run"]["trainer"]["precision"] == "bf16-mixed"
    assert load_run(folder).actor.precision == "bf16-mixed"
    machine(OLD)
    out, used = train(*words, f"folder={folder}", "resume=auto", stop=True)
    assert f"resume=auto: continuing {folder}" in out and used == "bf16-mixed"
    assert "is bf16-mixed: chosen when the run started" in out
    # The same override again changes nothing, another one does.
    out, used = train(f"resume={folder}", "trainer.precision=auto", stop=True)
    assert used == "bf16-mixed" and "->" not in out
    out, used = train(f"resume={folder}", "trainer.precision=32-true", stop=True)
    assert used == "32-true" and "trainer.precision: auto -> 32-true" in out
    assert read_config(folder)["trainer"]["precision"] == "32-true"
    machine(NEW)
    out, used = train(f"resume={folder}", "trainer=debug", "trainer.precision=auto", stop=True)
    assert used == "bf16-mixed" and "trainer.precision: 32-true -> auto" in out


def test_a_new_run_on_another_machine_chooses_anew(train, machine, tmp_path):
    machine(OLD)
    out, used = train(*TINY, "trainer.precision=auto", f"folder={tmp_path / 'old'}", stop=True)
    assert used == "32-true" and "is 32-true: this processor does not multiply bfloat16" in out
    assert read_config(tmp_path / "old")["trainer"]["precision"] == "auto:32-true"


def resolved(precision):
    """A configuration, reduced to its trainer."""
    trainer = {"accelerator": "cpu", "devices": 1, "precision": precision}
    return ResolvedConfig({"trainer": trainer}, {"trainer": trainer})


def test_all_processes_use_what_the_first_one_chooses(machine, capsys):
    class Second(Ranks):
        def gather(self, item):
            return [("bf16-mixed", "of the first"), item]

    machine(OLD)
    config = resolve_precision(resolved("auto"), {}, nn.Linear(9, 9), Second())
    assert config.plain["trainer"]["precision"] == "bf16-mixed"
    assert config.saved["trainer"]["precision"] == "auto:bf16-mixed"
    assert "of the first" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("model", "chosen"),
    [
        (nn.Linear(9, 9), "bf16-mixed"),
        (nn.Linear(2, 3), "32-true"),
        (nn.Linear(9, 9).requires_grad_(False), "32-true"),  # target networks do not count
        (nn.Linear(9, 9, dtype=torch.float64), "32-true"),
    ],
)
def test_the_size_is_that_of_the_trained_weights(machine, model, chosen):
    machine(NEW)
    config = resolve_precision(resolved("auto"), {}, model, Ranks())
    assert config.plain["trainer"]["precision"] == chosen


@pytest.mark.parametrize("word", ["32-true", "bf16-mixed", None])
def test_other_precisions_stay_as_they_are(word, capsys):
    config = resolved(word)
    assert resolve_precision(config, {}, nn.Linear(9, 9), Ranks()) is config
    assert capsys.readouterr().out == ""


def test_runs_are_compared_by_what_was_asked_for():
    asked = resolved("auto").saved
    for chosen in ("bf16-mixed", "32-true"):
        assert comparable(resolved(f"auto:{chosen}").saved) == comparable(asked)
        assert require_changeable(resolved(f"auto:{chosen}").saved, asked) == []
        assert comparable(resolved(chosen).saved) != comparable(asked)


def test_a_wrong_precision_is_rejected_before_anything_is_built():
    validate_config(compose_config("trainer.precision=auto", "folder=x"), {})
    with pytest.raises(ValueError, match=r"trainer\.precision is bf17; expected .* auto"):
        validate_config(compose_config("trainer.precision=bf17", "folder=x"), {})


def test_auto_and_another_precision_are_two_jobs_of_a_sweep(commands, tmp_path):
    place = add_program(tmp_path, JOB)
    words = ["-m", "trainer.precision=auto,32-true", "seed=0", "sweep=name"]
    assert "2 of 2 jobs are finished" in commands.good(words, place)["out"]
    given = [word for job in starts(place) for word in job["args"] if word.startswith("trainer.")]
    assert sorted(given) == ["trainer.precision=32-true", "trainer.precision=auto"]
    finished = place.glob("runs/sweeps/name/*/scores.yaml")
    assert {path.parent.name for path in finished} == {"auto", "precision32-true"}
