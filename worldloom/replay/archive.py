"""Checkpoints of a replay: block files that a state names, so that it need not contain the rows.

The immutable fields of a block are written once, when the block is complete. Rewritable fields
change all the time, so each checkpoint writes those of the blocks in which any has changed, under
a new name. The rows after a stream's last complete block are part of the state itself.

Two threads use an archive: one adds and rewrites rows, the other calls `finish` and `keep`. While
`finish` writes a state, the first thread goes on: before it changes fields that are still to be
written, it copies those rows aside.
"""

import logging
import threading
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from worldloom.replay.block_files import NAME, Block, BlockFiles
from worldloom.replay.row_format import Arrays, to_numpy
from worldloom.replay.snapshot import Snapshot
from worldloom.replay.store import RowStore

log = logging.getLogger(__name__)

MAX_COPIES = 256 * 2**20  # bytes of rows copied aside at which changes wait for `finish`


class Archive:
    """The block files of the rows in `store`.

    digest: None, or the checksum of rows that come from a dataset. Every start reads them again,
        so a state contains the checksum in place of the rows.
    """

    def __init__(self, store: RowStore, files: BlockFiles) -> None:
        self.store, self.files = store, files
        self.digest: int | None = None
        # Rows in memory are not written before the first state: offline runs never need that.
        self._eager = bool(store.large)
        self._next = np.zeros(store.num_envs, np.int64)  # block of each stream to write next
        self._behind = False  # whether more blocks can be written at once
        self._error: OSError | None = None  # why the last block could not be written
        self._lock = threading.RLock()
        self._changed = threading.Condition(self._lock)
        self._writing = threading.Lock()  # held while a state is made or finished
        self._current: dict[Block, str] = {}  # files whose rewritable fields are up to date
        self._generation = files.newest_generation()
        self._snapshot: Snapshot | None = None
        self._finished = 0
        self._finishing = False

    def append(self, values: Arrays) -> None:
        """Write the next row of every stream."""
        store = self.store
        with self._lock:
            if self._snapshot is not None and self._snapshot.waiting:
                self._protect(store.streams, store.written - store.rows)
            store.append(values)
        if self._behind or store.common is None or store.common % store.block_rows == 0:
            self._add_blocks(store.num_envs)

    def write(self, env: int, row: np.ndarray, values: Arrays) -> None:
        """Write the next rows (consecutive numbers [N]) of one stream."""
        with self._changed:
            if self._snapshot is not None and self._snapshot.waiting:
                last = self.store.written[env] - 1  # the new rows may skip slots of the ring
                overwritten = last - (last - row) % self.store.rows
                self._protect(np.full(len(row), env), overwritten)
            self.store.write(env, row, values)
        self._add_blocks(len(row))

    def rewrite(self, env: np.ndarray, row: np.ndarray, values: Arrays) -> None:
        """Replace rewritable fields of stored rows (numbers [N]) of streams env [N]."""
        with self._changed:
            for block in self._protect(env, row):
                self.files.release(self._current.pop(block, ""))
                if self._snapshot is not None:
                    self._snapshot.changed.add(block)
            self.store.rewrite(env, row, values)

    def freeze(self) -> None:
        """Accept no more rows; states contain their checksum instead."""
        if self._eager:
            self._write_blocks()
        self.digest = self.store.digest()

    def state(self) -> dict[str, Any]:
        """Return what is needed in addition to the files; `finish` has to complete it."""
        with self._writing, self._changed:
            store, frozen = self.store, self.digest is not None
            self._eager = not frozen
            complete = frozen or self._write_blocks()
            self._generation += 1
            snapshot = Snapshot(store, self._generation, None if complete else self._error)
            self._snapshot = snapshot
            used = self.files.used
            for block in self._blocks():
                if block in store.lost:
                    continue
                if not frozen and (name := self.files.rows_name(block)) in used:
                    snapshot.files[name] = used[name]
                if block in self._current:
                    snapshot.files[self._current[block]] = used[self._current[block]]
                elif store.rewritable:
                    snapshot.waiting[block] = None
            state = {
                "tails": [self._tail(env) for env in range(store.num_envs)],
                "lost": [list(block) for block in sorted(store.lost)],
                "generation": self._generation,
                "files": dict(snapshot.files),
            }
            return state | ({"digest": self.digest} if frozen else {})

    def finish(self, state: dict[str, Any]) -> None:
        """Write what a state still needs, flush it to the disk and name it in the state.

        Raises:
            OSError: the files cannot be written. No row is lost; make a new state to try again.
            ValueError: a newer state was made.
        """
        with self._writing:
            snapshot = self._snapshot
            if snapshot is None or snapshot.generation != state["generation"]:
                if state["generation"] == self._finished:
                    return
                raise ValueError(
                    "this state of the replay can no longer be finished, because a newer one was "
                    "made or writing it failed; make a new one with state_dict()"
                )
            written: dict[Block, str] = {}
            self._finishing = True
            try:
                if snapshot.error is not None:
                    raise snapshot.error
                self._write_snapshot(snapshot, written)
                self.files.sync(snapshot.files)
                self.files.sync_names()
            except BaseException:
                for name in written.values():
                    self.files.remove(name)
                raise
            else:
                with self._lock:
                    for block, name in written.items():
                        if block in snapshot.changed:
                            self.files.release(name)
                        else:
                            self._current[block] = name
                self._finished = snapshot.generation
            finally:
                with self._changed:
                    self._snapshot, self._finishing = None, False
                    self._changed.notify_all()
            state["files"] = dict(snapshot.files)

    def keep(self, files: Iterable[str]) -> None:
        """Delete the files that are neither among these nor needed by this replay."""
        with self._writing:
            oldest = (self.store.oldest // self.store.block_rows).tolist()
            for name in list(self.files.used):
                env, number = block = self.files.parse_block(name)
                if number < oldest[env]:
                    self.files.release(name)
                    self._current.pop(block, None)
            with self._lock:
                pending = self._snapshot.files if self._snapshot else {}
                names = {*files, *pending}
            self.files.keep(names)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Read what a state names; `written` of the store is that of the state already.

        A block whose rows cannot be read is lost. Rewritable fields that cannot be read are zero.
        """
        self._reset()
        store = self.store
        files = {name: crc for name, crc in state["files"].items() if NAME.fullmatch(name)}
        store.lost = {(env, number) for env, number in state["lost"]}
        current = {
            self.files.parse_block(name): name
            for name in files
            if "fields" in name and NAME.fullmatch(name)
        }
        lost_rows, lost_fields = [], []
        for block in self._blocks():
            known = block in store.lost or self.digest is not None
            if not known and not self._load(
                block, self.files.rows_name(block), files, store.immutable
            ):
                lost_rows.append(block)
                store.lost.add(block)
            if block in store.lost:
                self._load_zeros(block, list(store.rings))
            elif store.rewritable:
                self._current[block] = current.get(block, "")
                if not self._load(block, self._current[block], files, store.rewritable):
                    lost_fields.append(block)
                    del self._current[block]
                    self._load_zeros(block, store.rewritable)
        for env, tail in enumerate(state["tails"]):
            row, values = self._tail_rows(env), {name: to_numpy(x) for name, x in tail.items()}
            if self.digest is None:
                store.write(env, row, values)
            else:
                store.rewrite(np.full(len(row), env), row, values)
        self._warn(lost_rows, "rows", "are lost, and training continues without them")
        self._warn(lost_fields, "rewritable fields", "have lost these fields, which are now zero")

    def load_rings(self, rings: list[Arrays]) -> None:
        """Load whole rings, [R, *shape] of each stream, from a state without files."""
        self._reset()
        self.store.load_rings(rings)
        self._next = self.store.oldest // self.store.block_rows
        self._eager = bool(self.store.large)  # rows in memory wait for the first state
        if self._eager:
            self._write_blocks()

    def check_dataset(self, state: Mapping[str, Any]) -> None:
        """Raise ValueError for a state that was saved with other rows of a dataset."""
        if "digest" not in state:
            return  # another kind of state: see `check_kind`
        if (state["digest"], state["written"]) != (self.digest, self.store.written.tolist()):
            raise ValueError(
                f"the dataset has changed since this run was saved: it had {sum(state['written'])} "
                f"rows then, and has {int(self.store.written.sum())} rows with other contents now; "
                f"restore the dataset, or start a new run"
            )

    def _blocks(self) -> Iterator[Block]:
        """List the complete blocks of which rows are stored."""
        oldest = self.store.oldest // self.store.block_rows
        complete = self.store.written // self.store.block_rows
        for env, (first, end) in enumerate(zip(oldest.tolist(), complete.tolist(), strict=True)):
            yield from ((env, number) for number in range(first, end))

    def _add_blocks(self, rows: int) -> None:
        """Write blocks that have become complete after `rows` new rows, unless that is not due.

        The number of files per call is limited: streams that complete their blocks at the same
        time share the work between the following calls.
        """
        if self._eager:
            self._write_blocks(1 + rows // self.store.block_rows)

    def _write_blocks(self, limit: int = -1) -> bool:
        """Write up to `limit` complete blocks, all by default; return whether all are written.

        The rows of a block that cannot be written stay in memory.
        """
        store = self.store
        complete = store.written // store.block_rows
        self._behind = bool((complete > self._next).any())
        for env, end in enumerate(complete.tolist() if self._behind else []):
            for number in range(int(self._next[env]), end):
                if limit == 0:
                    return False
                if not store.has_expired((env, number)):
                    limit -= 1
                    if not self._write_rows((env, number)):
                        self._behind = False  # trying again for every row would take time
                        return False
                store.blocks.pop((env, number), None)
                self._next[env] = number + 1
        self._behind = False
        return True

    def _write_rows(self, block: Block) -> bool:
        """Write the immutable fields of a block, then free its memory; return False on failure."""
        store, name = self.store, self.files.rows_name(block)
        try:
            if name not in self.files.used:
                self.files.write(name, store.get(store.immutable, block, store.row_numbers(block)))
            with self._lock:
                store.spill(block)
        except OSError as error:
            if self._error is None:
                log.warning(
                    "the replay could not write to %s (%s); its rows stay in memory and writing "
                    "is tried again later; free some disk space",
                    self.files.path,
                    error.strerror or error,
                )
            self._error = error
            return False
        if self._error is not None:
            log.warning("the replay can write to %s again", self.files.path)
            self._error = None
        return True

    def _protect(self, env: np.ndarray, row: np.ndarray) -> list[Block]:
        """Copy rows aside that are about to change, if a snapshot needs them; return the blocks."""
        env, row = env[row >= 0], row[row >= 0]
        stride = np.int64(2**40)  # more blocks than a stream can have
        codes = env.astype(np.int64) * stride + row // self.store.block_rows
        unique = np.unique(codes)
        blocks = [divmod(int(code), int(stride)) for code in unique]
        if (snapshot := self._snapshot) is not None:
            for block, code in zip(blocks, unique, strict=True):
                if block in snapshot.waiting:
                    snapshot.protect(block, np.unique(row[codes == code]))
            while self._finishing and snapshot.size > MAX_COPIES:
                self._changed.wait()
        return blocks

    def _write_snapshot(self, snapshot: Snapshot, written: dict[Block, str]) -> None:
        """Write the blocks that a snapshot waits for; add the names of the files to `written`."""
        while snapshot.waiting:
            with self._changed:
                block, arrays = snapshot.take()
                self._changed.notify_all()
            name = written[block] = self.files.fields_name(block, snapshot.generation)
            snapshot.files[name] = self.files.write(name, arrays)
            # At once: many pages waiting for the disk would delay the next writes of any thread.
            self.files.sync([name])

    def _reset(self) -> None:
        """Forget all files and blocks, except for the rows of a dataset."""
        store, frozen = self.store, self.digest is not None
        self._snapshot, self._eager = None, not frozen
        for name in [n for n in self.files.used if not frozen or "fields" in n]:
            self.files.release(name)
        self._current.clear()
        store.lost = set()
        if not frozen:
            store.blocks.clear()
        self._next = store.written // store.block_rows

    def _load(self, block: Block, name: str, files: Mapping[str, int], fields: list[str]) -> bool:
        """Load fields of a block from its file; return whether the file is undamaged."""
        store = self.store
        layout = {field: store.fields[field] for field in fields}
        arrays = self.files.read(name, files.get(name), layout, store.block_rows)
        if arrays is not None:
            store.load_block(block, arrays)
        return arrays is not None

    def _load_zeros(self, block: Block, names: list[str]) -> None:
        """Zero fields of a block; the row after it begins an episode if rows are zeroed."""
        arrays = {
            name: np.zeros((self.store.block_rows, *shape), dtype)
            for name, (shape, dtype) in self.store.fields.items()
            if name in names
        }
        if "episode" in arrays:
            arrays["episode"][:] = (block[1] + 1) * self.store.block_rows
        self.store.load_block(block, arrays)

    def _tail_rows(self, env: int) -> np.ndarray:
        """Return the numbers of the rows after the last complete block of a stream."""
        written, rows = int(self.store.written[env]), self.store.block_rows
        return np.arange(max(written - written % rows, self.store.oldest[env]), written)

    def _tail(self, env: int) -> dict[str, torch.Tensor]:
        """Copy the rows after the last complete block of a stream."""
        row = self._tail_rows(env)
        if len(row) == 0:
            return {}
        names = list(self.store.fields) if self.digest is None else self.store.rewritable
        values = self.store.get(names, (env, int(row[0]) // self.store.block_rows), row)
        return {name: torch.from_numpy(x) for name, x in values.items()}

    def _warn(self, blocks: list[Block], what: str, result: str) -> None:
        """Log which files could not be read."""
        if blocks:
            rows = [
                self.store.row_numbers(block) >= self.store.oldest[block[0]] for block in blocks
            ]
            log.warning(
                "%d rows of the replay %s: missing or damaged in %s are the %s of %s",
                np.concatenate(rows).sum(),
                result,
                self.files.path,
                what,
                ", ".join(
                    self.files.rows_name(block).removesuffix("-rows.bin") for block in blocks
                ),
            )


def check_kind(state: Mapping[str, Any], has_folder: bool, frozen: bool) -> None:
    """Raise ValueError for a state with files but no folder, or with another source of rows."""
    if "streams" not in state and not has_folder:
        raise ValueError(
            "the rows of the saved replay are in separate files; give ReplayBuffer the folder "
            "that contains them"
        )
    if "digest" in state and not frozen:
        raise ValueError(
            "the saved replay was filled from a dataset; fill this one and call freeze() first"
        )
    if has_folder and frozen and "digest" not in state:
        raise ValueError(
            "the rows of the saved replay do not come from a dataset; resume with data=online"
        )
