"""Remember environment steps and hand out sequences of them.

Letters: B sequences, T rows, E streams (one per environment), N steps of an episode, A action_dim.

Each stream is a ring of slots. Its rows are counted from the first one ever written and the count
never wraps, so a row keeps its number until it is overwritten; it lies in slot `number % rows`.
"""

import math
import warnings
from collections.abc import Mapping
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from worldloom.protocol import Batch, Obs
from worldloom.training.capacity import require_memory, rows_per_stream
from worldloom.training.rows import (
    FLAGS,
    Array,
    ArrayObs,
    Arrays,
    RowFormat,
    has_final_observation,
    has_terminated,
    require_borders,
    require_range,
    to_numpy,
)


class ReplayBuffer:
    """Keep the newest steps of E streams and sample sequences of consecutive rows from them.

    capacity: steps of all streams together, or their size in memory such as "2GB" or "1.5GiB".
    obs_shape: shape of one observation, or a dict of shapes for dict observations.
    action_dim: width of the action vector (for discrete actions, which are one-hot, their number).
    num_envs: number of streams; each gets an equal share of the capacity.
    latents: {name: (shape, torch dtype)} that the model wants remembered with every row.
    obs_dtypes: a numpy dtype (or a dict of them) to store observations in, where uint8 for three
        dimensions (images, channels first) and float32 for all others is not what is wanted.
    online: serve each fresh stretch of T rows once before sampling uniformly, as DreamerV3 does.
    """

    def __init__(
        self,
        capacity: int | float | str = 100_000,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] = (4,),
        action_dim: int = 2,
        *,
        num_envs: int = 1,
        latents: Mapping[str, tuple[tuple[int, ...], torch.dtype]] | None = None,
        obs_dtypes: Any = None,
        online: bool = False,
        seed: int = 0,
    ) -> None:
        require_positive(action_dim=action_dim, num_envs=num_envs)
        self._format = RowFormat(obs_shape, action_dim, latents or {}, obs_dtypes)
        self.num_envs = num_envs
        self.online = online
        self.keeps_latents = bool(latents)
        self.rows = rows_per_stream(capacity, self.bytes_per_step, num_envs)
        require_memory(self.capacity, self.bytes_per_step)
        # Zeros take no memory before they are written: the system commits pages on first touch.
        self._store = {
            name: np.zeros((num_envs, self.rows, *shape), dtype)
            for name, (shape, dtype) in self._format.fields.items()
        }
        self._written = np.zeros(num_envs, np.int64)
        self._served = np.zeros(num_envs, np.int64)
        self._rng = np.random.default_rng(seed)
        self._warned = False

    @property
    def capacity(self) -> int:
        """Count the steps that fit, over all streams."""
        return self.rows * self.num_envs

    @property
    def bytes_per_step(self) -> int:
        """Return the memory of one row in bytes."""
        return sum(
            math.prod(shape) * dtype.itemsize for shape, dtype in self._format.fields.values()
        )

    @property
    def num_episodes(self) -> int:
        """Count the episodes of which at least one row is stored, unfinished ones included."""
        envs = range(self.num_envs)
        return sum(int(np.count_nonzero(np.diff(self._episodes(e), prepend=-1))) for e in envs)

    def __len__(self) -> int:
        """Count the rows stored, over all streams."""
        return int((self._written - self._oldest).sum())

    def add(
        self,
        obs: ArrayObs,
        actions: Array,
        rewards: Array,
        is_first: Array,
        is_last: Array,
        is_terminal: Array,
        latents: Mapping[str, Array] | None = None,
    ) -> None:
        """Append one row to every stream, laid out as `worldloom.protocol` says.

        obs: [E, *obs_shape] or a dict of such arrays; actions: [E, A]; rewards and flags: [E];
        latents: {name: [E, ...]}, zeros if left out.
        """
        flags = dict(zip(FLAGS, (is_first, is_last, is_terminal), strict=True))
        given = {**self._format.named(obs), "actions": actions, "rewards": rewards, **flags}
        lead = (self.num_envs,)
        values = {name: self._format.convert(name, x, lead, "env {}") for name, x in given.items()}
        values |= self._format.convert_latents(latents, lead)
        env, row = np.arange(self.num_envs), self._written
        before = (env, (row - 1) % self.rows)
        require_borders((row == 0) | self._store["is_last"][before], values)
        values["episode"] = np.where(values["is_first"], row, self._store["episode"][before])
        self._write(env, row, values)
        self._written = row + 1

    def add_episode(
        self,
        obs: ArrayObs,
        actions: Array,
        rewards: Array,
        dones: Array | None = None,
        *,
        terminations: Array | None = None,
        truncations: Array | None = None,
        env: int = 0,
    ) -> None:
        """Append an episode in Gymnasium's order to the stream of one environment.

        obs: [N + 1, *obs_shape] or a dict of such arrays; the last one is what the last action led
        to. actions: [N, A] in [-1, 1] or one-hot. rewards, dones: [N], what followed action t.
        `dones` means terminated; `terminations` and `truncations` may replace it. An episode
        without any of them set counts as cut off: it ends (is_last) but is not terminal. With only
        N observations the last action, its reward and a termination there cannot be stored.
        """
        if not 0 <= env < self.num_envs:
            raise ValueError(f"env is {env}; this replay has envs 0 to {self.num_envs - 1}")
        terminated = has_terminated(len(actions), dones, terminations, truncations)
        where = f"step {{}} of the episode for env {env}"
        actions = self._format.convert("actions", actions, (len(actions),), where)
        rewards = self._format.convert("rewards", rewards, (len(actions),), where)
        require_range(actions)
        named = self._format.named(obs)
        rows = len(next(iter(named.values())))
        final = has_final_observation(rows, len(actions))
        if not final:
            self._warn_of_lost_step(rows)
        values = {name: self._format.convert(name, x, (rows,), where) for name, x in named.items()}
        values |= {name: np.zeros(rows, bool) for name in FLAGS} | self._format.convert_latents(
            None, (rows,)
        )
        values["is_first"][0] = values["is_last"][-1] = True
        values["is_terminal"][-1] = terminated and final
        values["actions"] = np.pad(actions[: rows - 1], [(0, 1), (0, 0)])
        values["rewards"] = np.pad(rewards[: rows - 1], [(1, 0)])
        first = int(self._written[env])
        values["episode"] = np.full(rows, first)
        # Of an episode longer than the ring only the newest rows, so no slot is written twice.
        kept = {name: x[-self.rows :] for name, x in values.items()}
        self._write(env, np.arange(first, first + rows)[-self.rows :], kept)
        self._written[env] += rows

    def write_latents(self, index: Tensor, latents: Mapping[str, Array]) -> None:
        """Replace the latents of rows 1 to T - 1 of sampled sequences.

        index: [B, 2] as sampled; latents: {name: [B, T - 1, ...]}. Rows that were overwritten
        since are skipped.
        """
        env, start = index.cpu().numpy().T
        row = start[:, None] + np.arange(1, next(iter(latents.values())).shape[1] + 1)
        values = self._format.convert_latents(latents, row.shape)
        stored = row >= self._oldest[env][:, None]
        env = np.broadcast_to(env[:, None], row.shape)
        self._write(env[stored], row[stored], {name: x[stored] for name, x in values.items()})

    def can_sample(self, seq_len: int, *, across_episodes: bool = True) -> bool:
        """Tell whether a sequence of `seq_len` rows is stored."""
        if across_episodes:
            return bool((self._written - self._oldest).max() >= seq_len)
        return len(self._starts_inside(seq_len)[0]) > 0

    def sample(
        self,
        batch_size: int,
        seq_len: int,
        device: str | torch.device = "cpu",
        *,
        across_episodes: bool = True,
    ) -> Batch:
        """Draw B sequences of T rows, uniformly over all stored start positions.

        Besides the keys of `Batch` there is "index" [B, 2] int64, stream and number of row 0, and
        if latents are kept "context" {name: [B, ...] float32}, those of row 0. Sequences may run
        on into the next episode (see is_first, returned as stored) unless `across_episodes` is
        false.
        """
        require_positive(batch_size=batch_size, seq_len=seq_len)
        self._require_length(seq_len)
        env, start = (self._draw if across_episodes else self._draw_inside)(batch_size, seq_len)
        if self.online:
            fresh_env, fresh_start = self._fresh(batch_size, seq_len)
            env[: len(fresh_env)], start[: len(fresh_env)] = fresh_env, fresh_start
        return cast(Batch, to_device(self._read(env, start, seq_len), device))

    def newest(self, rows: int, device: str | torch.device = "cpu") -> Batch:
        """Return the newest rows of the first stream, at most so many, [1, T]; draw nothing."""
        length = min(rows, int(self._written[0] - self._oldest[0]))
        start = self._written[:1] - length
        return cast(Batch, to_device(self._read(np.zeros(1, np.int64), start, length), device))

    def state_dict(self) -> dict[str, Any]:
        """Return everything stored as tensors and plain data.

        The tensors share the buffer's memory, as those of a torch module do, so that saving a
        large replay needs no second copy: write them out (or deepcopy them) before adding more.
        """
        filled = np.minimum(self._written, self.rows)
        return {
            "layout": self._layout(),
            "streams": [
                {name: torch.from_numpy(x[env, : filled[env]]) for name, x in self._store.items()}
                for env in range(self.num_envs)
            ],
            "written": self._written.tolist(),
            "served": self._served.tolist(),
            "rng": self._rng.bit_generator.state,
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; sampling goes on as if it had never stopped."""
        ours, saved = self._layout(), state["layout"]
        for name in [*ours, *saved]:
            if ours.get(name) != saved.get(name):
                raise ValueError(
                    f"the saved replay has {name} {saved.get(name)} but this one {ours.get(name)}; "
                    f"resume with the data and env settings of the saved run"
                )
        for env, stream in enumerate(state["streams"]):
            for name, rows in stream.items():
                self._store[name][env, : len(rows)] = to_numpy(rows)
        self._written = np.array(state["written"], np.int64)
        self._served = np.array(state["served"], np.int64)
        self._rng.bit_generator.state = state["rng"]

    def _layout(self) -> dict[str, str]:
        sizes = {"num_envs": str(self.num_envs), "capacity": str(self.capacity)}
        return sizes | {
            name: f"{dtype}{shape}" for name, (shape, dtype) in self._format.fields.items()
        }

    def _read(self, env: np.ndarray, start: np.ndarray, length: int) -> dict[str, Any]:
        """Read sequences of streams env [B] from rows start [B] on."""
        slots = env[:, None] * self.rows + (start[:, None] + np.arange(length)) % self.rows
        batch: dict[str, Any] = {"obs": self._take_obs(slots)}
        batch |= {name: self._take(name, slots) for name in ("actions", "rewards", *FLAGS)}
        # That an episode was abandoned (a resumed run resets its environments, a crashed one is
        # replaced) was not known when its last row was written, with an action that led nowhere.
        abandoned = batch["is_first"][:, 1:] & ~batch["is_last"][:, :-1]
        batch["is_last"][:, :-1] |= abandoned
        batch["actions"][:, :-1][abandoned] = 0.0
        batch["index"] = torch.from_numpy(np.stack([env, start], 1))
        if self.keeps_latents and length:
            names = self._format.latent_names.items()
            batch["context"] = {k: self._take(name, slots[:, 0]).float() for k, name in names}
        return batch

    @property
    def _oldest(self) -> np.ndarray:
        """Number of the oldest row stored, [E]."""
        return np.maximum(self._written - self.rows, 0)

    def _episodes(self, env: int) -> np.ndarray:
        """Episode (number of its first row) of all stored rows of a stream, oldest first."""
        rows = np.arange(self._oldest[env], self._written[env])
        return self._store["episode"][env, rows % self.rows]

    def _draw(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw streams [B] and start rows [B] uniformly from all start positions."""
        starts = np.maximum(self._written - self._oldest - length + 1, 0)
        ends = starts.cumsum()
        drawn = self._rng.integers(ends[-1], size=count)
        env = np.searchsorted(ends, drawn, side="right")
        return env, self._oldest[env] + drawn - (ends - starts)[env]

    def _draw_inside(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Draw uniformly from the start positions whose sequence stays in one episode."""
        if self.online:
            raise ValueError(
                "an online replay serves fresh stretches of a stream, which cross episodes; set "
                "data.online=false or data.across_episodes=true"
            )
        env, start = self._draw(count, length)
        episode = self._store["episode"]
        for _ in range(8):
            end = (start + length - 1) % self.rows
            crosses = np.flatnonzero(episode[env, start % self.rows] != episode[env, end])
            if len(crosses) == 0:
                return env, start
            env[crosses], start[crosses] = self._draw(len(crosses), length)
        # Drawing again is cheap where few sequences cross; where most do, list those that do not.
        envs, starts = self._starts_inside(length)
        if len(envs) == 0:
            streams = [self._episodes(e) for e in range(self.num_envs)]
            longest = max(np.unique(x, return_counts=True)[1].max(initial=0) for x in streams)
            raise ValueError(
                f"the longest stored episode has {longest} rows but a sequence needs {length}; "
                f"lower training.sequence_length or set data.across_episodes=true"
            )
        pick = self._rng.integers(len(envs), size=count)
        return envs[pick], starts[pick]

    def _starts_inside(self, length: int) -> tuple[np.ndarray, np.ndarray]:
        """List streams and start rows of all sequences that stay in one episode."""
        envs, starts = [], []
        for env in range(self.num_envs):
            first = self._episodes(env)[: -length + 1 or None]
            inside = np.flatnonzero(first == self._episodes(env)[length - 1 :])
            envs.append(np.full(len(inside), env))
            starts.append(self._oldest[env] + inside)
        return np.concatenate(envs), np.concatenate(starts)

    def _fresh(self, count: int, length: int) -> tuple[np.ndarray, np.ndarray]:
        """Take up to `count` whole stretches that were not served yet, oldest first."""
        self._served = np.maximum(self._served, self._oldest)
        ready = (self._written - self._served) // length
        env = np.repeat(np.arange(self.num_envs), ready)
        nth = np.arange(len(env)) - np.repeat(ready.cumsum() - ready, ready)
        start = self._served[env] + nth * length
        order = np.argsort(start, kind="stable")[:count]
        self._served += np.bincount(env[order], minlength=self.num_envs) * length
        return env[order], start[order]

    def _take(self, name: str, slots: np.ndarray) -> Tensor:
        """Gather rows by slot (counted over all streams); floats come out as float32."""
        shape, dtype = self._format.fields[name]
        rows = np.empty((*slots.shape, *shape), dtype)
        # Mode "clip" lets take write into `out` without a buffer; no slot is out of range.
        np.take(self._store[name].reshape(-1, *shape), slots, axis=0, out=rows, mode="clip")
        taken = torch.from_numpy(rows)
        return taken.float() if taken.is_floating_point() else taken

    def _take_obs(self, slots: np.ndarray) -> Obs:
        if self._format.obs_names is None:
            return self._take("obs", slots)
        return {key: self._take(name, slots) for key, name in self._format.obs_names.items()}

    def _write(self, env: int | np.ndarray, row: np.ndarray, values: Arrays) -> None:
        for name, value in values.items():
            self._store[name][env, row % self.rows] = value

    def _require_length(self, length: int) -> None:
        longest = int((self._written - self._oldest).max())
        if longest == 0:
            raise ValueError("replay is empty; add episodes, or collect first (training.prefill)")
        if longest < length:
            setting = "data.capacity" if self.rows < length else "training.prefill"
            raise ValueError(
                f"replay holds {longest} steps{' per env' * (self.num_envs > 1)} but a sequence "
                f"needs {length}; raise {setting} to at least {length * self.num_envs} or lower "
                f"training.sequence_length"
            )

    def _warn_of_lost_step(self, steps: int) -> None:
        """Say once that episodes come without their final observation."""
        if not self._warned:
            self._warned = True
            warnings.warn(
                f"an episode came with as many observations as actions ({steps}), so its last "
                f"reward and whether it terminated are left out of training; give {steps + 1} "
                f"observations, the last one being what the last step returned",
                stacklevel=3,
            )


def require_positive(**numbers: float) -> None:
    """Refuse numbers below 1, each given under the name of its setting."""
    for name, number in numbers.items():
        if number < 1:
            raise ValueError(f"{name} is {number}; it must be at least 1")


def to_device(batch: Any, device: str | torch.device) -> Any:
    """Move the tensors of a nested dict to a device, into new dicts."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device)
