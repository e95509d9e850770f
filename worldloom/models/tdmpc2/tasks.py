"""What tells the tasks of one model apart: an embedding, the actions they have, their discount."""

import functools
from collections.abc import Sequence

import torch
from torch import Tensor, nn


class Tasks(nn.Module):
    """Several tasks in one model (Hansen et al. 2024, section 3.3).

    action_dims: number of actions of each task; the rest of the A = `width` actions is padding.
    task_dim: width of the embedding, whose rows are kept at a norm of at most one.

    Raises:
        ValueError: action_dims that do not fit the action width, or no room for an embedding.
    """

    def __init__(self, action_dims: Sequence[int], task_dim: int, width: int) -> None:
        super().__init__()
        if not all(isinstance(n, int) for n in action_dims):
            raise ValueError(f"action_dims is {action_dims}; expected a whole number for each task")
        if min(action_dims) < 1 or max(action_dims) > width:
            raise ValueError(
                f"action_dims is {list(action_dims)}, but action_dim is {width}; expected from 1 "
                f"to {width} actions of each task. Pass the largest number as action_dim"
            )
        if task_dim < 1:
            raise ValueError(
                f"task_dim is {task_dim}; expected at least 1 for {len(action_dims)} tasks (96 "
                "officially, 64 for 30 tasks at the middle sizes)"
            )
        self.count = len(action_dims)
        # Rows that are looked up are rescaled in place, as the official code has it. Processes that
        # train together would have to rescale the same rows.
        self.embedding = nn.Embedding(self.count, task_dim, max_norm=1.0)
        nn.init.uniform_(self.embedding.weight, -0.02, 0.02)
        exists = torch.arange(width) < torch.tensor(list(action_dims)).unsqueeze(1)
        self.register_buffer("masks", exists.float())
        self.masks: Tensor

    def ids(self, task: Tensor | int | None, rows: int) -> Tensor:
        """Return task ids [rows] int64, from ids [rows] or [], or from one-hot [rows, tasks]."""
        if task is None:
            raise ValueError(
                f"no task was named, but the model knows {self.count}; pass task ids [B] from 0 to "
                f"{self.count - 1}, as batch['task'], encode(obs, task=…) or obs['task']"
            )
        ids = torch.as_tensor(task, device=self.masks.device)
        if ids.is_floating_point() and ids.shape[1:] == (self.count,):
            ids = ids.argmax(-1)
        if ids.ndim == 2 and ids.shape[-1] == 1:  # as a box of one number has it
            ids = ids.squeeze(-1)
        ids = ids.long().expand(rows) if ids.ndim == 0 else ids.long()
        if ids.shape != (rows,):
            raise ValueError(
                f"the task ids have shape {tuple(ids.shape)}; expected [{rows}], one for each row, "
                f"or one-hot [{rows}, {self.count}]"
            )
        # On a GPU looking would wait for it; there an impossible id fails in the look-up.
        if ids.device.type == "cpu" and not bool(((ids >= 0) & (ids < self.count)).all()):
            raise ValueError(
                f"the task ids are {ids.tolist()}; expected them from 0 to {self.count - 1}"
            )
        return ids


@functools.lru_cache
def tensor_of(values: tuple[float, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    """Return numbers as a tensor, made once for each dtype and device."""
    with torch.inference_mode(False):  # or training could not use what acting made
        return torch.tensor(values, dtype=dtype, device=device)


def discount_from(length: int | None, denom: float, least: float, most: float) -> float:
    """Return the discount for episodes of so many agent steps; None for no end.

    (L / denom - 1) / (L / denom), clipped to [least, most] (Hansen et al. 2024, appendix).
    """
    if length is None:
        return most
    if not isinstance(length, int) or length < 1:
        raise ValueError(f"episode_length is {length!r}; expected at least 1, or null for no end")
    share = length / denom
    return min(max((share - 1) / share, least), most)
