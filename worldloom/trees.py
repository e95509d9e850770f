"""Nested dicts and lists: batches, observations, configurations, checkpoints."""

from collections.abc import Callable, Mapping
from typing import Any


def map_tree(fn: Callable[[Any], Any], tree: Any, sequence: type | None = None) -> Any:
    """Apply `fn` to every leaf of nested mappings, lists and tuples; return new containers.

    Mappings become dicts with the same order of keys.

    sequence: type of the new lists and tuples; by default they keep theirs.
    """
    if isinstance(tree, Mapping):
        return {key: map_tree(fn, value, sequence) for key, value in tree.items()}
    if isinstance(tree, list | tuple):
        make = sequence or type(tree)
        return make(map_tree(fn, value, sequence) for value in tree)
    return fn(tree)


def to_device(batch: Any, device: Any) -> Any:
    """Move the tensors of a nested dict to a device, into new dicts.

    Nobody waits for copies to a CUDA device: they are made from pinned memory.
    """
    if str(device).startswith("cuda"):
        return map_tree(lambda x: x.pin_memory().to(device, non_blocking=True), batch)
    return map_tree(lambda x: x.to(device), batch)


def flatten_tree(
    tree: Any, separator: str = "/", *, lists: bool = False, prefix: str = ""
) -> dict[str, Any]:
    """Flatten nested mappings into {"key/key": leaf}; anything else has the key "".

    lists: also descend into lists and tuples, whose items get their index as the key.
    prefix: put in front of every key.
    """
    if isinstance(tree, Mapping):
        items: Any = tree.items()
    elif lists and isinstance(tree, list | tuple):
        items = enumerate(tree)
    else:
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in items:
        name = f"{prefix}{separator}{key}" if prefix else str(key)
        leaves |= flatten_tree(value, separator, lists=lists, prefix=name)
    return leaves
