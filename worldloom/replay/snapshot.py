"""Snapshots: rewritable fields as they were when a state was made, written while they change.

Nothing is copied when the snapshot is made. Before a row changes that is still to be written, it
is copied aside.
"""

from dataclasses import dataclass, field

import numpy as np

from worldloom.replay.block_files import Block
from worldloom.replay.row_format import Arrays
from worldloom.replay.store import RowStore


@dataclass
class Copies:
    """Rows of a block that were copied aside.

    saved: [C], which rows; parts: (their positions in the block, their values).
    """

    saved: np.ndarray
    parts: list[tuple[np.ndarray, Arrays]] = field(default_factory=list)


@dataclass
class Snapshot:
    """The files that a state needs, and the blocks that are still to be written.

    The lock of the archive protects it.

    generation: of the state; files: {name: CRC-32} of the files that exist.
    error: why immutable fields could not be written, or None.
    waiting: blocks whose rewritable fields have to be written; copied: those of them with rows
        copied aside, in order; size: bytes of these copies.
    changed: blocks of which rewritable fields have changed since the state was made.
    """

    store: RowStore
    generation: int
    error: OSError | None = None
    files: dict[str, int] = field(default_factory=dict)
    waiting: dict[Block, None] = field(default_factory=dict)
    copied: dict[Block, Copies] = field(default_factory=dict)
    changed: set[Block] = field(default_factory=set)
    size: int = 0

    def protect(self, block: Block, row: np.ndarray) -> None:
        """Copy rows (ascending numbers [N]) of a waiting block aside, before they change."""
        rows = self.store.block_rows
        copies = self.copied.setdefault(block, Copies(np.zeros(rows, bool)))
        row = row[~copies.saved[row % rows]]
        if len(row):
            values = self.store.get(self.store.rewritable, block, row)
            copies.saved[row % rows] = True
            copies.parts.append((row % rows, values))
            self.size += sum(x.nbytes for x in values.values())

    def take(self) -> tuple[Block, Arrays]:
        """Remove a block from those waiting; return its rewritable fields as they were.

        Blocks with copied rows come first, which frees the copies.
        """
        block = next(iter(self.copied or self.waiting))
        del self.waiting[block]
        arrays = self.store.get(self.store.rewritable, block, self.store.row_numbers(block))
        if (copies := self.copied.pop(block, None)) is not None:
            for position, values in copies.parts:
                for name, value in values.items():
                    arrays[name][position] = value
                    self.size -= value.nbytes
        return block, arrays
