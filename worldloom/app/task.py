"""Tasks: the spaces, environment and model that a configuration describes."""

import functools
import math
import traceback
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from omegaconf import OmegaConf
from torch import nn

from worldloom.acting import Actor
from worldloom.app.compose import Overrides, compose_config, compose_env, key_of, names_env
from worldloom.app.run_dir import CONFIG, describes_run, find_run, read_config
from worldloom.app.saved_config import require_trusted, resolve_saved
from worldloom.app.tasks import MULTITASK, TaskChoice, expand_tasks, require_same_tasks
from worldloom.app.validation import RUNNING, check_arguments
from worldloom.cuda_graphs import Recorder
from worldloom.datasets import Dataset
from worldloom.envs.contract import EnvError
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.custom import make_env as make_custom_env
from worldloom.envs.suites.custom import split_options
from worldloom.envs.suites.multitask import TaskSet
from worldloom.envs.time_limit import SECONDS
from worldloom.envs.vector import (
    episode_length,
    frames_per_step,
    make_limited_env,
    make_vector_env,
    order_vectors,
)
from worldloom.envs.workers import choose_workers
from worldloom.errors import escape, list_names
from worldloom.factory import build_model, create_world_model
from worldloom.protocol import REQUIRED, count_parameters, find_missing_methods
from worldloom.ranks import rank, world_size
from worldloom.records import REGISTERED, find_targets, import_target
from worldloom.saving import get_config, read_weights
from worldloom.training.precision import split_precision

NO_LIMIT = (
    "episodes: no time limit is known, so they may be endless; env.time_limit=STEPS sets one; "
    "evaluations cut episodes off (evaluation.max_steps)"
)


