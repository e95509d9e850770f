"""Sampling: which sequences of a replay a batch consists of, and how they are read.

Letters: B sequences, T rows, E streams, S stretches of consecutive rows: one per stream, or more
if rows were lost.
"""

from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.protocol import Obs
from worldloom.replay.episodes import EpisodeList, finished_ends
from worldloom.replay.row_format import FLAGS, RowSchema
from worldloom.replay.store import RowStore, Stretches

Places = tuple[np.ndarray, np.ndarray]  # streams and numbers of first rows, [B] each


class Sampler:
    """Random and queued start positions of sequences in the rows of `store`.

    draw_by, finished: `draw_by` and `finished_episodes` of the replay.
    queue_position: [E], number of the first row of each stream that `take_fresh` has not returned.
    """

    def __init__(
        self, store: RowStore, seed: int = 0, draw_by: str = "start", finished: bool = False
    ) -> None:
        self.queue_position = np.zeros(store.num_envs, np.int64)
        self.rng = np.random.default_rng(seed)
        self._store, self._draw_by, self._finished = store, draw_by, finished
        self._episode_list: EpisodeList | None = None

    def longest(self) -> int:
        """Return the number of rows in the longest stretch."""
        if (common := self._common()) is not None:
            return min(common, self._store.rows)
        _, first, end = self._stretches()
        return int((end - first).max())

    def require_length(self, length: int) -> None:
        """Raise ValueError if no sequence of that length is stored."""
        longest, streams = self.longest(), self._store.num_envs
        if longest == 0 and not self._store.written.any():
            raise ValueError("replay is empty; add episodes, or collect first (training.prefill)")
        if self._finished and longest < length:
            raise ValueError(
                f"the finished episodes in the replay have {longest} consecutive rows but a "
                f"sequence needs {length}; raise training.prefill, or data.capacity above the "
                "length of an episode, or set data.finished_episodes=false"
            )
        if longest < length:
            setting = "data.capacity" if self._store.rows < length else "training.prefill"
            raise ValueError(
                f"replay holds {longest} steps{' per env' * (streams > 1)} but a sequence "
                f"needs {length}; raise {setting} to at least {length * streams} or lower "
                f"training.sequence_length"
            )

    def num_episodes(self) -> int:
        """Count the episodes of which at least one row is stored."""
        parts: list[list[np.ndarray]] = [[] for _ in range(self._store.num_envs)]
        for env, first, end in zip(*self._store.stretches(), strict=True):
            parts[env].append(self._episodes(env, first, end))
        # An episode may continue after a gap, so the stretches of a stream are counted together.
        streams = [np.concatenate(part) for part in parts]
        return sum(int(np.count_nonzero(np.diff(stream, prepend=-1))) for stream in streams)

    def draw(self, count: int, length: int) -> Places:
        """Draw uniformly from all start positions of sequences of that length."""
        if (common := self._common()) is not None:  # the same result as below, but faster
            oldest = max(common - self._store.rows, 0)
            starts = common - oldest - length + 1
            drawn = self.rng.integers(starts * self._store.num_envs, size=count)
            return drawn // starts, oldest + drawn % starts
        streams, first, end = self._stretches()
        starts = np.maximum(end - first - length + 1, 0)
        ends = starts.cumsum()
        drawn = self.rng.integers(ends[-1], size=count)
        stretch = np.searchsorted(ends, drawn, side="right")
        return streams[stretch], first[stretch] + drawn - (ends - starts)[stretch]

    def draw_inside_episodes(self, count: int, length: int) -> Places:
        """Draw sequences that stay within one episode, uniformly over starts or over episodes."""
        if self._draw_by == "episode":
            return self._draw_episodes(count, length)
        env, start = self.draw(count, length)
        episode, rows = self._store.rings["episode"], self._store.rows
        for _ in range(8):
            end = (start + length - 1) % rows
            crosses = np.flatnonzero(episode[env, start % rows] != episode[env, end])
            if len(crosses) == 0:
                return env, start
            env[crosses], start[crosses] = self.draw(len(crosses), length)
        # Drawing again is cheap if few sequences cross episodes. If most do, list the others.
        envs, starts = self.starts_inside_episodes(length)
        if len(envs) == 0:
            raise self._too_short(length)
        pick = self.rng.integers(len(envs), size=count)
        return envs[pick], starts[pick]

    def _draw_episodes(self, count: int, length: int) -> Places:
        """Draw uniformly from the episodes with enough rows, then from the starts in each."""
        if self._episode_list is None or self._episode_list.length != length:
            self._episode_list = EpisodeList(self._store, length, self._finished)
        env, start = self._episode_list.draw(count, self.rng)
        if len(env) == 0:
            raise self._too_short(length)
        return env, start

    def forget_episodes(self) -> None:
        """Read all rows again before the next draw of episodes, because a state was loaded."""
        self._episode_list = None

    def starts_inside_episodes(self, length: int) -> Places:
        """Return all start positions whose sequence stays within one episode."""
        envs, starts = [], []
        for env, first, end in self._each_stretch():
            episodes = self._episodes(env, first, end)
            inside = np.flatnonzero(episodes[: -length + 1 or None] == episodes[length - 1 :])
            envs.append(np.full(len(inside), env))
            starts.append(first + inside)
        return np.concatenate(envs), np.concatenate(starts)

    def take_fresh(self, count: int, length: int) -> Places:
        """Take up to `count` sequences of that length from the online queue, oldest first."""
        streams, first, end = self._stretches()
        first = np.maximum(first, self.queue_position[streams])
        ready = np.maximum(end - first, 0) // length
        env = np.repeat(streams, ready)
        nth = np.arange(len(env)) - np.repeat(ready.cumsum() - ready, ready)
        start = np.repeat(first, ready) + nth * length
        order = np.argsort(start, kind="stable")[:count]
        np.maximum.at(self.queue_position, env[order], start[order] + length)
        return env[order], start[order]

    def find_newest(self, limit: int, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray, int]:
        """Return S wanted streams, the first of their newest rows [S], and the number of these.

        It is the same for all: at most `limit`, and the rows of the shortest newest stretch.
        """
        streams, first, end = self._store.stretches()
        filled = end > first
        streams, first, end = streams[filled], first[filled], end[filled]
        if not np.isin(wanted, streams).all():
            return wanted, np.zeros(len(wanted), np.int64), 0
        last = np.array([np.flatnonzero(streams == stream)[-1] for stream in wanted])
        count = min(limit, int((end - first)[last].min()))
        return wanted, end[last] - count, count

    def _common(self) -> int | None:
        """Return the number of rows written if each stream is one stretch of as many rows."""
        return None if self._store.lost or self._finished else self._store.common

    def _stretches(self) -> Stretches:
        """Return the stretches to sample from: all rows, or those of finished episodes."""
        streams, first, end = self._store.stretches()
        if self._finished:
            end = np.maximum(np.minimum(end, finished_ends(self._store)[streams]), first)
        return streams, first, end

    def _each_stretch(self) -> zip:
        return zip(*self._stretches(), strict=True)

    def _too_short(self, length: int) -> ValueError:
        """Return the error for episodes with fewer rows than a sequence needs."""
        parts = [self._episodes(*stretch) for stretch in self._each_stretch()]
        longest = max(np.unique(x, return_counts=True)[1].max(initial=0) for x in parts)
        kind = "finished" if self._finished else "stored"
        return ValueError(
            f"the longest {kind} episode has {longest} rows but a sequence needs {length}; "
            f"lower training.sequence_length or set data.across_episodes=true data.draw_by=start"
        )

    def _episodes(self, env: int, first: int, end: int) -> np.ndarray:
        """Return the episode (number of its first row) of each row of a stretch."""
        return self._store.rings["episode"][env, np.arange(first, end) % self._store.rows]


