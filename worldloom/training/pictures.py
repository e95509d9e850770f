"""Pictures of imagined observations next to the true ones."""

import itertools
import operator
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor

from worldloom.protocol import LatentState
from worldloom.trees import map_tree

TRUE, MODEL, PAPER, GRID = (30, 90, 200), (220, 80, 40), (255, 255, 255), (225, 225, 225)


@torch.no_grad()
def open_loop(model: Any, batch: dict[str, Any], context: int) -> dict[str, np.ndarray]:
    """Observe `context` rows of one sequence, then imagine the others from the actions alone.

    Returns {"open_loop" or "open_loop/KEY": picture}: for images a film [T, H, W, 3] with truth,
    prediction and error side by side (green border while observing, red while imagining); for
    vectors curves [H, W, 3] of up to eight dimensions. The dict is empty if the model decodes no
    observations or no episode in the batch is long enough.
    """
    row, start, length = _longest_stretch(batch["is_first"])
    if length < context + 2:
        return {}
    steps = slice(start, start + length)
    obs = map_tree(lambda x: x[row : row + 1, steps], batch["obs"])
    actions = batch["actions"][row : row + 1, steps]
    at = [map_tree(operator.itemgetter((slice(None), t)), obs) for t in range(context)]
    states = [model.encode(at[0])]
    for t in range(1, context):
        states.append(model.observe(states[-1], actions[:, t - 1], at[t]))
    future = model.imagine(states[-1], actions[:, context - 1 : -1].transpose(0, 1)).states[1:]
    predicted = model.decode(LatentState.cat(states + future)).get("obs")
    if predicted is None:
        return {}
    truth = map_tree(lambda x: x[0], obs)
    named = predicted.items() if isinstance(predicted, dict) else [("", predicted)]
    pictures = {}
    for key, guess in named:
        real = truth[key] if isinstance(truth, dict) else truth
        name = f"open_loop/{key}" if key else "open_loop"
        draw = _film if real.ndim == 4 else _curves
        guess = guess.float().nan_to_num()  # the run continues even if the model diverges
        pictures[name] = draw(real.float().cpu().numpy(), guess.cpu().numpy(), context)
    return pictures


def _longest_stretch(is_first: Tensor) -> tuple[int, int, int]:
    """Return row, start and length of the longest part of one episode in flags [B, T]."""
    best = (0, 0, 0)
    for row, flags in enumerate(is_first.tolist()):
        borders = [0, *[t for t, first in enumerate(flags) if first and t], len(flags)]
        for start, stop in itertools.pairwise(borders):
            if stop - start > best[2]:
                best = (row, start, stop - start)
    return best


def _film(real: np.ndarray, guess: np.ndarray, context: int) -> np.ndarray:
    """Return frames [T, H, W, 3] with truth, prediction and error [T, C, H, W] side by side."""
    error = (guess - real) / 2 + 128
    frames = []
    for part in (real, guess, error):
        part = np.clip(part, 0, 255).astype(np.uint8).transpose(0, 2, 3, 1)
        part = part[..., :3] if part.shape[-1] >= 3 else np.repeat(part[..., :1], 3, -1)
        frames.append(part)
    film = np.pad(np.concatenate(frames, 2), ((0, 0), (3, 3), (3, 3), (0, 0)))
    scale = max(1, 128 // real.shape[-1])
    border = np.where(np.arange(len(film))[:, None] < context, (40, 160, 60), (200, 50, 40))
    for edge in (np.s_[:, :3], np.s_[:, -3:], np.s_[:, :, :3], np.s_[:, :, -3:]):
        film[edge] = border[:, None, None]
    return film.repeat(scale, 1).repeat(scale, 2)


def _curves(real: np.ndarray, guess: np.ndarray, context: int) -> np.ndarray:
    """Plot truth (blue) and prediction (red) of each dimension of [T, ...], one below the other."""
    real, guess = real.reshape(len(real), -1)[:, :8], guess.reshape(len(guess), -1)[:, :8]
    width, height, margin = 640, 90, 8
    image = Image.new("RGB", (width, height * real.shape[1]), PAPER)
    draw = ImageDraw.Draw(image)
    xs = np.linspace(margin, width - margin, len(real))
    for i, (truth, model) in enumerate(zip(real.T, guess.T, strict=True)):
        low = min(truth.min(), model.min())
        span = max(truth.max(), model.max()) - low or 1.0
        base = height * (i + 1) - margin
        seam = float(xs[context - 1])
        draw.line([(seam, base - height + 2 * margin), (seam, base)], fill=GRID, width=2)
        for values, colour in ((truth, TRUE), (model, MODEL)):
            ys = base - (values - low) / span * (height - 2 * margin)
            draw.line(list(zip(xs.tolist(), ys.tolist(), strict=True)), fill=colour, width=2)
        draw.text(
            (margin, base - height + margin + 2), f"{i}: {low:.3g} to {low + span:.3g}", (90,) * 3
        )
    return np.asarray(image)
