"""The files of a replay: what they are called, how they are written, read, checked and deleted.

A file holds the rows [n * C, (n + 1) * C) of one stream (fewer where the ring had lost the first
ones already): all their fields but the latents, or the latents alone as they were when a certain
checkpoint was made. It never changes once it has its name. The format is safetensors: plain arrays
behind a header, which says where each begins.
"""

import json
import math
import os
import re
import zlib
from collections.abc import Container, Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load, save

from worldloom.replay.row_format import Arrays, Fields

BYTES = 4 * 2**20  # of a file, about
FEWEST_ROWS = 64
NAME = re.compile(r"(\d+)-(\d{6,})-(?:rows|latents-(\d+))\.safetensors")


class DamagedFile(ValueError):
    """A file that is missing, or not as it was written."""


def rows_per_file(fields: Fields, latents: Iterable[str], rows: int) -> int:
    """Return C for a ring of so many rows; it depends on nothing else, so a resumed run agrees."""
    sizes = {name: math.prod(shape) * dtype.itemsize for name, (shape, dtype) in fields.items()}
    of_latents = sum(sizes[name] for name in latents)
    largest = max(sum(sizes.values()) - of_latents, of_latents)
    return max(1, min(rows // 4, max(FEWEST_ROWS, BYTES // largest)))


def rows_name(env: int, number: int) -> str:
    """Return the name of the file with the rows of a block."""
    return f"{env}-{number:06d}-rows.safetensors"


def latents_name(env: int, number: int, generation: int) -> str:
    """Return the name of the file with the latents of a block, as a certain state found them."""
    return f"{env}-{number:06d}-latents-{generation}.safetensors"


def block_of(name: str) -> tuple[int, int]:
    """Return the stream and the number of the block that a file belongs to."""
    env, number = name.split("-")[:2]
    return int(env), int(number)


class ChunkFolder:
    """The folder that holds the files of one replay.

    used: {name: CRC-32} of the files that the replay refers to, which `keep` does not delete.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.used: dict[str, int] = {}
        self._offsets: dict[str, dict[str, int]] = {}
        self._unsynced: set[str] = set()
        path.mkdir(parents=True, exist_ok=True)
        for left in path.glob("*.safetensors.tmp"):  # by a run that was killed
            left.unlink(missing_ok=True)

    def write(self, name: str, arrays: Mapping[str, np.ndarray]) -> int:
        """Write a file and use it, or leave nothing; return its CRC-32.

        Raises:
            OSError: it cannot be written, for example because the disk is full.
        """
        data = save(dict(arrays))
        crc = zlib.crc32(data)
        # Known as used before it exists, for `keep` may look through the folder meanwhile.
        self.used[name] = crc
        temporary = self.path / f"{name}.tmp"
        try:
            temporary.write_bytes(data)
            os.replace(temporary, self.path / name)
        except BaseException:
            del self.used[name]
            temporary.unlink(missing_ok=True)
            raise
        self._unsynced.add(name)
        self._offsets[name] = offsets(data)
        return crc

    def sync(self, names: Iterable[str]) -> None:
        """Flush those files to the disk that were not yet; `sync_folder` makes their names last."""
        for name in self._unsynced.intersection(names):
            # Files of latents are read at a resume at most: let the system cache those of rows.
            flush_to_disk(self.path / name, forget="latents" in name)
            self._unsynced.discard(name)

    def sync_folder(self) -> None:
        """Flush the names of the files to the disk."""
        flush_to_disk(self.path)

    def read(self, name: str, crc: int | None) -> Arrays:
        """Return the arrays of a file, and use it from now on.

        Raises:
            DamagedFile: it is missing or has another CRC-32.
        """
        try:
            data = (self.path / name).read_bytes()
        except OSError as error:
            raise DamagedFile(f"{name} cannot be read: {error.strerror}") from error
        if crc is None or zlib.crc32(data) != crc:
            raise DamagedFile(f"{name} is damaged: its check sum differs")
        try:
            arrays = load(data)
        except (SafetensorError, KeyError) as error:
            raise DamagedFile(f"{name} is no safetensors file: {error}") from error
        self.used[name] = crc
        self._offsets[name] = offsets(data)
        return arrays

    def read_part(self, name: str, array: str, skip: int, out: np.ndarray) -> None:
        """Fill a contiguous array from a file in use, from so many bytes into one of its arrays.

        Files are read rather than mapped: Python keeps one of the few open files a process may
        have for every mapping, and a mapped file that was cut off kills the process.
        """
        offset = self._offsets[name][array] + skip
        left = memoryview(cast(Any, out)).cast("B")
        # Much cheaper than `open` of a `Path`, and a batch reads from some twenty files.
        file = os.open(os.path.join(self.path, name), os.O_RDONLY)
        try:
            while left and (count := os.preadv(file, [left], offset)):
                left, offset = left[count:], offset + count
        finally:
            os.close(file)
        if left:
            raise OSError(f"{self.path / name} was cut off while the run was using it; resume it")

    def release(self, name: str) -> None:
        """Use a file no longer, so that `keep` may delete it."""
        self.used.pop(name, None)
        self._offsets.pop(name, None)

    def remove(self, name: str) -> None:
        """Delete a file that nobody has been told of."""
        self.release(name)
        self._unsynced.discard(name)
        (self.path / name).unlink(missing_ok=True)

    def keep(self, names: Container[str]) -> None:
        """Delete all files of a replay but these and those in use."""
        found = list(self._names())  # before `used` is looked at: see `write`
        for name in found:
            if name not in names and name not in self.used:
                self.remove(name)

    def damaged(self, files: Mapping[str, int]) -> list[str]:
        """Return which of these are missing or have another CRC-32."""
        return [name for name, crc in files.items() if self._crc(name) != crc]

    def size(self) -> int:
        """Return the bytes of all files of a replay in the folder."""
        return sum((self.path / name).stat().st_size for name in self._names())

    def newest_generation(self) -> int:
        """Return the highest generation of latents in the folder, 0 if there are none."""
        found = (NAME.fullmatch(name) for name in self._names())
        return max((int(match[3]) for match in found if match and match[3]), default=0)

    def _names(self) -> Iterator[str]:
        with os.scandir(self.path) as entries:
            yield from (entry.name for entry in entries if NAME.fullmatch(entry.name))

    def _crc(self, name: str) -> int | None:
        crc = 0
        try:
            with open(self.path / name, "rb", buffering=0) as file:
                while data := file.read(BYTES):
                    crc = zlib.crc32(data, crc)
        except OSError:
            return None
        return crc


def offsets(data: bytes) -> dict[str, int]:
    """Return where in the bytes of a safetensors file each array begins."""
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    return {
        name: 8 + length + entry["data_offsets"][0]
        for name, entry in header.items()
        if name != "__metadata__"
    }


def flush_to_disk(path: Path, forget: bool = False) -> None:
    """Make a file last, or the names in a folder; forget: let the system drop what it cached."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
        if forget and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    finally:
        os.close(handle)
