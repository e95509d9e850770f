"""Random numbers of a policy as inputs of a graph.

`Noise` replaces what torch's random functions return in a block. The draws of a policy are recorded
in this way, and later replaced by slices of inputs, so that any model can be exported.
"""

import math
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode


@dataclass(frozen=True)
class Draw:
    """Random numbers that one call of a random function needs.

    kind: "uniform" in [0, 1), "normal" (standard), "exponential" (of rate 1), "integers" from 0 to
        high - 1, or "permutation" of 0 to high - 1.
    shape: of the numbers; [high] for a permutation.
    """

    kind: str
    shape: tuple[int, ...]
    high: int = 0

    @property
    def input(self) -> str:
        """Name of the input with all numbers of this distribution, such as noise/integers7."""
        return f"noise/{self.kind}{self.high or ''}"

    def make(self, rng: np.random.Generator) -> Tensor:
        """Draw the numbers, float32 or int64."""
        drawn: Any
        if self.kind == "uniform":
            drawn = rng.random(self.shape, np.float32)
        elif self.kind == "normal":
            drawn = rng.standard_normal(self.shape, np.float32)
        elif self.kind == "exponential":
            drawn = rng.standard_exponential(self.shape, np.float32)
        elif self.kind == "integers":
            drawn = rng.integers(self.high, size=self.shape)
        else:
            drawn = rng.permuted(np.broadcast_to(np.arange(self.high), self.shape), axis=-1)
        return torch.as_tensor(drawn)


# Numbers of the draws of each part of a decision.
Numbers = dict[str, list[Tensor]]


@dataclass
class NoiseInputs:
    """All random numbers of a decision, joined to one input for each distribution.

    draws: of each part of the decision, in order.
    unused: the draws, as (part, index), on which nothing depends.
    """

    draws: Mapping[str, Sequence[Draw]]
    unused: set[tuple[str, int]] = field(default_factory=set)

    def list_inputs(self) -> dict[str, Draw]:
        """Return the inputs: [total] numbers, or [count, high] permutations."""
        groups: dict[str, list[Draw]] = defaultdict(list)
        for _, _, draw in self._list_used():
            groups[draw.input].append(draw)
        return {name: _join(draws) for name, draws in groups.items()}

    def make(self, rng: np.random.Generator) -> Numbers:
        """Draw all numbers, also those that are not used."""
        return {part: [draw.make(rng) for draw in draws] for part, draws in self.draws.items()}

    def pack(self, numbers: Numbers) -> dict[str, Tensor]:
        """Return the inputs that contain the given numbers."""
        groups: dict[str, list[Tensor]] = defaultdict(list)
        for part, index, draw in self._list_used():
            groups[draw.input].append(numbers[part][index].flatten())
        shapes = {name: draw.shape for name, draw in self.list_inputs().items()}
        return {name: torch.cat(each).view(shapes[name]) for name, each in groups.items()}

    def unpack(self, inputs: Mapping[str, Tensor]) -> Numbers:
        """Return the numbers of each draw; those that are not used are zeros."""
        flat = {name: inputs[name].flatten() for name in self.list_inputs()}
        numbers: Numbers = {part: [*map(_blank, draws)] for part, draws in self.draws.items()}
        for part, index, draw in self._list_used():
            size = math.prod(draw.shape)
            numbers[part][index] = flat[draw.input][:size].view(draw.shape)
            flat[draw.input] = flat[draw.input][size:]
        return numbers

    def _list_used(self) -> Iterator[tuple[str, int, Draw]]:
        for part, draws in self.draws.items():
            for index, draw in enumerate(draws):
                if (part, index) not in self.unused:
                    yield part, index, draw


