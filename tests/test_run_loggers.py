"""Loggers and callbacks of Lightning, and of a package outside the checkout, in real runs."""

import csv
import json
import os
import shutil
import struct
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from worldloom import create_world_model

ROOT = Path(__file__).resolve().parent.parent
LIGHTNING = "lightning.pytorch"
TINY = ["experiment=cartpole", "env=gymnasium", "threads=1", "env.num_envs=4", "env.workers=0"]
TINY += [f"model.{name}={size}" for name, size in dict(deter=32, hidden=8, units=8).items()]
TINY += ["model.classes=4", "model.stoch=4", "model.imag_length=5", "callbacks.open_loop.every=10"]
TINY += [f"training.{k}={v}" for k, v in dict(batch_size=4, sequence_length=8).items()]
TINY += ["training.total_steps=240", "training.train_ratio=8", "training.log_every=10"]
TINY += ["evaluation.episodes=2", "evaluation.episodes_during=2", "evaluation.every=80"]

SHORTER = [*TINY, "training.total_steps=60", "evaluation.every=0"]

PACKAGE = '''
import json
import os

import numpy as np
import torch
from lightning import Callback
from lightning.pytorch.loggers import Logger


class Notes(Logger):
    """Writes what it receives to a file, one JSON object a line."""

    name, version = "notes", "0"

    def __init__(self, file):
        super().__init__()
        self.file, self.rows = file, 0

    def note(self, **values):
        with open(self.file, "a") as file:
            print(json.dumps(values), file=file)

    def log_metrics(self, metrics, step=None):
        self.rows += 1
        self.note(step=step, metrics={k: float(v) for k, v in metrics.items()})

    def log_hyperparams(self, params):  # takes no scores, as many of Lightning's
        self.note(seed=params["seed"])

    def log_image(self, key, images, step=None):
        self.note(step=step, image=key, shape=np.shape(images[0]))

    def finalize(self, status):
        self.note(status=status)

    def state_dict(self):
        return {"rows": self.rows}

    def load_state_dict(self, state):
        self.rows = state["rows"]
        self.note(restored=self.rows)


class Broken(Logger):
    """Raises in every method, also where Lightning starts its experiment."""

    def fail(self, *args, **kwargs):
        raise ConnectionError("the server\\nis gone")

    log_metrics = log_hyperparams = log_image = finalize = save = state_dict = fail
    load_state_dict = after_save_checkpoint = fail
    experiment = name = version = save_dir = property(fail)


class Logs(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        pl_module.log("mine/updates", float(pl_module.updates))

    def on_validation_end(self, trainer, pl_module):
        known = trainer.callback_metrics
        print("validated", int(known["env_steps"]), float(known["eval/return"]))


class Stops(Callback):
    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        trainer.should_stop = pl_module.updates == 12


def make_timer():
    from lightning.pytorch.callbacks import Timer

    return Timer("00:00:00:01")


class Counts(Callback):
    """Has a state, which must survive a resume."""

    count = 0

    def on_train_batch_end(self, *args):
        self.count += 1

    def on_train_end(self, *args):
        print("counted", self.count)

    def state_dict(self):
        return {"count": self.count}

    def load_state_dict(self, state):
        self.count = state["count"]


class Recounts(Counts):
    """Has the name of an older class, but not its state."""

    def load_state_dict(self, state):
        self.count = state["totals"]["all"]


Recounts.__qualname__ = "Counts"


class Odd(Callback):
    def state_dict(self):
        return {"array": np.zeros(2)}
'''


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """A folder with a user's package, outside worldloom."""
    folder = tmp_path_factory.mktemp("somewhere")
    (folder / "research").mkdir()
    (folder / "research" / "__init__.py").write_text(PACKAGE)
    return folder


