"""Pictures of imagined observations and rewards next to the true ones."""

import itertools
import operator
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from worldloom.protocol import LatentState
from worldloom.training.drawing import draw_curves, draw_film
from worldloom.trees import map_tree

DIMENSIONS = 5  # of a vector, in one picture
LARGEST = 1e20  # drawn in place of infinity


class Stretch(NamedTuple):
    """Part of one episode: rows start to stop - 1 of sequence `row` of a batch."""

    row: int
    start: int
    stop: int

    @property
    def length(self) -> int:
        """Return the number of rows."""
        return self.stop - self.start


def find_stretches(is_first: Tensor, context: int, length: int) -> list[Stretch]:
    """Cut the episodes in flags [B, T] into parts of up to `length` rows; the longest come first.

    Only parts with context + 2 rows are returned, or if there are none, those of the longest part's
    length, which has at least three rows. Of equally long parts the newest come first.
    """
    parts = []
    for row, flags in enumerate(is_first.tolist()):
        borders = [0, *[t for t, first in enumerate(flags) if first and t], len(flags)]
        for start, end in itertools.pairwise(borders):
            parts += [Stretch(row, t, min(t + length, end)) for t in range(start, end, length)]
    parts.sort(key=lambda part: (-part.length, -part.stop))
    longest = parts[0].length if parts else 0
    least = max(3, min(context + 2, longest))
    return [part for part in parts if part.length >= least]


@torch.no_grad()
def open_loop(
    model: Any, batch: dict[str, Any], parts: Sequence[Stretch], context: int
) -> dict[str, np.ndarray]:
    """Observe `context` rows of some sequences, then imagine the others from the actions alone.

    batch: rows [B, T, ...] of the replay.
    parts: the sequences, from `find_stretches`; fewer rows are observed of shorter ones.

    Returns the pictures by name: "open_loop", with "/KEY" for dict observations, is for images a
    film [T, H, W, 3] of all sequences (see `draw_film`), and for vectors the curves [H, W, 3] of
    the first sequence; those of the others are "open_loop_2" and so on. "open_loop_rewards" are the
    curves of the rewards. What the model does not decode is left out.
    """
    if not parts:
        return {}
    context = min(context, min(part.length for part in parts) - 2)
    found = predict(model, batch, parts, context)
    lengths = [part.length for part in parts]
    pictures = {}
    for key, (truth, guess) in found.items():
        if key == "rewards":
            pictures["open_loop_rewards"] = _draw_rewards(truth, guess, lengths, context)
        elif truth.ndim == 5:
            pictures[f"open_loop{key}"] = draw_film(truth, guess, lengths, context)
        else:
            pictures |= _draw_vectors(key, truth, guess, lengths, context)
    return pictures


def predict(
    model: Any, batch: dict[str, Any], parts: Sequence[Stretch], context: int
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Return truth and prediction [S, T, ...] of what the model decodes along S parts of a batch.

    The keys are "" for an observation, "/KEY" for those of a dict, and "rewards" [S, T], of which
    the first is the true one, as no prediction precedes it. Shorter sequences repeat their last
    row.
    """
    steps = max(part.length for part in parts)
    rows = torch.tensor([[part.row] * steps for part in parts])
    times = [[min(part.start + t, part.stop - 1) for t in range(steps)] for part in parts]

    def select(x: Tensor) -> Tensor:
        """Return the parts [S, T, ...] of x [B, T', ...]."""
        return x[rows.to(x.device), torch.tensor(times, device=x.device)]

    obs, actions = map_tree(select, batch["obs"]), select(batch["actions"])
    at = [map_tree(operator.itemgetter((slice(None), t)), obs) for t in range(context)]
    states = [model.encode(at[0])]
    for t in range(1, context):
        states.append(model.observe(states[-1], actions[:, t - 1], at[t]))
    future = model.imagine(states[-1], actions[:, context - 1 : -1].transpose(0, 1)).states[1:]
    decoded = model.decode(LatentState.cat(states + future))

    def arrange(guess: Tensor) -> np.ndarray:
        """Return [T * S, ...] as [S, T, ...], finite: a run continues if its model diverges."""
        guess = guess.float().nan_to_num().clamp(-LARGEST, LARGEST)
        return guess.unflatten(0, (steps, -1)).transpose(0, 1).cpu().numpy()

    found = {}
    guess = decoded.get("obs")
    for key, value in guess.items() if isinstance(guess, dict) else [("", guess)]:
        if value is not None:
            truth = obs[key] if isinstance(obs, dict) else obs
            found[f"/{key}" if key else ""] = truth.float().cpu().numpy(), arrange(value)
    if (reward := decoded.get("reward")) is not None:
        truth = select(batch["rewards"]).float().cpu().numpy()
        predicted = arrange(reward)[..., 0].copy()
        predicted[:, 0] = truth[:, 0]
        found["rewards"] = truth, predicted
    return found


def _draw_vectors(
    key: str, truth: np.ndarray, guess: np.ndarray, lengths: Sequence[int], context: int
) -> dict[str, np.ndarray]:
    """Return a picture of each sequence [S, T, ...]: the dimensions with the largest errors."""
    truth, guess = (x.reshape(*x.shape[:2], -1) for x in (truth, guess))
    steps, width = truth.shape[1:]
    deviation = truth.std((0, 1))
    error = np.abs(guess - truth) / np.where(deviation > 1e-6, deviation, 1.0)  # [S, T, D]
    imagined = np.arange(context, steps) < np.array(lengths)[:, None]  # [S, T - context]
    worst = np.argsort(-error[:, context:][imagined].mean(0), kind="stable")[:DIMENSIONS]
    which = f"all {width} values" if width <= DIMENSIONS else f"the worst {DIMENSIONS} of {width}"
    pictures = {}
    for s, length in enumerate(lengths):
        panels = [(f"[{d}]", truth[s, :length, d], guess[s, :length, d]) for d in sorted(worst)]
        title = f"{key[1:] or 'obs'} in its own units, sequence {s + 1}: {which}"
        name = f"open_loop{f'_{s + 1}' if s else ''}{key}"
        pictures[name] = draw_curves(panels, title, context, error[s, :length].mean(1))
    return pictures


def _draw_rewards(
    truth: np.ndarray, guess: np.ndarray, lengths: Sequence[int], context: int
) -> np.ndarray:
    """Return a picture of the rewards [S, T] for arriving at each row."""
    panels = [
        (f"sequence {s + 1}", truth[s, :length], guess[s, :length])
        for s, length in enumerate(lengths)
    ]
    return draw_curves(panels, "reward of each step", context)
