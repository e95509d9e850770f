"""Where metrics go: TensorBoard events and metrics.csv."""

import csv
import io
import textwrap
from argparse import Namespace
from pathlib import Path
from typing import Any

import numpy as np
from lightning.fabric.utilities.rank_zero import rank_zero_only
from lightning.pytorch.loggers import Logger, TensorBoardLogger
from omegaconf import OmegaConf
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary


class TensorBoard(TensorBoardLogger):
    """TensorBoard events directly in one folder, with still and moving pictures."""

    def __init__(self, folder: str | Path) -> None:
        super().__init__(str(folder), name="", version="", default_hp_metric=False)

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
            self.experiment.add_text("config", textwrap.indent(text, "    "))  # Markdown for code
        super().log_hyperparams(params, metrics, step)

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
        self.experiment._get_file_writer().add_summary(summary, step)


def _save_gif(film: np.ndarray, data: io.BytesIO) -> None:
    """Encode with one palette for all frames: thirty times faster than Pillow's own choice."""
    still = Image.fromarray(film.reshape(-1, *film.shape[2:]))
    palette = still.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    frames = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in film]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)


class MetricsCSV(Logger):
    """All scalars in one metrics.csv: a row per step, a column per name.

    Rows are appended as they come; only when a new name appears is the file rewritten.
    """

    def __init__(self, folder: str | Path) -> None:
        super().__init__()
        self.file = Path(folder) / "metrics.csv"
        self.columns = ["step"]

    @property
    def name(self) -> str:
        """Name of the logger."""
        return "csv"

    @property
    def version(self) -> str:
        """Version of the logger; there is only one."""
        return ""

    @rank_zero_only
    def log_hyperparams(
        self, params: dict[str, Any] | Namespace, *args: Any, **kwargs: Any
    ) -> None:
        """Do nothing: the run's folder holds its configuration."""

    @rank_zero_only
    def log_metrics(self, metrics: dict[str, float], step: int | None = None) -> None:
        """Append one row."""
        if new := [name for name in metrics if name not in self.columns]:
            self._widen(new)
        with self.file.open("a", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writerow({"step": step, **metrics})

    def _widen(self, new: list[str]) -> None:
        rows: list[dict[str, str]] = []
        if self.file.exists():
            with self.file.open(newline="") as file:
                reader = csv.DictReader(file)
                rows = list(reader)
                self.columns = list(dict.fromkeys([*(reader.fieldnames or ()), *self.columns]))
        self.columns += [name for name in new if name not in self.columns]
        temporary = self.file.with_suffix(".tmp")
        with temporary.open("w", newline="") as file:
            writer = csv.DictWriter(file, self.columns)
            writer.writeheader()
            writer.writerows(rows)
        temporary.replace(self.file)
