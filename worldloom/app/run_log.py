"""worldloom.log in the folder of a run: what the terminal showed, and the traceback of an error."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldloom.app.command_line import USER_ERRORS, explain_error
from worldloom.app.run_dir import LOG


class _File:
    """A file that is only appended to. If that fails, as on a full disk, the run goes on."""

    def __init__(self, path: Path) -> None:
        self.number: int | None = None
        with contextlib.suppress(OSError):
            self.number = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(self, text: str) -> None:
        if self.number is not None:
            with contextlib.suppress(OSError):
                os.write(self.number, text.encode(errors="replace"))

    def close(self) -> None:
        number, self.number = self.number, None
        if number is not None:
            os.close(number)


class _Tee:
    """Stream that writes to another one and to a file, except for progress bars."""

    def __init__(self, stream: Any, file: _File) -> None:
        self.stream, self.file = stream, file
        self._in_bar = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        # A bar is written with a carriage return in front, and a line break after the last time.
        is_bar = text.startswith("\r") or (self._in_bar and text in ("", "\n"))
        if not is_bar:
            self.file.append(text)
        self._in_bar = is_bar and text != "\n"
        return self.stream.write(text)


@contextmanager
def record_output(folder: Path) -> Iterator[None]:
    """Append what is printed and logged inside the block to worldloom.log in a folder."""
    file, streams = _File(folder / LOG), (sys.stdout, sys.stderr)
    tees: Any = [_Tee(stream, file) for stream in streams]
    handlers = [
        (handler, handler.stream)
        for handler in logging.getLogger().handlers
        if isinstance(handler, logging.StreamHandler) and handler.stream in streams
    ]
    for handler, stream in handlers:
        handler.setStream(tees[streams.index(stream)])
    sys.stdout, sys.stderr = tees
    try:
        yield
    except Exception as error:
        file.append(traceback.format_exc())
        if isinstance(error, USER_ERRORS):  # printed when the folder is no longer held
            file.append(f"error: {explain_error(error)}\n")
        raise
    finally:
        sys.stdout, sys.stderr = streams
        for handler, stream in handlers:
            handler.setStream(stream)
        file.close()
