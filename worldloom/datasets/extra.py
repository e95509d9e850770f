"""Packages that only some data sets need."""

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def needs_extra(path: Path) -> Iterator[None]:
    """Say which of our extras installs what reading a data set needs."""
    try:
        yield
    except ImportError as error:
        raise ImportError(
            f"{path} needs a package that cannot be imported ({error}); "
            "pip install 'worldloom[offline]'"
        ) from error
