"""Replay buffer: storage of environment steps and sampling of sequences.

Letters: B sequences, T rows, E streams (one per environment), N steps of an episode, A action_dim.

Each stream is a ring of rows. Rows are numbered from the first one ever written, and a row keeps
its number until it is overwritten; row r is stored in slot r % (length of the ring).
"""

import sys
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from worldloom.errors import require_positive
from worldloom.protocol import Batch, ReplayField, context_rows
from worldloom.replay.archive import Archive, check_kind
from worldloom.replay.block_files import BlockFiles, choose_block_rows
from worldloom.replay.capacity import describe_resources, fit_rows, rows_per_stream
from worldloom.replay.episodes import require_drawing
from worldloom.replay.row_format import (
    Array,
    ArrayObs,
    Arrays,
    RowSchema,
    check_episode_flags,
    check_layout,
    has_terminated,
    row_bytes,
    to_numpy,
    warn_of_lost_step,
)
from worldloom.replay.sampler import BatchReader, Sampler
from worldloom.replay.shares import Share, join_states, load_episodes
from worldloom.replay.store import RowStore, bytes_needed, check_storage
from worldloom.trees import map_tree, to_device


class ReplayBuffer:
    """Keep the newest steps of E streams and sample sequences of consecutive rows from them.

    capacity: steps of all streams together, or the size of their rows such as "2GB" or "1.5GiB".
    obs_shape: shape of one observation, or a dict of shapes for dict observations.
    action_dim: width of the action vector (for discrete actions, which are one-hot, their number).
    num_envs: number of streams; each gets an equal share of the capacity.
    fields: {name: ReplayField} that are stored with every row for the model.
    obs_dtypes: a numpy dtype (or a dict of them) in which observations are stored. The default is
        uint8 for three dimensions (images, channels first) and float32 otherwise.
    online_queue: sample each new stretch of T rows once before sampling uniformly (DreamerV3).
    draw_by: what is drawn uniformly: a "start" position, or an "episode" and then a start in it.
    finished_episodes: sample only episodes that have ended, or were abandoned.
    storage: "ram", or "memmap" to keep fields of 512 bytes and more in files instead of memory.
    folder: of files with the rows. With it, `state_dict` contains only what is not in a file, and
        every state has to be completed by `finish` before it is saved.
    expected: upper limit of the rows that will ever be added; a smaller replay is then made. A
        state may be loaded into a replay that expects more.
    shrink: if memory or disk are too small for the capacity, use the largest one that fits.
    share: number of this replay, from 0, and how many replays of as many streams share the folder:
        those of the processes that train together.

    Raises:
        ValueError: an argument is wrong, or memory or disk are too small for the capacity.
    """

    def __init__(
        self,
        capacity: int | float | str = 100_000,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]] = (4,),
        action_dim: int = 2,
        *,
        num_envs: int = 1,
        fields: Mapping[str, ReplayField] | None = None,
        obs_dtypes: Any = None,
        online_queue: bool = False,
        draw_by: str = "start",
        finished_episodes: bool = False,
        seed: int = 0,
        storage: str = "ram",
        folder: Path | None = None,
        expected: int | None = None,
        shrink: bool = False,
        share: Share = (0, 1),
    ) -> None:
        require_positive(action_dim=action_dim, num_envs=num_envs)
        check_storage(storage, folder)
        require_drawing(draw_by, draw_by == "start", online_queue)
        fields = fields or {}
        self._schema = RowSchema(obs_shape, action_dim, fields, obs_dtypes, num_envs)
        self.num_envs, self.online_queue = num_envs, online_queue
        self.draw_by, self.finished_episodes = draw_by, finished_episodes
        self._share = share
        # Rows to sample in front of those that are trained on, as context.
        self.context_rows = context_rows(fields)
        first, last = share[0] * num_envs, share[0] == share[1] - 1
        streams = range(first, sys.maxsize if last else first + num_envs)
        files = None if folder is None else BlockFiles(Path(folder), streams)
        mapped = storage == "memmap"
        schema, names = self._schema.fields, list(self._schema.model_names.values())
        in_memory, on_disk = bytes_needed(schema, names, files is not None, mapped)
        rows = rows_per_stream(capacity, self.bytes_per_step, num_envs)
        own = files.size() if files else 0
        place = files.path if files else None
        used = rows if expected is None else min(rows, -(-expected // num_envs))
        self.rows = fit_rows(used, num_envs, in_memory, on_disk, place, own, shrink)
        self.resources = describe_resources(self.capacity, in_memory, on_disk, place, own)
        # Rows per stream that do not depend on `expected`, so a run can be extended.
        self._nominal = rows if self.rows == used else self.rows
        block = choose_block_rows(schema, names, self._nominal)
        self._store = RowStore(schema, names, num_envs, self.rows, block, files, mapped)
        self._archive = None if files is None else Archive(self._store, files)
        self._writer = self._archive or self._store
        self._frozen = self._warned = False
        self._episodes: list[int] = []  # rows of each episode of the dataset
        self._sampler = Sampler(self._store, seed, draw_by, finished_episodes)
        self._reader = BatchReader(self._store, self._schema)

    @property
    def capacity(self) -> int:
        """Number of steps that fit, in all streams together."""
        return self.rows * self.num_envs

    @property
    def bytes_per_step(self) -> int:
        """Size of one row in bytes."""
        return sum(row_bytes(shape, dtype) for shape, dtype in self._schema.fields.values())

    @property
    def num_episodes(self) -> int:
        """Number of episodes with at least one stored row, including unfinished ones."""
        return self._sampler.num_episodes()

    @property
    def rows_added(self) -> int:
        """Number of rows ever added to all streams together."""
        return int(self._store.written.sum())

    def __len__(self) -> int:
        """Return the number of stored rows in all streams together."""
        _, first, end = self._store.stretches()
        return int((end - first).sum())

    def add(
        self,
        obs: ArrayObs,
        actions: Array,
        rewards: Array,
        is_first: Array,
        is_last: Array,
        is_terminal: Array,
        fields: Mapping[str, Array] | None = None,
    ) -> None:
        """Append one row to every stream, in the layout of `protocol.Batch`.

        obs: [E, *obs_shape] or a dict of such arrays; actions: [E, A]; rewards and flags: [E];
        fields: {name: [E, ...]}, zeros by default.

        Raises:
            ValueError, TypeError: the arrays do not fit; nothing is stored.
            RuntimeError: `freeze` was called.
        """
        self._require_open()
        given = self._schema.name_obs(obs)
        given["actions"], given["rewards"] = actions, rewards
        given["is_first"], given["is_last"], given["is_terminal"] = is_first, is_last, is_terminal
        values = self._schema.convert_row(given)
        if self._schema.model_names or fields is not None:
            values |= self._schema.convert_model_fields(fields, (self.num_envs,))
        values["episode"] = self._find_episodes(values)
        self._writer.append(values)

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

        obs: [N + 1, *obs_shape] or a dict of such arrays; the last one is the observation after
        the last action. actions: [N, A] in [-1, 1] or one-hot. rewards, dones: [N], returned for
        action t. `dones` means terminated; `terminations` and `truncations` may replace it. If
        none of them is set, the episode was truncated: it ends (is_last) but is not terminal. With
        only N observations, the last action, its reward and a termination there are not stored.
        """
        self._require_open()
        if not 0 <= env < self.num_envs:
            raise ValueError(f"env is {env}; this replay has envs 0 to {self.num_envs - 1}")
        terminated = has_terminated(len(actions), dones, terminations, truncations)
        where = f"step {{}} of the episode for env {env}"
        values, rows, final = self._schema.convert_episode(obs, actions, rewards, terminated, where)
        if not final:
            self._warned = self._warned or warn_of_lost_step(rows)
        first = int(self._store.written[env])
        values["episode"] = np.full(rows, first)
        # Only the newest rows of an episode longer than the ring: no slot is written twice.
        newest = {name: x[-self.rows :] for name, x in values.items()}
        self._writer.write(env, np.arange(first, first + rows)[-self.rows :], newest)

    def write_fields(self, index: Tensor, values: Mapping[str, Array], seq_len: int) -> None:
        """Replace fields of the last rows of sampled sequences.

        index: [B, 2] as sampled; values: {name: [B, n, ...]} for the last n rows; seq_len: rows T
        of the sequences. Fields that are left out keep their values, and rows that have been
        overwritten since are skipped.
        """
        sizes = {name: x.shape[1] if x.ndim > 1 else 0 for name, x in values.items()}
        for rows in sorted(set(sizes.values())):
            same = {name: x for name, x in values.items() if sizes[name] == rows}
            if not 0 < rows <= seq_len:
                raise ValueError(
                    f"fields {sorted(same)} have shape {tuple(next(iter(same.values())).shape)}; "
                    f"expected [B, n, ...] for the last n of {seq_len} rows"
                )
            self._write_fields(index, same, seq_len - rows, seq_len)

    def _write_fields(
        self, index: Tensor, given: Mapping[str, Array], first: int, end: int
    ) -> None:
        env, start = index.cpu().numpy().T
        row = start[:, None] + np.arange(first, end)
        values = self._schema.convert_model_fields(given, row.shape, partial=True)
        stored = row >= self._store.oldest[env][:, None]
        env = np.repeat(env, row.shape[1])
        row, stored = row.reshape(-1), stored.reshape(-1)
        values = {name: x.reshape(len(row), *x.shape[2:]) for name, x in values.items()}
        if not stored.all():
            env, row = env[stored], row[stored]
            values = {name: x[stored] for name, x in values.items()}
        self._writer.rewrite(env, row, values)

    def can_sample(self, seq_len: int, *, across_episodes: bool = True) -> bool:
        """Return whether a sequence of `seq_len` rows is stored."""
        if across_episodes:
            return self._sampler.longest() >= seq_len
        return len(self._sampler.starts_inside_episodes(seq_len)[0]) > 0

    def sample(
        self,
        batch_size: int,
        seq_len: int,
        device: str | torch.device = "cpu",
        *,
        across_episodes: bool = True,
    ) -> Batch:
        """Draw B sequences of T rows, uniformly over start positions or over episodes (`draw_by`).

        across_episodes: whether a sequence may continue into the next episode, where is_first is
            set.
        """
        require_positive(batch_size=batch_size, seq_len=seq_len)
        require_drawing(self.draw_by, across_episodes, self.online_queue)
        self._sampler.require_length(seq_len)
        draw = self._sampler.draw if across_episodes else self._sampler.draw_inside_episodes
        env, start = draw(batch_size, seq_len)
        if self.online_queue:
            fresh_env, fresh_start = self._sampler.take_fresh(batch_size, seq_len)
            env[: len(fresh_env)], start[: len(fresh_env)] = fresh_env, fresh_start
        batch = self._reader.read(env, start, seq_len)
        return cast(Batch, batch if device == "cpu" else to_device(batch, device))

    def newest(self, rows: int, device: Any = "cpu", streams: Sequence[int] = (0,)) -> Batch:
        """Return up to `rows` of the newest rows of S streams, [S, T], without sampling."""
        where = self._sampler.find_newest(rows, np.array(streams, np.int64))
        return cast(Batch, to_device(self._reader.read(*where), device))

    def freeze(self, episodes: Sequence[int] = ()) -> None:
        """Accept no more rows, because they come from a dataset that every start reads again.

        With a folder, states then contain a checksum instead of the rows.

        episodes: rows of each episode, in all replays that share the folder. Needed to load the
            states of another number of replays; `assign_episodes` has to be used in both.
        """
        self._frozen, self._episodes = True, list(episodes)
        if self._archive is not None:
            self._archive.freeze()

    def state_dict(self) -> dict[str, Any]:
        """Return the contents as tensors and plain data.

        Without a folder the tensors share the buffer's memory, as those of a torch module do, so
        saving a large replay needs no second copy: save (or deepcopy) them before adding rows.
        With a folder the tensors are copies of the rows after each stream's last complete block.
        All complete blocks are in files, or are written now, and `finish` adds the names of the
        files with rewritable fields.
        """
        state = {
            "layout": self._layout(),
            "written": self._store.written.tolist(),
            "queue_position": self._sampler.queue_position.tolist(),
            "rng": self._sampler.rng.bit_generator.state,
        }
        if self._archive is not None:
            return state | self._archive.state()
        filled = np.minimum(self._store.written, self.rows)
        rings = self._store.rings.items()
        streams = [
            {name: torch.from_numpy(x[env, : filled[env]]) for name, x in rings}
            for env in range(self.num_envs)
        ]
        return state | {"streams": streams, "files": {}}

    def finish(self, state: dict[str, Any]) -> None:
        """Write the files that a state (or a copy of it) needs, and add their names to it.

        May run in another thread while the replay is used. Does nothing without a folder.

        Raises:
            OSError: for example because the disk is full. No row is lost; make a new state to try
                again.
        """
        if self._archive is not None:
            self._archive.finish(state)

    def keep(self, files: Iterable[str]) -> None:
        """Delete the replay's files that are neither among `files` nor used by this buffer.

        files: the names under "files" in all states that are kept.
        """
        if self._archive is not None:
            self._archive.keep(files)

    def damaged(self, state: Mapping[str, Any]) -> list[str]:
        """Return the files of a state that are missing or have another checksum."""
        return [] if self._archive is None else self._archive.files.find_damaged(state["files"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; sampling continues with the same draws.

        Of another number of replays, give {"shares": their states, "rng": a random state}.

        A warning names damaged files. Their rows are lost: no sequence that contains one of them
        is sampled.

        Raises:
            ValueError: the state belongs to a replay with other settings or other data.
        """
        if "shares" in state:
            rng, shares = state["rng"], state["shares"]
            state = join_states(shares, self._share, self.num_envs) | {"rng": rng}
            if self._archive is not None and self._frozen:
                check_layout(self._layout() | {"capacity": ""}, state["layout"] | {"capacity": ""})
                check_kind(shares[0], True, True)
                load_episodes(self._archive, shares, self._episodes, self._share)
                self._sampler.rng.bit_generator.state = rng
                return
        if self._archive is not None and self._frozen:
            self._archive.check_dataset(state)
        check_layout(self._layout(), state["layout"])
        check_kind(state, self._archive is not None, self._frozen)
        if max(state["written"]) > self.rows < self._nominal:
            raise ValueError(
                f"the saved replay has {max(state['written'])} rows per environment, but this one "
                f"expects {self.rows} at most; raise training.total_steps"
            )
        self._sampler.forget_episodes()
        self._store.written = np.array(state["written"], np.int64)
        if self._archive is None or "streams" in state:
            rings = [map_tree(to_numpy, stream) for stream in state["streams"]]
            self._writer.load_rings(rings)
        else:
            self._archive.restore(state)
        self._sampler.queue_position = np.array(state["queue_position"], np.int64)
        self._sampler.rng.bit_generator.state = state["rng"]

    def _layout(self) -> dict[str, str]:
        capacity = self._nominal * self.num_envs
        fields = self._schema.fields.items()
        layout = {name: f"{dtype}{shape}" for name, (shape, dtype) in fields}
        return {"num_envs": str(self.num_envs), "capacity": str(capacity)} | layout

    def _find_episodes(self, values: Arrays) -> np.ndarray:
        """Check the flags of one row per stream; return the episode [E] of each row."""
        store = self._store
        place, first = store.ring_index(-1), values["is_first"]
        before, ended = store.rings["episode"][place], store.rings["is_last"][place]
        # Most rows are inside an episode, and comparing bytes is the fastest way to check that.
        none = bytes(self.num_envs)
        if (
            first.tobytes() == none
            and ended.tobytes() == none
            and values["is_terminal"].tobytes() == none
            and (store.common or store.written.all())
        ):
            return before
        check_episode_flags(ended | (store.written == 0), values)
        return np.where(first, store.written, before)

    def _require_open(self) -> None:
        if self._frozen:
            raise RuntimeError("this replay was frozen; add all rows before freeze()")
