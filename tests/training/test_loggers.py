import csv
import io
import time
from pathlib import Path

import numpy as np
import pytest
from lightning import Trainer
from lightning.pytorch.loggers import Logger
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from worldloom.training.logger_guard import guard_logger, guard_loggers
from worldloom.training.loggers import MetricsCSV, TensorBoard
from worldloom.training.metrics import COUNTERS


def rows_of(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


# ---- metrics.csv ---------------------------------------------------------------------------------


def test_a_row_per_call_and_a_column_per_name(tmp_path):
    logger, none = MetricsCSV(tmp_path), dict.fromkeys(COUNTERS, "")
    logger.log_metrics({"loss/loss": 1.5, "fps/env": 10.0}, step=4)
    logger.log_metrics({"eval/return": 7.0}, step=8)
    logger.log_metrics({"loss/loss": 1.25, "eval/return": 9.0}, step=12)
    assert rows_of(tmp_path) == [
        {"step": "4", **none, "loss/loss": "1.5", "fps/env": "10.0", "eval/return": ""},
        {"step": "8", **none, "loss/loss": "", "fps/env": "", "eval/return": "7.0"},
        {"step": "12", **none, "loss/loss": "1.25", "fps/env": "", "eval/return": "9.0"},
    ]


def test_counters_have_their_own_names_and_the_first_columns(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1}, step=1)
    logger.log_metrics({"counters/updates": 3, "a": 2}, step=2)
    assert list(rows_of(tmp_path)[0]) == ["step", *COUNTERS, "a"]
    assert [row["updates"] for row in rows_of(tmp_path)] == ["", "3"]


def test_numbers_come_back_exactly(tmp_path):
    values = [1 / 3, -1e-30, 1e30, float("inf"), 2**53 + 1]
    MetricsCSV(tmp_path).log_metrics({str(i): v for i, v in enumerate(values)}, step=0)
    (row,) = rows_of(tmp_path)
    assert [type(v)(row[str(i)]) for i, v in enumerate(values)] == values


def test_a_second_logger_continues_the_file(tmp_path):
    """As a resumed run does, whichever names it logs first."""
    MetricsCSV(tmp_path).log_metrics({"a": 1, "b": 2}, step=1)
    again = MetricsCSV(tmp_path)
    again.log_metrics({"b": 3}, step=2)
    again.log_metrics({"c": 4, "a": 5}, step=3)
    assert [[row[name] for name in "abc"] for row in rows_of(tmp_path)] == [
        ["1", "2", ""],
        ["", "3", ""],
        ["5", "", "4"],
    ]


def test_the_file_is_readable_after_every_row(tmp_path):
    logger = MetricsCSV(tmp_path)
    for i in range(5):
        logger.log_metrics({"old": i, f"new{i // 2}": i}, step=i)
        assert len(rows_of(tmp_path)) == i + 1
    assert [f.name for f in tmp_path.iterdir()] == ["metrics.csv"]


def test_a_rewound_file_is_that_of_the_moment(tmp_path):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1}, step=1)
    logger.log_metrics({"a": 2}, step=2)
    before, state = (tmp_path / "metrics.csv").read_bytes(), logger.state_dict()
    logger.log_metrics({"a": 3, "b": 3}, step=3)
    again = MetricsCSV(tmp_path)
    again.load_state_dict(state)
    assert (tmp_path / "metrics.csv").read_bytes() == before
    again.log_metrics({"a": 4}, step=3)
    assert [row["a"] for row in rows_of(tmp_path)] == ["1", "2", "4"]


def test_rows_wait_while_the_disk_is_full(tmp_path, monkeypatch, caplog):
    logger = MetricsCSV(tmp_path)
    logger.log_metrics({"a": 1}, step=1)
    real = Path.open

    def half_a_row(self, mode="r", *args, **kwargs):
        if mode == "r+b":
            with real(self, "ab") as file:
                file.write(b"2,")
            raise OSError(28, "No space left on device")
        return real(self, mode, *args, **kwargs)

    monkeypatch.setattr(Path, "open", half_a_row)
    logger.log_metrics({"a": 2}, step=2)
    logger.log_metrics({"a": 3}, step=3)
    state = logger.state_dict()
    assert state["waiting"] == [{"step": 2, "a": 2}, {"step": 3, "a": 3}]
    assert caplog.text.count("No space left") == 1
    monkeypatch.setattr(Path, "open", real)
    logger.log_metrics({"a": 4}, step=4)
    expected = [str(i) for i in range(1, 5)]
    assert [row["step"] for row in rows_of(tmp_path)] == expected
    again = MetricsCSV(tmp_path)  # killed after the state was saved
    again.load_state_dict(state)
    again.log_metrics({"a": 4}, step=4)
    assert [row["a"] for row in rows_of(tmp_path)] == expected


# ---- TensorBoard ---------------------------------------------------------------------------------


@pytest.fixture
def board(tmp_path):
    return TensorBoard(tmp_path)


def events(board):
    board.finalize("success")
    accumulator = EventAccumulator(board.log_dir, {"scalars": 0, "images": 0, "tensors": 0})
    accumulator.Reload()
    return accumulator


def test_events_lie_in_the_folder_itself(board, tmp_path):
    board.log_metrics({"loss/loss": 2.5}, step=100)
    (scalar,) = events(board).Scalars("loss/loss")
    assert (scalar.step, scalar.value) == (100, 2.5)
    assert list(tmp_path.glob("events.out.tfevents.*"))


