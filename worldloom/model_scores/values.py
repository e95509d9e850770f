"""Scores of values: what the policy was expected to collect, and what it did collect.

Letters used in shapes: N sequences, O observed rows of each, E streams of W rows.
"""

from typing import Any

import torch
from torch import Tensor

from worldloom.model_scores.sequences import Sequences
from worldloom.model_scores.statistics import measure_error
from worldloom.protocol import Batch, LatentState


def score_values(
    model: Any,
    window: Batch,
    sequences: Sequences,
    states: list[LatentState],
    final: LatentState,
) -> dict[str, float]:
    """Compare the model's values with discounted returns: {"value_error", "value_bias"}.

    The error is the mean squared one as a share of the returns' spread, the bias the mean of value
    minus return. A return that a time limit or the end of the window [E, W] cuts off is completed
    by the model's own value there. Empty if the model has no `value` or no `discount`; without the
    error if all returns are 0.

    window, sequences: on the CPU. states: O states [N] after the observed rows. final: [N], at the
        `end` of each sequence.
    """
    if not (callable(getattr(model, "value", None)) and callable(getattr(model, "discount", None))):
        return {}
    values = model.value(LatentState.cat([*states, final])).reshape(len(states) + 1, -1)
    values = values.t().cpu().double()  # [N, O + 1]
    discount = torch.as_tensor(model.discount(states[0])).flatten().cpu().double()
    returns = compute_returns(window, sequences, values, discount.expand(len(values)))
    known = (sequences.informed & ~sequences.rows["is_last"])[:, : len(states)]
    known[:, -1] &= sequences.end > sequences.last
    value, true = values[:, :-1][known], returns[known]
    if not len(true):
        return {}
    scores = {"value_bias": (value - true).mean().item()}
    if (error := measure_error(value, true)) is not None:
        scores["value_error"] = error
    return scores


def compute_returns(
    window: Batch, sequences: Sequences, values: Tensor, discount: Tensor
) -> Tensor:
    """Return the discounted sums of the rewards after each observed row, [N, O].

    values: [N, O + 1] at these rows and at the ends of the returns. discount: [N].
    """
    stream, last, end = sequences.stream, sequences.last, sequences.end
    # Backwards from the ends to the last observed row of each sequence.
    total = torch.where(window["is_terminal"][stream, end], 0.0, values[:, -1])
    for after in range(int((end - last).max()), 0, -1):
        row = (last + after).minimum(end)
        further = window["rewards"][stream, row] + discount * total
        total = torch.where(last + after <= end, further, total)
    # Backwards through the observed rows.
    rows = sequences.rows
    returns = [total]
    for t in range(sequences.observed - 1, 0, -1):
        rest = torch.where(rows["is_last"][:, t], values[:, t], returns[-1])
        rest = torch.where(rows["is_terminal"][:, t], 0.0, rest)
        returns.append(rows["rewards"][:, t] + discount * rest)
    return torch.stack(returns[::-1], 1)
