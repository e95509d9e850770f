"""Where the rows of a replay lie while it runs: in rings in memory, or large ones in files.

Letters: B sequences, T rows, E streams, R rows of a stream's ring, C rows of a block. Row r of a
stream lies in slot r % R of a ring, and in block r // C, which is one file once it is complete.
"""

import math
import mmap
import os
import tempfile
import zlib
from concurrent.futures import ThreadPoolExecutor, wait
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.replay.chunks import ChunkFolder, rows_name
from worldloom.replay.row_format import Arrays, Fields

# Latents on disk: of the last two checkpoints, and of the one that is being written.
GENERATIONS = 3
LARGE = 512  # bytes of a row's field from which it is kept out of memory
TOUCHED = 64 * 2**20  # bytes of a scratch file that may lie in memory before they are let go
NEIGHBOURS = 2**16  # bytes that the system maps together with a page that is read

THREADED = 2**20  # bytes of a gathered field from which several threads are worth their start

Block = tuple[int, int]  # stream, number
Part = tuple[Block, int, np.ndarray]  # block, number of the first row, where rows go [N, *shape]


class RowStorage:
    """Rings of R rows for E streams.

    folder: None, or where large fields are kept if `mapped`. Those of `latents`, which change, lie
    in a scratch file that is mapped into memory; all others in one file a block, once it is
    complete and `write_file` was called.

    written: number of rows ever written to each stream, [E]; to be set by who writes them.
    common: that number where it is the same for all streams, else None.
    blocks: {block: arrays [C, *shape]} of large fields that are not in a file yet.
    files: {block: number of its first row} of the blocks that are in a file.
    """

    def __init__(
        self,
        fields: Fields,
        latents: list[str],
        num_envs: int,
        rows: int,
        block_rows: int,
        folder: ChunkFolder | None = None,
        mapped: bool = False,
    ) -> None:
        self.fields, self.latents = fields, latents
        self.fixed = [name for name in fields if name not in latents]
        self.num_envs, self.rows, self.block_rows = num_envs, rows, block_rows
        self.folder = folder
        self.mapped = mapped
        self.streams = np.arange(num_envs)
        self.written = np.zeros(num_envs, np.int64)
        self.blocks: dict[Block, Arrays] = {}
        self.files: dict[Block, int] = {}
        self.rings: Arrays = {}
        self._scratch: dict[str, Scratch] = {}
        self._filed: list[str] = []
        self._readers: ThreadPoolExecutor | None = None
        for name, (shape, dtype) in fields.items():
            if not (mapped and is_large(shape, dtype)):
                # Zeros take no memory before they are written: pages are committed on first touch.
                self.rings[name] = np.zeros((num_envs, rows, *shape), dtype)
            elif name in latents:
                assert folder is not None
                self._scratch[name] = Scratch(folder.path, (num_envs, rows, *shape), dtype)
                self.rings[name] = self._scratch[name].array
            else:
                self._filed.append(name)

    @property
    def written(self) -> np.ndarray:
        """Number of rows ever written to each stream, [E]."""
        return self._written if self.common is None else np.full(self.num_envs, self.common)

    @written.setter
    def written(self, written: np.ndarray) -> None:
        first = int(written[0])
        self.common = first if (written == first).all() else None
        self._written = written

    def advance(self) -> None:
        """Count one more row in every stream."""
        if self.common is None:
            self._written = self._written + 1
        else:
            self.common += 1

    @property
    def oldest(self) -> np.ndarray:
        """Number of the oldest row of each stream that the ring still holds, [E]."""
        return np.maximum(self.written - self.rows, 0)

    def place(self, ahead: int) -> Any:
        """Return what to index a ring by for the row behind the newest of every stream.

        ahead: so many rows later; -1 is the newest row, or anything where there is none.
        """
        if self.common is not None:  # a slice and a number are an index four times as fast
            return slice(None), (self.common + ahead) % self.rows
        return self.streams, (self._written + ahead) % self.rows

    def append(self, values: Arrays) -> None:
        """Write a row behind the newest of every stream, [E, *shape]; count it with `advance`."""
        place, rings = self.place(0), self.rings
        for name, value in values.items():
            if name in rings:
                rings[name][place] = value
            else:
                self._write_blocks(name, self.streams, self.written, value)
        for scratch in self._scratch.values():
            scratch.touch(self.num_envs)

    def write(self, env: int | np.ndarray, row: np.ndarray, values: Arrays) -> None:
        """Write rows (numbers [N]) of one stream, or of streams env [N]; values: [N, *shape]."""
        slot = row % self.rows
        for name, value in values.items():
            if name in self.rings:
                self.rings[name][env, slot] = value
                if name in self._scratch:
                    self._scratch[name].touch(row.size)
            else:
                self._write_blocks(name, env, row, value)

    def take(self, name: str, env: np.ndarray, start: np.ndarray, slots: np.ndarray) -> np.ndarray:
        """Gather sequences of a field, [B, T, *shape].

        env, start: [B], stream and number of each first row; slots: [B, T], of all these rows,
        counted over all streams (which is what rings need, while files need the other two).
        """
        shape, dtype = self.fields[name]
        out = np.empty((*slots.shape, *shape), dtype)
        if name in self.rings:
            _gather(self.rings[name].reshape(-1, *shape), slots, out)
            if name in self._scratch:
                self._scratch[name].touch(slots.size, scattered=True)
            return out
        if slots.size == 0:
            return out
        length, rows = slots.shape[1], self.block_rows
        parts: list[Part] = []
        for sequence, stream, first in zip(out, env.tolist(), start.tolist(), strict=True):
            for number in range(first // rows, (first + length - 1) // rows + 1):
                low, high = max(first, number * rows), min(first + length, (number + 1) * rows)
                parts.append(((stream, number), low, sequence[low - first : high - first]))
        self._take_parts(name, parts, torch.get_num_threads() if out.nbytes >= THREADED else 1)
        return out

    def get(self, names: list[str], env: int, row: np.ndarray) -> Arrays:
        """Copy fields of rows (numbers [N], in one block) that are not in files."""
        arrays = {}
        for name in names:
            if name in self.rings:
                arrays[name] = self.rings[name][env, row % self.rows]
                if name in self._scratch:
                    self._scratch[name].touch(len(row))
            else:
                number = int(row[0]) // self.block_rows
                arrays[name] = self.blocks[env, number][name][row - number * self.block_rows]
        return arrays

    def write_file(self, block: Block, first: int, arrays: Arrays) -> int:
        """Write the rows of a complete block, from number `first` on, to its file, and use that.

        Returns its CRC-32.
        """
        assert self.folder is not None
        crc = self.folder.write(rows_name(*block), arrays)
        self.files[block] = first
        self.blocks.pop(block, None)
        return crc

    def use_file(self, block: Block, arrays: Arrays) -> None:
        """Take over the rows of a complete block as they were read from its file."""
        env, number = block
        end = (number + 1) * self.block_rows
        row = np.arange(end - len(arrays["rewards"]), end)
        self.files[block] = int(row[0])
        kept = row >= self.oldest[env]
        rings = {name: x[kept] for name, x in arrays.items() if name in self.rings}
        self.write(env, row[kept], rings)

    def forget(self, block: Block) -> None:
        """Let go of a block whose rows have left the ring, or were never there."""
        self.blocks.pop(block, None)
        if self.files.pop(block, None) is not None and self.folder is not None:
            self.folder.release(rows_name(*block))

    def digest(self) -> int:
        """Return the CRC-32 of all stored rows but for their latents."""
        digest = 0
        for env, (first, end) in enumerate(zip(self.oldest, self.written, strict=True)):
            for low in range(int(first), int(end), self.block_rows):
                row = np.arange(low, min(low + self.block_rows, int(end)))
                slots = env * self.rows + row[None] % self.rows
                for name in self.fixed:
                    taken = self.take(name, np.array([env]), row[:1], slots)
                    digest = zlib.crc32(taken.tobytes(), digest)
        return digest

    def _write_blocks(
        self, name: str, env: int | np.ndarray, row: np.ndarray, value: np.ndarray
    ) -> None:
        rows = self.block_rows
        if isinstance(env, np.ndarray):  # a row for each of several streams
            for stream, number, one in zip(env.tolist(), row.tolist(), value, strict=True):
                self._block(name, (stream, number // rows))[number % rows] = one
            return
        first, end = int(row[0]), int(row[-1]) + 1
        for number in range(first // rows, (end - 1) // rows + 1):
            low, high = max(first, number * rows), min(end, (number + 1) * rows)
            block = self._block(name, (env, number))
            block[low - number * rows : high - number * rows] = value[low - first : high - first]

    def _block(self, name: str, block: Block) -> np.ndarray:
        if block not in self.blocks:
            fields = ((name, self.fields[name]) for name in self._filed)
            self.blocks[block] = {
                name: np.zeros((self.block_rows, *shape), dtype) for name, (shape, dtype) in fields
            }
        return self.blocks[block][name]

    def _take_parts(self, name: str, parts: list[Part], threads: int) -> None:
        """Fill the arrays of all parts; Python lets other threads run while it reads a file."""
        if threads > 1 and self._readers is None:
            self._readers = ThreadPoolExecutor(threads - 1, "replay-reader")

        def fill(share: list[Part]) -> None:
            for block, low, out in share:
                self._take_part(name, block, low, out)

        shares = [parts[nth::threads] for nth in range(threads)]
        others = [self._readers.submit(fill, share) for share in shares[1:] if self._readers]
        try:
            fill(shares[0])
        finally:
            wait(others)  # also after an error: they write to an array of the caller
        for other in others:
            other.result()

    def _take_part(self, name: str, block: Block, low: int, out: np.ndarray) -> None:
        # The writer thread makes the file known before it lets go of the arrays.
        arrays = self.blocks.get(block)
        if arrays is not None:
            offset = low - block[1] * self.block_rows
            out[:] = arrays[name][offset : offset + len(out)]
            return
        assert self.folder is not None
        shape, dtype = self.fields[name]
        skip = (low - self.files[block]) * bytes_of(shape, dtype)
        self.folder.read_part(rows_name(*block), name, skip, out)


class Scratch:
    """An array of zeros in a file without a name, which goes when the process does.

    The pages of a mapped file count as memory of the process while they are mapped, so they are
    let go again and again: their contents stay in the file, or on their way to it.

    Raises:
        OSError: the disk has no room. It is all taken at once, for a disk that fills up later
            would kill the process at its next write to the array.
    """

    def __init__(self, folder: Path, shape: tuple[int, ...], dtype: np.dtype) -> None:
        self._row_bytes = bytes_of(shape[2:], dtype)
        size = bytes_of(shape, dtype)
        with tempfile.TemporaryFile(dir=folder, prefix="scratch-") as file:
            try:
                if hasattr(os, "posix_fallocate"):
                    os.posix_fallocate(file.fileno(), 0, size)
                else:
                    file.truncate(size)
            except OSError as error:
                why = f"{error.strerror}: {size / 1e9:.1f} GB of latents; lower data.capacity"
                raise OSError(error.errno, why, str(folder)) from None
            self._map = mmap.mmap(file.fileno(), size)
        self.array = np.frombuffer(self._map, dtype).reshape(shape)
        self._touched = 0

    def touch(self, rows: int, scattered: bool = False) -> None:
        """Count rows that were read or written; let go of the pages when they have become many."""
        self._touched += rows * (self._row_bytes + NEIGHBOURS * scattered)
        if self._touched > TOUCHED and hasattr(mmap, "MADV_DONTNEED"):
            self._map.madvise(mmap.MADV_DONTNEED)
            self._touched = 0


def _gather(ring: np.ndarray, slots: np.ndarray, out: np.ndarray) -> None:
    """Copy rows [B, T] of a ring [N, *shape] to an array [B, T, *shape]."""
    if out.nbytes >= THREADED:
        # As numbers of eight bytes where that is possible: for longer rows of single bytes
        # torch has a slower way.
        size = bytes_of(ring.shape[1:], ring.dtype)
        word = np.dtype(np.uint8 if size % 8 else np.int64)
        rows, copies = (
            torch.from_numpy(x.view(np.uint8).reshape(-1, size).view(word))
            for x in (ring.reshape(len(ring), -1), out.reshape(slots.size, -1))
        )
        torch.index_select(rows, 0, torch.from_numpy(slots.reshape(-1)), out=copies)
    else:
        # Mode "clip" lets take write into `out` without a buffer; no slot is out of range.
        ring.take(slots, 0, out, "clip")


def bytes_of(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the bytes of one row of a field."""
    return math.prod(shape) * dtype.itemsize


def is_large(shape: tuple[int, ...], dtype: np.dtype) -> bool:
    """Tell whether a field of this shape is kept out of memory where that is asked for."""
    return bytes_of(shape, dtype) >= LARGE


def bytes_needed(
    fields: Fields, latents: list[str], on_disk: bool, mapped: bool
) -> tuple[int, int]:
    """Return the bytes that a step takes in memory and on disk."""
    memory = disk = 0
    for name, field in fields.items():
        size, large = bytes_of(*field), mapped and is_large(*field)
        memory += 0 if large else size
        disk += size * (GENERATIONS + large if name in latents else 1)
    return memory, disk if on_disk else 0


def require_storage(storage: str, folder: Path | None) -> None:
    """Refuse a storage that is not known, or lacks a folder."""
    if storage not in ("ram", "memmap"):
        raise ValueError(f"storage is {storage!r}; set data.storage to 'ram' or 'memmap'")
    if storage == "memmap" and folder is None:
        raise ValueError(
            "storage is 'memmap' but there is no folder for its files; give one, or set "
            "data.storage=ram"
        )
