"""Sequences of rows on which a model is scored, and the states that a model infers for them.

Letters used in shapes: E streams of W rows, N sequences of L rows.
"""

import operator
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from worldloom.protocol import Batch, LatentState
from worldloom.trees import map_tree, to_device

LENGTH = 64  # rows of a sequence
OBSERVED = 20  # of them are observed; the others are only predicted, because observing takes longer
CONTEXT = 5  # rows that a model observes at least, unless an episode starts with fewer


@dataclass
class Sequences:
    """N sequences of a window of rows.

    rows: keys of `Batch`, [N, L, ...]. observed: number of the first rows that are observed, O.
    stream: [N], of each sequence. last: [N], its last observed row in the window.
    end: [N], row of the window at which the episode of `last` ends, or the window.
    """

    rows: dict[str, Any]
    observed: int
    stream: Tensor
    last: Tensor
    end: Tensor

    def to(self, device: Any) -> "Sequences":
        """Move the rows to a device."""
        return replace(self, rows=to_device(self.rows, device))

    @property
    def episode(self) -> Tensor:
        """Number of the episode of each row in its sequence, [N, L]."""
        return F.pad(self.rows["is_first"][:, 1:].cumsum(1), (1, 0))

    @property
    def informed(self) -> Tensor:
        """Rows whose state has seen CONTEXT rows, or its episode from the start, [N, L]."""
        first = self.rows["is_first"]
        late = torch.arange(first.shape[1], device=first.device) >= CONTEXT - 1
        return (first.cumsum(1) > 0) | late


def cut_sequences(window: Batch, count: int) -> Sequences:
    """Return about `count` sequences, spread evenly over a window of rows [E, W, ...]."""
    is_last = window["is_last"]
    streams, rows = is_last.shape
    length = min(LENGTH, rows)
    observed = min(OBSERVED, length)
    each = max(2, -(-count // streams)) if rows > length else 1
    starts = torch.linspace(0, rows - length, each).round().long().unique()
    stream = torch.arange(streams).repeat_interleave(len(starts))
    start = starts.repeat(streams)
    last = start + observed - 1
    ends = is_last.clone()
    ends[:, -1] = True
    later = ends[stream] & (torch.arange(rows) >= last.unsqueeze(1))  # [N, W]
    end = later.int().argmax(1)  # the first of the largest values
    return Sequences(take_rows(window, stream, start, length), observed, stream, last, end)


def take_rows(window: Batch, stream: Tensor, start: Tensor, length: int) -> dict[str, Any]:
    """Return `length` rows from `start` [N] of streams [N] on, [N, length, ...]."""
    at = start.unsqueeze(1) + torch.arange(length)
    names = ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal")
    given: Any = {name: window[name] for name in names}  # type: ignore[literal-required]
    return map_tree(lambda x: x[stream.unsqueeze(1), at], given)


def infer_states(model: Any, rows: dict[str, Any]) -> list[LatentState]:
    """Observe sequences [N, O, ...] from their first row on; return O states [N]."""
    first = rows["is_first"]
    states: list[LatentState] = []
    starts = first.any(0).tolist()
    for t in range(first.shape[1]):
        obs = map_tree(operator.itemgetter((slice(None), t)), rows["obs"])
        state = None if t == 0 else model.observe(states[-1], rows["actions"][:, t - 1], obs)
        if state is None:
            state = model.encode(obs)
        elif starts[t]:
            state = LatentState.where(first[:, t], model.encode(obs), state)
        states.append(state)
    return states


def observe_sequences(
    model: Any, window: Batch, sequences: Sequences, device: Any
) -> tuple[list[LatentState], LatentState]:
    """Return the O states [N] of the observed rows, and the states [N] at the `end` of each.

    For the latter the O rows before the end are observed.
    """
    count, observed = len(sequences.stream), sequences.observed
    stream = sequences.stream.repeat(2)
    last = torch.cat([sequences.last, sequences.end])
    rows = take_rows(window, stream, last - observed + 1, observed)
    states = infer_states(model, to_device(rows, device))
    return [state[:count] for state in states], states[-1][count:]
