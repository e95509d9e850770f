"""Blocks of rows as they were at one moment, to be written later while the replay goes on.

Nothing is copied when a snapshot is taken. Whoever changes a row that it still waits for copies
that row aside first.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field

import numpy as np

from worldloom.replay.row_format import Arrays
from worldloom.replay.store import Block

ROWS, LATENTS = "rows", "latents"
Item = tuple[str, Block]  # ROWS or LATENTS, of which block
Read = Callable[[list[str], int, np.ndarray], Arrays]  # fields, stream, numbers [N] -> [N, *shape]


@dataclass
class Waiting:
    """What a snapshot knows of a block that it waits for.

    row: numbers [N] of its rows, one after the other; parts: those fields of them that will not
    change; saved: [N], which rows were copied aside; copies: (their indices, their values).
    """

    row: np.ndarray
    parts: Arrays
    saved: np.ndarray
    copies: list[tuple[np.ndarray, Arrays]] = field(default_factory=list)


class Snapshot:
    """What a state needs that is not in a file yet. All calls have to come under one lock.

    number: of the state; names: {ROWS: fields, LATENTS: fields}; files: {name: CRC-32} of the
    files that the state needs and that are there.
    read: returns fields of rows as they are now.
    """

    def __init__(
        self, number: int, names: dict[str, list[str]], block_rows: int, read: Read
    ) -> None:
        self.number = number
        self.files: dict[str, int] = {}
        self.waiting: dict[Item, Waiting] = {}
        self.changed: set[Block] = set()  # whose latents have been written since
        self.bytes = 0  # copied aside
        self._names, self._block_rows, self._read = names, block_rows, read
        self._rows_of: set[Block] = set()
        self._touched: dict[Item, None] = {}  # those with rows copied aside, in order

    def wait_for(self, item: Item, row: np.ndarray, parts: Arrays) -> None:
        """Add rows (numbers [N]) of a block, of which fields that will not change may be given."""
        if item[0] == ROWS:
            self._rows_of.add(item[1])
        self.waiting[item] = Waiting(row, parts, np.zeros(len(row), bool))

    def has_rows(self, block: Block) -> bool:
        """Tell whether the rows of a block are left to whoever writes the snapshot."""
        return block in self._rows_of

    def protect(
        self, kinds: Iterable[str], blocks: Iterable[Block], env: np.ndarray, row: np.ndarray
    ) -> None:
        """Copy rows aside before they change: numbers [N] of streams env [N], in these blocks."""
        for block in blocks:
            items = [(kind, block) for kind in kinds if (kind, block) in self.waiting]
            if not items:
                continue
            inside = np.unique(row[(env == block[0]) & (row // self._block_rows == block[1])])
            for item in items:
                waiting = self.waiting[item]
                self._copy(item, waiting, inside[inside >= waiting.row[0]])

    def take(self) -> tuple[Item, int, Arrays] | None:
        """Return a block, the number of its first row and its fields as they were, or None.

        Those of which rows were copied aside come first, so that the copies can go.
        """
        if not self.waiting:
            return None
        item = next(iter(self._touched or self.waiting))
        waiting = self.waiting.pop(item)
        self._touched.pop(item, None)
        names = [name for name in self._names[item[0]] if name not in waiting.parts]
        arrays = self._read(names, item[1][0], waiting.row)
        for index, values in waiting.copies:
            for name, value in values.items():
                arrays[name][index] = value
                self.bytes -= value.nbytes
        return item, int(waiting.row[0]), arrays | waiting.parts

    def _copy(self, item: Item, waiting: Waiting, row: np.ndarray) -> None:
        row = row[~waiting.saved[row - waiting.row[0]]]
        if len(row) == 0:
            return
        index = row - waiting.row[0]
        names = [name for name in self._names[item[0]] if name not in waiting.parts]
        values = self._read(names, item[1][0], row)
        waiting.saved[index] = True
        waiting.copies.append((index, values))
        self._touched[item] = None
        self.bytes += sum(value.nbytes for value in values.values())