def rows(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(folder, name):
    return [(int(row["step"]), float(row[name])) for row in rows(folder) if row.get(name)]


def without_clocks(folder):
    clocks = ("fps/", "timings/", "seconds")
    return [{k: v for k, v in row.items() if not k.startswith(clocks)} for row in rows(folder)]


def part(kind, **options):
    """Return the overrides that add a logger or callback, named after its class."""
    (target,) = (options.pop("target"),)
    name = target.rpartition(".")[2].lower()
    added = {"_target_": target, **options}
    return [f"+{kind}.{name}.{key}={value}" for key, value in added.items()]


def callback(name, **options):
    return part("callbacks", target=name if "." in name else f"research.{name}", **options)


STOPPING = f"{LIGHTNING}.callbacks.EarlyStopping"
KEEPING = f"{LIGHTNING}.callbacks.ModelCheckpoint"


# ---- loggers -------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def many(commands, package, tmp_path_factory):
    """One run with four loggers of others and three callbacks: (cwd, run folder, output)."""
    cwd = tmp_path_factory.mktemp("many")
    words = part("logger", target="research.Broken")
    words += part("logger", target="research.Notes", file=cwd / "notes.jsonl")
    words += part("logger", target=f"{LIGHTNING}.loggers.CSVLogger", save_dir=cwd / "lightning")
    words += part("logger", target=f"{LIGHTNING}.loggers.TensorBoardLogger", save_dir=cwd / "board")
    words += callback("Logs") + callback("Odd")
    words += callback(f"{LIGHTNING}.callbacks.LearningRateMonitor")
    done = commands.good([*TINY, *words, "hydra.run.dir=r"], cwd, path=package)
    return cwd, cwd / "r", done["out"] + done["err"]


def notes(cwd):
    return [json.loads(line) for line in (cwd / "notes.jsonl").read_text().splitlines()]


def test_a_run_with_a_broken_logger_is_finished_and_says_so_once(many):
    _, folder, printed = many
    assert OmegaConf.load(folder / "scores.yaml")["final/return"] > 0
    assert printed.count("logger.broken failed") == 1
    assert "(ConnectionError: the server is gone)" in printed
    assert printed.count(" failed (") == 1  # none of the others, which are Lightning's


def test_every_logger_receives_every_row(many):
    cwd, folder, _ = many
    received = [note for note in notes(cwd) if "metrics" in note]
    table = rows(folder)
    assert [note["step"] for note in received] == [int(row["step"]) for row in table]
    for note, row in zip(received, table, strict=True):
        plain = {k.removeprefix("counters/"): v for k, v in note["metrics"].items()}
        assert plain.pop("seconds") == pytest.approx(float(row.pop("seconds")), abs=0.5)
        assert plain == {k: float(v) for k, v in row.items() if v and k != "step"}
    assert {"final/return", "loss/loss", "eval/return"} <= {
        k for n in received for k in n["metrics"]
    }
    with (cwd / "lightning/lightning_logs/version_0/metrics.csv").open() as file:
        theirs = [int(row["step"]) for row in csv.DictReader(file)]
    assert {int(row["step"]) for row in table} == set(theirs)
    assert notes(cwd)[0] == {"seed": 0} and notes(cwd)[-1] == {"status": "success"}


def test_pictures_reach_loggers_that_take_them(many):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    cwd, folder, _ = many
    pictures = [note for note in notes(cwd) if "image" in note]
    names = {f"imagination/open_loop{part}" for part in ("", "_2", "_3", "_rewards")}
    assert pictures and {note["image"] for note in pictures} <= names
    pictures = [note for note in pictures if note["image"] == "imagination/open_loop"]
    for place in (folder, cwd / "board/lightning_logs/version_0"):
        board = EventAccumulator(str(place), {"images": 0})
        board.Reload()
        steps = [event.step for event in board.Images("imagination/open_loop")]
        assert steps == [note["step"] for note in pictures]


def test_what_callbacks_log_has_environment_steps_as_its_axis(many):
    """The run of `many` makes an update every 4 steps, from a known step on."""
    _, folder, _ = many
    loss = {step: row for row in rows(folder) if row["loss/loss"] for step in [int(row["step"])]}
    mine = curve(folder, "mine/updates")
    assert [(step, int(loss[step]["updates"])) for step, _ in mine] == mine
    assert len(mine) >= 4 and "epoch" not in rows(folder)[0]


def test_the_learning_rate_is_the_one_in_use(many):
    """A linear warm-up: update k uses (k - 1) / warmup of the peak."""
    _, folder, _ = many
    training = OmegaConf.load(folder / "config.yaml").training
    peak, warmup = training.learning_rate, training.warmup
    used = [row for row in rows(folder) if row["stats/learning_rate"]]
    assert len(used) >= 4
    for row in used:
        expected = peak * min(1, (int(row["updates"]) - 1) / warmup)
        assert float(row["stats/learning_rate"]) == pytest.approx(expected, rel=1e-4)
    for row in (row for row in rows(folder) if row["lr-LaProp"]):  # before the update
        done = max(0, int(row["updates"]) - 1)
        expected = peak * min(1, done / warmup)
        assert float(row["lr-LaProp"]) == pytest.approx(expected, rel=1e-4)


def test_an_evaluation_is_a_validation_for_callbacks(many):
    _, folder, printed = many
    seen = [line.split()[1:] for line in printed.splitlines() if line.startswith("validated")]
    assert [(int(step), float(score)) for step, score in seen] == curve(folder, "eval/return")


def test_a_state_that_a_checkpoint_cannot_hold_is_left_out_with_a_warning(many):
    _, folder, printed = many
    assert printed.count("the state of the callback Odd is not saved: it contains ndarray") == 1
    assert "Odd" not in torch.load(folder / "checkpoints/last.ckpt", weights_only=True)["callbacks"]


# ---- early stopping, ModelCheckpoint -------------------------------------------------------------


def test_early_stopping_finishes_the_run_within_an_interval(commands, package, tmp_path):
    """No score is a million better than the one before, so the second one is the last."""
    words = callback(STOPPING, monitor="eval/return", mode="max", patience=1, min_delta=1e6)
    words += callback(KEEPING, monitor="eval/return", mode="max", save_top_k=1)
    words += ["evaluation.every=40", "training.total_steps=120", "hydra.run.dir=r"]
    done = commands.good([*TINY, *words], tmp_path, path=package)
    folder, scores = tmp_path / "r", curve(tmp_path / "r", "eval/return")
    assert len(scores) == 2
    assert int(rows(folder)[-1]["step"]) == scores[-1][0] < 120
    assert OmegaConf.load(folder / "scores.yaml").step == scores[-1][0]
    assert "stopped early: Monitored metric eval/return did not improve" in done["out"]
    (file,) = (folder / "model_checkpoints" / "modelcheckpoint").iterdir()
    saved = create_world_model(file).state_dict()
    best = create_world_model(folder).state_dict()  # the run keeps its best model, too
    assert all(torch.equal(saved[name], best[name]) for name in best)
    trusted = [word[1:] for word in words if "._target_=" in word]
    again = commands.good(["resume=r", *trusted], tmp_path)["out"]
    assert f"is finished: stopped early after {scores[-1][0]} of 120 steps, return" in again
    drop = ["~callbacks.earlystopping", "~callbacks.modelcheckpoint", "evaluation.every=0"]
    commands.good(["resume=r", *drop], tmp_path)
    assert 120 <= int(rows(folder)[-1]["step"]) < 124  # 4 environments step at once


def test_a_callback_of_ones_own_may_finish_the_run(commands, package, tmp_path):
    done = commands.good([*TINY, *callback("Stops"), "hydra.run.dir=r"], tmp_path, path=package)
    assert "a callback set trainer.should_stop; yours: callbacks.stops\n" in done["out"]
    assert rows(tmp_path / "r")[-1]["updates"] == "12" and (tmp_path / "r/scores.yaml").exists()


@pytest.mark.parametrize(
    ("monitor", "words", "message"),
    [
        ("eval/retrun", [], "expected eval/return, eval/return_std, eval/length, eval/success"),
        ("eval/return", ["evaluation.every=0"], "set evaluation.every=<environment steps>"),
        ("loss/lost", [], "monitor is loss/lost, which was not logged; expected one of env_steps"),
        ("my/own", [], "callbacks.earlystopping.monitor is my/own, which was not logged; expected"),
    ],
)
def test_an_unknown_monitor_is_named(commands, tmp_path, monitor, words, message):
    words = [*TINY, *callback(STOPPING, monitor=monitor), *words, "hydra.run.dir=r"]
    done = commands.run(words, tmp_path)
    assert done["code"] == 1
    assert message in done["err"] and done["err"].count("\n") == 1


def test_an_unknown_monitor_can_be_changed_on_resume(commands, tmp_path):
    words = [*TINY, *callback(STOPPING, monitor="my/own"), "evaluation.every=100"]
    words += ["training.total_steps=120", "checkpoint.every=5updates", "hydra.run.dir=r"]
    failed = commands.run(words, tmp_path)
    (tmp_path / "other").mkdir()
    shutil.copytree(tmp_path / "r", tmp_path / "other" / "r")
    printed = failed["out"].splitlines()[-1].split()[3:]
    assert printed[0] == f"resume={tmp_path / 'r'}"
    without = ["resume=r", *(word for word in printed[1:] if "earlystopping" not in word)]
    for words, fix, cwd in (
        (printed, "callbacks.earlystopping.monitor=loss/loss", tmp_path),
        (without, "~callbacks.earlystopping", tmp_path / "other"),
    ):
        assert failed["code"] == 1 and fix.replace("loss/loss", "NAME") in failed["err"]
        assert "\nfinal return" in commands.good([*words, fix], cwd)["out"]


@pytest.mark.parametrize("every", [0, 1000])
def test_an_unknown_monitor_is_named_after_a_run_without_a_row_of_metrics(
    commands, tmp_path, every
):
    """The training is done then, so the run is finished."""
    words = [*SHORTER, *callback(STOPPING, monitor="loss/lss"), "training.log_every=100"]
    done = commands.good([*words, f"evaluation.every={every}", "hydra.run.dir=r"], tmp_path)
    printed = done["out"] + done["err"]
    assert printed.count("earlystopping.monitor is loss/lss, which was not logged") == 1
    assert "loss/loss, " in printed and (tmp_path / "r/scores.yaml").exists()


def test_what_a_function_builds_is_checked_as_well(commands, package, tmp_path):
    words = [*SHORTER, *callback("make_timer"), "hydra.run.dir=r"]
    done = commands.run(words, tmp_path, path=package)
    assert done["code"] == 1
    assert "callbacks.make_timer is Timer, which ends a run as finished; leave" in done["err"]


def test_without_evaluations_rows_of_metrics_are_checked(commands, tmp_path):
    words = callback(STOPPING, monitor="loss/loss", patience=1, min_delta=1e6)
    commands.good([*TINY, *words, "evaluation.every=0", "hydra.run.dir=r"], tmp_path)
    assert len(curve(tmp_path / "r", "loss/loss")) == 2


# ---- limits, and parts that come and go ----------------------------------------------------------


def test_a_paused_run_continues_as_if_it_had_not_been(commands, package, many, tmp_path):
    """Also after a callback and a logger were dropped whose classes no longer exist."""
    own = callback("Counts") + part("logger", target="research.Notes", file="notes.jsonl")
    words = [*TINY, *own, "+trainer.max_steps=11", "hydra.run.dir=r"]
    done = commands.good(words, tmp_path, path=package)
    assert "stopped by trainer.max_steps=11; saved after" in done["out"]
    assert "final return" not in done["out"] and not (tmp_path / "r/scores.yaml").exists()
    printed = done["out"].splitlines()[-1]
    assert "trainer.max_steps=-1" in printed and "callbacks.counts._target_" in printed
    shutil.copytree(tmp_path / "r", tmp_path / "whole")

    refused = commands.run(["resume=r", "trainer.max_steps=-1"], tmp_path)
    assert "third-party code" in refused["err"]
    drop = ["~callbacks.counts", "~logger.notes", "trainer.max_steps=-1"]
    commands.good(["resume=r", *drop], tmp_path)  # no package in the path
    trusted = [word for word in printed.split()[4:] if "whole" not in word]
    done = commands.good(["resume=whole", *trusted], tmp_path, path=package)
    assert f"counted {rows(tmp_path / 'whole')[-1]['updates']}" in done["out"]
    assert any("restored" in note for note in notes(tmp_path))
    _, uninterrupted, _ = many
    own = ("mine/", "lr-")  # columns of the callbacks of `many`

    def plain(folder):
        table = [
            {k: v for k, v in r.items() if not k.startswith(own)} for r in without_clocks(folder)
        ]
        counted = {"step", "env_steps", "frames", "updates", "episodes", "restarts"}
        return [row for row in table if any(v for k, v in row.items() if k not in counted)]

    assert plain(tmp_path / "r") == plain(tmp_path / "whole") == plain(uninterrupted)


def test_a_callback_is_added_or_replaced_on_resume(commands, package, tmp_path):
    """And a changed learning rate is used."""
    words = [*TINY, *callback("Counts"), "+trainer.max_steps=5", "hydra.run.dir=r"]
    commands.good(words, tmp_path, path=package)
    changed = ["callbacks.counts._target_=research.Recounts", *callback("Stops")]
    changed += ["training.learning_rate=0.5", "training.warmup=2"]
    words = ["resume=r", *changed, "trainer.max_steps=-1"]
    done = commands.good(words, tmp_path, path=package)
    printed = done["out"] + done["err"]
    assert "cannot restore its saved state (KeyError: 'totals'), so" in printed
    assert "counted 7" in done["out"]  # updates 6 to 12
    rate = curve(tmp_path / "r", "stats/learning_rate")[-1][1]
    assert rate == pytest.approx(0.5, rel=0.01)  # a little of it has been annealed


def test_a_time_limit_pauses_and_starts_anew(commands, tmp_path):
    words = [*TINY, "training.total_steps=1000000", "+trainer.max_time.seconds=1"]
    done = commands.good([*words, "hydra.run.dir=r"], tmp_path)
    first = int(torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["updates"])
    again = commands.good(["resume=r"], tmp_path)
    second = int(torch.load(tmp_path / "r/checkpoints/last.ckpt", weights_only=True)["updates"])
    for printed in (done["out"], again["out"]):
        assert "stopped by trainer.max_time={'seconds': 1}; saved after" in printed
    assert second > first and not (tmp_path / "r/scores.yaml").exists()
    bad = commands.run([*TINY, "+trainer.max_time=1h", "hydra.run.dir=b"], tmp_path)
    assert "trainer.max_time is '1h'; expected days, hours" in bad["err"]


# ---- W&B and MLflow ------------------------------------------------------------------------------


def python(*words, cwd):
    """Train in an interpreter of its own: W&B and MLflow start threads and processes."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "WANDB_SILENT": "true"}
    command = [sys.executable, "-m", "worldloom.run", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def tracked(tmp_path_factory):
    """A run with W&B and MLflow that is paused and resumed: its folder."""
    pytest.importorskip("wandb")
    pytest.importorskip("mlflow")
    cwd = tmp_path_factory.mktemp("tracked")
    words = ["logger=[wandb,mlflow]", "logger.wandb.offline=true", "logger.wandb.project=mine"]
    words += ["hydra.run.dir=r", "+trainer.max_steps=15"]
    python(*TINY, *words, cwd=cwd)
    python("resume=r", "trainer.max_steps=-1", cwd=cwd)
    return cwd / "r"


def read_wandb(file):
    """Yield the records of an offline run: protocol buffers in LevelDB's log format."""
    from wandb.proto import wandb_internal_pb2

    data, at, record = file.read_bytes(), 7, b""
    while at + 7 <= len(data):
        if 32768 - at % 32768 < 7:  # the end of a block is padded
            at += 32768 - at % 32768
            continue
        _, length, kind = struct.unpack("<IHB", data[at : at + 7])
        record += data[at + 7 : at + 7 + length]
        at += 7 + length
        if kind in (1, 4):  # whole, or the last part
            yield wandb_internal_pb2.Record.FromString(record)
            record = b""


@pytest.mark.slow
def test_wandb_has_the_run_in_the_files_of_both_starts(tracked):
    files = sorted(tracked.glob("wandb/offline-run-*/run-*.wandb"))
    identity = (tracked / "wandb/run_id").read_text()
    history, charts, settings = [], [], {}
    for file in files:
        for record in read_wandb(file):
            kind = record.WhichOneof("record_type")
            if kind == "run":
                assert (record.run.run_id, record.run.project) == (identity, "mine")
                assert record.run.display_name.endswith("/r")
            elif kind == "history":
                items = record.history.item
                history.append({i.key or "/".join(i.nested_key): i.value_json for i in items})
            elif kind == "metric":
                charts.append((record.metric.glob_name, record.metric.step_metric))
            elif kind == "config":
                settings |= {update.key: update.value_json for update in record.config.update}
    assert len(files) == 2 and charts == [("*", "step")] * 2
    picture = "imagination/open_loop"
    logged = [row for row in history if not any(name.startswith(picture) for name in row)]
    steps = [int(row["step"]) for row in logged]
    assert steps == [int(row["step"]) for row in rows(tracked)]  # the pause lost and repeated none
    final = float(rows(tracked)[-1]["final/return"])
    assert float(logged[-1]["final/return"]) == final
    assert json.loads(settings["training"])["total_steps"] == 240
    assert list(tracked.glob("wandb/offline-run-*/files/media/images/imagination/open_loop_*.png"))


@pytest.mark.slow
def test_mlflow_has_the_run_once_with_both_starts(tracked):
    """Asked in another process, since importing mlflow gives warnings, which pytest raises."""
    ask = """
import json, sys
from mlflow import MlflowClient
client = MlflowClient(f"sqlite:///{sys.argv[1]}/mlflow/mlflow.db")
(experiment,) = (e for e in client.search_experiments() if e.name == "worldloom")
(run,) = client.search_runs([experiment.experiment_id])
losses = client.get_metric_history(run.info.run_id, "loss/loss")
print(json.dumps({
    "status": run.info.status, "id": run.info.run_id, "params": run.data.params,
    "tags": run.data.tags, "final": run.data.metrics["final/return"],
    "losses": [[m.step, m.value] for m in losses],
    "files": [f.path for f in client.list_artifacts(run.info.run_id, "images")],
}))
"""
    command = [sys.executable, "-c", ask, str(tracked)]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["status"] == "FINISHED" and found["id"] == (tracked / "mlflow/run_id").read_text()
    assert [tuple(pair) for pair in found["losses"]] == curve(tracked, "loss/loss")
    assert found["final"] == float(rows(tracked)[-1]["final/return"])
    assert found["params"]["training.total_steps"] == "240"
    assert found["tags"]["trainer.max_steps"] == "-1"  # changed on resume
    assert found["tags"]["mlflow.runName"].endswith("/r") and len(found["files"]) >= 2


def test_the_example_is_run_as_it_is_written(commands, tmp_path):
    pytest.importorskip("wandb")
    text = (ROOT / "examples" / "logger.yaml").read_text()
    assert len(text.splitlines()) < 60
    copy, command = (line[2:].strip() for line in text.splitlines() if line.startswith("#   "))
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    subprocess.run(copy, shell=True, cwd=tmp_path, check=True)
    assert command.startswith("python -m worldloom.run ")
    commands.good([*command.split()[3:], *SHORTER, "hydra.run.dir=r"], tmp_path)
    assert list(tmp_path.glob("r/wandb/offline-run-*/run-*.wandb"))
    assert (tmp_path / "r/table/version_0/metrics.csv").exists() and rows(tmp_path / "r")
