"""Atomic writes, and YAML that is read as plain data."""

import os
import secrets
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException


@contextmanager
def atomic_write(file: Path, *, sync: bool = True) -> Iterator[BinaryIO]:
    """Open a temporary file that replaces `file` when the block ends without an exception.

    The temporary file is created in the same folder under a random name (O_EXCL, so neither an
    existing file nor a symbolic link is ever opened), with permissions according to the umask. Its
    contents and its name are flushed to the disk. A symbolic link called `file` is replaced, its
    target is left alone. After an exception `file` is unchanged.

    sync: flush contents and name; with False the caller has to, before it relies on the file.

    Raises:
        OSError: the file cannot be written, for example because the disk is full.
    """
    temporary = file.with_name(f".{file.name}.{secrets.token_hex(4)}.tmp")
    try:
        with temporary.open("xb") as stream:
            yield stream
            stream.flush()
            if sync:
                os.fsync(stream.fileno())
        os.replace(temporary, file)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    if sync:
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


def read_yaml(file: Path, advice: str, interpolations: bool = False) -> Any:
    """Return the contents of a YAML file as plain data; nothing in the file is resolved or run.

    advice: how to fix a file that cannot be read; the end of the message.
    interpolations: whether strings may contain "${"; `False` for all files but a run's config.yaml.

    Raises:
        ValueError: the file is not YAML, has tags (!!python/...), aliases (*name) or duplicate
            keys, or contains an interpolation that is not allowed.
    """
    try:
        text = file.read_text(encoding="utf-8")
        for event in yaml.parse(text, Loader=yaml.SafeLoader):
            if getattr(event, "tag", None) or isinstance(event, yaml.AliasEvent):
                line = event.start_mark.line + 1
                raise ValueError(f"line {line} has a tag or an alias, which are not allowed")
        # OmegaConf, unlike plain PyYAML, reads 1e-3 as a number and rejects duplicate keys.
        tree = OmegaConf.to_container(OmegaConf.create(text))
    except AssertionError:  # OmegaConf's answer to a number
        raise ValueError(f"{file} is not valid YAML (it has no keys); {advice}") from None
    except (yaml.YAMLError, OmegaConfBaseException, ValueError, OSError, RecursionError) as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{file} is not valid YAML ({reason}); {advice}") from None
    if not interpolations:
        reject_interpolations(tree, file)
    return tree


def check_format(file: Path, found: Any, expected: int, advice: str) -> None:
    """Raise ValueError unless a file that worldloom wrote has the expected format version.

    found: the version in the file, None if there is none. advice: what to do with a file of an
    earlier version.
    """
    if found == expected:
        return
    newer = isinstance(found, int) and found > expected
    writer = f"{'a newer' if newer else 'an earlier'} worldloom (format {found!r})"
    if found is None:
        writer = "worldloom 0.1.0 before format versions were recorded"
    raise ValueError(
        f"{file} was written by {writer}, but this version reads format {expected}; "
        f"{'update worldloom' if newer else advice}"
    )


def reject_interpolations(tree: Any, source: Path | str) -> None:
    """Raise ValueError if a key or string anywhere in a tree of dicts and lists contains "${".

    OmegaConf would replace ${...} by a value from elsewhere, such as an environment variable, after
    the file has been checked.

    source: named in the message.
    """
    if isinstance(tree, str) and "${" in tree:
        raise ValueError(
            f"{source} contains {tree!r}, but interpolations are not allowed in it; replace it by "
            "its value"
        )
    if isinstance(tree, Mapping):
        for key, value in tree.items():
            reject_interpolations(key, source)
            reject_interpolations(value, source)
    elif isinstance(tree, list | tuple):
        for value in tree:
            reject_interpolations(value, source)


def remember(file: Path, make: Callable[[], str]) -> str:
    """Return the text of a file; if it does not exist, write the result of `make()` first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, make())
    return file.read_text(encoding="utf-8").strip()
