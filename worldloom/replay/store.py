"""Row storage: rings of rows in memory, with large fields in files if `storage` is "memmap".

Letters: B sequences, T rows, E streams, R rows of a stream's ring, C rows of a block. Row r of a
stream has slot r % R of the ring and belongs to block r // C.
"""

import os
import tempfile
import weakref
import zlib
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.replay.block_files import Block, BlockFiles, read_fully, write_fully
from worldloom.replay.row_format import Arrays, Fields, row_bytes

GENERATIONS = 3  # rewritable fields on disk: of the last two checkpoints and of the next one
LARGE = 512  # bytes per row from which a field is stored in files
THREADED = 2**20  # bytes of a gathered field from which several threads are faster

Stretches = tuple[np.ndarray, np.ndarray, np.ndarray]  # stream, first row and end of each, [S]
Part = tuple[Block, int, np.ndarray]  # block, row within the block, destination [N, *shape]


class RowStore:
    """The newest R rows of E streams.

    files: folder of the block files, or None.
    large_in_files: keep large fields in files. Until a block is complete and `spill` was called,
        its rows are in memory; afterwards immutable fields are read from the block file and
        rewritable fields are in a scratch file.

    written: number of rows ever written to each stream, [E].
    common: that number if it is the same for all streams, else None.
    blocks: {block: {field: [C, *shape]}}, large fields that are still in memory.
    lost: blocks that could not be read when the run was resumed.
    """

    def __init__(
        self,
        fields: Fields,
        rewritable: list[str],
        num_envs: int,
        rows: int,
        block_rows: int,
        files: BlockFiles | None = None,
        large_in_files: bool = False,
    ) -> None:
        self.fields, self.rewritable = fields, rewritable
        self.immutable = [name for name in fields if name not in rewritable]
        self.num_envs, self.rows, self.block_rows = num_envs, rows, block_rows
        self.streams = np.arange(num_envs)
        self.written = np.zeros(num_envs, np.int64)
        self.blocks: dict[Block, Arrays] = {}
        self.lost: set[Block] = set()
        self.large = {n: x for n, x in fields.items() if large_in_files and is_large(*x)}
        # Zeros take no memory until they are written: the system commits pages on first use.
        self.rings: Arrays = {
            name: np.zeros((num_envs, rows, *shape), dtype)
            for name, (shape, dtype) in fields.items()
            if name not in self.large
        }
        self._files = files
        self._offsets = block_offsets(fields, self.immutable, block_rows)
        self._scratch: Scratch | None = None
        self._readers: ThreadPoolExecutor | None = None
        if files is not None and (scratch := [name for name in self.large if name in rewritable]):
            count = -(-rows // block_rows) + 2  # blocks that have stored rows, and one more
            self._scratch = Scratch(files, fields, scratch, num_envs, count, block_rows)

    @property
    def written(self) -> np.ndarray:
        """Number of rows ever written to each stream, [E]."""
        return self._written if self.common is None else np.full(self.num_envs, self.common)

    @written.setter
    def written(self, written: np.ndarray) -> None:
        first = int(written[0])
        self.common = first if (written == first).all() else None
        self._written = written

    @property
    def oldest(self) -> np.ndarray:
        """Number of the oldest stored row of each stream, [E]."""
        return np.maximum(self.written - self.rows, 0)

    def has_expired(self, block: Block) -> bool:
        """Return whether all rows of a block were overwritten."""
        return (block[1] + 1) * self.block_rows <= self.oldest[block[0]]

    def row_numbers(self, block: Block) -> np.ndarray:
        """Return the numbers [C] of the rows of a block."""
        return block[1] * self.block_rows + np.arange(self.block_rows)

    def stretches(self) -> Stretches:
        """Return the stretches of consecutive rows: one per stream, or more between lost blocks."""
        if not self.lost:
            return self.streams, self.oldest, self.written
        self.lost = {block for block in self.lost if not self.has_expired(block)}
        found = []
        for env, (first, end) in enumerate(zip(self.oldest, self.written, strict=True)):
            for number in sorted(number for stream, number in self.lost if stream == env):
                low = number * self.block_rows
                found.append((env, first, max(first, low)))
                first = max(first, low + self.block_rows)
            found.append((env, first, end))
        envs, firsts, ends = np.array(found, np.int64).T
        return envs, firsts, ends

    def ring_index(self, ahead: int) -> Any:
        """Return the index of the row after the newest of every stream, for rings.

        ahead: -1 for the newest row itself, which exists only if the streams have rows.
        """
        if self.common is not None:  # indexing by a slice and a number is four times as fast
            return slice(None), (self.common + ahead) % self.rows
        return self.streams, (self._written + ahead) % self.rows

    def append(self, values: Arrays) -> None:
        """Write the next row of every stream, [E, *shape]."""
        index, rings = self.ring_index(0), self.rings
        for name, value in values.items():
            if name in rings:
                rings[name][index] = value
        if self.large:
            for env, number in enumerate(self.written.tolist()):
                block = self._block_in_memory((env, number // self.block_rows))
                for name, array in block.items():
                    array[number % self.block_rows] = values[name][env]
        if self.common is None:
            self._written = self._written + 1
        else:
            self.common += 1

    def write(self, env: int, row: np.ndarray, values: Arrays) -> None:
        """Write the next rows (consecutive numbers [N]) of one stream; values: [N, *shape]."""
        if len(row) == 0:
            return
        slot = row % self.rows
        for name, value in values.items():
            if name in self.rings:
                self.rings[name][env, slot] = value
        for block, low, high in self._runs(np.full(len(row), env), row) if self.large else ():
            first = int(row[low]) % self.block_rows
            for name, array in self._block_in_memory(block).items():
                array[first : first + high - low] = values[name][low:high]
        written = self.written.copy()
        written[env] = row[-1] + 1
        self.written = written

    def rewrite(self, env: np.ndarray, row: np.ndarray, values: Arrays) -> None:
        """Replace rewritable fields of stored rows (numbers [N]) of streams env [N]."""
        slot = row % self.rows
        for name, value in values.items():
            if name in self.rings:
                self.rings[name][env, slot] = value
        if self._scratch is None:
            return
        for block, low, high in self._runs(env, row):
            first, arrays = int(row[low]) % self.block_rows, self.blocks.get(block)
            for name, value in values.items():
                if name in self.rings:
                    continue
                if arrays is None:
                    self._scratch.write(name, block, first, value[low:high])
                else:
                    arrays[name][first : first + high - low] = value[low:high]

    def slots(self, env: np.ndarray, start: np.ndarray, length: int) -> np.ndarray:
        """Return the slots [B, length] of sequences, counted over the rings of all streams."""
        return env[:, None] * self.rows + (start[:, None] + np.arange(length)) % self.rows

    def take(self, name: str, env: np.ndarray, start: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Gather sequences of a field, [B, T, *shape].

        env, start: [B], stream and number of each first row; slots: [B, T], see `slots`.
        """
        shape, dtype = self.fields[name]
        out = np.empty((*slots.shape, *shape), dtype)
        if name in self.rings:
            _gather(self.rings[name].reshape(-1, *shape), slots, out)
        elif slots.size:
            self._read_parts(name, self._split(out, env.tolist(), start.tolist()), out.nbytes)
        return out

    def get(self, names: list[str], block: Block, row: np.ndarray) -> Arrays:
        """Copy fields of some rows (ascending numbers [N]) of one block."""
        arrays = {}
        for name in names:
            if name in self.rings:
                arrays[name] = self.rings[name][block[0], row % self.rows]
                continue
            shape, dtype = self.fields[name]
            first = int(row[0])
            out = np.empty((int(row[-1]) + 1 - first, *shape), dtype)
            self._read_part(name, block, first % self.block_rows, out)
            arrays[name] = out if len(out) == len(row) else out[row - first]
        return arrays

    def spill(self, block: Block) -> None:
        """Free the memory of a block whose immutable fields are in its file.

        Raises:
            OSError: the scratch file cannot be written; the block stays in memory.
        """
        for name, array in self.blocks.get(block, {}).items():
            if self._scratch is not None and name in self.rewritable:
                self._scratch.write(name, block, 0, array)
        self.blocks.pop(block, None)

    def load_block(self, block: Block, arrays: Arrays) -> None:
        """Take over fields of a complete block that were read from its file."""
        row = self.row_numbers(block)
        stored = row >= self.oldest[block[0]]
        slot = row[stored] % self.rows
        for name, array in arrays.items():
            if name in self.rings:
                self.rings[name][block[0], slot] = array[stored]
            elif self._scratch is not None and name in self.rewritable:
                self._scratch.write(name, block, 0, array)

    def load_rings(self, rings: list[Arrays]) -> None:
        """Load whole rings, [R, *shape] of each stream; `written` is that of the rings already."""
        for env, ring in enumerate(rings):
            row = np.arange(self.oldest[env], self.written[env])
            self.write(env, row, {name: x[row % self.rows] for name, x in ring.items()})

    def digest(self) -> int:
        """Return the CRC-32 of the immutable fields of all stored rows."""
        digest = 0
        for env, (first, end) in enumerate(zip(self.oldest, self.written, strict=True)):
            for low in range(int(first), int(end), self.block_rows):
                where = np.array([env]), np.array([low])
                slots = self.slots(*where, min(self.block_rows, int(end) - low))
                for name in self.immutable:
                    digest = zlib.crc32(self.take(name, *where, slots).tobytes(), digest)
        return digest

    def _block_in_memory(self, block: Block) -> Arrays:
        if block not in self.blocks:
            self.blocks[block] = {
                name: np.zeros((self.block_rows, *shape), dtype)
                for name, (shape, dtype) in self.large.items()
            }
        return self.blocks[block]

    def _runs(self, env: np.ndarray, row: np.ndarray) -> list[tuple[Block, int, int]]:
        """Split rows [N] into runs of consecutive rows within a block: (block, first, end)."""
        if len(row) == 0:
            return []
        breaks = (np.diff(env) != 0) | (np.diff(row) != 1) | (row[1:] % self.block_rows == 0)
        starts = [0, *(np.flatnonzero(breaks) + 1).tolist()]
        blocks = zip(env[starts].tolist(), (row[starts] // self.block_rows).tolist(), strict=True)
        return list(zip(blocks, starts, [*starts[1:], len(row)], strict=True))

    def _split(self, out: np.ndarray, envs: list[int], starts: list[int]) -> list[Part]:
        """Split sequences [B, T, *shape] at the borders of blocks."""
        length, rows = out.shape[1], self.block_rows
        parts = []
        for sequence, env, start in zip(out, envs, starts, strict=True):
            for low in range(start - start % rows, start + length, rows):
                first, end = max(start, low), min(start + length, low + rows)
                part = sequence[first - start : end - start]
                parts.append(((env, low // rows), first - low, part))
        return parts

    def _read_parts(self, name: str, parts: list[Part], size: int) -> None:
        """Fill all parts; Python lets other threads run while one reads a file."""
        threads = torch.get_num_threads() if size >= THREADED else 1

        def fill(share: list[Part]) -> None:
            for part in share:
                self._read_part(name, *part)

        if threads == 1:
            fill(parts)
            return
        if self._readers is None:
            self._readers = ThreadPoolExecutor(threads, "replay-reader")
        list(self._readers.map(fill, (parts[nth::threads] for nth in range(threads))))

    def _read_part(self, name: str, block: Block, first: int, out: np.ndarray) -> None:
        # A block file exists before the thread that wrote it removes the arrays.
        arrays = self.blocks.get(block)
        if arrays is not None:
            out[:] = arrays[name][first : first + len(out)]
        elif name in self._offsets:
            assert self._files is not None
            offset = self._offsets[name] + first * row_bytes(*self.fields[name])
            self._files.read_part(self._files.rows_name(block), offset, out)
        else:
            assert self._scratch is not None
            self._scratch.read(name, block, first, out)


class Scratch:
    """Large rewritable fields of complete blocks, in one file without a name.

    The system deletes the file when the process ends. It is read and written rather than mapped,
    so a full disk raises OSError and its pages do not count as memory of the process. It grows
    with the rows that were written.
    """

    def __init__(
        self,
        files: BlockFiles,
        fields: Fields,
        names: list[str],
        num_envs: int,
        num_blocks: int,
        block_rows: int,
    ) -> None:
        with tempfile.TemporaryFile(dir=files.path, prefix="scratch-") as file:
            self._handle = os.dup(file.fileno())
        weakref.finalize(self, os.close, self._handle)
        self._sizes = {name: row_bytes(*fields[name]) for name in names}
        self._offsets = block_offsets(fields, names, num_envs * num_blocks * block_rows)
        self._num_blocks, self._block_rows = num_blocks, block_rows

    def write(self, name: str, block: Block, first: int, values: np.ndarray) -> None:
        """Write rows of a block, from the row `first` of the block on."""
        write_fully(self._handle, self._offset(name, block, first), values)

    def read(self, name: str, block: Block, first: int, out: np.ndarray) -> None:
        """Read rows of a block, from the row `first` of the block on."""
        if not read_fully(self._handle, self._offset(name, block, first), out):
            raise OSError("the scratch file of the replay was truncated; resume the run")

    def _offset(self, name: str, block: Block, first: int) -> int:
        place = block[0] * self._num_blocks + block[1] % self._num_blocks
        return self._offsets[name] + (place * self._block_rows + first) * self._sizes[name]


def _gather(ring: np.ndarray, slots: np.ndarray, out: np.ndarray) -> None:
    """Copy rows [B, T] of a ring [N, *shape] to an array [B, T, *shape]."""
    if out.nbytes >= THREADED:
        # torch copies rows of single bytes more slowly than rows of eight-byte numbers.
        size = row_bytes(ring.shape[1:], ring.dtype)
        word = np.dtype(np.uint8 if size % 8 else np.int64)
        rows, copies = (
            torch.from_numpy(x.view(np.uint8).reshape(-1, size).view(word))
            for x in (ring.reshape(len(ring), -1), out.reshape(slots.size, -1))
        )
        torch.index_select(rows, 0, torch.from_numpy(slots.reshape(-1)), out=copies)
    else:
        # With mode "clip" `take` writes to `out` without a buffer; all slots are in range.
        ring.take(slots, 0, out, "clip")


def block_offsets(fields: Fields, names: list[str], rows: int) -> dict[str, int]:
    """Return where each field begins in a file of arrays [rows, *shape] of these fields."""
    sizes = [rows * row_bytes(*fields[name]) for name in names]
    return dict(zip(names, np.cumsum([0, *sizes]).tolist(), strict=False))


def is_large(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Return whether `storage="memmap"` keeps a field of this shape in files."""
    return row_bytes(shape, dtype) >= LARGE


def bytes_needed(
    fields: Fields, rewritable: list[str], on_disk: bool, large_in_files: bool
) -> tuple[int, int]:
    """Return the bytes that one row takes in memory and on disk."""
    memory = disk = 0
    for name, field in fields.items():
        size, large = row_bytes(*field), large_in_files and is_large(*field)
        memory += 0 if large else size
        disk += size * (GENERATIONS + large if name in rewritable else 1)
    return memory, disk if on_disk else 0


def check_storage(storage: str, folder: Path | None) -> None:
    """Raise ValueError for an unknown storage, or for one that lacks a folder."""
    if storage not in ("ram", "memmap"):
        raise ValueError(f"storage is {storage!r}; set data.storage to 'ram' or 'memmap'")
    if storage == "memmap" and folder is None:
        raise ValueError(
            "storage is 'memmap' but there is no folder for its files; give one, or set "
            "data.storage=ram"
        )
