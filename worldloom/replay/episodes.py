"""Which sequences are drawn: the rules that exclude each other, and episodes with equal weights.

Letters: B sequences, E streams, N complete episodes per stream.
"""

from typing import TYPE_CHECKING

import numpy as np

from worldloom.errors import require

if TYPE_CHECKING:
    from worldloom.replay.store import RowStore


def require_drawing(draw_by: str, across_episodes: bool, online_queue: bool) -> None:
    """Raise ValueError for ways of drawing sequences that exclude each other."""
    require(draw_by in ("start", "episode"), "draw_by", draw_by, "start or episode")
    if across_episodes and draw_by == "episode":
        raise ValueError(
            "draw_by is 'episode', which draws an episode and then a sequence inside it, but "
            "across_episodes is true; set data.across_episodes=false or data.draw_by=start"
        )
    if online_queue and not across_episodes:
        raise ValueError(
            "online_queue is true, which samples stretches of a stream that cross episodes, but "
            "across_episodes is false; set data.online_queue=false or data.across_episodes=true"
        )


def finished_ends(store: "RowStore") -> np.ndarray:
    """Return the end of the finished episodes of each stream, [E].

    An episode is finished once it has a last row or the next one has begun. Only the newest one
    of a stream can be unfinished, so this takes the same time for any number of rows.
    """
    newest, written = store.ring_index(-1), store.written
    ended = store.rings["is_last"][newest] | (written == 0)
    return np.where(ended, written, store.rings["episode"][newest])


class EpisodeList:
    """The episodes of `store` with at least `length` stored rows, for draws with equal weights.

    The list is brought up to date when sequences are drawn: only rows of streams in which an
    episode has begun since are read, so a draw takes the same time for any number of rows. Between
    lost rows, the parts of an episode count as episodes.

    finished: leave out the newest episode of a stream until it is finished.
    """

    def __init__(self, store: "RowStore", length: int, finished: bool) -> None:
        self.length = length
        self._store, self._finished = store, finished
        streams = store.num_envs
        # Complete episodes of each stream in their order: those from `head` to `tail` have enough
        # rows. Column `tail` is for the newest episode, which still changes.
        self._first = np.zeros((streams, 8), np.int64)
        self._end = np.zeros((streams, 8), np.int64)
        self._head, self._tail = np.zeros(streams, np.int64), np.zeros(streams, np.int64)
        self._newest = np.zeros(streams, np.int64)  # its first row, after lost rows
        self._number = np.full(streams, -1)  # what the ring "episode" has for it

    def draw(self, count: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
        """Draw episodes, and a start position in each: streams and first rows, [B] each.

        Both are empty if no episode has enough rows.
        """
        counts, oldest = self._count()
        ends = counts.cumsum()
        if ends[-1] == 0:
            return np.zeros(0, np.int64), np.zeros(0, np.int64)
        drawn = rng.integers(ends[-1], size=count)
        stream = np.searchsorted(ends, drawn, side="right")
        place = stream, self._head[stream] + drawn - (ends - counts)[stream]
        first = np.maximum(self._first[place], oldest[stream])
        offset: np.ndarray = rng.integers(self._end[place] - first - self.length + 1)
        return stream.astype(np.int64), first + offset

    def _count(self) -> tuple[np.ndarray, np.ndarray]:
        """Bring the list up to date; return the episodes and the oldest row of each stream, [E]."""
        store = self._store
        written, oldest, streams = store.written, store.oldest, store.streams
        number = np.where(written > 0, store.rings["episode"][store.ring_index(-1)], -1)
        for env in np.flatnonzero(number != self._number).tolist():
            self._scan(env)
        self._number = number
        newest = streams, self._tail
        self._first[newest] = self._newest
        self._end[newest] = finished_ends(store) if self._finished else written
        # Rows were overwritten since: the oldest episodes may have too few left.
        while True:
            head = streams, self._head
            rows = self._end[head] - np.maximum(self._first[head], oldest)
            if not (gone := (rows < self.length) & (self._head < self._tail)).any():
                break
            self._head += gone
        rows = self._end[newest] - np.maximum(self._newest, oldest)
        return self._tail - self._head + (rows >= self.length), oldest

    def _scan(self, env: int) -> None:
        """Add the episodes of a stream that are complete now, and find its newest one."""
        store = self._store
        for stream, first, end in zip(*store.stretches(), strict=True):
            if stream != env or (end < self._newest[env]):
                continue
            first = max(first, self._newest[env])
            numbers = store.rings["episode"][env, np.arange(first, end) % store.rows]
            firsts = np.append(first, first + 1 + np.flatnonzero(np.diff(numbers)))
            if end == store.written[env]:
                self._newest[env] = firsts[-1]
            ends = np.append(firsts[1:], end)
            enough = ends - firsts >= self.length
            enough[-1] &= end < store.written[env]
            self._append(env, firsts[enough], ends[enough])

    def _append(self, env: int, firsts: np.ndarray, ends: np.ndarray) -> None:
        tail = self._tail[env] + len(firsts)
        if tail >= self._first.shape[1]:  # drop what is before the heads, or take more memory
            kept = self._tail - self._head
            width = 2 * int(kept.max() + len(firsts) + 1)
            before = self._first, self._end
            self._first, self._end = (np.zeros((len(kept), width), np.int64) for _ in before)
            for stream, number in enumerate(kept.tolist()):
                for new, old in zip((self._first, self._end), before, strict=True):
                    head = self._head[stream]
                    new[stream, :number] = old[stream, head : head + number]
            self._head, self._tail = np.zeros_like(self._head), kept
            tail = self._tail[env] + len(firsts)
        self._first[env, self._tail[env] : tail] = firsts
        self._end[env, self._tail[env] : tail] = ends
        self._tail[env] = tail
