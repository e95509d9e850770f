"""Which inputs of a computation its results depend on."""

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

# Operations that read the shape of their input, not its values.
BY_SHAPE = re.compile(r"aten::(new_\w+|\w+_like)")


class Dependencies(TorchDispatchMode):
    """Follows, in a block, which of the given tensors each result is computed from.

    Tensors that share memory count as one, so results may name too many sources, never too few.

    sources: tensors by name.
    random: names of the operations that drew random numbers.
    """

    def __init__(self, sources: Mapping[str, Tensor]) -> None:
        super().__init__()
        self.random: set[str] = set()
        self._names: dict[int, set[str]] = {}
        self._kept: list[Any] = []  # an address identifies memory while it is allocated
        self.add(sources)

    def add(self, sources: Mapping[str, Tensor]) -> None:
        """Follow further tensors, which have sources of their own if they were computed."""
        self._kept.append(sources)
        for name, tensor in sources.items():
            self._names.setdefault(_address(tensor), set()).add(name)

    def find(self, tensor: Tensor) -> set[str]:
        """Return the names of the sources that a tensor was computed from."""
        return self._names.get(_address(tensor), set())

    def __torch_dispatch__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Call the operation, and note the sources of what it returns or overwrites."""
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        if torch.Tag.nondeterministic_seeded in func.tags:
            self.random.add(func._schema.name)
        read = [] if BY_SHAPE.fullmatch(func._schema.name) else _tensors((args, kwargs))
        sources = set().union(*map(self.find, read))
        arguments = zip(func._schema.arguments, args, strict=False)
        written = [x for spec, x in arguments if spec.alias_info and spec.alias_info.is_write]
        written += [kwargs[name] for name in ("out",) if name in kwargs]
        for tensor in _tensors((result, written)):
            self._names.setdefault(_address(tensor), set()).update(sources)
            self._kept.append(tensor)
        return result


def _tensors(tree: Any) -> Iterable[Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, Tensor)]


def _address(tensor: Tensor) -> int:
    return tensor.untyped_storage()._cdata
