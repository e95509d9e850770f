"""Commands with environments that misbehave: a message, an exit code, and never a traceback."""

import re
import signal
from pathlib import Path

import pytest

from tests.envs import misbehaving
from tests.envs.misbehaving import IN_COMMANDS
from tests.test_run import TINY_MODEL, metrics

SMALL = [
    *("~experiment", "threads=1", "model=dreamerv3_size1m", *TINY_MODEL, "training.batch_size=2"),
    *("training.sequence_length=4", "training.train_ratio=4", "training.total_steps=60"),
    *("evaluation.episodes=2", "evaluation.num_envs=2", "callbacks.open_loop.every=0"),
    *("env=custom", "env._target_=misbehaving.Odd", "env.num_envs=2"),
]


@pytest.fixture(autouse=True)
def own_module(tmp_path):
    """Put the module into the folder in which the commands run."""
    (tmp_path / "misbehaving.py").write_text(Path(misbehaving.__file__).read_text())


def words(name, folder, *more):
    return [*SMALL, f"+env.name='{name}'", "env.workers=0", f"hydra.run.dir={folder}", *more]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        *(
            pytest.param(name, case[2][1], marks=[pytest.mark.slow] * (name != "step os._exit"))
            for name, case in IN_COMMANDS.items()
            if case[2] != "same"
        ),
        ("step sys.exit(0)", "environment 0 raised SystemExit: 0 in step"),
        ("init sys.exit", "the environment raised SystemExit: 0 when it was made"),
        ("step no text", "environment 0 raised NoText: its message cannot be shown in step"),
        ("reward nan", "environment 0 returned nan as the reward.* 3 times"),
    ],
)
def test_a_run_ends_with_a_message_and_a_code(commands, tmp_path, name, message):
    done = commands.run(words(name, "run"), tmp_path)
    said = done["out"] + done["err"]
    assert done["code"] == 1 and "Traceback" not in said, said
    (line,) = [line for line in done["err"].splitlines() if line.startswith("error: ")]
    assert re.search(message, line), line


def test_a_run_survives_faults_and_a_failing_close(commands, tmp_path):
    done = commands.good(words("close KeyError", "run"), tmp_path)
    assert (done["out"] + done["err"]).count("raised KeyError: 'hot' in close") == 1
    done = commands.good(words("obs nan once", "again"), tmp_path)
    assert (done["out"] + done["err"]).count("returned nan in the observation") == 1
    assert any(float(row["restarts"] or 0) == 2 for row in metrics(tmp_path / "again"))


def test_endless_episodes_are_cut_off_in_evaluations_and_collections(commands, tmp_path):
    done = commands.good(words("always endless", "run", "evaluation.max_steps=30"), tmp_path)
    assert "no time limit is known" in done["out"]
    assert "2 of the 2 evaluated episodes were cut off after 30 steps" in done["out"]
    own = "env._target_=misbehaving.Odd"
    score = ["checkpoint=run", "max_steps=7", own]
    done = commands.good(score, tmp_path, module="worldloom.eval")
    assert "cut off after 7 steps" in done["out"] and "mean length 7.0" in done["out"]
    record = ["policy=run", "episodes=3", "out=data", "max_steps=9", own]
    done = commands.good(record, tmp_path, module="worldloom.collect")
    assert "3 were cut off after 9 steps" in done["out"]


@pytest.mark.slow
def test_a_signal_stops_an_evaluation_which_is_repeated_on_resume(commands, tmp_path):
    more = ["evaluation.every=20", "evaluation.episodes_during=2"]
    done = commands.run(words("always slow", "run", *more), tmp_path, kill=("long", signal.SIGTERM))
    assert done["code"] == 128 + signal.SIGTERM, done["out"] + done["err"]
    assert "stopped by SIGTERM; saved after" in done["out"]
    resume = ["resume=run", "env._target_=misbehaving.Odd"]
    commands.good([*resume, "evaluation.max_steps=30"], tmp_path)
    steps = [int(row["step"]) for row in metrics(tmp_path / "run") if row.get("eval/length")]
    assert steps[0] < 40 and len(steps) >= 3


@pytest.mark.slow
def test_a_signal_stops_the_final_evaluation(commands, tmp_path):
    done = commands.run(words("always slow", "run"), tmp_path, kill=("long", signal.SIGTERM))
    assert done["code"] == 128 + signal.SIGTERM, done["out"] + done["err"]
    assert "stopped by SIGTERM in the final evaluation; to continue:" in done["out"]
    resume = ["resume=run", "env._target_=misbehaving.Odd"]
    done = commands.good([*resume, "evaluation.max_steps=30"], tmp_path)
    assert "cut off after 30 steps" in done["out"]