def _join(draws: Sequence[Draw]) -> Draw:
    """Return one draw with the numbers of several of the same distribution."""
    total = sum(math.prod(draw.shape) for draw in draws)
    first = draws[0]
    shape = (total // first.high, first.high) if first.kind == "permutation" else (total,)
    return replace(first, shape=shape)


def _blank(draw: Draw) -> Tensor:
    return torch.zeros(draw.shape, dtype=torch.int64 if draw.high else torch.float32)


Take = Callable[[Draw], Tensor]


class Noise(TorchFunctionMode):
    """Replaces, in a block, the numbers that torch's random functions draw.

    take: called with every draw; returns its numbers, a tensor of its shape.
    """

    def __init__(self, take: Take) -> None:
        super().__init__()
        self.take = take

    def __torch_function__(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Answer a random function with the numbers of `take`; call any other function."""
        kwargs = kwargs or {}
        replacement = REPLACEMENTS.get(func)
        found = NotImplemented
        if replacement is not None:
            found = replacement(self.take, *args, **kwargs)
        return func(*args, **kwargs) if found is NotImplemented else found


def _take(take: Take, kind: str, shape: Any, like: Any, high: int = 0) -> Tensor:
    """Take numbers, with the dtype and the device of `like`, a tensor or keyword arguments."""
    numbers = take(Draw(kind, tuple(int(n) for n in shape), high))
    if isinstance(like, Tensor):
        return numbers.to(like.device, like.dtype)
    dtype = like.get("dtype") or (numbers.dtype if high else torch.get_default_dtype())
    return numbers.to(like.get("device"), dtype)


def _factory(kind: str) -> Callable[..., Tensor]:
    """Return the replacement of torch.rand or torch.randn."""

    def draw(take: Take, *size: Any, **kwargs: Any) -> Tensor:
        size = kwargs.get("size", size[0] if len(size) == 1 and not _is_int(size[0]) else size)
        return _take(take, kind, size, kwargs)

    return draw


def _like(kind: str) -> Callable[..., Tensor]:
    """Return the replacement of torch.rand_like or torch.randn_like."""

    def draw(take: Take, x: Tensor, **kwargs: Any) -> Tensor:
        dtype = kwargs.get("dtype") or x.dtype
        return _take(take, kind, x.shape, {"device": x.device, "dtype": dtype})

    return draw


def _is_int(x: Any) -> bool:
    return isinstance(x, int | torch.SymInt)


def _randint(take: Take, *args: Any, **kwargs: Any) -> Tensor:
    size: Any = next((arg for arg in args if not _is_int(arg)), kwargs.get("size"))
    given: list[Any] = [arg for arg in args if _is_int(arg)]
    high: Any = kwargs["high"] if "high" in kwargs else given.pop()
    low: Any = given[0] if given else kwargs.get("low", 0)
    return _take(take, "integers", size, kwargs, high - low) + low


def _randperm(take: Take, n: int, **kwargs: Any) -> Tensor:
    return _take(take, "permutation", (n,), kwargs, n)


def _normal(take: Take, mean: Any, std: Any = 1.0, size: Any = None, **kwargs: Any) -> Tensor:
    like: Any = next((x for x in (mean, std) if isinstance(x, Tensor)), kwargs)
    if isinstance(like, Tensor):
        size = torch.broadcast_shapes(*(x.shape for x in (mean, std) if isinstance(x, Tensor)))
    return mean + std * _take(take, "normal", size, like)


def _bernoulli(take: Take, p: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs.get("p") is not None:
        return NotImplemented
    return (_take(take, "uniform", p.shape, p) < p).to(p.dtype)


def _multinomial(
    take: Take, probs: Tensor, num_samples: int, replacement: bool = False, **kwargs: Any
) -> Tensor:
    """Sample by inverse transform: one uniform number for each sample."""
    if num_samples > 1 and not replacement:
        return NotImplemented
    cumulative = probs.cumsum(-1).unsqueeze(-2)  # [..., 1, classes]
    shape = (*probs.shape[:-1], num_samples)
    level = _take(take, "uniform", shape, probs).unsqueeze(-1) * cumulative[..., -1:]
    return (cumulative <= level).sum(-1).clamp(max=probs.shape[-1] - 1)


def _uniform_(take: Take, x: Tensor, low: float = 0.0, high: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(_take(take, "uniform", x.shape, x) * (high - low) + low)


def _normal_(take: Take, x: Tensor, mean: float = 0.0, std: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(_take(take, "normal", x.shape, x) * std + mean)


def _exponential_(take: Take, x: Tensor, lambd: float = 1.0, **_: Any) -> Tensor:
    return x.copy_(_take(take, "exponential", x.shape, x) / lambd)


REPLACEMENTS: dict[Any, Callable[..., Any]] = {
    torch.rand: _factory("uniform"),
    torch.randn: _factory("normal"),
    torch.rand_like: _like("uniform"),
    torch.randn_like: _like("normal"),
    torch.randint: _randint,
    torch.randperm: _randperm,
    torch.normal: _normal,
    torch.bernoulli: _bernoulli,
    torch.Tensor.bernoulli: _bernoulli,
    torch.multinomial: _multinomial,
    torch.Tensor.multinomial: _multinomial,
    torch.Tensor.uniform_: _uniform_,
    torch.Tensor.normal_: _normal_,
    torch.Tensor.exponential_: _exponential_,
}
