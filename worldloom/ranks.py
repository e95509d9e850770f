"""The processes that train one model together (ranks), and what they tell each other.

W processes with B / W rows each compute the same update as one process with B rows if every
statistic in a loss is that of all rows. `gather_rows` and `sum_counts` are what a model needs for
that, a custom model included. In one process both return their argument, so a model calls them
always.
"""

import datetime
from collections.abc import Iterable
from typing import Any, ClassVar

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor


def world_size() -> int:
    """Return the number of processes that train together, W; 1 without torch.distributed."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def rank() -> int:
    """Return the number of this process among them, from 0."""
    return dist.get_rank() if world_size() > 1 else 0


@torch.no_grad()
def gather_rows(x: Tensor) -> Tensor:
    """Return the rows [B, ...] of all processes, [W * B, ...], in the order of the ranks.

    For statistics such as percentiles: the result has no gradient. All processes have to call it in
    the same order and with the same shape; mark missing values with NaN.
    """
    if (size := world_size()) == 1:
        return x
    parts = [torch.empty_like(x, memory_format=torch.contiguous_format) for _ in range(size)]
    dist.all_gather(parts, x.detach().contiguous())
    return torch.cat(parts)


def gather_rows_with_gradient(x: Tensor) -> Tensor:
    """Return the rows [B, ...] of all processes, as `gather_rows` does, with gradient of one's own.

    For losses that are computed from all rows in every process. The gradient of one's own rows is
    multiplied by the number of processes, because DDP divides the sum of all gradients by it.
    """
    if (size := world_size()) == 1:
        return x
    parts = list(gather_rows(x).chunk(size))
    parts[rank()] = x.detach() + size * (x - x.detach())
    return torch.cat(parts)


@torch.no_grad()
def sum_counts(count: Tensor) -> Tensor:
    """Return the sums over all processes of counts of any shape, without gradient.

    For means over a varying number of rows. DDP averages the gradients of the processes, so the
    mean of x over the rows with mask 1 is, for any split of the rows::

        world_size() * (x * mask).sum() / sum_counts(mask.sum()).clamp(min=1)
    """
    if world_size() == 1:
        return count
    total = count.detach().clone()
    dist.all_reduce(total)
    return total


def seed_of_rank(seed: int, *key: int) -> int:
    """Return the seed of this process: `seed` in one process, else one for each rank.

    key: more numbers that distinguish seeds.
    """
    if world_size() == 1:
        return seed
    sequence = np.random.SeedSequence(seed, spawn_key=(rank(), *key))
    return int(sequence.generate_state(1)[0])


def copy_from_first(tensors: Iterable[Tensor]) -> None:
    """Copy tensors of the first process to all others, in place."""
    if world_size() > 1:
        for tensor in tensors:
            dist.broadcast(tensor, 0)


class RankError(RuntimeError):
    """Another process has failed; the message names it."""


class Ranks:
    """Exchange of numbers and plain data between the processes, for decisions taken together.

    A process is alone until `connect` is called. All processes call all methods in the same order.
    A thread that exchanges needs an instance of its own.

    rank, size: of this process, from 0; the number of processes.
    stopping: whether all processes have agreed to stop, each in a complete state.
    timeout: after which a process that waits for another one raises RuntimeError.
    """

    timeout: ClassVar = datetime.timedelta(seconds=300)

    def __init__(self) -> None:
        self.rank, self.size = 0, 1
        self.stopping = False
        self._group: Any = None

    def connect(self) -> None:
        """Connect to the other processes, if there are any, once torch.distributed is initialised.

        The exchange uses gloo, whatever the gradients use, so that it waits for no GPU.
        """
        self.rank, self.size = rank(), world_size()
        if self.size > 1:
            self._group = dist.new_group(backend="gloo", timeout=self.timeout)

    def share(self, *numbers: int) -> np.ndarray:
        """Return the numbers of all processes, [W, n] int64."""
        if self.size == 1:
            return np.array([numbers], np.int64)
        mine = torch.tensor(numbers, dtype=torch.int64)
        parts = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(parts, mine, group=self._group)
        return torch.stack(parts).numpy()

    def gather(self, item: Any) -> list[Any]:
        """Return the plain data of all processes, in the order of the ranks."""
        if self.size == 1:
            return [item]
        items: list[Any] = [None] * self.size
        dist.all_gather_object(items, item, group=self._group)
        return items

    def decide(self, number: int) -> int:
        """Return the number of the first process."""
        return number if self.size == 1 else int(self.share(number)[0, 0])
