"""Remember environment steps and hand out sequences of them.

Letters: B sequences, T rows, E streams (one per environment), N steps of an episode, A action_dim.

Each stream is a ring of slots. Its rows are counted from the first one ever written and the count
never wraps, so a row keeps its number until it is overwritten; it lies in slot `number % rows`.
"""

import warnings
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor

from worldloom.errors import require_positive
from worldloom.protocol import Batch, Obs, ReplayField, context_rows
from worldloom.replay.archive import Archive, require_kind
from worldloom.replay.block_files import BlockFiles, choose_block_rows
from worldloom.replay.capacity import fitting_rows, resources, rows_per_stream
from worldloom.replay.row_format import (
    FLAGS,
    Array,
    ArrayObs,
    Arrays,
    RowFormat,
    has_terminated,
    require_borders,
    require_layout,
    row_bytes,
    to_numpy,
)
from worldloom.replay.sampler import Sampler
from worldloom.replay.store import RowStore, bytes_needed


class ReplayBuffer:
    """Keep the newest steps of E streams and sample sequences of consecutive rows from them.

    capacity: steps of all streams together, or the size of their rows such as "2GB" or "1.5GiB".
    obs_shape: shape of one observation, or a dict of shapes for dict observations.
    action_dim: width of the action vector (for discrete actions, which are one-hot, their number).
    num_envs: number of streams; each gets an equal share of the capacity.
    fields: {name: ReplayField} that are stored with every row for the model.
    obs_dtypes: a numpy dtype (or a dict of them) to store observations in, where uint8 for three
        dimensions (images, channels first) and float32 for all others is not what is wanted.
    online_queue: sample each new stretch of T rows once before sampling uniformly (DreamerV3).
    storage: "ram", or "memmap" to keep fields of 512 bytes and more in files instead of memory.
    folder: for files of the rows. With it `state_dict` holds only what is not in a file, and
        `finish` has to complete every state before it is saved.
    expected: rows that will ever be added, at most: a replay that is never filled takes no room for
        all of its capacity. A state may be loaded into a replay that expects more.
    shrink: take the largest capacity there is room for, where the one given is too much.

    Raises:
        ValueError: an argument is wrong, or memory or disk have no room for the capacity.
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
        seed: int = 0,
        storage: str = "ram",
        folder: Path | None = None,
        expected: int | None = None,
        shrink: bool = False,
    ) -> None:
        require_positive(action_dim=action_dim, num_envs=num_envs)
        _require_storage(storage, folder)
        fields = fields or {}
        self._format = RowFormat(obs_shape, action_dim, fields, obs_dtypes, num_envs)
        self.num_envs = num_envs
        self.online_queue = online_queue
        # Rows to sample in front of those that are trained on, for their context.
        self.context_rows = context_rows(fields)
        files = None if folder is None else BlockFiles(Path(folder))
        mapped = storage == "memmap"
        schema, names = self._format.fields, list(self._format.latent_names.values())
        in_memory, on_disk = bytes_needed(schema, names, files is not None, mapped)
        rows = rows_per_stream(capacity, self.bytes_per_step, num_envs)
        own = files.size() if files else 0
        place = files.path if files else None
        used = rows if expected is None else min(rows, -(-expected // num_envs))
        self.rows = fitting_rows(used, num_envs, in_memory, on_disk, place, own, shrink)
        self.resources = resources(self.capacity, in_memory, on_disk, place, own)
        # What the same run has at every start, however many steps it is given.
        self._nominal = rows if self.rows == used else self.rows
        block = choose_block_rows(schema, names, self._nominal)
        self._store = RowStore(schema, names, num_envs, self.rows, block, files, mapped)
        self._archive = None if files is None else Archive(self._store, files)
        self._frozen = False
        self._sampler = Sampler(self._store, seed)
        self._warned = False

    @property
    def capacity(self) -> int:
        """Count the steps that fit, over all streams."""
        return self.rows * self.num_envs

    @property
    def bytes_per_step(self) -> int:
        """Return the size of one row in bytes."""
        return sum(row_bytes(shape, dtype) for shape, dtype in self._format.fields.values())

    @property
    def num_episodes(self) -> int:
        """Count the episodes of which at least one row is stored, unfinished ones included."""
        return self._sampler.num_episodes()

    def __len__(self) -> int:
        """Count the rows stored, over all streams."""
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
        """Append one row to every stream, laid out as `worldloom.protocol` says.

        obs: [E, *obs_shape] or a dict of such arrays; actions: [E, A]; rewards and flags: [E];
        fields: {name: [E, ...]}, zeros if left out.

        Raises:
            ValueError, TypeError: the arrays do not fit; nothing is stored.
            RuntimeError: `freeze` was called.
        """
        self._require_open()
        given = self._format.named(obs)
        given["actions"], given["rewards"] = actions, rewards
        given["is_first"], given["is_last"], given["is_terminal"] = is_first, is_last, is_terminal
        values = self._format.convert_row(given)
        if self._format.latent_names or fields is not None:
            values |= self._format.convert_latents(fields, (self.num_envs,))
        values["episode"] = self._episodes(values)
        if self._archive is None:
            self._store.append(values)
            self._store.advance()
        else:
            self._archive.append(values)

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
        self._require_open()
        if not 0 <= env < self.num_envs:
            raise ValueError(f"env is {env}; this replay has envs 0 to {self.num_envs - 1}")
        terminated = has_terminated(len(actions), dones, terminations, truncations)
        where = f"step {{}} of the episode for env {env}"
        values, rows, final = self._format.episode(obs, actions, rewards, terminated, where)
        if not final:
            self._warn_of_lost_step(rows)
        first = int(self._store.written[env])
        values["episode"] = np.full(rows, first)
        # Of an episode longer than the ring only the newest rows, so no slot is written twice.
        kept = {name: x[-self.rows :] for name, x in values.items()}
        self._write(env, np.arange(first, first + rows)[-self.rows :], kept)
        written = self._store.written.copy()
        written[env] += rows
        self._store.written = written
        self._added(rows)

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
        values = self._format.convert_latents(given, row.shape, partly=True)
        stored = row >= self._store.oldest[env][:, None]
        env = np.repeat(env, row.shape[1])
        row, stored = row.reshape(-1), stored.reshape(-1)
        values = {name: x.reshape(len(row), *x.shape[2:]) for name, x in values.items()}
        if not stored.all():
            env, row = env[stored], row[stored]
            values = {name: x[stored] for name, x in values.items()}
        (self._store if self._archive is None else self._archive).rewrite(env, row, values)

    def can_sample(self, seq_len: int, *, across_episodes: bool = True) -> bool:
        """Tell whether a sequence of `seq_len` rows is stored."""
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
        """Draw B sequences of T rows, uniformly over all stored start positions.

        Sequences may run on into the next episode (see is_first, returned as stored) unless
        `across_episodes` is false.
        """
        require_positive(batch_size=batch_size, seq_len=seq_len)
        self._require_length(seq_len)
        if self.online_queue and not across_episodes:
            raise ValueError(
                "an online replay serves fresh stretches of a stream, which cross episodes; set "
                "data.online_queue=false or data.across_episodes=true"
            )
        draw = self._sampler.draw if across_episodes else self._sampler.draw_inside_episodes
        env, start = draw(batch_size, seq_len)
        if self.online_queue:
            fresh_env, fresh_start = self._sampler.take_fresh(batch_size, seq_len)
            env[: len(fresh_env)], start[: len(fresh_env)] = fresh_env, fresh_start
        batch = self._read(env, start, seq_len)
        return cast(Batch, batch if device == "cpu" else to_device(batch, device))

    def newest(self, rows: int, device: str | torch.device = "cpu") -> Batch:
        """Return the newest rows of the first stream, at most so many, [1, T]; draw nothing."""
        start, length = self._sampler.find_newest(rows)
        return cast(Batch, to_device(self._read(np.zeros(1, np.int64), start, length), device))

    def freeze(self) -> None:
        """Take no more rows: they come from a data set that every start reads anew.

        With a folder a state then holds their check sum in place of the rows.
        """
        self._frozen = True
        if self._archive is not None:
            self._archive.freeze()

    def state_dict(self) -> dict[str, Any]:
        """Return everything stored as tensors and plain data.

        Without a folder the tensors share the buffer's memory, as those of a torch module do, so
        that saving a large replay needs no second copy: write them out (or deepcopy them) before
        adding more. With a folder they are copies of the rows that belong to no complete file;
        `finish` writes the other ones and names their files.
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
        """Write the files that a state (or a copy of it) needs, and name them in it.

        May run in another thread while rows and latents are written and drawn. Does nothing
        without a folder.

        Raises:
            OSError: the disk is full, for example. Nothing is lost: try again with a new state.
        """
        if self._archive is not None:
            self._archive.finish(state)

    def keep(self, files: Iterable[str]) -> None:
        """Delete the files of the folder that are neither among these nor used by this buffer.

        files: those that states which are kept name under "files".
        """
        if self._archive is not None:
            self._archive.keep(files)

    def damaged(self, state: Mapping[str, Any]) -> list[str]:
        """Return the files of a state that are missing or whose check sum differs."""
        return [] if self._archive is None else self._archive.files.find_damaged(state["files"])

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what `state_dict` returned; sampling goes on as if it had never stopped.

        Of files that are damaged a warning is logged. Their rows are lost, and no sequence that
        would need one of them is drawn any more.

        Raises:
            ValueError: the state is of a replay with other settings, or of other data.
        """
        if self._archive is not None and self._frozen:
            self._archive.require_digest(state)
        require_layout(self._layout(), state["layout"])
        require_kind(state, self._archive is not None, self._frozen)
        if max(state["written"]) > self.rows < self._nominal:
            raise ValueError(
                f"the saved replay has {max(state['written'])} rows per environment, but this one "
                f"expects {self.rows} at most; raise training.total_steps"
            )
        self._store.written = np.array(state["written"], np.int64)
        if self._archive is None or "streams" in state:
            self._load_streams(state["streams"])
        else:
            self._archive.restore(state)
        self._sampler.queue_position = np.array(state["queue_position"], np.int64)
        self._sampler.rng.bit_generator.state = state["rng"]

    def _load_streams(self, streams: list[dict[str, Tensor]]) -> None:
        """Read the rows of a state that was made without a folder: all slots of each ring."""
        rings = [{name: to_numpy(x) for name, x in stream.items()} for stream in streams]
        if self._archive is not None:
            self._archive.restore_rings(rings)
            return
        for env, stream in enumerate(rings):
            row = np.arange(self._store.oldest[env], self._store.written[env])
            self._store.write(env, row, {name: x[row % self.rows] for name, x in stream.items()})

    def _layout(self) -> dict[str, str]:
        nominal = self._nominal * self.num_envs
        sizes = {"num_envs": str(self.num_envs), "capacity": str(nominal)}
        return sizes | {
            name: f"{dtype}{shape}" for name, (shape, dtype) in self._format.fields.items()
        }

    def _read(self, env: np.ndarray, start: np.ndarray, length: int) -> dict[str, Any]:
        """Read sequences of streams env [B] from rows start [B] on."""
        slots = self._store.slots(env, start, length)
        where = (env, start, slots)
        rows = {name: self._store.take(name, *where) for name in ("actions", "rewards", *FLAGS)}
        # That an episode was abandoned (a resumed run resets its environments, a crashed one is
        # replaced) was not known when its last row was written, with an action that led nowhere.
        abandoned = rows["is_first"][:, 1:] > rows["is_last"][:, :-1]
        if np.count_nonzero(abandoned):
            rows["is_last"][:, :-1] |= abandoned
            rows["actions"][:, :-1][abandoned] = 0.0
        batch: dict[str, Any] = {"obs": self._take_obs(*where)}
        batch |= {name: torch.from_numpy(x) for name, x in rows.items()}
        index = np.empty((len(env), 2), np.int64)
        index[:, 0], index[:, 1] = env, start
        batch["index"] = torch.from_numpy(index)
        if self._format.latent_names and length:
            batch |= self._take_fields(env, start, slots)
        return batch

    def _take_fields(
        self, env: np.ndarray, start: np.ndarray, slots: np.ndarray
    ) -> dict[str, dict[str, Tensor]]:
        names, every_row = self._format.latent_names, self._format.every_row
        taken: dict[str, dict[str, Tensor]] = {}
        if self.context_rows:
            taken["context"] = {
                key: self._take(name, env, start, slots[:, :1])[:, 0].float()
                for key, name in names.items()
                if key not in every_row
            }
        if every_row:
            taken["stored"] = {
                key: self._take(names[key], env, start, slots).float() for key in every_row
            }
        return taken

    def _take(self, name: str, env: np.ndarray, start: np.ndarray, slots: np.ndarray) -> Tensor:
        """Gather rows as `RowStorage.take` does; floats come out as float32."""
        taken = torch.from_numpy(self._store.take(name, env, start, slots))
        return taken.float() if taken.is_floating_point() else taken

    def _take_obs(self, *where: np.ndarray) -> Obs:
        if self._format.obs_names is None:
            return self._take("obs", *where)
        return {key: self._take(name, *where) for key, name in self._format.obs_names.items()}

    def _episodes(self, values: Arrays) -> np.ndarray:
        """Check the flags of a row of every stream; return the episodes that the rows are of."""
        store = self._store
        place, first = store.ring_index(-1), values["is_first"]
        before, ended = store.rings["episode"][place], store.rings["is_last"][place]
        # Most rows lie within an episode, and comparing bytes is the fastest way to see that.
        none = bytes(self.num_envs)
        if (
            first.tobytes() == none
            and ended.tobytes() == none
            and values["is_terminal"].tobytes() == none
            and (store.common or store.written.all())
        ):
            return before
        require_borders(ended | (store.written == 0), values)
        return np.where(first, store.written, before)

    def _write(self, env: int, row: np.ndarray, values: Arrays) -> None:
        (self._store if self._archive is None else self._archive).write(env, row, values)

    def _added(self, rows: int) -> None:
        if self._archive is not None:
            self._archive.add_blocks(rows)

    def _require_open(self) -> None:
        if self._frozen:
            raise RuntimeError(
                "this replay was frozen, so it accepts no more rows; add them before freeze()"
            )

    def _require_length(self, length: int) -> None:
        longest = self._sampler.longest()
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


def to_device(batch: Any, device: str | torch.device) -> Any:
    """Move the tensors of a nested dict to a device, into new dicts."""
    if isinstance(batch, Mapping):
        return {key: to_device(value, device) for key, value in batch.items()}
    return batch.to(device)


def _require_storage(storage: str, folder: Path | None) -> None:
    """Raise ValueError for an unknown storage, or for one that lacks a folder."""
    if storage not in ("ram", "memmap"):
        raise ValueError(f"storage is {storage!r}; set data.storage to 'ram' or 'memmap'")
    if storage == "memmap" and folder is None:
        raise ValueError(
            "storage is 'memmap' but there is no folder for its files; give one, or set "
            "data.storage=ram"
        )
