"""Choose which sequences of a replay come next.

Letters: B sequences, E streams, S stretches of rows that follow each other without a gap: one of
each stream, or more where rows were lost.
"""

import numpy as np

from worldloom.replay.blocks import Blocks
from worldloom.replay.store import RowStorage

Places = tuple[np.ndarray, np.ndarray]  # streams and numbers of first rows, [B] each
Stretches = tuple[np.ndarray, np.ndarray, np.ndarray]  # stream, first row and end of each, [S]


class Draws:
    """Draws from the rows of `store`, and the queue of those that were not served yet.

    blocks: None, or which of them were lost.
    served: [E], number of the first row of each stream that the queue has not served.
    """

    def __init__(self, store: RowStorage, blocks: Blocks | None = None, seed: int = 0) -> None:
        self.served = np.zeros(store.num_envs, np.int64)
        self.rng = np.random.default_rng(seed)
        self._store, self._blocks = store, blocks
        self._streams = np.arange(store.num_envs)

    def stretches(self) -> Stretches:
        """Return all stretches, in the order of streams and of their rows."""
        if self._blocks is not None and self._blocks.lost:
            return self._blocks.stretches()
        return self._streams, self._store.oldest, self._store.written

    def longest(self) -> int:
        """Return the number of rows in the longest stretch."""
        if (common := self._common()) is not None:
            return min(common, self._store.rows)
        _, first, end = self.stretches()
        return int((end - first).max())

    def num_episodes(self) -> int:
        """Count the episodes of which at least one row is stored."""
        parts: list[list[np.ndarray]] = [[] for _ in range(self._store.num_envs)]
        for env, first, end in zip(*self.stretches(), strict=True):
            parts[env].append(self._episodes(env, first, end))
        # An episode goes on behind a gap, so stretches of a stream are looked at together.
        streams = [np.concatenate(part) for part in parts]
        return sum(int(np.count_nonzero(np.diff(stream, prepend=-1))) for stream in streams)

    def anywhere(self, count: int, length: int) -> Places:
        """Draw uniformly from all start positions of sequences of that length."""
        if (common := self._common()) is not None:  # gives what follows below, sooner
            oldest = max(common - self._store.rows, 0)
            starts = common - oldest - length + 1
            drawn = self.rng.integers(starts * len(self._streams), size=count)
            return drawn // starts, oldest + drawn % starts
        streams, first, end = self.stretches()
        starts = np.maximum(end - first - length + 1, 0)
        ends = starts.cumsum()
        drawn = self.rng.integers(ends[-1], size=count)
        stretch = np.searchsorted(ends, drawn, side="right")
        return streams[stretch], first[stretch] + drawn - (ends - starts)[stretch]

    def inside(self, count: int, length: int) -> Places:
        """Draw uniformly from the start positions whose sequence stays in one episode."""
        env, start = self.anywhere(count, length)
        episode, rows = self._store.rings["episode"], self._store.rows
        for _ in range(8):
            end = (start + length - 1) % rows
            crosses = np.flatnonzero(episode[env, start % rows] != episode[env, end])
            if len(crosses) == 0:
                return env, start
            env[crosses], start[crosses] = self.anywhere(len(crosses), length)
        # Drawing again is cheap where few sequences cross; where most do, list those that do not.
        envs, starts = self.starts_inside(length)
        if len(envs) == 0:
            parts = [self._episodes(*stretch) for stretch in zip(*self.stretches(), strict=True)]
            longest = max(np.unique(x, return_counts=True)[1].max(initial=0) for x in parts)
            raise ValueError(
                f"the longest stored episode has {longest} rows but a sequence needs {length}; "
                f"lower training.sequence_length or set data.across_episodes=true"
            )
        pick = self.rng.integers(len(envs), size=count)
        return envs[pick], starts[pick]

    def starts_inside(self, length: int) -> Places:
        """List streams and start rows of all sequences that stay in one episode."""
        envs, starts = [], []
        for env, first, end in zip(*self.stretches(), strict=True):
            episodes = self._episodes(env, first, end)
            inside = np.flatnonzero(episodes[: -length + 1 or None] == episodes[length - 1 :])
            envs.append(np.full(len(inside), env))
            starts.append(first + inside)
        return np.concatenate(envs), np.concatenate(starts)

    def fresh(self, count: int, length: int) -> Places:
        """Take up to `count` pieces of that length that were not served yet, oldest first."""
        streams, first, end = self.stretches()
        first = np.maximum(first, self.served[streams])
        ready = np.maximum(end - first, 0) // length
        env = np.repeat(streams, ready)
        nth = np.arange(len(env)) - np.repeat(ready.cumsum() - ready, ready)
        start = np.repeat(first, ready) + nth * length
        order = np.argsort(start, kind="stable")[:count]
        np.maximum.at(self.served, env[order], start[order] + length)
        return env[order], start[order]

    def newest(self, most: int) -> tuple[np.ndarray, int]:
        """Return the first [1] of the newest rows of stream 0, and their number, at most `most`."""
        streams, first, end = self.stretches()
        last = np.flatnonzero((streams == 0) & (end > first))[-1:]
        if len(last) == 0:
            return np.zeros(1, np.int64), 0
        start = np.maximum(first, end - most)[last]
        return start, int((end[last] - start)[0])

    def _common(self) -> int | None:
        """Number of rows written, if each stream is one stretch of the same rows, else None."""
        if self._blocks is not None and self._blocks.lost:
            return None
        return self._store.common

    def _episodes(self, env: int, first: int, end: int) -> np.ndarray:
        """Episode (number of its first row) of rows of a stream."""
        return self._store.rings["episode"][env, np.arange(first, end) % self._store.rows]
