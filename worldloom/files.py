"""Writing files so that a reader, a crash or a full disk never leaves half of one."""

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import BinaryIO


@contextmanager
def atomic_write(file: Path) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `file` when the block ends without an exception.

    The temporary file is created in the same folder under a random name (O_EXCL, so neither an
    existing file nor a symbolic link is ever opened), with permissions according to the umask. Its
    contents and its name are flushed to the disk. A symbolic link called `file` is replaced, its
    target is left alone. After an exception `file` is unchanged.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync_folder(file.parent)


def write_text(file: Path, text: str) -> None:
    """Write a UTF-8 text file atomically; see `atomic_write`."""
    with atomic_write(file) as stream:
        stream.write(text.encode())


def sync_folder(folder: Path) -> None:
    """Flush the names of the files in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
