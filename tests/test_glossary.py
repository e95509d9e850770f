"""The glossary describes what runs of both families log, and nothing else; docs/glossary.md has it.

UPDATE_DOCS=1 writes it into the page.
"""

import csv
import os
import re
from pathlib import Path

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.app.several_tasks import SHORT, TASKS, write_module
from worldloom import create_world_model
from worldloom.glossary import GLOSSARY, find_metric, format_glossary
from worldloom.random_batches import RandomData
from worldloom.training.dashboard import CHARTS, FIRST_SCREEN, RESULTS
from worldloom.training.metrics import COUNTERS, group_metric

PAGE = Path(__file__).resolve().parent.parent / "docs" / "glossary.md"
ROWS = [row for rows in GLOSSARY.values() for row in rows]

# An environment with images, vectors and success, and a TD-MPC2 whose fifth loss is NaN.
PACKAGE = """
import gymnasium as gym
import numpy as np

from worldloom.models.tdmpc2 import TDMPC2


class Rooms(gym.Env):
    def __init__(self):
        spaces = {"view": gym.spaces.Box(0, 255, (16, 16, 3), np.uint8)}
        spaces["speed"] = gym.spaces.Box(-9, 9, (2,), np.float32)
        self.observation_space = gym.spaces.Dict(spaces)
        self.action_space = gym.spaces.Discrete(3)

    def look(self):
        speed = self.np_random.normal(size=2).astype(np.float32)
        return {"view": np.full((16, 16, 3), 9 * self.steps, np.uint8), "speed": speed}

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.look(), {}

    def step(self, action):
        self.steps += 1
        return self.look(), float(action), self.steps == 12, False, {"success": bool(action)}


class Breaks(TDMPC2):
    calls = 0

    def compute_loss(self, batch):
        result = super().compute_loss(batch)
        Breaks.calls += 1
        return {**result, "loss": result["loss"] * (float("nan") if Breaks.calls == 5 else 1)}
"""

FEW = [*("threads=1", "env.workers=0", "training.log_every=5", "hydra.run.dir=r")]
FEW += ["evaluation.every=40", "evaluation.episodes=2", "evaluation.episodes_during=2"]
DREAMER = [*("~experiment", "model=dreamerv3_size1m", "model.deter=16", "model.hidden=8")]
DREAMER += ["model.units=8", "model.classes=4", "model.stoch=4", "model.depth=2"]
DREAMER += ["model.imag_length=3", "training.batch_size=4", "training.sequence_length=8"]
DREAMER += ["training.train_ratio=8", "training.total_steps=120", "env._target_=my_rooms.Rooms"]
TDMPC2 = [*("~experiment", "model=tdmpc2_tiny", "model._target_=my_rooms.Breaks")]
TDMPC2 += ["model.num_samples=8", "model.num_elites=2", "model.num_pi_trajs=2"]
TDMPC2 += ["model.iterations=1", "model.decoder=true", "nonfinite=skip", "env.id=CartPole-v1"]
TDMPC2 += ["training.batch_size=8", "training.train_ratio=8", "training.prefill=60"]
TDMPC2 += ["training.seed_episodes=0", "training.random_steps=60", "training.total_steps=100"]
SEVERAL = [*SHORT, *TASKS, "training.total_steps=80"]


@pytest.fixture(scope="module")
def logged(commands, tmp_path_factory):
    """The names of all metrics and pictures that one run of each kind logs."""
    names = set()
    for overrides in (DREAMER, TDMPC2, SEVERAL):
        cwd = tmp_path_factory.mktemp("run")
        (write_module(cwd) / "my_rooms.py").write_text(PACKAGE)
        commands.good([*overrides, *FEW], cwd, path=cwd)
        with (cwd / "r" / "metrics.csv").open(newline="") as file:
            _, *columns = next(csv.reader(file))
        names |= {f"counters/{name}" if name in COUNTERS else name for name in columns}
        names |= {*EventAccumulator(str(cwd / "r"), {"images": 0}).Reload().Tags()["images"]}
    return names | representation_losses()


def representation_losses():
    """The names of what DreamerV3's models without a decoder return to a run."""
    names = set()
    for family in ("r2dreamer", "infonce", "dreamerpro"):
        sizes = {"deter": 16, "hidden": 8, "units": 8, "classes": 4, "stoch": 4, "imag_length": 3}
        model = create_world_model(f"{family}:size1m", (3,), 2, **sizes)
        batch = RandomData.for_model(model, (3,), 2, False, 2, 4).batch(ends=True)
        names |= {group_metric(name) for name in model.compute_loss(batch) if name != "replay"}
    return names


def test_every_metric_that_a_run_logs_has_a_row(logged):
    assert sorted(name for name in logged if find_metric(name) is None) == []


def test_every_row_describes_a_metric_that_a_run_logs(logged):
    found = {find_metric(name) for name in logged}
    assert [row.name for row in ROWS if row not in found] == []


def test_names_are_unique_and_rows_are_complete():
    names = [row.name for row in ROWS]
    assert len(names) == len({*names})
    assert [row.name for row in ROWS if not row.meaning] == []
    assert not [row.name for row in ROWS if "|" in row.describe()]  # ends a cell of the table


def test_an_exact_name_precedes_a_pattern():
    assert find_metric("timings/update").name == "timings/update"
    assert find_metric("timings/collect").name == "timings/PHASE"
    assert find_metric("eval/one/return").name == "eval/TASK/return"
    assert find_metric("imagination/open_loop_rewards").name == "imagination/open_loop_rewards"
    assert find_metric("loss/mine_loss") is None


def test_tensorboard_arranges_metrics_that_exist():
    assert [name for name in [*FIRST_SCREEN, *RESULTS] if find_metric(name) is None] == []
    patterns = [name for charts in CHARTS.values() for names in charts.values() for name in names]
    names = [re.sub("STEPS", "5", row.name) for row in ROWS]
    assert [p for p in patterns if not any(re.fullmatch(p, name) for name in names)] == []


def test_the_page_contains_the_glossary():
    begin, end = "tests/test_glossary.py -->\n", "<!-- end of the tables -->"
    before, _, rest = PAGE.read_text().partition(begin)
    page = f"{before}{begin}\n{format_glossary()}\n{end}{rest.partition(end)[2]}"
    if os.environ.get("UPDATE_DOCS"):
        PAGE.write_text(page)
    assert PAGE.read_text() == page, "run UPDATE_DOCS=1 pytest tests/test_glossary.py"