def test_stills_are_stored_without_loss(board):
    picture = np.random.default_rng(0).integers(256, size=(20, 30, 3), dtype=np.uint8)
    board.log_picture("imagination/open_loop", picture, step=7)
    (event,) = events(board).Images("imagination/open_loop")
    assert (event.step, event.width, event.height) == (7, 30, 20)
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert image.format == "PNG" and (np.asarray(image) == picture).all()


def test_films_become_gifs_that_show_every_frame(board):
    shades = [0, 80, 160, 240]
    film = np.array(shades, np.uint8)[:, None, None, None] * np.ones((1, 12, 16, 3), np.uint8)
    board.log_picture("film", film, step=1)
    (event,) = events(board).Images("film")
    image = Image.open(io.BytesIO(event.encoded_image_string))
    assert image.format == "GIF" and image.n_frames == 4 and image.size == (16, 12)
    for index, shade in enumerate(shades):
        image.seek(index)
        # A palette of 256 colours for 4 shades loses at most the three low bits.
        assert abs(np.asarray(image.convert("RGB")).astype(int) - shade).max() <= 8


def test_the_settings_are_there_as_text_and_beside_the_final_metric(board):
    config = {"seed": 3, "model": {"units": 32, "mults": [2, 3]}, "threads": None}
    board.log_hyperparams(config)
    board.log_hyperparams(config, {"eval/return": 480.0}, 5000)
    accumulator = events(board)
    (text,) = accumulator.Tensors("config/text_summary")
    shown = text.tensor_proto.string_val[0].decode()
    assert "    seed: 3\n" in shown and "      units: 32\n" in shown
    assert {"_hparams_/session_start_info", "_hparams_/experiment"} <= set(
        accumulator.summary_metadata
    )
    (metric,) = accumulator.Scalars("eval/return")
    assert (metric.step, metric.value) == (5000, 480.0)


def test_what_was_logged_after_a_checkpoint_is_forgotten_on_resume(tmp_path):
    logger = TensorBoard(tmp_path)
    for step in (1, 2):
        logger.log_metrics({"a": float(step)}, step=step)
    state = logger.state_dict()
    logger.log_metrics({"a": 33.0}, step=3)
    logger.finalize("failed")
    again = TensorBoard(tmp_path)
    again.load_state_dict(state)
    again.log_metrics({"a": 3.0}, step=3)
    again.finalize("success")
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert [(e.step, e.value) for e in board.Scalars("a")] == [(1, 1.0), (2, 2.0), (3, 3.0)]


def test_a_full_disk_costs_points_not_the_run(tmp_path, monkeypatch, caplog):
    logger = TensorBoard(tmp_path)
    logger.log_metrics({"a": 1.0}, step=1)
    writer = logger.experiment._get_file_writer()

    def full(event):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(writer.event_writer, "add_event", full)
    logger.log_metrics({"a": 2.0}, step=2)
    logger.log_metrics({"a": 3.0}, step=3)  # a new file
    logger.finalize("success")
    assert caplog.text.count("No space left") == 1
    board = EventAccumulator(str(tmp_path))
    board.Reload()
    assert {e.step for e in board.Scalars("a")} >= {3}


class Unreachable(Logger):
    """A logger whose server does not answer, but which has a state."""

    name = version = "unreachable"

    def log_hyperparams(self, params, *args, **kwargs):
        pass

    def log_metrics(self, metrics, step=None):
        time.sleep(0.01)
        raise ConnectionError("no answer")

    def state_dict(self):
        return {"written": 7}


def test_the_state_of_a_logger_is_saved_while_it_is_left_alone_after_an_error(caplog):
    logger = Unreachable()
    guard_logger(logger, "mine", lambda metrics, step: (metrics, step))
    for _ in range(2):
        logger.log_metrics({"x": 1.0}, 0)
    assert caplog.text.count("logger.mine failed (ConnectionError: no answer)") == 1
    assert logger.state_dict() == {"written": 7}


class Kept(Logger):
    """Keeps what it receives."""

    name = version = "kept"

    def __init__(self):
        super().__init__()
        self.rows = []

    def log_hyperparams(self, params, *args, **kwargs):
        self.log_metrics({"hp_metric": -1}, 0)  # as Lightning's TensorBoardLogger

    def log_metrics(self, metrics, step=None):
        self.rows.append((dict(metrics), step))


def test_what_is_logged_before_training_is_passed_on_unchanged(caplog):
    logger = Kept()
    guard_loggers(
        Trainer(logger=logger, accelerator="cpu", enable_checkpointing=False), {"k": logger}
    )
    logger.log_hyperparams({"seed": 0})
    logger.log_metrics({"mine": 1.0, "epoch": 0})
    assert logger.rows == [({"hp_metric": -1}, 0), ({"mine": 1.0, "epoch": 0}, None)]
    assert "failed" not in caplog.text


def test_trackers_name_the_runs_of_a_sweep_after_what_differs(tmp_path):
    pytest.importorskip("wandb")
    from worldloom.training.wandb_logger import WandB

    folder = tmp_path / "cartpole" / "seed1"
    alone, grouped = WandB(folder, offline=True), WandB(folder, sweep="mine", offline=True)
    assert (alone._wandb_init["name"], alone._wandb_init["group"]) == ("cartpole/seed1", None)
    assert (grouped._wandb_init["name"], grouped._wandb_init["group"]) == ("seed1", "mine")
    named = WandB(folder, sweep="mine", name="x", group="y", offline=True)
    assert (named._wandb_init["name"], named._wandb_init["group"]) == ("x", "y")
