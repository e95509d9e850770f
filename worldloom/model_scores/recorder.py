"""Rows of an evaluation, kept to score the model on them."""

import numpy as np

from worldloom.envs.vector import RowStream
from worldloom.protocol import Batch
from worldloom.replay.buffer import ReplayBuffer

MOST_ROWS, MOST_MEMORY = 4096, "256MB"  # of each environment, and of all


class RowRecorder:
    """Keep the newest rows of N environments; a `Record` for `acting.evaluate`."""

    def __init__(self) -> None:
        self._buffer: ReplayBuffer | None = None

    def __call__(self, rows: RowStream, actions: np.ndarray) -> None:
        """Keep the current rows and the actions [N, A] that follow them."""
        if self._buffer is None:
            self._buffer = ReplayBuffer(
                MOST_MEMORY,
                rows.obs_spec.shape,
                rows.action_spec.width,
                num_envs=rows.num_envs,
                expected=MOST_ROWS * rows.num_envs,
            )
        taken = np.where(rows.is_last[:, None], np.float32(0.0), actions)
        flags = rows.is_first, rows.is_last, rows.is_terminal
        self._buffer.add(rows.obs, taken, rows.rewards, *flags)

    @property
    def window(self) -> Batch:
        """All rows that are kept, [N, W, ...]; there must be some."""
        assert self._buffer is not None
        return self._buffer.newest(MOST_ROWS, streams=range(self._buffer.num_envs))
