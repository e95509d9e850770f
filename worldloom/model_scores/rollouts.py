"""Scores of imagined steps: observations, rewards and ends of episodes.

Letters used in shapes: N sequences of L rows, R rollouts of H steps.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from worldloom.model_scores.sequences import CONTEXT, Sequences
from worldloom.model_scores.statistics import (
    LEAST,
    measure_calibration,
    measure_error,
    measure_spread,
)
from worldloom.protocol import LatentState, Trajectory
from worldloom.trees import flatten_tree

HORIZONS = (1, 5, 15, 50)  # steps ahead at which observations are compared
REWARD_STEPS = 15  # steps ahead up to which rewards and ends of episodes are
STRIDE = 7  # rows between two starts of rollouts


@dataclass
class Rollouts:
    """Imagined steps and the rows that they predict.

    trajectory: of H steps from R states.
    sequence, start: [R], where each of them starts.
    row: [H, R], row of the sequence that each step predicts. valid: [H, R], whether there is one.
    """

    trajectory: Trajectory
    sequence: Tensor
    start: Tensor
    row: Tensor
    valid: Tensor


def roll_out(model: Any, sequences: Sequences, states: list[LatentState]) -> Rollouts | None:
    """Imagine the actions of the sequences from some of their states; None if all are too short.

    states: O states [N] after the observed rows.
    """
    actions, device = sequences.rows["actions"], sequences.rows["actions"].device
    count, length = actions.shape[:2]
    most = min(sequences.observed, length - 1)
    starts = torch.arange(CONTEXT - 1, most, STRIDE, device=device)
    sequence = torch.arange(count, device=device).repeat(len(starts))
    start = starts.repeat_interleave(count)
    episode = sequences.episode
    steps = torch.arange(1, max(HORIZONS) + 1, device=device).unsqueeze(1)
    row = (start + steps).clamp(max=length - 1)  # [H, R]
    valid = (start + steps < length) & (episode[sequence, row] == episode[sequence, start])
    valid &= sequences.informed[sequence, start]
    kept, horizon = valid[:1].any(0), int(valid.any(1).sum())
    if horizon == 0:
        return None
    initial = LatentState.cat([states[t] for t in starts.tolist()])[kept]
    sequence, start, row, valid = (
        sequence[kept],
        start[kept],
        row[:horizon, kept],
        valid[:horizon, kept],
    )
    trajectory = model.imagine(initial, actions[sequence, row - 1])
    return Rollouts(trajectory, sequence, start, row, valid)


def score_observations(model: Any, sequences: Sequences, rollouts: Rollouts) -> dict[str, float]:
    """Return the errors of imagined observations, and of two predictions without a model.

    {"obs_error/h", "obs_error_no_change/h", "obs_error_mean/h"} for steps h: mean squared errors of
    the model, of the last observation and of the mean observation, as shares of the variance.
    Empty if the model decodes no observations.
    """
    states, picks = rollouts.trajectory.states, {}
    for h in HORIZONS:
        if h <= len(rollouts.valid):
            picks[h] = rollouts.valid[h - 1].nonzero().squeeze(1)
    decoded = model.decode(LatentState.cat([states[h][pick] for h, pick in picks.items()]))
    if decoded.get("obs") is None:
        return {}
    predicted, true = flatten_tree(decoded["obs"]), flatten_tree(sequences.rows["obs"])
    found: dict[str, list[float]] = {}
    for key, guesses in predicted.items():
        obs = true[key].float()  # [N, L, ...]
        if (scale := _measure_scale(obs)) is None:
            continue
        mean = obs.flatten(0, 1).mean(0)
        parts = guesses.float().split([len(pick) for pick in picks.values()])
        for (h, pick), guess in zip(picks.items(), parts, strict=True):
            at = rollouts.sequence[pick]
            real = obs[at, rollouts.row[h - 1, pick]]
            rivals = {"": guess, "_no_change": obs[at, rollouts.start[pick]], "_mean": mean}
            for name, rival in rivals.items():
                error = ((rival - real).square() / scale).mean().item()
                found.setdefault(f"obs_error{name}/{h}", []).append(error)
    return {name: sum(errors) / len(errors) for name, errors in found.items()}


def _measure_scale(obs: Tensor) -> Tensor | None:
    """Return the variance by which squared errors of obs [N, L, *shape] are divided, [*shape].

    That of each number of a vector, at least a hundredth of their mean, or the mean of all pixels
    of an image. None if nothing varies.
    """
    variance = obs.flatten(0, 1).var(0, correction=0)
    mean = variance.mean()
    if not mean > 0:
        return None
    return mean if obs.ndim >= 5 else variance.clamp(min=LEAST * mean)


def score_rewards(sequences: Sequences, rollouts: Rollouts) -> dict[str, float]:
    """Return the errors and the calibration of imagined rewards and ends of episodes.

    {"reward_error", "continue_error"}: mean squared errors as shares of the spread of the truth.
    "reward_calibration" is in standard deviations of the rewards, "continue_calibration" is a
    difference of probabilities. Rewards that are all 0 have no scores.
    """
    valid, row = rollouts.valid[:REWARD_STEPS], rollouts.row[:REWARD_STEPS]
    sequence = rollouts.sequence.expand_as(row)[valid]
    row = row[valid]
    trajectory = rollouts.trajectory
    truth = {
        "reward": (trajectory.rewards, sequences.rows["rewards"]),
        "continue": (trajectory.continues, ~sequences.rows["is_terminal"]),
    }
    scores = {}
    for name, (guesses, rows) in truth.items():
        predicted = guesses[: len(valid)].squeeze(-1)[valid].float()
        true = rows[sequence, row].float()
        if (error := measure_error(predicted, true)) is not None:
            unit = measure_spread(true).sqrt().item() if name == "reward" else 1.0
            scores[f"{name}_error"] = error
            scores[f"{name}_calibration"] = measure_calibration(predicted, true) / unit
    return scores
