"""Loggers: TensorBoard events and metrics.csv."""

import csv
import io
import logging
import os
import textwrap
from argparse import Namespace
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import OmegaConf
from tensorboard.compat.proto.event_pb2 import Event, SessionLog

from worldloom.files import atomic_write
from worldloom.glossary import format_glossary
from worldloom.training.dashboard import (
    chart_layout,
    hparams_end,
    hparams_start,
    scalar_summary,
)
from worldloom.training.media import image_summary
from worldloom.training.metrics import COUNTERS

log = logging.getLogger(__name__)


class TensorBoard(TensorBoardLogger):
    """TensorBoard events written directly to one folder, with pictures and animations.

    Metrics have the descriptions of the glossary, and `worldloom.training.dashboard` arranges them.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder), name="", version="", default_hp_metric=False)
        self._last = -1  # step of the newest point
        self._full = False
        self._described: set[str] = set()  # tags that TensorBoard has a description of

    def state_dict(self) -> dict[str, int]:
        """Return the step of the newest point."""
        return {"last": self._last}

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Mark a restart, so that TensorBoard drops later points, which are logged again."""
        self._last = state["last"]
        writer = self.experiment._get_file_writer()
        start = SessionLog(status=SessionLog.START)
        writer.add_event(Event(step=self._last + 1, session_log=start))

    @rank_zero_only
    def log_metrics(self, metrics: Mapping[str, Any], step: int | None = None) -> None:
        """Add a point to each curve; dicts become several, as by Lightning's logger."""
        nested: Any = {name: value for name, value in metrics.items() if isinstance(value, dict)}
        if nested:
            self._try(lambda: super(TensorBoard, self).log_metrics(nested, step))
        flat = {name: value for name, value in metrics.items() if name not in nested}
        summary = scalar_summary(flat, self._described)
        self._add(summary, step)
        self._last = max(self._last, step or 0)

    @rank_zero_only
    def log_hyperparams(
        self,
        params: dict[str, Any] | Namespace,
        metrics: dict[str, Any] | None = None,
        step: int | None = None,
    ) -> None:
        """Add the configuration and the glossary as texts, and the charts.

        metrics: if they are given, `params` are instead the settings that the page "HParams"
            compares; {} at the start of a run and the final metrics at its end.
        """
        settings = dict(vars(params) if isinstance(params, Namespace) else params)
        if metrics is None:
            block = textwrap.indent(OmegaConf.to_yaml(OmegaConf.create(settings)), "    ")
            texts = {"config": block, "glossary": format_glossary()}  # Markdown
            for name, text in texts.items():
                self._try(lambda: self.experiment.add_text(name, text))  # noqa: B023
            self._try(lambda: self.experiment.add_custom_scalars(chart_layout()))
            return
        for summary in hparams_start(settings):
            self._add(summary, step)
        if metrics:
            self.log_metrics(metrics, step)
            self._add(hparams_end(), step)

    @rank_zero_only
    def log_picture(self, name: str, picture: np.ndarray, step: int) -> None:
        """Add a picture [H, W, 3] or an animation [T, H, W, 3] of uint8, stored as PNG or GIF."""
        self._add(image_summary(name, picture), step)

    @rank_zero_only
    def save(self) -> None:
        """Write all points that are still in memory; not hparams.yaml, a copy of config.yaml."""
        self._try(lambda: self.experiment.flush())

    @rank_zero_only
    def finalize(self, status: str) -> None:
        """Write all points that are still in memory."""
        self._try(lambda: super(TensorBoard, self).finalize(status))

    def _add(self, summary: Any, step: int | None) -> None:
        """Write a summary."""
        self._try(lambda: self.experiment._get_file_writer().add_summary(summary, step))

    def _try(self, write: Callable[[], None]) -> None:
        """Write events; if the disk is full, warn once and continue without these points."""
        try:
            if self._full:  # an event file must not be started before there is room again
                with TemporaryFile(dir=self.log_dir, buffering=0) as probe:
                    probe.write(bytes(2**16))
            write()
            self._full = False
        except (OSError, ValueError) as raised:
            error = raised.__cause__ or raised  # Lightning replaces every error by a ValueError
            if not isinstance(error, OSError):
                raise
            # The event file ends in the middle of a record, so the next point starts a new file.
            self._experiment = None
            if not self._full:
                log.warning("TensorBoard's events cannot be written now (%s)", error)
            self._full = True