class BatchReader:
    """Reads sequences from the rows of `store` as a batch of tensors."""

    def __init__(self, store: RowStore, schema: RowSchema) -> None:
        self._store, self._schema = store, schema

    def read(self, env: np.ndarray, start: np.ndarray, length: int) -> dict[str, Any]:
        """Return the keys of `Batch` for sequences of streams env [B] from rows start [B] on."""
        where = env, start, self._store.slots(env, start, length)
        rows = {name: self._store.take(name, *where) for name in ("actions", "rewards", *FLAGS)}
        # An episode may have been abandoned: a resumed run resets its environments, and a crashed
        # environment is replaced. The last row was written before that, so it lacks `is_last` and
        # has an action that led to no row.
        abandoned = rows["is_first"][:, 1:] > rows["is_last"][:, :-1]
        if np.count_nonzero(abandoned):
            rows["is_last"][:, :-1] |= abandoned
            rows["actions"][:, :-1][abandoned] = 0.0
        batch: dict[str, Any] = {"obs": self._take_obs(*where)}
        batch |= {name: torch.from_numpy(x) for name, x in rows.items()}
        index = np.empty((len(env), 2), np.int64)
        index[:, 0], index[:, 1] = env, start
        batch["index"] = torch.from_numpy(index)
        if self._schema.model_names and length:
            batch |= self._take_model_fields(*where)
        return batch

    def _take_model_fields(
        self, env: np.ndarray, start: np.ndarray, slots: np.ndarray
    ) -> dict[str, dict[str, Tensor]]:
        """Return "context" {name: [B, ...]} and "stored" {name: [B, T, ...]}, float32."""
        taken: dict[str, dict[str, Tensor]] = {}
        for key, name in self._schema.model_names.items():
            if key in self._schema.every_row:
                values = self._take(name, env, start, slots).float()
                taken.setdefault("stored", {})[key] = values
            else:
                first = self._take(name, env, start, slots[:, :1])[:, 0].float()
                taken.setdefault("context", {})[key] = first
        return taken

    def _take_obs(self, *where: np.ndarray) -> Obs:
        if self._schema.obs_names is None:
            return self._take("obs", *where)
        return {key: self._take(name, *where) for key, name in self._schema.obs_names.items()}

    def _take(self, name: str, env: np.ndarray, start: np.ndarray, slots: np.ndarray) -> Tensor:
        """Gather a field as `RowStore.take` does; floats become float32."""
        taken = torch.from_numpy(self._store.take(name, env, start, slots))
        return taken.float() if taken.is_floating_point() else taken
