"""All scores of a model on recorded rows."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch

from worldloom.acting import evaluation_mode, find_device, use_seed
from worldloom.model_scores.latents import score_latents
from worldloom.model_scores.rollouts import roll_out, score_observations, score_rewards
from worldloom.model_scores.sequences import CONTEXT, cut_sequences, observe_sequences
from worldloom.model_scores.values import score_values
from worldloom.protocol import Batch

SEQUENCES = 16  # scored at once in a run
SEED = 0

# What the model was asked for, and its error, of the scores that are missing for that reason.
Failures = dict[str, Exception]


@torch.no_grad()
def score_model(
    model: Any, window: Batch, count: int = SEQUENCES
) -> tuple[dict[str, float], Failures]:
    """Score a world model on consecutive rows of E streams, [E, W, ...] on the CPU.

    The model observes a few rows of about `count` sequences and imagines up to 50 further steps
    with the actions that were taken. docs/inspecting.md explains each score. Scores that the model
    or the rows do not allow are missing; with at most CONTEXT rows these are all. The model is
    scored in evaluation mode; its modes and torch's random state are restored.
    """
    scores: dict[str, float] = {}
    failures: Failures = {}

    def attempt(name: str, score: Callable[[], dict[str, float]]) -> None:
        try:
            scores.update(score())
        except Exception as error:  # of a custom model
            failures[name] = error

    def score_all() -> dict[str, float]:
        sequences = cut_sequences(window, count)
        here = sequences.to(device)
        states, final = observe_sequences(model, window, sequences, device)
        attempt("values", lambda: score_values(model, window, sequences, states, final))
        attempt("latents", lambda: score_latents(model, here, states))
        if (rollouts := roll_out(model, here, states)) is not None:
            attempt("rewards", lambda: score_rewards(here, rollouts))
            attempt("observations", lambda: score_observations(model, here, rollouts))
        return {}

    if window["rewards"].shape[1] > CONTEXT:
        device = find_device(model)
        with evaluation_mode(model), use_seed(SEED, device):
            attempt("states", score_all)
    return scores, failures


def average_scores(parts: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Return the mean of each score over the parts that have it."""
    names = dict.fromkeys(name for part in parts for name in part)
    return {n: float(np.mean([part[n] for part in parts if n in part])) for n in names}
