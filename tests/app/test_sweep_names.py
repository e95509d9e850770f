"""Names of sweeps and their runs."""

import re
import subprocess

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser

from worldloom.app.sweep_names import name_run, name_sweep

RUNS = [
    ({"seed": "1", "model": "tdmpc2_5m"}, "tdmpc2_5m-seed1"),
    ({"training.train_ratio": "512", "seed": "0"}, "train_ratio512-seed0"),
    ({"env.id": "CartPole-v1"}, "CartPole-v1"),
    ({"training.learning_rate": "3e-4"}, "learning_rate3e-4"),
    ({"data.online_queue": "false"}, "online_queue_false"),
    ({"data.overlap": "null", "model.lam": "-1"}, "overlap_null-lam_-1"),
    ({"a.b1": "2"}, "b1_2"),
    ({"a.size": "2", "b.size": "3"}, "a.size2-b.size3"),
    ({"experiment": "dreamerv3/dmc_proprio", "seed": "1"}, "dreamerv3.dmc_proprio-seed1"),
    ({"experiment": "pendulum", "env": "dmc", "model": "custom"}, "dmc-pendulum-custom"),
    ({}, "run"),
]


@pytest.mark.parametrize(("differs", "name"), RUNS)
def test_a_run_is_named_after_what_differs(differs, name):
    assert name_run(differs) == name
    assert name_run(dict(reversed(differs.items()))) == name


def test_values_that_need_quotes_get_a_hash_and_stay_different():
    paths = ["a/b", "a_b", "a b", "a,b", "'a'b", "a\nb", "ä", "", "~", ".", "-x", "$HOME", "[1,2]"]
    names = [name_run({"data.path": path}) for path in paths]
    assert names[1] == "a_b" and len(set(names)) == len(paths)
    for name in names:
        assert re.fullmatch(r"[A-Za-z][A-Za-z0-9._+-]*", name)
        assert subprocess.check_output(f"echo {name}", shell=True, text=True) == f"{name}\n"
        (parsed,) = OverridesParser.create().parse_overrides([f"hydra.run.dir={name}"])
        assert parsed.value() == name


def test_long_names_are_cut_and_stay_different():
    names = {name_run({"a.path": "x" * 300 + end}) for end in "ab"}
    assert len(names) == 2 and {len(name) for name in names} == {100}


SWEEPS = [
    ("seed=0,1,2 model=dreamerv3_tiny,tdmpc2_tiny", "model-seed"),
    ("model=a,b seed=range(3)", "model-seed"),
    ("-m experiment=pendulum seed=0,1", "pendulum-seed"),
    ("-m experiment=tdmpc2/dmc env.task=dog-run seed=0,1", "tdmpc2.dmc-dog-run-seed"),
    ("hydra.launcher.jobs=2 env.task=walker-walk seed=0,1", "walker-walk-seed"),
    ("training.total_steps=600 ~callbacks.open_loop seed=0,1", "no_open_loop-total_steps600-seed"),
    ("+env.level=1,2 threads=1", "threads1-level"),
    ("-m", "sweep"),
    ("seed=(((", "sweep"),
]


@pytest.mark.parametrize(("command", "name"), SWEEPS)
def test_a_sweep_is_named_after_its_overrides(command, name):
    words = command.split()
    assert name_sweep(words) == name_sweep(words[::-1]) == name


def test_long_names_of_sweeps_are_cut_and_stay_different():
    words = [f"model.key{i}={i}" for i in range(30)]
    names = {name_sweep([*words, f"model.zzz={i}"]) for i in range(3)}
    assert len(names) == 3 and {len(name) for name in names} == {60}
