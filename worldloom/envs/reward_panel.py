"""The rewards of an episode, drawn below its images.

Letters used in shapes: H, W height and width.
"""

import functools
import math

import numpy as np
from PIL import Image, ImageDraw, ImageFont

HEIGHT = 84  # of the panel, pixels
WIDTH = 256  # of the whole image at least, pixels
MARGIN, TEXT = 6, 12  # pixels
SHORTEST = 50  # steps that the curves have room for, if the length of the episode is unknown
TRUE, MODEL, INK, PAPER, GRID = "#1e5ac8", "#d2461e", "#202020", "#ffffff", "#d8d8d8"


@functools.cache
def load_font(size: int) -> ImageFont.FreeTypeFont | ImageFont.ImageFont:
    """Return Pillow's own scalable font, or its fixed one where FreeType is missing."""
    return ImageFont.load_default(size)


class RewardPanel:
    """Draws step, reward and predicted reward below an image, and both rewards so far as curves.

    length: steps of the episode, over which the curves grow; None if it is not known.
    """

    def __init__(self, length: int | None = None) -> None:
        self.length = length
        self._rewards: list[float] = []
        self._predicted: list[float] = []

    def restart(self) -> None:
        """Start with an episode's first image, which has no reward."""
        self._rewards, self._predicted = [], []

    def add(self, reward: float, predicted: float = math.nan) -> None:
        """Add the rewards of a step; NaN if there is no prediction."""
        self._rewards.append(float(reward))
        self._predicted.append(float(predicted))

    def draw(self, image: np.ndarray) -> np.ndarray:
        """Return an image [H, W, 3] uint8 with the panel below it, [H + 84, max(W, 256), 3]."""
        height, width = image.shape[:2]
        whole = Image.new("RGB", (max(width, WIDTH), height + HEIGHT), PAPER)
        whole.paste(Image.fromarray(image), ((whole.width - width) // 2, 0))
        draw = ImageDraw.Draw(whole)
        self._write(draw, whole.width, height + MARGIN)
        self._plot(draw, whole.width, height + MARGIN + TEXT + 8, whole.height - MARGIN)
        return np.asarray(whole)

    def _write(self, draw: ImageDraw.ImageDraw, width: int, top: int) -> None:
        """Write the numbers of the newest step; their colours are the legend of the curves."""
        true, model = (format_reward(*values[-1:]) for values in (self._rewards, self._predicted))
        parts = [(f"step {len(self._rewards)}", INK), (f"reward {true}", TRUE)]
        parts.append((f"predicted {model}", MODEL))
        lengths = [draw.textlength(text, load_font(TEXT)) for text, _ in parts]
        gap = max(3.0, min(14.0, (width - 2 * MARGIN - sum(lengths)) / 2))
        left = float(MARGIN)
        for (text, colour), length in zip(parts, lengths, strict=True):
            draw.text((left, top), text, colour, load_font(TEXT))
            left += length + gap

    def _plot(self, draw: ImageDraw.ImageDraw, width: int, top: int, bottom: int) -> None:
        """Plot both curves between two rows, with their lowest and highest value on the left."""
        curves = np.array([self._rewards, self._predicted])
        known = curves[np.isfinite(curves)]
        low, high = (min(0.0, known.min()), max(0.0, known.max())) if known.size else (0.0, 0.0)
        span = high - low or 1.0
        left, right = MARGIN + 40, width - MARGIN
        base = bottom - (0.0 - low) / span * (bottom - top)
        draw.line([(left, base), (right, base)], GRID)
        draw.text((MARGIN, top - 3), format_reward(high), INK, load_font(10))
        if low < 0:
            draw.text((MARGIN, bottom - 10), format_reward(low), INK, load_font(10))
        steps = max(2, len(self._rewards), self.length or SHORTEST)
        for curve, colour, wide in zip(curves, (TRUE, MODEL), (4, 2), strict=True):
            rows, values = _thin(curve, 2 * (right - left))
            xs = left + rows / (steps - 1) * (right - left)
            ys = bottom - (values - low) / span * (bottom - top)
            points = [(x, y) for x, y in zip(xs.tolist(), ys.tolist(), strict=True)]
            if len(points) == 1:
                (x, y), half = points[0], wide / 2
                draw.ellipse([x - half, y - half, x + half, y + half], colour)
            draw.line(points, colour, wide)


def format_reward(reward: float = math.nan) -> str:
    """Return a reward as a short text, "-" if there is none."""
    if not math.isfinite(reward):
        return "-"
    return f"{reward:.0f}" if 1000 <= abs(reward) < 100_000 else f"{reward:.3g}"


def _thin(curve: np.ndarray, most: int) -> tuple[np.ndarray, np.ndarray]:
    """Return positions and values of the finite points, at most about `most`, peaks included."""
    rows = np.flatnonzero(np.isfinite(curve))
    if len(rows) > most:
        parts = np.array_split(rows, most // 2)
        peaks = {part[pick(curve[part])] for part in parts for pick in (np.argmin, np.argmax)}
        rows = np.array(sorted(peaks))
    return rows, curve[rows]
