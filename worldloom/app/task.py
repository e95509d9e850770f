"""What is to be learned: an environment as the configuration names it, or a data set's spaces."""

import functools
import inspect
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import nn

from worldloom.acting import Actor
from worldloom.datasets import Dataset
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.custom import make_env as make_custom_env
from worldloom.envs.suites.custom import split_options
from worldloom.envs.vector import episode_length, frames_per_step, make_vector_env
from worldloom.envs.workers import choose_workers
from worldloom.errors import suggest
from worldloom.factory import build_model, import_target
from worldloom.protocol import REQUIRED, find_missing_methods

# Keys of the env section that say how environments are run, not which.
RUNNING = ("num_envs", "workers", "timeout")


@dataclass
class Task:
    """What is to be learned: what models see of it and do, and the environment if there is one.

    episode_length: decisions until the time limit, None if there is none.
    frames_per_step: simulator's steps of a decision.
    make_env: None where there is nothing but a data set. running: how environments are run.
    """

    obs: ObsSpec
    actions: ActionSpec
    episode_length: int | None
    frames_per_step: int = 1
    make_env: Callable[[], Any] | None = None
    running: dict[str, Any] = field(default_factory=dict)

    @classmethod
    def from_config(cls, env: Mapping[str, Any], collects: bool = True) -> "Task":
        """Read the env section; one environment is made, looked at and closed.

        collects: whether environments will be run otherwise than in this process.
        """
        make_env = env_maker(env)
        with blaming(env["_target_"]):
            probe: Any = make_vector_env(make_env)
        try:
            obs = ObsSpec.from_space(probe.single_observation_space, **(env.get("obs") or {}))
            actions = ActionSpec.from_space(probe.single_action_space)
            times = episode_length(probe.envs[0]), frames_per_step(probe.envs[0])
            running = {k: env[k] for k in RUNNING if k in env and collects}
            if running.get("workers") == "auto":
                running["workers"] = choose_workers(probe.envs[0], running.get("num_envs", 1))
        finally:
            probe.close()
        return cls(obs, actions, *times, make_env, running)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Task":
        """Know of a data set alone; its longest episode stands for the time limit."""
        return cls(dataset.obs, dataset.actions, max(dataset.lengths))

    def vector_env(self, **changes: int) -> Any:
        """Make the environments of a run; changes of num_envs and workers are for these alone."""
        assert self.make_env is not None
        return make_vector_env(self.make_env, **{**self.running, **changes})

    def build_model(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the model section's class for this task.

        Where the section has a null for something that only the environment knows, it is told.
        """
        knows = {"episode_length": self.episode_length, "episodic": "auto"}
        told = {k: v for k, v in knows.items() if k in config and config[k] is None}
        spaces = (self.obs.shape, self.actions.action_dim, self.actions.discrete)
        model = build_model({**config, **told}, *spaces)
        if lacking := find_missing_methods(model):
            raise ValueError(
                f"{config['_target_']} has no {', '.join(lacking)}; expected the methods of "
                f"worldloom.protocol.WorldModel: {', '.join(REQUIRED)}; write them, and see "
                "worldloom.check_world_model"
            )
        return model

    def build_actor(self, model: Any, planner: Mapping[str, Any]) -> Actor:
        """Let the model act with its policy, or plan with it if it has none."""
        if callable(getattr(model, "policy", None)):
            return Actor(model)
        options = {k: v for k, v in planner.items() if k != "_target_"}
        cls = import_target(str(planner["_target_"]))
        return Actor(model, cls(model, self.actions.action_dim, self.actions.discrete, **options))

    def describe(self, model: nn.Module) -> str:
        """Say in a few lines what the model sees, does and weighs."""
        lines = [f"  {key or 'obs':<16} {self.obs.describe(key)}" for key in self.obs.parts]
        lines += [f"  {key:<16} left out" for key in self.obs.dropped]
        kind = "one-hot choices" if self.actions.discrete else "continuous in [-1, 1]"
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return "\n".join(
            [
                f"{type(model).__name__} with {count:,} parameters on "
                f"{next(model.parameters()).device}, {torch.get_num_threads()} threads",
                "observations:",
                *lines,
                f"actions: {self.actions.action_dim} ({kind})",
                *self._where(),
            ]
        )

    def _where(self) -> list[str]:
        """Say where the environments of a run are stepped."""
        if not self.running:
            return []
        copies = self.running.get("num_envs", 1)
        workers = min(self.running.get("workers", 0), copies)
        where = f"{workers} processes" if workers else "this process"
        return [f"environments: {copies} in {where}"]


def env_maker(env: Mapping[str, Any]) -> Callable[[], Any]:
    """Return the function that makes the environment of an env section."""
    if env["_target_"] is None:
        raise ValueError("there is no environment; name one: env=gymnasium env.id=CartPole-v1")
    make = import_target(str(env["_target_"]))
    kept = {k: v for k, v in env.items() if k not in (*RUNNING, "obs") and not k.startswith("_")}
    options, around = split_options(make, kept)
    takes = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in takes.values()):
        for key in options:
            if key not in takes:
                near = suggest(key, takes, "env.") or f"; it takes {', '.join(takes) or 'none'}"
                raise ValueError(f"{env['_target_']} has no option 'env.{key}'{near}")
    if not around:
        return functools.partial(make, **options)
    return functools.partial(make_custom_env, make, options, **around)


@contextmanager
def blaming(target: str) -> Iterator[None]:
    """Name the function whose environment cannot be made, where its error does not say so."""
    try:
        yield
    except (ValueError, TypeError, ImportError):
        raise  # our own, and what says which option is wrong
    except Exception as error:
        frame = traceback.extract_tb(error.__traceback__)[-1]
        raise ValueError(
            f"{target} raised {type(error).__name__} in {frame.filename}:{frame.lineno}: {error}; "
            "expected an environment; mend it (HYDRA_FULL_ERROR=1 shows the whole traceback)"
        ) from error
