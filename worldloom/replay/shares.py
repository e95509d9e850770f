"""The shares that several processes have of a replay, and how another number of them continues it.

Each process has a replay of its own, with consecutive streams of all environments or with some
episodes of a dataset. Its files are named by the numbers of the streams among those of all
processes (see `block_files`), so only states are cut and joined here: no row is copied.
"""

import logging
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch

from worldloom.replay.archive import Archive
from worldloom.replay.block_files import choose_block_rows, parse_name
from worldloom.replay.row_format import to_numpy

log = logging.getLogger(__name__)

Share = tuple[int, int]  # of a replay: its number, from 0, and the number of replays


def assign_episodes(rows: Sequence[int], size: int) -> list[int]:
    """Return which of `size` replays each episode belongs to: the one with the fewest rows so far.

    rows: of each episode, in the order of the dataset.
    """
    filled = [0] * size
    chosen = []
    for count in rows:
        chosen.append(filled.index(min(filled)))
        filled[chosen[-1]] += count
    return chosen


def cut_streams(trees: Sequence[Any], first: int, end: int) -> Any:
    """Return the streams [first, end) of nested states, one per process, with axis 0 for streams.

    Lists and tensors are joined and cut; of anything else the first process has the value.
    """
    head = trees[0]
    if isinstance(head, Mapping):
        return {key: cut_streams([tree[key] for tree in trees], first, end) for key in head}
    if isinstance(head, torch.Tensor):
        return torch.cat(list(trees))[first:end].clone()
    return [x for tree in trees for x in tree][first:end] if isinstance(head, list) else head


def join_states(states: Sequence[Mapping[str, Any]], share: Share, num_envs: int) -> dict[str, Any]:
    """Return the state of a replay with `num_envs` streams from the states of all replays."""
    first = share[0] * num_envs
    end = first + num_envs
    names = [
        name for name in ("written", "queue_position", "tails", "streams") if name in states[0]
    ]
    state = {name: cut_streams([x[name] for x in states], first, end) for name in names}
    before = len(states[0]["written"])
    rows = int(states[0]["layout"]["capacity"]) // before
    layout = {"num_envs": str(num_envs), "capacity": str(rows * num_envs)}
    lost = [
        [rank * before + env - first, number]
        for rank, x in enumerate(states)
        for env, number in x.get("lost", ())
    ]
    files = {name: crc for x in states for name, crc in x["files"].items()}
    return state | {
        "layout": states[0]["layout"] | layout,
        "lost": [block for block in lost if 0 <= block[0] < num_envs],
        "files": {name: c for name, c in files.items() if first <= parse_name(name)[0] < end},
    }


def place_episodes(rows: Sequence[int], share: Share, before: int) -> list[np.ndarray]:
    """Return where this replay has the rows of `before` replays with the same episodes.

    One array for each of them, with this replay's number of every row; -1 for another replay's.

    rows: of each episode of all replays.
    """
    places: list[list[np.ndarray]] = [[] for _ in range(before)]
    filled = 0
    pairs = zip(assign_episodes(rows, before), assign_episodes(rows, share[1]), strict=True)
    for count, (old, new) in zip(rows, pairs, strict=True):
        own = new == share[0]
        places[old].append(np.arange(filled, filled + count) if own else np.full(count, -1))
        filled += count * own
    return [np.concatenate([np.zeros(0, np.int64), *parts]) for parts in places]


def load_episodes(
    archive: Archive, states: Sequence[Mapping[str, Any]], rows: Sequence[int], share: Share
) -> None:
    """Load the model's fields of this replay's episodes from the states of all replays.

    One file at a time is read.

    Raises:
        ValueError: the dataset had other episodes.
    """
    for state, place in zip(states, place_episodes(rows, share, len(states)), strict=True):
        if state["written"] != [len(place)]:
            raise ValueError(
                f"the dataset has changed since this run was saved: it had {state['written'][0]} "
                f"rows where it has {len(place)} now; restore the dataset, or start a new run"
            )
        _load_fields(archive, state, place)


def _load_fields(archive: Archive, state: Mapping[str, Any], place: np.ndarray) -> None:
    """Load fields from one state; place: this replay's number of each of its rows, or -1."""
    store, files = archive.store, archive.files
    fields = {name: store.fields[name] for name in store.rewritable}
    block_rows = choose_block_rows(store.fields, fields, int(state["layout"]["capacity"]))

    def rewrite(first: int, arrays: Mapping[str, np.ndarray]) -> None:
        for values in list(arrays.values())[:1]:
            row = place[first : first + len(values)]
            own = row >= 0
            taken = {name: x[own] for name, x in arrays.items()}
            store.rewrite(np.zeros(np.count_nonzero(own), np.int64), row[own], taken)

    for name, crc in state["files"].items():
        first = parse_name(name)[1] * block_rows
        if (place[first : first + block_rows] >= 0).any():
            arrays = files.read(name, crc, fields, block_rows)
            files.release(name)
            if arrays is None:
                log.warning("%s is damaged; its fields of the replay are now zero", name)
            rewrite(first, arrays or {})
    tail = {name: to_numpy(x) for name, x in state["tails"][0].items()}
    rewrite(len(place) // block_rows * block_rows, tail)
