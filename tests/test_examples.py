"""The scripts in examples/ run as they are written, one after the other."""

import re
import runpy
import shlex
import sys
from pathlib import Path

import pytest

EXAMPLES = Path(__file__).resolve().parent.parent / "examples"
# What makes the run of own_env.py short.
SHORT = ["training.total_steps=60", "training.prefill=40", "training.random_steps=20"]
SHORT += ["training.batch_size=8", "evaluation.episodes=2", "model.num_samples=32"]
SHORT += ["model.num_elites=8", "model.num_pi_trajs=4", "threads=1"]


@pytest.mark.parametrize("script", sorted(EXAMPLES.glob("*.py")), ids=lambda path: path.name)
def test_examples_are_short(script):
    assert len(script.read_text().splitlines()) <= 70


@pytest.fixture
def execute(monkeypatch, capsys):
    """Run a script of examples/ with arguments, as `python NAME ...` does; return its output."""

    def call(name, *args):
        monkeypatch.syspath_prepend(EXAMPLES)
        monkeypatch.setattr(sys, "argv", [name, *map(str, args)])
        runpy.run_path(str(EXAMPLES / name), run_name="__main__")
        return capsys.readouterr().out

    return call


@pytest.fixture(scope="module")
def tank(commands, tmp_path_factory):
    """The folder of the run whose command own_env.py documents."""
    text = (EXAMPLES / "own_env.py").read_text()
    line = re.search(r"^    python -m worldloom.run (.+)$", text, re.MULTILINE)[1]
    cwd = tmp_path_factory.mktemp("tank")
    commands.good([*shlex.split(line), *SHORT, "hydra.run.dir=run"], cwd, path=EXAMPLES)
    return cwd / "run"


def test_own_env_has_no_problems(execute):
    assert "no problems found" in execute("own_env.py")


def test_act_plays_episodes_in_the_units_of_the_environment(tank, execute):
    lines = execute("act.py", tank, "own_env.Tank").splitlines()
    assert [line.split(":")[0] for line in lines] == ["seed 0", "seed 1", "seed 2"]
    assert all(line.endswith("in 40 steps") for line in lines)


def test_plan_plans_with_the_model_of_a_run(tank, execute):
    assert -360 < float(execute("plan.py", tank, "own_env.Tank").split()[1]) < 40


@pytest.mark.parametrize("name", ["act.py", "plan.py"])
def test_custom_code_has_to_be_named(name, tank, execute):
    with pytest.raises(ValueError, match=r"allow=\('own_env.Tank',\)"):
        execute(name, tank)
    with pytest.raises(SystemExit, match=r"python .* RUN"):
        execute(name)