@dataclass
class Task:
    """Observations and actions as models receive them, and the environment if there is one.

    episode_length: actions until the time limit; None without a limit.
    frames_per_step: simulator steps per action.
    make_env: None if there is only a dataset.
    running: how environments are run, the keys in `RUNNING`.
    obs_order: keys of the vectors in the environment's own order, if it has one.
    tasks: makes those of env=multitask; environment i of a run has task i modulo their number.
    choices: their names and scores.
    action_dims: number of actions of each task, if there are several.
    """

    obs: ObsSpec
    actions: ActionSpec
    episode_length: int | None
    frames_per_step: int = 1
    make_env: Callable[[], Any] | None = None
    running: dict[str, Any] = field(default_factory=dict)
    obs_order: tuple[str, ...] | None = None
    tasks: TaskSet | None = None
    choices: list[TaskChoice] = field(default_factory=list)
    action_dims: Sequence[int] | None = None

    @classmethod
    def from_config(cls, env: Mapping[str, Any], collects: bool = True) -> "Task":
        """Read the env section; one environment is made, inspected and closed.

        collects: whether a run collects from the environments; False evaluates in this process.
        """
        make_env = env_maker(env)
        tasks = make_env if isinstance(make_env, TaskSet) else None
        with name_failing_env(env["_target_"]):
            timeout = env.get("timeout", SECONDS)
            probe: Any = make_vector_env(make_env, timeout=timeout)
        try:
            choice = (env.get("obs") or {}) if tasks is None else {}  # each task has made it
            obs = ObsSpec.from_space(probe.single_observation_space, **choice)
            actions = ActionSpec.from_space(probe.single_action_space)
            times = episode_length(probe.envs[0]), frames_per_step(probe.envs[0])
            order = order_vectors(probe.envs[0], obs)
            running = {k: env[k] for k in RUNNING if k in env and collects}
            if running.get("workers") == "auto":
                running["workers"] = choose_workers(probe.envs[0], running.get("num_envs", 1))
        finally:
            probe.close()
        if tasks is not None:
            if running:
                _require_multiple(running.get("num_envs", 1) * world_size(), tasks)
            lengths = [info.episode_length for info in tasks.infos]
            times = None if None in lengths else max(n for n in lengths if n), times[1]
        choices = [] if tasks is None else expand_tasks(env)
        dims = None if tasks is None else [info.actions for info in tasks.infos]
        return cls(obs, actions, *times, make_env, running, order, tasks, choices, dims)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Task":
        """Build a task from a dataset; its longest episode serves as the time limit."""
        length = max(dataset.lengths)
        return cls(dataset.obs, dataset.actions, length, action_dims=dataset.action_dims)

    @property
    def spaces(self) -> tuple[Any, Any, Any]:
        """Return obs_shape, action_dim and discrete, as models take them."""
        return self.obs.shape, self.actions.action_dim, self.actions.discrete

    def vector_env(self, max_steps: int | None = None, first: int = 0, **changes: int) -> Any:
        """Make the environments of a run, with changes of num_envs or workers.

        max_steps: actions after which episodes are truncated, if there is no shorter time limit.
        first: number of the first of these environments among those of all processes.
        """
        assert self.make_env is not None
        running = {**self.running, **changes}
        count = running.get("num_envs", 1)
        makers: list[Callable[[], Any]] = [self.make_env] * count
        if self.tasks is not None:
            makers = [self.tasks.maker(task) for task in self.find_tasks(first, count)]
        if max_steps is not None and max_steps < (self.episode_length or math.inf):
            makers = [functools.partial(make_limited_env, make, max_steps) for make in makers]
        return make_vector_env(makers, keys=self.obs.parts, **{**running, "num_envs": count})

    def find_tasks(self, first: int, count: int) -> list[int]:
        """Return the number of the task of each of `count` environments from `first` on."""
        numbers = [0] if self.tasks is None else self.tasks.playable
        return [numbers[i % len(numbers)] for i in range(first, first + count)]

    def collecting(self) -> dict[str, Any]:
        """Return what a collector has to know of the tasks of this process's environments."""
        if self.tasks is None:
            return {"frames_per_step": self.frames_per_step}
        count = self.running["num_envs"]
        numbers = self.find_tasks(rank() * count, count)
        infos = [self.tasks.infos[number] for number in numbers]
        return {
            "frames_per_step": [info.frames_per_step for info in infos],
            "names": [info.name for info in infos],
            "masks": self.tasks.action_masks(numbers),
        }

    def build_model(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the model section's class for this task.

        `episode_length`, `episodic`, `obs_order` and, for several tasks, `action_dims` and
        `episode_lengths` are filled in where the section leaves them null.
        """
        known: dict[str, Any] = {"episode_length": self.episode_length, "episodic": "auto"}
        known["obs_order"] = self.obs_order
        if self.tasks is not None:
            known["episode_lengths"] = [info.episode_length for info in self.tasks.infos]
        if self.action_dims is not None:
            known["action_dims"] = list(self.action_dims)
            if config.get("action_dims") not in (None, known["action_dims"]):
                raise ValueError(
                    f"model.action_dims is {config['action_dims']}, but the tasks have "
                    f"{known['action_dims']} actions; leave it out"
                )
        filled = {k: v for k, v in known.items() if k in config and config[k] is None}
        model = build_model({**config, **filled}, *self.spaces)
        if lacking := find_missing_methods(model):
            raise ValueError(
                f"{config['_target_']} has no {', '.join(lacking)}; expected the methods of "
                f"worldloom.protocol.WorldModel: {', '.join(REQUIRED)}; write them, and see "
                "worldloom.check_world_model"
            )
        return model

    def build_actor(
        self,
        model: Any,
        planner: Mapping[str, Any],
        precision: str,
        record: Recorder | None = None,
    ) -> Actor:
        """Return an actor that uses the model's policy, or plans with it if it has none.

        precision: in which the model is trained. record: see `Actor`.
        """
        if callable(getattr(model, "policy", None)):
            return Actor(model, precision=precision, record=record)
        options = {k: v for k, v in planner.items() if k != "_target_"}
        cls = import_target(str(planner["_target_"]))
        chosen = cls(model, self.actions.action_dim, self.actions.discrete, **options)
        return Actor(model, chosen, record=record)

    def describe(self, model: nn.Module) -> str:
        """Return a few lines about the model, its observations and its actions."""
        lines = [f"  {escape(key or 'obs'):<16} {self.obs.describe(key)}" for key in self.obs.parts]
        lines += [f"  {escape(key):<16} not used" for key in self.obs.dropped]
        lines += [f"  {escape(remark)}" for remark in self.obs.remarks]
        kind = "one-hot choices" if self.actions.discrete else "continuous in [-1, 1]"
        count = count_parameters(model)
        return "\n".join(
            [
                f"{type(model).__name__} with {count:,} parameters on "
                f"{next(model.parameters()).device}, {torch.get_num_threads()} threads",
                "observations:",
                *lines,
                f"actions: {self.actions.action_dim} ({kind})",
                *self._describe_tasks(),
                *self._describe_workers(),
                *([] if self.episode_length or self.make_env is None else [NO_LIMIT]),
            ]
        )

    def _describe_tasks(self) -> list[str]:
        """Return a line about each task."""
        if self.tasks is None:
            return []
        lines = [
            f"  {escape(info.name):<16} {info.width} numbers, {info.actions} actions, "
            f"{info.episode_length or 'endless'} steps of {info.frames_per_step} frames"
            for info in self.tasks.infos
        ]
        return [f"tasks: {len(self.tasks)}", *lines]

    def _describe_workers(self) -> list[str]:
        """Return a line about the processes that step the environments."""
        if not self.running:
            return []
        copies = self.running.get("num_envs", 1)
        workers = min(self.running.get("workers", 0), copies)
        where = f"{workers} processes" if workers else "this process"
        return [f"environments: {copies} in {where}"]


def env_maker(env: Mapping[str, Any]) -> Callable[[], Any]:
    """Return the function that makes the environment of an env section.

    Raises:
        ValueError: the section names no environment, or one that cannot be imported or does not
            take the arguments.
    """
    if env["_target_"] is None:
        raise ValueError("there is no environment; name one: env=gymnasium env.id=CartPole-v1")
    if env["_target_"] == MULTITASK:
        return _make_task_set(env)
    make = import_target(str(env["_target_"]))
    kept = {k: v for k, v in env.items() if k not in (*RUNNING, "obs") and not k.startswith("_")}
    options, around = split_options(make, kept)
    check_arguments("env", options, make)
    if not around:
        return functools.partial(make, **options)
    return functools.partial(make_custom_env, make, options, **around)


def _make_task_set(env: Mapping[str, Any]) -> TaskSet:
    """Return what makes the environments of env=multitask."""
    makers: dict[str, Any] = {}
    for task in expand_tasks(env):
        try:
            makers[task.name] = task.info or env_maker(task.env)
        except ValueError as error:
            raise ValueError(f"env.tasks: {task.name}: {error}") from error
    return TaskSet(makers, env.get("obs"))


def _require_multiple(num_envs: int, tasks: TaskSet) -> None:
    """Raise ValueError unless every task has equally many of the environments of a run."""
    count = len(tasks)
    if lacking := [tasks.names[i] for i in range(count) if i not in tasks.playable]:
        raise ValueError(
            f"env.tasks: {list_names(lacking)} have no simulator here, only recorded data; "
            "expected tasks to collect from; leave them out, or train on data: data=offline"
        )
    if num_envs % count:
        valid = [n for n in (num_envs - num_envs % count, num_envs + count - num_envs % count) if n]
        raise ValueError(
            f"env.num_envs is {num_envs}, but there are {count} tasks; expected a multiple, so "
            f"that each task has as many environments; set it to {' or '.join(map(str, valid))}"
        )


@contextmanager
def name_failing_env(target: str) -> Iterator[None]:
    """Name the function whose environment cannot be made, if its error does not."""
    try:
        yield
    except EnvError as error:
        raise ValueError(f"{target}: {error}") from error.__cause__
    except (ValueError, TypeError, ImportError):
        raise  # raised by worldloom, or names the wrong option
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{target} raised {type(error).__name__} in {frame.filename}:{frame.lineno}: {error}; "
            "expected an environment; fix it (HYDRA_FULL_ERROR=1 shows the whole traceback)"
        ) from error


def open_saved_run(path: Path, overrides: Overrides) -> tuple[dict[str, Any], dict[str, Any]]:
    """Return the resolved configuration of a run and the env section to act in, both trusted.

    path: of the run, or of its model folder or a checkpoint in it; or of a saved model without a
        run, for which the overrides name an environment.
    overrides: env=NAME and env.KEY=VALUE change the environment; SECTION._target_=NAME repeats the
        override that named third-party code when the run was trained.

    Raises:
        ValueError: there is no run, an override differs from its configuration, or third-party code
            is not repeated in the overrides.
    """
    run, env_overrides = find_run(path), overrides.select(r"env$|env\.")
    if path.exists() and not describes_run(run / CONFIG) and names_env(env_overrides):
        config = _describe_model(path, env_overrides)
    else:
        config = resolve_saved(read_config(run), run / CONFIG)
    for arg in overrides:
        key, _, value = arg.partition("=")
        if (
            arg not in env_overrides.args
            and OmegaConf.select(OmegaConf.create(config), key) != value
        ):
            raise ValueError(
                f"{arg} differs from the value with which {path} was trained; repeat the override "
                f"of the training command, or leave {key_of(arg)} out"
            )
    section = compose_env(env_overrides, config["env"])
    require_same_tasks(path, config["env"], section)
    model = dict(config["model"])
    if model["_target_"] in REGISTERED:  # the name of a family in a saved model
        del model["_target_"]
    require_trusted({"model": model, "env": section, "planner": config["planner"]}, overrides)
    return config, section


def _describe_model(path: Path, env_overrides: Overrides) -> dict[str, Any]:
    """Return what the configuration of a run would be, for a model without one."""
    name = str(read_weights(path)[0].get("model"))
    planner: Any = OmegaConf.to_container(compose_config("~experiment").planner, resolve=True)
    return {
        "model": {"_target_": name},
        "planner": planner,
        "env": compose_env(env_overrides),
        "threads": None,
    }


def load_actor(path: Path, config: Mapping[str, Any], task: Task, device: Any = "cpu") -> Actor:
    """Load the model of a run to act in a task, which may differ from the one of its training.

    config: of the run, as `open_saved_run` returns it.

    Raises:
        ValueError: the model has other observations or actions than the task.
    """
    model: Any = create_world_model(path, device=device, allow=find_targets(config["model"])).eval()
    built_with = (get_config(model) or {}).get("arguments", {})
    spaces = {"obs_shape": task.obs.shape, "action_dim": task.actions.action_dim}
    for name, value in spaces.items():
        if built_with.get(name, value) != value:
            raise ValueError(
                f"the model of {path} has {name} {built_with[name]}, but the environment {value}; "
                "choose the environment in which it was trained"
            )
    asked, chosen = split_precision(config.get("trainer", {}).get("precision"))
    return task.build_actor(model, config["planner"], chosen or asked)
