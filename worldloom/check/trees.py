"""Look into nested dicts of tensors and latent states, to compare and describe them."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from worldloom.protocol import LatentState


def leaves(tree: Any, name: str = "") -> dict[str, Any]:
    """Flatten into {"name.key.key": leaf}; a LatentState counts as a dict, None as empty."""
    if tree is None:
        return {}
    if isinstance(tree, LatentState):
        tree = {
            "deterministic": tree.deterministic,
            "stochastic": tree.stochastic,
            "features": tree.features,
            "extras": tree.extras,
        }
    if not isinstance(tree, dict):
        return {name: tree}
    found = {}
    for key, value in tree.items():
        found.update(leaves(value, f"{name}.{key}" if name else str(key)))
    return found


def clone(tree: Any) -> Any:
    """Copy every tensor of a nested dict or latent state."""
    if isinstance(tree, LatentState):
        return tree.map(torch.Tensor.clone)
    if isinstance(tree, dict):
        return {key: clone(value) for key, value in tree.items()}
    return tree.clone() if isinstance(tree, Tensor) else tree


def differing(one: Any, other: Any, same: Callable[[Tensor, Tensor], bool]) -> list[str]:
    """Name the leaves that only one tree has, or that are not the `same` in both."""
    a, b = leaves(one), leaves(other)
    missing = a.keys() ^ b.keys()
    return sorted(missing | {name for name in a.keys() & b.keys() if not same(a[name], b[name])})


def identical(a: Any, b: Any) -> bool:
    """Whether two leaves are equal in layout and every bit of value; NaN equals NaN."""
    if not isinstance(a, Tensor) or not isinstance(b, Tensor):
        return bool(a == b)
    return layout(a) == layout(b) and torch.equal(a.nan_to_num(), b.nan_to_num())


def close(a: Tensor, b: Tensor) -> bool:
    """Whether two tensors agree up to the rounding of another order of operations."""
    return torch.allclose(a.float(), b.float(), rtol=1e-3, atol=1e-4)


def layout(value: Any) -> str:
    """Describe a leaf: dtype and shape of a tensor, else its type."""
    if not isinstance(value, Tensor):
        name = type(value).__name__
        return f"{'an' if name[0] in 'aeiouAEIOU' else 'a'} {name}"
    return f"{str(value.dtype).removeprefix('torch.')} {list(value.shape)}"


def some(names: Iterable[str]) -> str:
    """List names, at most five."""
    names = list(names)
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return ", ".join(names[:5]) + more
