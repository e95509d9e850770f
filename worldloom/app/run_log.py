"""worldloom.log in the folder of a run: what the terminal showed, and the traceback of an error."""

import contextlib
import logging
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from worldloom.app.command_line import USER_ERRORS, explain_error
from worldloom.app.run_dir import LOG


class _Tee:
    """Stream that writes to another one and to a file, except for progress bars."""

    def __init__(self, stream: Any, append: Callable[[str], None]) -> None:
        self.stream, self.append = stream, append
        self._in_bar = False

    def __getattr__(self, name: str) -> Any:
        return getattr(self.stream, name)

    def write(self, text: str) -> int:
        # A bar is written with a carriage return in front, and a line break after the last time.
        is_bar = text.startswith("\r") or (self._in_bar and text in ("", "\n"))
        if not is_bar:
            self.append(text)
        self._in_bar = is_bar and text != "\n"
        self.stream.write(text)
        return len(text)


@contextmanager
def record_output(folder: Path) -> Iterator[None]:
    """Append what is printed and logged inside the block to worldloom.log in a folder.

    If the file cannot be written, as on a full disk, the run continues.
    """
    number: int | None = None
    with contextlib.suppress(OSError):
        number = os.open(folder / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)

    def append(text: str) -> None:
        if number is not None:
            with contextlib.suppress(OSError):
                os.write(number, text.encode(errors="replace"))

    streams = (sys.stdout, sys.stderr)
    tees: Any = [_Tee(stream, append) for stream in streams]
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
        append(traceback.format_exc())
        if isinstance(error, USER_ERRORS):  # printed when the folder is no longer held
            append(f"error: {explain_error(error)}\n")
        raise
    finally:
        sys.stdout, sys.stderr = streams
        for handler, stream in handlers:
            handler.setStream(stream)
        opened, number = number, None  # a stream that is used later must not write to it
        if opened is not None:
            os.close(opened)
