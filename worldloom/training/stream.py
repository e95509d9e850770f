"""The iterable that the data module gives Lightning: batches without an end of its own."""

from collections.abc import Callable, Iterator
from typing import Any

from worldloom.protocol import Batch


class ReplayStream:
    """Iterable over the batches of a run."""

    def __init__(self, batches: Callable[[], Iterator[Batch]]) -> None:
        self._batches = batches

    def __iter__(self) -> Iterator[Batch]:
        """Iterate over the batches, from where the previous iterator stopped."""
        return self._batches()

    def __len__(self) -> int:
        """Return a very large number; without a length, Lightning would draw one batch ahead.

        That batch would be sampled before the current update and be missing after a resume.
        """
        return 10**9

    def state_dict(self) -> dict[str, Any]:
        """Return nothing: the data module saves the state, but Lightning requires the method."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Do nothing; see `state_dict`."""
