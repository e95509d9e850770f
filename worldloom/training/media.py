"""Pictures and films for every logger that supports them."""

import io
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from lightning import Trainer
from lightning.pytorch.loggers import MLFlowLogger, TensorBoardLogger
from PIL import Image
from tensorboard.compat.proto.summary_pb2 import Summary


def log_pictures(trainer: Trainer, pictures: Mapping[str, np.ndarray], step: int) -> None:
    """Send pictures [H, W, 3] and films [T, H, W, 3] of uint8 to all loggers that support them."""
    for logger in trainer.loggers:
        for name, picture in pictures.items():
            if hasattr(logger, "attempt"):  # see logger_guard
                logger.attempt(log_picture, name, picture, step)
            else:
                log_picture(logger, name, picture, step)


def log_picture(logger: Any, name: str, picture: np.ndarray, step: int) -> None:
    """Log a picture [H, W, 3] or a film [T, H, W, 3] of uint8; nothing if the logger takes none.

    Loggers take pictures by `log_picture(name, picture, step)` or by Lightning's `log_image` and
    `log_video`. Films are GIFs.
    """
    is_film = picture.ndim == 4
    if hasattr(logger, "log_picture"):
        logger.log_picture(name, picture, step)
    elif isinstance(logger, TensorBoardLogger):
        logger.experiment._get_file_writer().add_summary(image_summary(name, picture), step)
    elif isinstance(logger, MLFlowLogger) and is_film:
        with tempfile.TemporaryDirectory() as folder:
            file = Path(folder) / f"step_{step:012}.gif"
            file.write_bytes(encode(picture))
            logger.experiment.log_artifact(logger.run_id, str(file), name)
    elif isinstance(logger, MLFlowLogger):
        logger.experiment.log_image(logger.run_id, picture, key=name, step=step)
    elif is_film and hasattr(logger, "log_video"):
        logger.log_video(name, [io.BytesIO(encode(picture))], step=step, format=["gif"])
    elif not is_film and hasattr(logger, "log_image"):
        logger.log_image(name, [picture], step=step)


def image_summary(name: str, picture: np.ndarray) -> Summary:
    """Return a picture or film as TensorBoard stores it."""
    height, width = picture.shape[-3:-1]
    data = encode(picture)
    image = Summary.Image(height=height, width=width, colorspace=3, encoded_image_string=data)
    return Summary(value=[Summary.Value(tag=name, image=image)])


def encode(picture: np.ndarray) -> bytes:
    """Encode a picture [H, W, 3] as PNG, or a film [T, H, W, 3] as GIF."""
    data = io.BytesIO()
    if picture.ndim == 3:
        Image.fromarray(picture).save(data, "PNG")
    else:
        _save_gif(picture, data)
    return data.getvalue()


def _save_gif(film: np.ndarray, data: io.BytesIO) -> None:
    """Encode with one palette for all frames; thirty times faster than one palette per frame."""
    still = Image.fromarray(film.reshape(-1, *film.shape[2:]))
    palette = still.quantize(256, method=Image.Quantize.FASTOCTREE, dither=Image.Dither.NONE)
    frames = [Image.fromarray(f).quantize(palette=palette, dither=Image.Dither.NONE) for f in film]
    frames[0].save(data, "GIF", save_all=True, append_images=frames[1:], duration=80, loop=0)
