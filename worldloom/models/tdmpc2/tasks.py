"""Several tasks in one TD-MPC2 model (Hansen et al. 2024, section 3.3)."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from worldloom.errors import require
from worldloom.nn.products import is_tracing


class Tasks(nn.Module):
    """Embeddings and action masks of several tasks.

    action_dims: number of actions of each task; the rest of the `width` actions is padding.
    task_dim: width of the embeddings, whose norm is kept at one or below.

    Raises:
        ValueError: action_dims that do not fit the width, or a task_dim of 0.
    """

    def __init__(self, action_dims: Sequence[int], task_dim: int, width: int) -> None:
        super().__init__()
        integers = all(isinstance(n, int) for n in action_dims)
        require(integers, "action_dims", action_dims, "a whole number for each task")
        if min(action_dims) < 1 or max(action_dims) > width:
            raise ValueError(
                f"action_dims is {list(action_dims)}, but action_dim is {width}; expected from 1 "
                f"to {width} actions of each task. Pass the largest number as action_dim"
            )
        self.count = len(action_dims)
        expected = f"at least 1 for {self.count} tasks (officially 96, or 64 for 30 tasks)"
        require(task_dim >= 1, "task_dim", task_dim, expected)
        # As in the official code, a look-up rescales the rows that it reads in place.
        self.embedding = nn.Embedding(self.count, task_dim, max_norm=1.0)
        nn.init.uniform_(self.embedding.weight, -0.02, 0.02)
        exists = torch.arange(width) < torch.tensor(list(action_dims)).unsqueeze(1)
        self.register_buffer("masks", exists.float())  # [tasks, A]
        self.masks: Tensor

    @torch.no_grad()
    def rescale(self) -> None:
        """Rescale all embeddings as a look-up rescales those that it reads.

        Twice, because rounding may leave a norm just above one: all ranks end with the same
        numbers, whichever rows each of them has read before.
        """
        for _ in range(2):
            self.embedding(torch.arange(self.count, device=self.masks.device))

    def read_ids(self, task: Tensor | int | None, rows: int) -> Tensor:
        """Return task ids [rows] int64, from ids [rows] or [], or from one-hot [rows, tasks]."""
        if task is None:
            raise ValueError(
                f"the task is missing, and the model has {self.count}; pass task ids [B] from 0 to "
                f"{self.count - 1}, as batch['task'], encode(obs, task=…) or obs['task']"
            )
        ids = torch.as_tensor(task, device=self.masks.device)
        if ids.is_floating_point() and ids.shape[1:] == (self.count,):
            ids = ids.argmax(-1)
        if ids.ndim == 2 and ids.shape[-1] == 1:  # from a Box of one number
            ids = ids.squeeze(-1)
        ids = ids.long().expand(rows) if ids.ndim == 0 else ids.long()
        if ids.shape != (rows,):
            raise ValueError(
                f"the task ids have shape {tuple(ids.shape)}; expected [{rows}], one for each row, "
                f"or one-hot [{rows}, {self.count}]"
            )
        # On a GPU this check would wait for the device; there the look-up fails instead.
        checked = ids.device.type == "cpu" and not is_tracing()
        if checked and not bool(((ids >= 0) & (ids < self.count)).all()):
            raise ValueError(
                f"the task ids are {ids.tolist()}; expected integers from 0 to {self.count - 1}"
            )
        return ids
