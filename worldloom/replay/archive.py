"""Keep a replay in files, so that a checkpoint only names them and writes what is new.

The rows of a block go to their file when the block is complete. Latents change again and again, so
a checkpoint writes those of the blocks in which any did, under a new name each time. Rows since a
stream's last complete block are in the state itself.

Two threads meet here: the one that adds rows and writes latents, and the one that calls `finish`.
"""

import logging
import threading
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch

from worldloom.replay.blocks import Blocks
from worldloom.replay.chunks import ChunkFolder, DamagedFile, block_of, latents_name, rows_name
from worldloom.replay.row_format import Arrays, to_numpy
from worldloom.replay.snapshot import LATENTS, ROWS, Snapshot
from worldloom.replay.store import Block, RowStorage

log = logging.getLogger(__name__)

COPIES = 256 * 2**20  # bytes copied aside at which who changes rows waits for the writer


class Archive:
    """The files of a replay whose rows lie in `store`.

    blocks: which there are, and which of them are lost.
    digest: None, or the check sum of rows that come from a data set and are read anew at every
        start, so that it is kept in their place.
    """

    def __init__(self, store: RowStorage, folder: ChunkFolder) -> None:
        self.store, self.folder = store, folder
        self.blocks = Blocks(store)
        self.digest: int | None = None
        # Rows in memory are not written before the first state: offline runs never need that.
        self._eager = store.mapped
        self._lock = threading.RLock()  # of rows, latents and what is known of files
        self._changes = threading.Condition(self._lock)
        self._writer = threading.Lock()  # held while a state is made or finished
        self._latents: dict[Block, str] = {}  # the file of each block that did not change since
        self._generation = folder.newest_generation()
        self._snapshot: Snapshot | None = None
        self._taken = self._finished = 0
        self._finishing = self._failing = False

    @property
    def sealed(self) -> bool:
        """Tell whether no rows may be added any more."""
        return self.digest is not None

    def write(self, env: int, row: np.ndarray, values: Arrays) -> None:
        """Write new rows (numbers [N]) of one stream over the oldest."""
        with self._changes:
            if self._snapshot is not None:
                last = self.store.written[env] - 1  # an episode may leap over rows of the ring
                overwritten = last - (last - row) % self.store.rows
                self._protect((ROWS, LATENTS), np.broadcast_to(env, row.shape), overwritten)
            self.store.write(env, row, values)

    def append(self, values: Arrays) -> None:
        """Write a row behind the newest of every stream, over the oldest."""
        with self._lock:  # that of `_changes`, which takes longer to enter
            if self._snapshot is not None:
                store = self.store
                self._protect((ROWS, LATENTS), store.streams, store.written - store.rows)
            self.store.append(values)

    def write_latents(self, env: np.ndarray, row: np.ndarray, values: Arrays) -> None:
        """Write latents of stored rows (numbers [N]) of streams env [N]."""
        with self._changes:
            for block in self._protect((LATENTS,), env, row):
                if (name := self._latents.pop(block, None)) is not None:
                    self.folder.release(name)
            self.store.write(env, row, values)

    def added(self, count: int) -> None:
        """Write blocks that have become complete, once `store.written` counts the new rows.

        count: of the new rows. So many files are written at most that the next calls, too, have
        something to do where all streams complete their blocks at once.
        """
        new = False
        if self.blocks.changed():
            with self._changes:
                new, gone = self.blocks.account()
                for block in gone:
                    self._forget(block)
        # With a full disk, trying at every step would only cost time.
        if self._eager and self.blocks.unwritten and (new or not self._failing):
            self._write_rows(1 + count // self.store.block_rows)

    def seal(self, digest: int) -> None:
        """Take no more rows; keep this digest in their place."""
        self._write_rows(len(self.blocks.unwritten) if self._eager else 0)
        self.digest = digest

    def state(self) -> dict[str, Any]:
        """Return what is needed besides the files; `finish` has to complete it."""
        with self._writer, self._changes:
            store = self.store
            self._taken += 1
            self._generation += 1
            names = {ROWS: store.fixed, LATENTS: store.latents}
            snapshot = Snapshot(self._taken, names, store.block_rows, store.get)
            for block in self.blocks:
                if block not in self.blocks.lost:
                    self._expect(snapshot, block)
            self._snapshot, self._eager = snapshot, not self.sealed
            state = {
                "tails": [self._tail(env) for env in range(store.num_envs)],
                "lost": [list(block) for block in sorted(self.blocks.lost)],
                "snapshot": self._taken,
                "files": dict(snapshot.files),
            }
            return state | ({"digest": self.digest} if self.sealed else {})

    def finish(self, state: dict[str, Any]) -> None:
        """Write what a state still needs, flush it to the disk, and name it in the state.

        Raises:
            OSError: it cannot be written. Nothing is lost; make a new state and try again.
            ValueError: there is a newer state.
        """
        with self._writer:
            snapshot = self._snapshot
            if snapshot is None or snapshot.number != state["snapshot"]:
                if state["snapshot"] == self._finished:
                    return
                raise ValueError(
                    "this state of the replay can no longer be finished, because a newer one was "
                    "made or writing it failed; make a new one with state_dict()"
                )
            latents: dict[Block, str] = {}
            try:
                with self._changes:
                    self._finishing = True
                self._write_snapshot(snapshot, latents)
                self.folder.sync(snapshot.files)
                self.folder.sync_folder()
            except BaseException:
                with self._changes:
                    self._snapshot, self._finishing = None, False
                    self._changes.notify_all()
                for name in latents.values():
                    self.folder.remove(name)
                raise
            with self._changes:
                self._snapshot, self._finishing, self._finished = None, False, snapshot.number
                for block, name in latents.items():
                    if block in snapshot.changed or self.blocks.has_gone(block):
                        self.folder.release(name)
                    else:
                        self._latents[block] = name
                self._changes.notify_all()
            state["files"] = dict(snapshot.files)

    def keep(self, files: Iterable[str]) -> None:
        """Delete the files that are neither among these nor needed by this replay."""
        with self._writer:
            with self._changes:
                pending = self._snapshot.files if self._snapshot else {}
                names = {*files, *pending}
            self.folder.keep(names)

    def restore(self, state: Mapping[str, Any]) -> None:
        """Read what a state names, once `store.written` is that of the state.

        Where the rows of a block cannot be read the block is lost; where its latents cannot be,
        they are zero.
        """
        self._reset()
        store, files, lost = self.store, state["files"], self.blocks.lost
        lost.update((env, number) for env, number in state["lost"])
        latents = {block_of(name): name for name in files if "latents" in name}
        lost_rows: list[Block] = []
        lost_latents: list[Block] = []
        for block in self.blocks:
            if block not in lost and not self.sealed and not self._read_rows(block, files):
                lost.add(block)
                lost_rows.append(block)
            if block in lost:
                self._blank(block)
            elif store.latents and not self._read_latents(block, latents.get(block, ""), files):
                lost_latents.append(block)
        for env, tail in enumerate(state["tails"]):
            if tail:
                values = {name: to_numpy(x) for name, x in tail.items()}
                store.write(env, self.blocks.tail(env), values)
        self._warn(lost_rows, "rows", "are lost, and training goes on without them")
        self._warn(lost_latents, "latents", "have lost their latents, which begin at zero")

    def restore_rings(self, rings: list[Arrays]) -> None:
        """Take over the rows of whole rings, [R, *shape] for each stream and field."""
        self._reset()

        def copy(env: int, row: np.ndarray) -> None:
            values = {name: x[row % self.store.rows] for name, x in rings[env].items()}
            self.store.write(env, row, values)

        for block in self.blocks:
            copy(block[0], self.blocks.rows(block))
            self.blocks.unwritten[block] = None
            self._write_rows(1 if self.store.mapped else 0)  # in memory they wait for `finish`
        for env in range(self.store.num_envs):
            if len(row := self.blocks.tail(env)):
                copy(env, row)

    def require_digest(self, state: Mapping[str, Any]) -> None:
        """Refuse a state that was saved with other rows than these."""
        if "digest" not in state:
            return  # it is of another kind: see `require_kind`
        if (state["digest"], state["written"]) != (self.digest, self.store.written.tolist()):
            raise ValueError(
                f"the data set has changed since this run was saved: it filled the replay with "
                f"{sum(state['written'])} rows then, and with "
                f"{int(self.store.written.sum())} of other contents now; restore the data set, or "
                f"start a new run"
            )

    def _protect(self, kinds: tuple[str, ...], env: np.ndarray, row: np.ndarray) -> list[Block]:
        """Copy rows aside for the snapshot that are about to change; return their blocks."""
        store, snapshot = self.store, self._snapshot
        stored = row >= 0
        env, row = env[stored], row[stored]
        wide = np.int64(2**40)  # more blocks than any stream has
        unique = np.unique(env.astype(np.int64) * wide + row // store.block_rows)
        blocks = [divmod(int(code), int(wide)) for code in unique]
        if snapshot is not None:
            snapshot.protect(kinds, blocks, env, row)
            if ROWS not in kinds:
                snapshot.changed.update(blocks)
            while self._finishing and snapshot.bytes > COPIES:
                self._changes.wait()
        return blocks

    def _reset(self) -> None:
        """Forget all files, but for the rows of a data set, and count blocks anew."""
        for block in list({*self.store.files, *self.store.blocks} if not self.sealed else ()):
            self.store.forget(block)
        for name in self._latents.values():
            self.folder.release(name)
        self._latents.clear()
        self._snapshot = None
        self._eager = not self.sealed
        self.blocks.reset()

    def _blank(self, block: Block) -> None:
        """Make nothing of what lies in memory of a lost block; what follows begins an episode."""
        row = self.blocks.rows(block)
        for name, ring in self.store.rings.items():
            ring[block[0], row % self.store.rows] = (row[-1] + 1) * (name == "episode")

    def _warn(self, lost: list[Block], what: str, result: str) -> None:
        """Say which files could not be read."""
        if lost:
            log.warning(
                "%d rows of the replay %s: missing or damaged in %s are the %s of %s",
                sum(len(self.blocks.rows(block)) for block in lost),
                result,
                self.folder.path,
                what,
                ", ".join(rows_name(*block).removesuffix("-rows.safetensors") for block in lost),
            )

    def _forget(self, block: Block) -> None:
        self.store.forget(block)
        if (name := self._latents.pop(block, None)) is not None:
            self.folder.release(name)

    def _write_rows(self, most: int) -> None:
        """Write so many complete blocks; if that fails their rows stay in memory."""
        with self._changes:
            snapshot = self._snapshot
            due = [b for b in self.blocks.unwritten if snapshot is None or not snapshot.has_rows(b)]
        for block in due[:most]:
            row = self.blocks.rows(block)
            arrays = self.store.get(self.store.fixed, block[0], row)
            try:
                self._write_file(block, int(row[0]), arrays)
            except OSError as error:
                if not self._failing:
                    log.warning(
                        "the replay could not write to %s (%s); its rows stay in memory and it "
                        "tries again; free some space",
                        self.folder.path,
                        error.strerror or error,
                    )
                self._failing = True
                return

    def _write_file(self, block: Block, first: int, arrays: Arrays) -> int:
        crc = self.store.write_file(block, first, arrays)
        with self._changes:
            self.blocks.unwritten.pop(block, None)
            if self.blocks.has_gone(block):  # while it was written
                self.store.forget(block)
        if self._failing:
            log.warning("the replay can write to %s again", self.folder.path)
            self._failing = False
        return crc

    def _expect(self, snapshot: Snapshot, block: Block) -> None:
        """Add the files of a block to a snapshot, or what has to be written."""
        store, row, name = self.store, self.blocks.rows(block), rows_name(*block)
        if block in store.files and not self.sealed:
            snapshot.files[name] = self.folder.used[name]
        elif not self.sealed:
            skipped = row[0] - block[1] * store.block_rows
            parts = {name: x[skipped:] for name, x in store.blocks.get(block, {}).items()}
            snapshot.wait_for((ROWS, block), row, parts)
        if block in self._latents:
            name = self._latents[block]
            snapshot.files[name] = self.folder.used[name]
        elif store.latents:
            snapshot.wait_for((LATENTS, block), row, {})

    def _write_snapshot(self, snapshot: Snapshot, latents: dict[Block, str]) -> None:
        """Write all that a snapshot waits for; add the files of latents to `latents`."""
        while True:
            with self._changes:
                taken = snapshot.take()
                self._changes.notify_all()
            if taken is None:
                return
            (kind, block), first, arrays = taken
            if kind == ROWS:
                name = rows_name(*block)
                snapshot.files[name] = self._write_file(block, first, arrays)
            else:
                name = latents[block] = latents_name(*block, self._generation)
                snapshot.files[name] = self.folder.write(name, arrays)
            # At once: pages that wait for the disk would slow down whoever writes next.
            self.folder.sync([name])

    def _tail(self, env: int) -> dict[str, torch.Tensor]:
        """Copy the rows since the last complete block of a stream."""
        row = self.blocks.tail(env)
        if len(row) == 0:
            return {}
        fields = self.store.latents if self.sealed else list(self.store.fields)
        return {name: torch.from_numpy(x) for name, x in self.store.get(fields, env, row).items()}

    def _read_rows(self, block: Block, files: Mapping[str, int]) -> bool:
        """Read the rows of a block; tell whether that was possible."""
        name = rows_name(*block)
        try:
            self.store.use_file(block, self.folder.read(name, files.get(name)))
        except DamagedFile:
            return False
        return True

    def _read_latents(self, block: Block, name: str, files: Mapping[str, int]) -> bool:
        """Read the latents of a block, or make them zero; tell whether that was possible."""
        row = self.blocks.rows(block)
        try:
            arrays = self.folder.read(name, files.get(name))
        except DamagedFile:
            for latent in self.store.latents:
                self.store.rings[latent][block[0], row % self.store.rows] = 0
            return False
        self.store.write(block[0], row, {key: x[-len(row) :] for key, x in arrays.items()})
        self._latents[block] = name
        return True


def require_kind(state: Mapping[str, Any], has_folder: bool, sealed: bool) -> None:
    """Refuse the state of a replay in files where there is no folder, or of another source."""
    if "streams" not in state and not has_folder:
        raise ValueError(
            "the rows of the saved replay lie in files of their own; give ReplayBuffer the folder "
            "they are in"
        )
    if "digest" in state and not sealed:
        raise ValueError(
            "the saved replay was filled from a data set; fill this one and seal() it before"
        )
    if has_folder and sealed and "digest" not in state:
        raise ValueError(
            "the rows of the saved replay do not come from a data set; resume with data=online"
        )
