"""Resuming with another number of processes: each gets its share of what the others have saved."""

from typing import Any

import numpy as np

from worldloom.ranks import Ranks
from worldloom.replay.shares import cut_streams


def redistribute(states: list[dict[str, Any]], ranks: Ranks) -> tuple[dict[str, Any], int]:
    """Return the state of this rank's data module, and the seed of its random numbers.

    The number of streams of all processes together, which is that of the environments, is the
    same as before. Each rank continues consecutive streams with their rows, unfinished episodes
    and queues. Random numbers are drawn from new seeds, which differ between ranks.

    states: of the data modules of the processes that have saved the run.
    """
    first = states[0]
    drawn = int(first["buffer"]["rng"]["state"]["state"])
    seeds = np.random.SeedSequence(drawn, spawn_key=(ranks.size, ranks.rank, first["updates"]))
    replay, collector, others = (np.random.default_rng(x) for x in seeds.spawn(3))
    shares = [state["buffer"] for state in states]
    state = first | {"buffer": {"shares": shares, "rng": replay.bit_generator.state}}
    if first["collector"] is not None:
        parts = [state["collector"] for state in states]
        streams = len(shares[0]["written"]) * len(states) // ranks.size
        episodes = _cut_episodes(parts, ranks.rank * streams, streams, collector)
        state["collector"] = {**parts[0], **episodes, "rng": collector.bit_generator.state}
    return state, int(others.integers(2**31))


def _cut_episodes(
    parts: list[dict[str, Any]], first: int, count: int, rng: np.random.Generator
) -> dict[str, Any]:
    """Return the unfinished episodes of consecutive environments, and the actor's memory of them.

    All environments start new episodes if those of one rank were not saved.
    """
    rows = [part["rows"] for part in parts]
    memories = [part["memory"] for part in parts]
    if any(x is None for x in (*rows, *memories)):
        return {"rows": None, "memory": None}
    cut = cut_streams(rows, first, first + count)
    if cut["envs"]["seed"] is not None:  # the seed of environments that will replace crashed ones
        cut["envs"]["seed"] = int(rng.integers(2**31))
    return {"rows": cut, "memory": cut_streams(memories, first, first + count)}
