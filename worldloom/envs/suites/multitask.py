"""Several tasks with the same observations and actions for models, for one run.

Vectors are padded with zeros to the widest task, and a task ignores the actions that it does not
have (Hansen et al. 2024, section 3.3).
"""

import functools
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.contract import EnvError, read_reset, read_step
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import (
    episode_length,
    frames_per_step,
    make_single_env,
    order_vectors,
)
from worldloom.errors import list_names, suggest
from worldloom.trees import map_tree

MakeEnv = Callable[[], gym.Env]
VECTOR, TASK = "obs", "task"  # keys of the padded vector and of the number of the task


@dataclass(frozen=True)
class TaskInfo:
    """What a run has to know of one task.

    width: numbers in its observations, 0 if it has images only. images: shapes by key.
    actions: number of its actions.
    episode_length: actions until its time limit; None without a limit.
    frames_per_step: simulator steps per action.
    """

    name: str
    width: int
    images: Mapping[str, tuple[int, ...]]
    actions: int
    episode_length: int | None
    frames_per_step: int


class TaskSet:
    """Makes environments of several tasks, all with the same spaces.

    Observations are {"obs": [widest task] float32, "task": number of the task}, and images by their
    key ("image" for a single one); actions are in [-1, 1]. Called without an argument, it makes an
    environment of the first task.

    makers: {name of a task: function without arguments that makes its environment}; or a `TaskInfo`
        for a task of a dataset that has no simulator, in which a model is not evaluated.
    obs: which observations models see, as in `ObsSpec.from_space`.
    """

    def __init__(
        self,
        makers: Mapping[str, MakeEnv | TaskInfo],
        obs: Mapping[str, str | None] | None = None,
    ) -> None:
        if len(makers) < 2:
            raise ValueError(
                f"env.tasks has {len(makers)} task; expected at least two; for a single task use "
                "its suite, such as env=dmc env.task=walker-walk"
            )
        if not any(map(callable, makers.values())):
            raise ValueError(
                f"env.tasks: {list_names(makers)} have no simulator here; expected one that has, "
                "such as walker-walk"
            )
        self._makers = dict(makers)
        self._options: dict[str, Any] = dict(obs or {})

    def __len__(self) -> int:
        """Count the tasks."""
        return len(self._makers)

    @property
    def names(self) -> list[str]:
        """Return the names of the tasks, in their order."""
        return list(self._makers)

    @functools.cached_property
    def infos(self) -> tuple[TaskInfo, ...]:
        """Describe every task, after an environment of each was made, inspected and closed.

        Raises:
            ValueError: a task cannot be made, has discrete actions, or other images than the first.
        """
        infos = []
        for name, maker in self._makers.items():
            if isinstance(maker, TaskInfo):
                infos.append(maker)
                continue
            with _naming(name):
                env = make_single_env(maker)
                try:
                    infos.append(self._inspect(name, env))
                finally:
                    env.close()
        for info in infos[1:]:
            if info.images != infos[0].images or bool(info.width) != bool(infos[0].width):
                kinds = [_describe(x) for x in (infos[0], info)]
                raise ValueError(
                    f"env.tasks: {infos[0].name} observes {kinds[0]}, but {info.name} {kinds[1]}; "
                    "expected the same images, or vectors of any length, in every task; set "
                    "env.pixels and env.image_size, or choose observations with env.obs"
                )
        return tuple(infos)

    @property
    def playable(self) -> list[int]:
        """Return the numbers of the tasks that have a simulator."""
        makers = self._makers.values()
        return [number for number, maker in enumerate(makers) if callable(maker)]

    def __call__(self, task: int | str | None = None) -> gym.Env:
        """Make an environment of a task, by its number or its name."""
        task = self.playable[0] if task is None else task
        if isinstance(task, str):
            if task not in self._makers:
                hint = suggest(task, self.names) or f"; expected one of {', '.join(self.names)}"
                raise ValueError(f"there is no task {task!r} among env.tasks{hint}")
            task = self.names.index(task)
        width = max(info.width for info in self.infos)
        actions = max(info.actions for info in self.infos)
        name = self.names[task]
        maker = self._makers[name]
        if isinstance(maker, TaskInfo):
            raise ValueError(
                f"env.tasks: {name} has no simulator here, only recorded data; expected one of "
                f"{list_names(self.names[number] for number in self.playable)}"
            )
        with _naming(name):
            env = make_single_env(maker)
            return PaddedTask(env, self._options, task, len(self), width, actions)

    def maker(self, task: int) -> MakeEnv:
        """Return a function that makes an environment of a task."""
        self.infos  # noqa: B018  (inspected once, not in every worker process)
        return functools.partial(self, task)

    def action_masks(self, tasks: list[int]) -> np.ndarray:
        """Return which actions exist in each of these tasks, [len(tasks), A] float32."""
        counts = np.array([self.infos[task].actions for task in tasks])
        most = max(info.actions for info in self.infos)
        return (np.arange(most) < counts[:, None]).astype(np.float32)

    def _inspect(self, name: str, env: gym.Env) -> TaskInfo:
        spec = ObsSpec.from_space(env.observation_space, **self._options)
        actions = ActionSpec.from_space(env.action_space)
        if actions.discrete:
            raise ValueError(
                f"its actions are {env.action_space}; expected continuous ones, which can be "
                "padded; train a run of its own for it"
            )
        images = {_image_key(k): p.shape for k, p in spec.parts.items() if len(p.shape) == 3}
        width = sum(int(np.prod(p.shape)) for p in spec.parts.values() if len(p.shape) != 3)
        times = episode_length(env), frames_per_step(env)
        return TaskInfo(name, width, images, actions.width, *times)


