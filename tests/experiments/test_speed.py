"""Choices, arithmetic and counting of experiments/speed; never how long anything takes."""

import os
import sys
from dataclasses import replace
from types import SimpleNamespace

import pytest

from experiments.speed import runs, updates
from experiments.speed.runs import Run, measure, merge, table

RUN = Run("worldloom", "state", 512, 4, 0, 8.0, 2.0, 500_000_000, 60.0, "2026-11-29")


def test_every_size_is_timed_where_it_exists():
    dreamer = ["dreamerv3", "dreamerv3-bf16", "r2dreamer", "sheeprl"]
    own = ["worldloom", "worldloom-bf16"]
    assert updates.entrants("size12m-images") == [*own, *dreamer]
    assert updates.entrants("5m") == [*own, "tdmpc2"]
    assert updates.entrants("5m", before=True) == [*own, "before", "tdmpc2"]
    assert updates.entrants("size1m", only=["sheeprl"]) == ["worldloom", "sheeprl"]
    assert updates.entrants("size1m", [], before=True) == ["worldloom", "before"]


def test_ratios_are_taken_within_a_round():
    facts = {"tasks": ["update"], "flops": 2e9}
    children = [SimpleNamespace(name=name, facts=facts) for name in ("worldloom", "other")]
    seconds = [(1.0, 2.0), (10.0, 40.0), (3.0, 9.0)]  # the second round at a busy time
    rounds = [
        {"seconds": {("worldloom", "update"): a, ("other", "update"): b}, "product": 1.0}
        for a, b in seconds
    ]
    ours, other = updates.table(children, rounds, {}).splitlines()[2:]
    assert ours.split("|")[3:7] == [" 3,000.0 ", " 1,000.0 ", " 10,000.0 ", " 1.000 "]
    assert other.split("|")[6:9] == [" 0.333 ", "  ", " 2.0 "]  # median of 1/2, 1/4, 1/3


def test_whole_runs_are_compared_within_a_turn():
    assert RUN.replayed == 512  # two updates of 1,024 rows in four actions of two steps
    busy = [replace(RUN, turn=1, steps=4.0), replace(RUN, name="sheeprl", turn=1, steps=1.0)]
    fast = replace(RUN, name="sheeprl", steps=4.0, peak=1_000_000_000)
    lines = table([RUN, fast, *busy, replace(fast, ratio=64)]).splitlines()[2:]
    cells = [[cell.strip() for cell in line.split("|")[1:-1]] for line in lines]
    assert [row[:3] for row in cells] == [
        ["state", "512", "worldloom"],
        ["state", "512", "sheeprl"],
        ["state", "64", "sheeprl"],
    ]
    # Median, least and most of 4 and 1, half and a quarter of worldloom's 8 and 4.
    assert cells[1][3:7] == ["2.5", "1.0", "4.0", "0.38"]
    assert cells[0][9] == "500" and cells[2][6] == ""


def test_new_runs_replace_those_of_the_same_implementation():
    again = replace(RUN, steps=9.0)
    others = [replace(RUN, ratio=64), replace(RUN, obs="pixels"), replace(RUN, name="sheeprl")]
    assert merge([RUN, replace(RUN, turn=1), *others], [again]) == [*others, again]


@pytest.mark.parametrize("name", runs.NAMES)
def test_all_runs_have_the_same_settings(name):
    given = " ".join(runs.command(name, "pixels", 64, 3, 2, "/folder", "/peers"))
    assert "/folder" in given and "action_repeat=2" in given
    assert "num_envs=3" in given or "env_num=3" in given
    assert "ratio=64" in given or "replay_ratio=0.0625" in given  # updates per action


FAKE = """
import subprocess, sys
from dm_control.rl.control import Environment
from torch._tensor import Tensor
child = [sys.executable, "-c", "from dm_control.rl.control import Environment as E\\n"
    "import time\\ne = E()\\nwhile True: e.step(0); time.sleep(0.002)"]
if len(sys.argv) > 1: subprocess.Popen(child)
env = Environment()
while True:
    for _ in range(8): assert env.step(0) == "row"
    for _ in range(2): Tensor().backward()
"""


@pytest.fixture
def fake_program(tmp_path):
    """Return a command that makes 8 steps and then 2 updates, and its environment."""
    step = "class Environment:\n    def step(self, action): return 'row'\n"
    back = "import time\nclass Tensor:\n    def backward(self): time.sleep(0.02)\n"
    for name, content in {
        **dict.fromkeys(("dm_control/__init__.py", "dm_control/rl/__init__.py"), ""),
        "dm_control/rl/control.py": step,
        "torch/__init__.py": "",
        "torch/_tensor.py": back,
        "program.py": FAKE,
    }.items():
        file = tmp_path / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(content)
    return [sys.executable, str(tmp_path / "program.py")], os.environ | {
        "PYTHONPATH": str(tmp_path)
    }


def test_steps_and_updates_of_a_program_are_counted(fake_program, tmp_path):
    command, environment = fake_program
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir(), second.mkdir()
    steps, updates, span, peak = measure(command, environment, first, 0.3)
    assert span >= 0.3 and updates * span == pytest.approx(round(updates * span))
    assert steps / updates == pytest.approx(4, rel=0.2)  # a busy machine may miss an update
    assert peak > 1e6
    # Steps of a process that the program starts count as well, and so does its memory.
    more, fewer, _, both = measure([*command, "child"], environment, second, 0.3)
    assert more / fewer > 6 and both > 1.5 * peak


def test_a_program_that_ends_is_an_error(tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such task')"]
    with pytest.raises(RuntimeError, match="no such task"):
        measure(command, os.environ, tmp_path, 1)
