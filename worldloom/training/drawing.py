"""Pictures of truth, prediction and error, in the size of an image card of TensorBoard.

A card shows a picture without scaling it down if it is at most 300 pixels wide and 214 high.
"""

import functools
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

WIDTH, HEIGHT = 300, 214
TRUE, MODEL, ERROR = (30, 90, 200), (225, 95, 20), (250, 215, 195)
PAPER, INK, GREY, GRID = (255, 255, 255), (40, 40, 40), (110, 110, 110), (205, 205, 205)
OBSERVED, IMAGINED = (30, 130, 60), (190, 60, 20)
TILE, LABELS = 64, 42  # pixels: the larger side of an image of a film, the names of its rows


@functools.cache
def font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return a font of this height, as part of Pillow."""
    return ImageFont.load_default(size)


def draw_film(
    truth: np.ndarray, guess: np.ndarray, lengths: Sequence[int], context: int
) -> np.ndarray:
    """Return a film [T, h, w, 3] of truth, prediction and error, one below the other.

    truth, guess: [S, T, C, H, W] with values from 0 to 255; the sequences are next to each other.
    lengths: rows of each sequence; nothing is shown after them.
    context: rows that the model observed before it imagined the others.
    """
    count, steps = truth.shape[:2]
    rows = [_scale(part) for part in (truth, guess, (guess - truth) / 2 + 128)]
    high, wide = rows[0].shape[2:4]
    top, gap = 16, 2
    size = (LABELS + count * (wide + gap), top + 3 * (high + gap))
    page = Image.new("RGB", (max(size[0], 190), size[1]), PAPER)
    draw = ImageDraw.Draw(page)
    for i, (name, note) in enumerate((("truth", ""), ("model", ""), ("error", "0: grey"))):
        y = top + i * (high + gap) + high // 2
        draw.text((2, y - 7), name, INK, font(11))
        draw.text((2, y + 6), note, GREY, font(9))
    film = np.repeat(np.asarray(page)[None], steps, 0)
    for i, images in enumerate(rows):
        for s, length in enumerate(lengths):
            y, x = top + i * (high + gap), LABELS + s * (wide + gap)
            film[:length, y : y + high, x : x + wide] = images[s, :length]
    for t in range(steps):
        ahead = t - context + 1
        text = f"imagined {ahead} steps ahead" if ahead > 0 else "observed"
        film[t, :15] = _headline(
            film.shape[2], f"step {t}: {text}", IMAGINED if ahead > 0 else OBSERVED
        )
    return film


def draw_curves(
    panels: Sequence[tuple[str, np.ndarray, np.ndarray]],
    title: str,
    context: int,
    error: np.ndarray | None = None,
) -> np.ndarray:
    """Return a picture [HEIGHT, WIDTH, 3] with a panel for each value that changes with the step.

    panels: (name, truth [T], prediction [T]) of at most six values.
    context: rows that the model observed before it imagined the others.
    error: [T], for one more panel.
    """
    image = Image.new("RGB", (WIDTH, HEIGHT), PAPER)
    draw = ImageDraw.Draw(image)
    draw.text((4, 1), title, INK, font(11))
    x = 4
    for name, colour in (("truth", TRUE), ("prediction", MODEL), ("error", ERROR)):
        draw.rectangle((x, 19, x + 12, 23), fill=colour)
        draw.text((x + 16, 14), name, INK, font(11))
        x += 26 + int(draw.textlength(name, font(11)))
    draw.line((x + 2, 15, x + 2, 27), fill=IMAGINED)
    draw.text((x + 6, 14), "imagined from here", IMAGINED, font(11))
    count = len(panels) + (error is not None)
    columns = 1 if count <= 3 else 2
    rows = -(-count // columns)
    width, height = WIDTH // columns, (HEIGHT - 42) // rows
    for i, (name, truth, guess) in enumerate(panels):
        box = (i % columns * width, 30 + i // columns * height, width, height)
        _panel(draw, box, name, [(truth, TRUE), (guess, MODEL)], context)
    if error is not None:
        box = ((count - 1) % columns * width, 30 + (count - 1) // columns * height, width, height)
        _panel(draw, box, "mean error / deviation", [(error, IMAGINED)], context)
    for column in range(columns):
        _steps(draw, column * width, width, len(panels[0][1]), column == columns - 1)
    return np.asarray(image)


def _panel(
    draw: ImageDraw.ImageDraw,
    box: tuple[int, int, int, int],
    name: str,
    curves: Sequence[tuple[np.ndarray, tuple[int, int, int]]],
    context: int,
) -> None:
    """Draw curves [T] into a box (x, y, width, height): the range of values at the left."""
    left, top, width, height = box
    low = min(float(values.min()) for values, _ in curves)
    high = max(float(values.max()) for values, _ in curves)
    if len(curves) == 1:
        low = min(low, 0.0)  # an error is compared with none
    span = high - low or 1.0
    x0, x1, y0, y1 = left + 38, left + width - 6, top + 13, top + height - 5
    steps = len(curves[0][0])
    xs = np.linspace(x0, x1, steps).tolist()
    lines = [
        list(zip(xs, (y1 - (values - low) / span * (y1 - y0)).tolist(), strict=True))
        for values, _ in curves
    ]
    if len(lines) == 2:
        draw.polygon(lines[0] + lines[1][::-1], fill=ERROR)
    draw.line((x0, y1, x1, y1), fill=GRID)
    draw.line((x0, y0, x0, y1), fill=GRID)
    seam = xs[min(context, steps) - 1]
    draw.line((seam, top + 13, seam, y1), fill=IMAGINED)
    for line, (_, colour) in zip(lines, curves, strict=True):
        draw.line(line, fill=colour, width=2, joint="curve")
    draw.text((x0 + 2, top), name, INK, font(10))
    for value, y in ((high, y0 - 5), (low, y1 - 8)):
        text = f"{value:.0f}" if 10 <= abs(value) < 1e5 else f"{value:.2g}".replace("e+", "e")
        draw.text((x0 - 4 - draw.textlength(text, font(10)), y), text, GREY, font(10))


def _steps(draw: ImageDraw.ImageDraw, left: int, width: int, steps: int, named: bool) -> None:
    """Label the axis of steps below a column of panels."""
    draw.text((left + 38, HEIGHT - 13), "step 0", GREY, font(10))
    text = str(steps - 1)
    x = left + width - 6 - draw.textlength(text, font(10))
    draw.text((x, HEIGHT - 13), text, GREY, font(10))


@functools.lru_cache(maxsize=256)
def _headline(width: int, text: str, colour: tuple[int, int, int]) -> np.ndarray:
    """Return a line of text [15, width, 3] on a coloured ground."""
    image = Image.new("RGB", (width, 15), colour)
    ImageDraw.Draw(image).text((3, 1), text, PAPER, font(11))
    return np.asarray(image)


def _scale(images: np.ndarray) -> np.ndarray:
    """Return images [S, T, C, H, W] as uint8 [S, T, h, w, 3], the larger side about TILE pixels."""
    high, wide = images.shape[-2:]
    colours = images[:, :, :3] if images.shape[2] >= 3 else images[:, :, :1].repeat(3, 2)
    x = torch.from_numpy(np.ascontiguousarray(colours)).flatten(0, 1).clamp(0, 255)
    if max(high, wide) <= TILE:
        factor = TILE // max(high, wide)
        x = x.repeat_interleave(factor, -1).repeat_interleave(factor, -2)
    else:
        size = [max(1, round(side * TILE / max(high, wide))) for side in (high, wide)]
        x = F.interpolate(x, size=size, mode="area")
    return x.unflatten(0, images.shape[:2]).to(torch.uint8).permute(0, 1, 3, 4, 2).numpy()
