"""Where metrics go: TensorBoard events and metrics.csv."""

import csv
import io
import logging
import os
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.compat.proto.event_pb2 import Event, SessionLog
from tensorboard.compat.proto.summary_pb2 import Summary

log = logging.getLogger(__name__)


class TensorBoard(TensorBoardLogger):
    """TensorBoard events directly in one folder, with still and moving pictures."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder), name="", version="", default_hp_metric=False)
        self._last = -1  # step of the newest point
        self._full = False

    def state_dict(self) -> dict[str, int]:
        """Return how far the curves go."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Tell TensorBoard to forget what was logged later than that: it is logged again."""
        self._last = state["last"]
        writer = self.experiment._get_file_writer()
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=self._last + 1, session_log=start))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a point to each curve."""
        self._try(lambda: super(TensorBoard, self).log_metrics(metrics, step))
        self._last = max(self._last, step or 0)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Add the settings as text at the start, and beside the final metrics at the end."""
        if metrics is None:
            text = OmegaConf.to_yaml(OmegaConf.create(dict(params)))
            block = textwrap.indent(text, "    ")  # Markdown for code
            self._try(lambda: self.experiment.add_text("config", block))
        self._try(lambda: super(TensorBoard, self).log_hyperparams(params, metrics, step))

    @rank_zero_only
    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a picture [H, W, 3] or a film [T, H, W, 3] of uint8; films become GIFs."""
        data = io.BytesIO()
        if picture.ndim == 3:
            Image.fromarray(picture).save(data, "PNG")
        else:
            _save_gif(picture, data)
        height, width = picture.shape[-3:-1]
        image = Summary.Image(
            height=height, width=width, colorspace=3, encoded_image_string=data.getvalue()
        )
        summary = Summary(value=[Summary.Value(tag=name, image=image)])
        self._try(lambda: self.experiment._get_file_writer().add_summary(summary, step))

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write what waits in memory."""
        self._try(lambda: super(TensorBoard, self).finalize(status))

    def _try(self, write: Callable[[], None]) -> None:
        """Write events; on a full disk say so once, and go on without their points."""
        try:
            if self._full:
                probe = Path(self.log_dir) / ".probe"
                probe.write_bytes(bytes(2**16))
                probe.unlink()
            write()
            self._full = False
        except (OSError, ValueError) as raised:
            error = raised.__cause__ or raised  # Lightning makes a ValueError of all
            if not isinstance(error, OSError):
                raise
            # What the writer has begun cannot be finished: the next point begins a new file.
            self._experiment = None
            if not self._full:
                log.warning("TensorBoard's events cannot be written now (%s)", error)
            self._full = True


def _save_gif(film: np.ndarray, data: io.BytesIO) -> None:
    """Encode with one palette for all frames: thirty times faster than Pillow's own choice."""
    still = Image.fromarray(film.reshape(-1, *film.shape[2:]))
    palette = still.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    frames = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in film]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)


class MetricsCSV(Logger):
    """All scalars in one metrics.csv: a row per step, a column per name.

    Rows are appended as they come; only when a new name appears is the file rewritten. Rows that a
    full disk refuses wait for the next one.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self.columns, rows = self._read()
        self._rows = len(rows)
        self._size = self.file.stat().st_size if rows else 0
        self._waiting: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the logger; there is only one."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Return how far the file goes, which is flushed to the disk, and the rows that wait."""
        if self._size:
            with suppress(OSError), self.file.open("rb") as file:
                os.fsync(file.fileno())
        waiting = [{k: _number(v) for k, v in row.items()} for row in self._waiting]
        return {"columns": list(self.columns), "rows": self._rows, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to that: what came later is logged again."""
        _, rows = self._read()
        if lost := max(0, state["rows"] - len(rows)):
            log.warning("%s has lost %d rows since this run was saved", self.file, lost)
        self._rewrite(list(state["columns"]), rows[: state["rows"]])
        self._waiting = list(state["waiting"])

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the run's folder holds its configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        self._waiting.append({"step": step, **metrics})
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s cannot be written now (%s); its rows wait", self.file, error)

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self._waiting for name in row)
        if not self._size or any(name not in self.columns for name in names):
            _, rows = self._read()
            columns = list(dict.fromkeys([*self.columns, *names]))
            self._rewrite(columns, [*rows[: self._rows], *self._waiting])
        else:
            lines = _csv(self.columns, self._waiting)
            with self.file.open("r+b") as file:
                file.truncate(self._size)  # where the disk was full in the middle of a row
                file.seek(self._size)
                file.write(lines)
            self._size += len(lines)
            self._rows += len(self._waiting)
        self._waiting = []

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the columns and rows of the file."""
        if not self.file.exists():
            return ["step"], []
        with self.file.open(newline="") as file:
            reader = csv.DictReader(file)
            return list(reader.fieldnames or ["step"]), list(reader)

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        text = _csv(columns, [dict(zip(columns, columns, strict=True)), *rows])
        temporary = self.file.with_suffix(".tmp")
        temporary.write_bytes(text)
        temporary.replace(self.file)
        self.columns, self._rows, self._size = columns, len(rows), len(text)


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, extrasaction="ignore").writerows(rows)
    return text.getvalue().encode()


def _number(value: Any) -> Any:
    """Return what a checkpoint can hold: a Python number."""
    return value.item() if hasattr(value, "item") else value
