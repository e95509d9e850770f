"""Filling a replay with the episodes of a dataset."""

from typing import Any

import numpy as np

from worldloom.datasets import Dataset
from worldloom.replay.capacity import rows_per_stream
from worldloom.replay.shares import Share


def rows_of_share(dataset: Dataset, size: int) -> int:
    """Return an upper limit of the rows that `fill_buffer` adds to one of `size` replays."""
    return -(-(dataset.steps + len(dataset)) // size) + max(dataset.lengths) + 1


def fill_buffer(
    buffer: Any, dataset: Dataset, capacity: int | str | None = None, share: Share = (0, 1)
) -> str:
    """Fill a replay with the episodes of a dataset, the first ones that fit; return a summary.

    Arrays that the model stores with every row start as zeros, as at the start of an episode, and
    training replaces them. The replay is frozen.

    capacity: of all replays that share the episodes, in steps or memory; by default the buffer's.
    share: number of this replay, from 0, and how many replays share the episodes. All read all
        episodes; each one goes to the replay with the fewest rows so far (`assign_episodes`).

    Raises:
        ValueError: the first episode does not fit, or there are fewer episodes than replays.
    """
    limit = buffer.capacity
    if capacity is not None:
        limit = rows_per_stream(capacity, buffer.bytes_per_step, 1)
    returns: list[float] = []
    counts: list[int] = []
    filled = [0] * share[1]
    for episode in dataset:
        steps = len(episode.rewards)
        if sum(filled) + steps + 1 > limit:
            break
        obs: Any = episode.obs
        counts.append(len(next(iter(obs.values())) if isinstance(obs, dict) else obs))
        chosen = filled.index(min(filled))
        filled[chosen] += counts[-1]
        returns.append(float(episode.rewards.sum(dtype=np.float64)))
        if chosen != share[0]:
            continue
        ends = np.arange(steps) == steps - 1
        buffer.add_episode(
            obs,
            episode.actions,
            episode.rewards,
            terminations=ends & episode.terminated,
            truncations=ends & episode.truncated,
        )
    if not returns:
        raise ValueError(
            f"the first episode of {dataset.path} has {dataset.lengths[0]} steps, but the replay "
            f"holds {limit}; raise data.capacity"
        )
    if len(returns) < share[1]:
        raise ValueError(
            f"{len(returns)} episodes of {dataset.path} are used, but each of {share[1]} processes "
            "needs one; lower trainer.devices, or raise data.capacity"
        )
    buffer.freeze(counts)
    kept = f"the first {len(returns):,} of " if len(returns) < len(dataset) else ""
    why = " (data.capacity has no room for more)" if kept else ""
    return (
        f"data: {kept}{len(dataset):,} episodes{why} of {dataset.path}, {sum(filled):,} rows, "
        f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}"
    )
