"""Files of the multi-task datasets of TD-MPC2 (mt30, mt80): TensorDicts written by torch.save.

Every .pt file has, for E episodes of N actions each:

    obs         [E, N + 1, W]  vectors, padded with zeros to the widest task
    action      [E, N + 1, A]  in [-1, 1], padded; row t led to obs[t], so row 0 has none (NaN)
    reward      [E, N + 1]     received with obs[t]; row 0 has none (NaN)
    task        [E, N + 1]     number of the task, the same in all rows of an episode; optional
    terminated  [E, N + 1]     the environment ended the episode at this row; optional

A plain dict of tensors is read, too.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.datasets.episode import Dataset, Episode, Schema, make_action_spec
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.files import read_tensors

SUFFIX = ".pt"
REQUIRED, OPTIONAL = ("obs", "action", "reward"), ("task", "terminated")
EXAMPLES = 5  # episodes of a task in which its actions are counted


def open_tensordicts(
    path: Path,
    obs: ObsSpec | None = None,
    actions: ActionSpec | None = None,
    choice: Mapping[str, str | None] = MappingProxyType({}),
) -> Dataset:
    """Open one file, or all files of a folder in the order of their names.

    obs, actions: of the environment, in whose spaces the data is. Without them the tasks are
        counted, and each has as many actions as some of its episodes use.
    choice: without obs, the observations of models, as in `ObsSpec.from_space`.
    """
    files = sorted(path.glob(f"*{SUFFIX}")) if path.is_dir() else [path]
    lengths: list[int] = []
    used: dict[int, int] = {}
    shapes = {}
    for file in files:
        data = _load(file)
        count, rows = data["reward"].shape
        lengths += [rows - 1] * count
        shapes[file] = {name: data[name].shape[2:] for name in ("obs", "action")}
        if shapes[file] != shapes[files[0]]:
            raise ValueError(
                f"{file} has obs and action of shape {[*shapes[file].values()]} in a row; expected "
                f"{[*shapes[files[0]].values()]}, as in {files[0]}"
            )
        if "task" in data:
            _count_actions(data["task"][:, 0], data["action"], used)
    tasks = max(used, default=-1) + 1
    if obs is None:
        vector = spaces.Box(-np.inf, np.inf, shapes[files[0]]["obs"], np.float32)
        parts = {"obs": vector, "task": spaces.Discrete(max(tasks, 1))}
        space = spaces.Dict(parts) if tasks else vector
        obs = ObsSpec.from_space(space, recorded=True, **choice)
    width = int(shapes[files[0]]["action"][-1])
    actions = actions or make_action_spec(width, False)
    schema = Schema(obs, actions, f"{path}", "Divide them by the largest value.")

    def read() -> Iterator[Episode]:
        for file in files:
            yield from _read_episodes(file, schema)

    return Dataset(str(path), obs, actions, lengths, read, action_dims=_list_actions(used, width))


def _load(file: Path) -> dict[str, np.ndarray]:
    """Map the arrays of a file, after checking their names and shapes."""
    try:
        found = read_tensors(file, mmap=True, tensordicts=True)
        held = found if isinstance(found, Mapping) else {}
        data = {name: held[name].numpy() for name in (*REQUIRED, *OPTIONAL) if name in held}
    except Exception as error:
        reason = " ".join(str(error).split())[:300]
        raise ValueError(
            f"{file} cannot be read ({reason}); expected a TensorDict of tensors that torch.save "
            "wrote; copy it again or delete it"
        ) from error
    if missing := [name for name in REQUIRED if name not in data]:
        raise ValueError(
            f"{file} has no {', '.join(missing)}; expected the layout of TD-MPC2's datasets; see "
            "worldloom/datasets/tensordicts.py"
        )
    lead = data["reward"].shape
    for name, array in data.items():
        axes = 3 if name in ("obs", "action") else 2
        if array.shape[:2] != lead or array.ndim != axes or 0 in array.shape or lead[1] < 2:
            wanted = "[episodes, rows, width]" if axes == 3 else "[episodes, rows]"
            raise ValueError(
                f"{file}: {name} has shape {array.shape} and reward {lead}; expected {wanted} with "
                "at least 2 rows"
            )
    if "task" in data:
        _check_tasks(file, data["task"])
    return data


def _check_tasks(file: Path, task: np.ndarray) -> None:
    if task.dtype.kind not in "iuf" or not (np.mod(task, 1) == 0).all() or task.min() < 0:
        raise ValueError(f"{file}: task has {task.dtype} from {task.min()}; expected 0, 1, 2...")
    if (task != task[:, :1]).any():
        at = int((task != task[:, :1]).any(1).argmax())
        raise ValueError(f"{file}: the task changes in episode {at}; expected one in each episode")


def _count_actions(task: np.ndarray, action: np.ndarray, used: dict[int, int]) -> None:
    """Set how many actions each task uses in its first episodes of a file."""
    for number in map(int, np.unique(task)):
        some = np.flatnonzero(task == number)[:EXAMPLES]
        columns = np.flatnonzero((action[some, 1:] != 0).any((0, 1)))
        used[number] = max(used.get(number, 1), *(columns[-1:] + 1).tolist(), 1)


def _list_actions(used: Mapping[int, int], width: int) -> Sequence[int] | None:
    """Return the number of actions of each task; a task without episodes has all."""
    return [used.get(n, width) for n in range(max(used) + 1)] if used else None


def _read_episodes(file: Path, schema: Schema) -> Iterator[Episode]:
    data = _load(file)
    several = "task" in schema.obs.parts
    if several != ("task" in data):
        raise ValueError(
            f"{file} has {'a' if 'task' in data else 'no'} task; expected the observations "
            f"{', '.join(schema.obs.parts) or 'of a single task'}, as in {schema.reference}"
        )
    for number, rewards in enumerate(data["reward"]):
        obs: Any = np.array(data["obs"][number])
        if several:
            tasks, last = schema.obs.shape["task"][0], int(data["task"][number, 0])  # type: ignore
            if last >= tasks:
                raise ValueError(
                    f"{file}: episode {number} has the task {last}; expected numbers below "
                    f"{tasks}, as the environment has them; set env.tasks to those of the data"
                )
            obs = {"obs": obs, "task": np.array(data["task"][number], np.int64)}
        ended = bool(data["terminated"][number, -1]) if "terminated" in data else False
        source = f"{file}, episode {number}"
        actions = np.array(data["action"][number, 1:], np.float32)
        yield schema.make_episode(source, obs, actions, np.array(rewards[1:]), ended, not ended)
