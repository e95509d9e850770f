"""Block files: the rows of a replay on disk, with their names, checksums and deletion.

A block is the rows [n * C, (n + 1) * C) of one stream. Its immutable fields are written once, for
example to `0-000004-rows.bin`. Its rewritable fields are written to a new file, for example
`0-000004-fields-7.bin`, by each checkpoint before which one of them has changed. A file never
changes after it was given its name. It contains one array [C, *shape] per field and nothing else,
so the position of a row follows from the fields and from C.

The replays of several processes share one folder. Files are named by the number that a stream has
among those of all processes, so they stay what they are if another process continues a stream.
"""

import os
import re
import sys
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np

from worldloom.files import atomic_write, require_regular, sync_folder
from worldloom.replay.row_format import Arrays, Fields, row_bytes

Block = tuple[int, int]  # stream, number

BLOCK_BYTES = 4 * 2**20  # approximate size of a file
MIN_BLOCK_ROWS = 64
NAME = re.compile(r"(\d+)-(\d{6,})-(?:rows|fields-(\d+))\.bin")


def choose_block_rows(fields: Fields, rewritable: Iterable[str], rows: int) -> int:
    """Return C for streams of `rows` rows; a resumed run gets the same number."""
    sizes = {name: row_bytes(*field) for name, field in fields.items()}
    of_rewritable = sum(sizes[name] for name in rewritable)
    largest = max(sum(sizes.values()) - of_rewritable, of_rewritable)
    return max(1, min(rows // 4, max(MIN_BLOCK_ROWS, BLOCK_BYTES // largest)))


def parse_name(name: str) -> Block:
    """Return the block that a file belongs to, with the number of the stream in its name."""
    stream, number = name.lstrip(".").split("-")[:2]
    return int(stream), int(number)


class BlockFiles:
    """The block files of one replay, in a folder that other processes may use as well.

    streams: the numbers in the names of this replay's files. They may include more than it has
        streams, so that somebody deletes the files of streams that no longer exist.
    used: {name: CRC-32} of the files that the replay refers to. `keep` does not delete them.
    """

    def __init__(self, path: Path, streams: range = range(sys.maxsize)) -> None:
        self.path, self.streams = path, streams
        self.used: dict[str, int] = {}
        self._unsynced: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)
        for leftover in path.glob(".*.bin.*.tmp"):  # of a killed run
            if parse_name(leftover.name)[0] in streams:
                leftover.unlink(missing_ok=True)

    def rows_name(self, block: Block) -> str:
        """Return the name of the file with the immutable fields of a block."""
        return f"{self.streams.start + block[0]}-{block[1]:06d}-rows.bin"

    def fields_name(self, block: Block, generation: int) -> str:
        """Return the name of the file with the rewritable fields of a block in one checkpoint."""
        return f"{self.streams.start + block[0]}-{block[1]:06d}-fields-{generation}.bin"

    def parse_block(self, name: str) -> Block:
        """Return the block of this replay that a file belongs to."""
        stream, number = parse_name(name)
        return stream - self.streams.start, number

    def write(self, name: str, arrays: Arrays) -> int:
        """Write the arrays of a block, add the file to `used` and return its CRC-32.

        Raises:
            OSError: the file cannot be written, for example because the disk is full; no part of
                it is left.
        """
        buffers = [cast(Any, np.ascontiguousarray(x)).data.cast("B") for x in arrays.values()]
        crc = 0
        for buffer in buffers:
            crc = zlib.crc32(buffer, crc)
        self.used[name] = crc  # before the file exists: `keep` may list the folder at any time
        try:
            with atomic_write(self.path / name, sync=False) as file:
                for buffer in buffers:
                    file.write(buffer)
        except BaseException:
            del self.used[name]
            raise
        self._unsynced.add(name)
        return crc

    def sync(self, names: Iterable[str]) -> None:
        """Flush those of the files to the disk that were not flushed yet."""
        for name in self._unsynced.intersection(names):
            handle = os.open(self.path / name, os.O_RDONLY)
            try:
                os.fsync(handle)
                # Rewritable fields are only read when a run is resumed. Dropping them from the
                # page cache leaves room for the rows, which are read all the time.
                if "fields" in name and hasattr(os, "posix_fadvise"):
                    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
            finally:
                os.close(handle)
            self._unsynced.discard(name)

    def sync_names(self) -> None:
        """Flush the names of the files to the disk."""
        sync_folder(self.path)

    def read(self, name: str, crc: int | None, fields: Fields, rows: int) -> Arrays | None:
        """Return the arrays of a file and add it to `used`; None if it is damaged or missing."""
        data = self._read_checked(name, crc)
        if data is None or crc is None:
            return None
        self.used[name] = crc
        arrays, offset = {}, 0
        for field, (shape, dtype) in fields.items():
            size = rows * row_bytes(shape, dtype)
            part = np.frombuffer(data[offset : offset + size], dtype)
            arrays[field], offset = part.reshape(rows, *shape), offset + size
        return arrays

    def read_part(self, name: str, offset: int, out: np.ndarray) -> None:
        """Fill a contiguous array with the bytes from `offset` on.

        Files are opened for every read because a process may only have a limited number of open
        or mapped files, and are not mapped because a truncated mapped file would kill the process.
        """
        # os.open is much cheaper than `open`, and one batch reads from about twenty files.
        handle = os.open(os.path.join(self.path, name), os.O_RDONLY)
        try:
            complete = read_fully(handle, offset, out)
        finally:
            os.close(handle)
        if not complete:
            raise OSError(
                f"{self.path / name} was truncated while the run was using it; resume the run"
            )

    def release(self, name: str) -> None:
        """Remove a file from `used`, so that `keep` may delete it."""
        self.used.pop(name, None)

    def remove(self, name: str) -> None:
        """Delete a file."""
        self.release(name)
        self._unsynced.discard(name)
        (self.path / name).unlink(missing_ok=True)

    def keep(self, names: Container[str]) -> None:
        """Delete all block files of this replay except for these and for those in `used`."""
        found = list(self._list())  # before reading `used`: see `write`
        for name in found:
            own = parse_name(name)[0] in self.streams
            if own and name not in names and name not in self.used:
                self.remove(name)

    def find_damaged(self, files: Mapping[str, int]) -> list[str]:
        """Return those of {name: CRC-32} that are missing or have another checksum."""
        return [name for name, crc in files.items() if self._read_checked(name, crc) is None]

    def size(self) -> int:
        """Return the bytes of all block files in the folder."""
        return sum((self.path / name).stat().st_size for name in self._list())

    def newest_generation(self) -> int:
        """Return the highest generation of rewritable fields in the folder, or 0."""
        found = (NAME.fullmatch(name) for name in self._list())
        return max((int(match[3]) for match in found if match and match[3]), default=0)

    def _list(self) -> Iterator[str]:
        with os.scandir(self.path) as entries:
            yield from (entry.name for entry in entries if NAME.fullmatch(entry.name))

    def _read_checked(self, name: str, crc: int | None) -> bytes | None:
        if NAME.fullmatch(name) is None:  # a path, in a forged checkpoint
            return None
        try:
            require_regular(self.path / name)
            data = (self.path / name).read_bytes()
        except (OSError, ValueError):
            return None
        return data if zlib.crc32(data) == crc else None


def read_fully(handle: int, offset: int, out: np.ndarray) -> bool:
    """Fill a contiguous array from an open file; return False if the file ends before."""
    buffer: Any = out
    done = os.preadv(handle, [buffer], offset)
    if done < out.nbytes:  # a signal or the end of the file
        left = memoryview(buffer).cast("B")
        while done < out.nbytes and (count := os.preadv(handle, [left[done:]], offset + done)):
            done += count
    return done == out.nbytes


def write_fully(handle: int, offset: int, array: np.ndarray) -> None:
    """Write all bytes of an array to an open file.

    Raises:
        OSError: for example because the disk is full.
    """
    buffer: Any = np.ascontiguousarray(array)
    done = os.pwrite(handle, buffer, offset)
    while done < array.nbytes:  # a signal or a full disk
        done += os.pwrite(handle, memoryview(buffer).cast("B")[done:], offset + done)