class PaddedTask(gym.Wrapper):
    """One of `count` tasks, with observations of `width` numbers and `actions` actions."""

    def __init__(
        self,
        env: gym.Env,
        options: Mapping[str, Any],
        task: int,
        count: int,
        width: int,
        actions: int,
    ) -> None:
        super().__init__(env)
        self.task, self._width = np.int64(task), width
        self._spec = ObsSpec.from_space(env.observation_space, **options)
        self._action_spec = ActionSpec.from_space(env.action_space)
        images = {k: p.shape for k, p in self._spec.parts.items() if len(p.shape) == 3}
        self._images = {key: _image_key(key) for key in images}
        vectors = [key for key in self._spec.parts if key not in images]
        self._vectors = order_vectors(env, self._spec) or vectors  # as the official code has them
        parts: dict[str, spaces.Space] = {
            _image_key(key): spaces.Box(0, 255, shape, np.uint8) for key, shape in images.items()
        }
        if width:
            parts[VECTOR] = spaces.Box(-np.inf, np.inf, (width,), np.float32)
        self.observation_space = spaces.Dict({**parts, TASK: spaces.Discrete(count)})
        self.action_space = spaces.Box(-1.0, 1.0, (actions,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        obs, info = read_reset(self.env.reset(seed=seed, options=options))
        return self._pad(obs), info

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act with the first actions; those that the task does not have are ignored."""
        own = np.asarray(action, np.float32)[None, : self._action_spec.width]
        obs, *rest = read_step(self.env.step(self._action_spec.decode(own)[0]))
        return self._pad(obs), *rest

    def _pad(self, obs: Any) -> dict[str, Any]:
        encoded = self._spec.encode(map_tree(lambda x: np.asarray(x)[None], obs))
        arrays = encoded if isinstance(encoded, dict) else {"": encoded}
        padded: dict[str, Any] = {name: arrays[key][0] for key, name in self._images.items()}
        if self._width:
            vector = np.concatenate([arrays[key][0].reshape(-1) for key in self._vectors])
            padded[VECTOR] = np.zeros(self._width, np.float32)
            padded[VECTOR][: len(vector)] = vector
        return {**padded, TASK: self.task}


def make_env(
    tasks: Mapping[str, MakeEnv],
    task: int | str | None = None,
    obs: Mapping[str, str | None] | None = None,
) -> gym.Env:
    """Make one of several tasks, padded to the spaces that all of them share.

    tasks, obs: as for `TaskSet`. A run makes them from env.tasks (worldloom/app/tasks.py).
    task: its number or name.
    """
    return TaskSet(tasks, obs)(task)


def _image_key(key: str) -> str:
    return f"image/{key}" if key else "image"


def _describe(info: TaskInfo) -> str:
    parts = [f"{key} {shape}" for key, shape in info.images.items()]
    return " and ".join(parts + [f"{info.width} numbers"] * bool(info.width))


@contextmanager
def _naming(task: str) -> Iterator[None]:
    """Put the name of a task in front of an error, and the setting that names tasks into it."""
    try:
        yield
    except ValueError as error:
        text = re.sub(r"\benv\.(task|id|game)\b", "env.tasks", str(error))
        cause = error.__cause__ if isinstance(error, EnvError) else error
        raise ValueError(f"env.tasks: {task}: {text}") from cause
