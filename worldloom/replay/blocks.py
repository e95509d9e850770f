"""Which blocks of rows there are: complete, not yet in a file, or lost."""

from collections.abc import Iterator

import numpy as np

from worldloom.replay.store import Block, RowStorage


class Blocks:
    """The blocks of the rows in `store`, as they were when `account` was called last.

    complete: [E], how many each stream has completed, ever; lowest: [E], number of the oldest one
    of which rows are stored.
    unwritten: those complete ones that have no file yet, in order (a dict for the order alone).
    lost: those whose rows could not be read when the run was resumed.
    """

    def __init__(self, store: RowStorage) -> None:
        self._store = store
        self.unwritten: dict[Block, None] = {}
        self.lost: set[Block] = set()
        self._count(np.zeros(store.num_envs, np.int64), np.zeros(store.num_envs, np.int64))

    def __iter__(self) -> Iterator[Block]:
        """List the complete blocks of which rows are stored, and the lost ones among them."""
        for env in range(self._store.num_envs):
            for number in range(int(self.lowest[env]), int(self.complete[env])):
                yield env, number

    def reset(self) -> None:
        """Count anew, as if every block were in a file and none lost."""
        self.unwritten.clear()
        self.lost.clear()
        self._count(*self._numbers())

    def changed(self) -> bool:
        """Tell whether a block was completed or has left the ring since the last account."""
        common = self._store.common
        if common is not None and common < self._until:
            return False
        complete, lowest = self._numbers()
        return bool((complete != self.complete).any() or (lowest != self.lowest).any())

    def account(self) -> tuple[bool, list[Block]]:
        """Look again; return whether there is a new complete block, and which have gone."""
        complete, lowest = self._numbers()
        new, gone = [], []
        for env in range(self._store.num_envs):
            gone += [(env, n) for n in range(int(self.lowest[env]), int(lowest[env]))]
            first = max(int(self.complete[env]), int(lowest[env]))
            new += [(env, n) for n in range(first, int(complete[env]))]
        self._count(complete, lowest)
        self.unwritten |= dict.fromkeys(new)
        for block in gone:
            self.unwritten.pop(block, None)
            self.lost.discard(block)
        return bool(new), gone

    def has_gone(self, block: Block) -> bool:
        """Tell whether all rows of a block have left the ring."""
        return block[1] < self.lowest[block[0]]

    def rows(self, block: Block) -> np.ndarray:
        """Numbers of the rows of a complete block that are stored."""
        env, number = block
        first, end = self._bounds(number)
        return np.arange(max(first, self._store.oldest[env]), end)

    def tail(self, env: int) -> np.ndarray:
        """Numbers of the rows since the last complete block of a stream."""
        first = max(self._bounds(int(self.complete[env]))[0], self._store.oldest[env])
        return np.arange(first, self._store.written[env])

    def stretches(self) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Stream, first row and end of all rows between two lost blocks, [S] each."""
        found = []
        for env, (first, end) in enumerate(
            zip(self._store.oldest, self._store.written, strict=True)
        ):
            for number in sorted(number for stream, number in self.lost if stream == env):
                low, high = self._bounds(number)
                found.append((env, first, max(first, low)))
                first = max(first, high)
            found.append((env, first, end))
        envs, firsts, ends = np.array(found, np.int64).T
        return envs, firsts, ends

    def _count(self, complete: np.ndarray, lowest: np.ndarray) -> None:
        self.complete, self.lowest = complete, lowest
        # No stream with fewer rows than this has completed or lost another block.
        next_complete, next_gone = complete.min() + 1, lowest.min() + 1
        rows = self._store.block_rows
        self._until = int(min(next_complete * rows, next_gone * rows + self._store.rows))

    def _bounds(self, number: int) -> tuple[int, int]:
        return number * self._store.block_rows, (number + 1) * self._store.block_rows

    def _numbers(self) -> tuple[np.ndarray, np.ndarray]:
        rows = self._store.block_rows
        return self._store.written // rows, self._store.oldest // rows