class MetricsCSV(Logger):
    """All scalars in one metrics.csv: one row per step, one column per name, the counters first.

    Rows are appended; the file is rewritten only when a new name appears. If the disk is full, rows
    wait in memory until the next one is written.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self._damaged = ""  # why the file of an earlier start cannot be continued
        self.columns, rows = self._read()
        self._rows = len(rows)
        self._size = self.file.stat().st_size if rows else 0
        self._waiting: list[dict[str, Any]] = []

    @property
    def name(self) -> str:
        """Return the name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Return an empty version; there is only one."""
        return ""

    def state_dict(self) -> dict[str, Any]:
        """Flush the file to the disk; return its length and the rows that are not written yet."""
        if self._size:
            with suppress(OSError), self.file.open("rb") as file:
                os.fsync(file.fileno())
        waiting = [{k: _number(v) for k, v in row.items()} for row in self._waiting]
        return {"columns": list(self.columns), "rows": self._rows, "waiting": waiting}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Cut the file back to its saved length; later rows are logged again."""
        _, rows = self._read()
        if lost := max(0, state["rows"] - len(rows)):
            log.warning("%s has %d rows fewer than when this run was saved", self.file, lost)
        self._rewrite(list(state["columns"]), rows[: state["rows"]])
        self._waiting = list(state["waiting"])

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing; the run folder contains the configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        plain = {name.removeprefix("counters/"): value for name, value in metrics.items()}
        self._waiting.append({"step": step, **plain})
        try:
            self._write()
        except OSError as error:
            if len(self._waiting) == 1:
                log.warning("%s cannot be written now (%s); rows are kept", self.file, error)

    def _write(self) -> None:
        names = dict.fromkeys(name for row in self._waiting for name in row)
        if not self._size or any(name not in self.columns for name in names):
            _, rows = self._read()
            columns = list(dict.fromkeys([*self.columns, *names]))
            self._rewrite(columns, [*rows[: self._rows], *self._waiting])
        else:
            lines = _csv(self.columns, self._waiting)
            with self.file.open("r+b") as file:
                file.truncate(self._size)  # removes part of a row if the disk was full
                file.seek(self._size)
                file.write(lines)
            self._size += len(lines)
            self._rows += len(self._waiting)
        self._waiting = []

    def _read(self) -> tuple[list[str], list[dict[str, Any]]]:
        """Return the columns and rows of the file; none if it is damaged."""
        self._damaged = ""
        if not self.file.exists():
            return ["step", *COUNTERS], []
        try:
            with self.file.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file, strict=True)
                columns, rows = list(reader.fieldnames or ()), list(reader)
            if columns[:1] != ["step"]:
                raise ValueError("its first column is not step")
            if any(None in row for row in rows) or any(None in row.values() for row in rows[:-1]):
                raise ValueError("some rows have another length")
        except (OSError, ValueError, csv.Error) as error:
            self._damaged = str(error)
            return ["step", *COUNTERS], []
        return columns, rows

    def _rewrite(self, columns: list[str], rows: list[dict[str, Any]]) -> None:
        if self._damaged:
            aside = self.file.with_suffix(".damaged")
            os.replace(self.file, aside)
            log.warning(
                "%s is damaged (%s); it is now %s, and a new file is started",
                *(self.file, self._damaged, aside),
            )
        text = _csv(columns, [dict(zip(columns, columns, strict=True)), *rows])
        with atomic_write(self.file) as file:
            file.write(text)
        self.columns, self._rows, self._size = columns, len(rows), len(text)


def _csv(columns: list[str], rows: list[dict[str, Any]]) -> bytes:
    text = io.StringIO(newline="")
    csv.DictWriter(text, columns, extrasaction="ignore").writerows(rows)
    return text.getvalue().encode()


def _number(value: Any) -> Any:
    """Return a Python number, which a checkpoint can contain."""
    return value.item() if hasattr(value, "item") else value
