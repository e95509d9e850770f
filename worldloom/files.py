"""Files: atomic writes, and the only functions that read YAML, text, arrays and tensors.

What is read may come from anyone. Nothing in it is executed, and its size is compared with what
the file contains and with the free memory before anything is allocated.
"""

import math
import os
import re
import secrets
import stat
import zipfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from worldloom.memory import require_memory

# Reading 150 configurations takes 6 s with the pure Python loader. Both create plain data only.
LOADER = getattr(yaml, "CSafeLoader", yaml.SafeLoader)
DEPTH = 100  # of nested containers; no file that worldloom or a user writes has more than ten
TENSORDICTS = ("tensordict.tensordict.TensorDict", "tensordict._td.TensorDict")  # by version
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}


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


def write_yaml(file: Path, tree: Mapping[str, Any], version: int) -> None:
    """Write plain data with the version of its format.

    The version is the last line, so that `check_format` finds out whether the file was cut off.
    """
    ordered = {**{key: x for key, x in tree.items() if key != "format"}, "format": version}
    write_text(file, OmegaConf.to_yaml(OmegaConf.create(ordered)))


def sync_folder(folder: Path) -> None:
    """Flush the names of the files in a folder to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def read_text(file: Path) -> str:
    """Return the contents of a UTF-8 text file.

    Raises:
        OSError: it cannot be read.
        ValueError: it is a pipe or a device, larger than the free memory, or no UTF-8.
    """
    require_regular(file)
    require_memory(2 * file.stat().st_size, str(file))
    return file.read_text(encoding="utf-8")


def require_regular(file: Path) -> None:
    """Raise ValueError for a pipe or a device, of which reading may never end."""
    if not stat.S_ISREG(file.stat().st_mode):
        raise ValueError(f"{file} is not a regular file; expected a copy of one")


def require_plain(text: str) -> str:
    """Return a YAML text unless it has tags, aliases or too many nested containers.

    Raises:
        ValueError, yaml.YAMLError: gives the line.
    """
    depth = 0
    for event in yaml.parse(text, Loader=LOADER):
        depth += isinstance(event, yaml.CollectionStartEvent)
        depth -= isinstance(event, yaml.CollectionEndEvent)
        line = event.start_mark.line + 1
        if getattr(event, "tag", None) or isinstance(event, yaml.AliasEvent):
            raise ValueError(f"line {line} has a tag or an alias, which are not allowed")
        if depth > DEPTH:
            raise ValueError(f"line {line} has {depth} nested containers; expected at most {DEPTH}")
    return text


def read_yaml(file: Path, advice: str, interpolations: bool = False) -> Any:
    """Return the contents of a YAML file as plain data; nothing in the file is resolved or run.

    advice: how to fix a file that cannot be read; the end of the message.
    interpolations: whether strings may contain "${"; `False` for all files but a run's config.yaml.

    Raises:
        ValueError: the file is not YAML, has tags (!!python/...), aliases (*name) or duplicate
            keys, or contains an interpolation that is not allowed.
    """
    try:
        text = require_plain(read_text(file))
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


def read_shipped(file: Path) -> Any:
    """Return the contents of a YAML file that is a part of worldloom, which takes less time."""
    return yaml.load(file.read_text(), LOADER)


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
        writer = "worldloom 0.1.0 before format versions were recorded, or was cut off"
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
    """Return the id in a file; if it does not exist, write the result of `make()` first."""
    if not file.exists():
        file.parent.mkdir(parents=True, exist_ok=True)
        write_text(file, make())
    return read_id(file)


def read_id(file: Path) -> str:
    """Return the id in a file; raise ValueError for a text that could be part of a path."""
    text = read_text(file).strip()
    if not re.fullmatch(r"[\w-]{1,64}", text):
        raise ValueError(f"{file} contains {text[:64]!r}; expected letters and digits; delete it")
    return text


def read_arrays(
    file: Path, names: Sequence[str] | None = None
) -> tuple[dict[str, np.ndarray], list[str]]:
    """Return arrays of an .npz file by name, all or those with the given names, and all names.

    Raises:
        OSError: there is no such file.
        ValueError: it is not a zip file of arrays, has Python objects, or an array declares more
            bytes than it contains or than memory is available. The message does not name the file.
    """
    require_regular(file)
    arrays, total = {}, 0
    try:
        with zipfile.ZipFile(file) as archive:
            held = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
            wanted = {name: info for name, info in held.items() if names is None or name in names}
            for name, info in wanted.items():
                with archive.open(info) as stream:
                    total += _require_contents(name, stream, info)
            require_memory(total, "its content")
            for name, info in wanted.items():
                with archive.open(info) as stream:
                    arrays[name] = np.lib.format.read_array(stream, allow_pickle=False)
    except (OSError, ValueError):
        raise
    except Exception as error:  # of the zip file and its compression
        reason = f"{type(error).__name__}: {error}"
        if not zipfile.is_zipfile(file):
            with file.open("rb") as opened:
                truncated = opened.read(2) == b"PK"
            reason = f"it is {'a truncated' if truncated else 'not a'} zip file"
        raise ValueError(reason) from error
    return arrays, list(held)


def _require_contents(name: str, stream: Any, info: zipfile.ZipInfo) -> int:
    """Return the bytes that the header of an array declares, which the zip file must contain."""
    if info.compress_type not in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
        raise ValueError(f"{name} is compressed in another way than numpy.savez does")
    version = np.lib.format.read_magic(stream)
    if version not in HEADERS:
        raise ValueError(f"{name} has the format {version}; expected one of {[*HEADERS]}")
    shape, _, dtype = HEADERS[version](stream)
    size, held = math.prod(shape) * dtype.itemsize, info.file_size - stream.tell()
    if size > held or any(n < 0 for n in shape):
        raise ValueError(
            f"{name} declares the shape {shape} of {dtype}, {size:,} bytes, but contains {held:,}"
        )
    return size


def read_tensors(
    file: Path, *, mmap: bool = False, verify: bool = False, tensordicts: bool = False
) -> Any:
    """Return the tensors and plain data in a file that torch.save wrote; no code is executed.

    mmap: map the file instead of reading it. verify: compare checksums first.
    tensordicts: also read TensorDicts, as dicts; the package tensordict is not needed.

    Raises:
        OSError: there is no such file.
        Exception: torch's, if it is damaged or contains anything else.
        ValueError: something in it declares more bytes than the file has. The message does not name
            the file.
    """
    import torch

    require_regular(file)
    size = file.stat().st_size
    with zipfile.ZipFile(file) as archive:  # torch's older formats declare sizes without contents
        infos = archive.infolist()
        total = sum(info.file_size for info in infos)
        if total > size or any(info.compress_type != zipfile.ZIP_STORED for info in infos):
            raise ValueError(f"it declares {total:,} bytes, but has {size:,}")
        if not mmap:
            require_memory(size, "it")
        if verify and (record := archive.testzip()):
            raise ValueError(f"it is damaged: the checksum of {record} differs")
    # Their names stand for classes here: a plain object that keeps the state, and dict.
    known: list[Any] = [(_TensorDict, name) for name in TENSORDICTS]
    known = [*known, (dict, "tensordict.utils._StringOnlyDict")] if tensordicts else []
    with torch.serialization.safe_globals(known):
        tree = torch.load(file, map_location="cpu", weights_only=True, mmap=mmap)
    tree = _open_tensordicts(tree, 0)
    _count_leaves(tree, size, {}, 0)
    return tree


class _TensorDict:
    """Holds the attributes of a TensorDict in a file; `_tensordict` has its items."""


def _open_tensordicts(tree: Any, depth: int) -> Any:
    """Return a tree in which the TensorDicts at its top, and in each other, are dicts."""
    if not isinstance(tree, _TensorDict):
        return tree
    items = vars(tree).get("_tensordict")
    if type(items) is not dict or depth > DEPTH:
        raise ValueError("it has a TensorDict without items, or too many nested ones")
    return {key: _open_tensordicts(value, depth + 1) for key, value in items.items()}


def _count_leaves(tree: Any, size: int, counted: dict[int, int], depth: int) -> int:
    """Return the number of items in nested containers, counting shared ones each time.

    Raises:
        ValueError: there are more than `size`, the file's bytes, or a tensor is larger.
    """
    if hasattr(tree, "untyped_storage"):
        held = tree.numel() * tree.element_size()
        if tree.device.type != "cpu" or tree.is_sparse or held > size:
            raise ValueError(f"a tensor declares {held:,} bytes, but the file has {size:,}")
    if not isinstance(tree, Mapping | list | tuple | set):
        return 1
    if id(tree) not in counted:
        if depth > DEPTH:
            raise ValueError(f"it has more than {DEPTH} nested containers")
        items = [*tree, *tree.values()] if isinstance(tree, Mapping) else tree
        count = 1 + sum(_count_leaves(item, size, counted, depth + 1) for item in items)
        if count > size:
            raise ValueError(f"it declares {count:,} items, but the file has {size:,} bytes")
        counted[id(tree)] = count
    return counted[id(tree)]
