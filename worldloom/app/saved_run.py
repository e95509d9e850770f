"""Trained runs: their model, their environment, and an agent that acts in it."""

import functools
import inspect
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import gymnasium as gym

from worldloom.acting import Actor
from worldloom.agent import Agent
from worldloom.app.run_dir import CONFIG, find_run, read_config
from worldloom.app.saved_config import (
    acting_sections,
    find_foreign_code,
    format_allow,
    resolve_saved,
)
from worldloom.app.task import Task, env_maker, load_actor, name_failing_env
from worldloom.app.tasks import MULTITASK
from worldloom.envs.replayable import ReplayableEpisodes
from worldloom.envs.suites.multitask import TaskSet
from worldloom.envs.vector import make_single_env
from worldloom.records import import_target


class SavedRun:
    """A run that was trained, or is still being trained.

    path: as for `load_run`.
    config: the run's resolved configuration.
    env: the env section of the environment to act in.
    """

    def __init__(
        self, path: Path, config: dict[str, Any], env: dict[str, Any], device: Any = "cpu"
    ) -> None:
        self.path, self.config, self.env, self.device = path, config, env, device

    @functools.cached_property
    def task(self) -> Task:
        """Observations and actions as the model sees them; one environment is made to find out."""
        return Task.from_config(self.env, collects=False)

    @functools.cached_property
    def actor(self) -> Actor:
        """Acts with the model, in model units; plans if the model has no policy."""
        return load_actor(self.path, self.config, self.task, self.device)

    @property
    def model(self) -> Any:
        """The trained model, in evaluation mode."""
        return self.actor.model

    def make_env(self, render_mode: str | None = None, task: str | int | None = None) -> gym.Env:
        """Make a new environment of the run, as its model was trained in it.

        It has the run's action repeat, time limit, image size, frame stack and pixels.
        `reset(seed=s)` determines this episode and all that follow, and `evaluation.seed` gives
        the episodes of an evaluation in one environment. Vector environments:
        `gymnasium.vector.SyncVectorEnv([run.make_env] * 4)`.

        render_mode: passed to the environment, such as "rgb_array" or "human".
        task: name or number of one of the tasks of env=multitask; by default the first one.

        Raises:
            ValueError: the run has no environment, it has no such render mode, or no such task.
        """
        make: Any = env_maker(
            self.env if render_mode is None else add_render_mode(self.env, render_mode)
        )
        if task is not None and not isinstance(make, TaskSet):
            raise ValueError(
                f"task is {task!r}, but {self.path} was trained on a single task; leave it out"
            )
        if task is not None:
            make = functools.partial(make, task)
        target = self.env["_target_"]
        with name_failing_env(target):
            env = ReplayableEpisodes(make_single_env(make))
        if render_mode is not None and env.render_mode != render_mode:
            env.close()
            raise ValueError(
                f"{target} made an environment with render_mode={env.render_mode!r}, but "
                f"{render_mode!r} was asked for; expected a parameter render_mode of {target} that "
                "reaches the environment; add it, or leave render_mode out"
            )
        return env

    def agent(self, deterministic: bool = True, seed: int = 0) -> Agent:
        """Return an agent that acts with the model in the run's environment, with its own memory.

        deterministic: choose the policy's mode instead of samples.
        seed: of the agent's random numbers; `evaluation.seed` gives those of an evaluation in one
            environment.
        """
        return Agent(self.actor, self.task.obs, self.task.actions, deterministic, seed)


def load_run(path: str | Path, allow: Iterable[str] = (), device: Any = "cpu") -> SavedRun:
    """Load a run, to act with its model in its environment.

    Args:
        path: the run's folder, its model folder, or one of its checkpoints. A run that has no final
            model yet is loaded from its last checkpoint.
        allow: import paths of the custom model, environment and planner that the run uses, such as
            ("my_pkg.MyModel", "my_pkg.make_env"), and ids of the form "module:id".
        device: device of the model.

    Raises:
        ValueError: there is no run, it cannot be read, it has no environment, or it uses
            third-party code that is not in `allow`; the message contains the complete argument.
    """
    path, allow = Path(path).expanduser(), (allow,) if isinstance(allow, str) else tuple(allow)
    run = find_run(path)
    config = resolve_saved(read_config(run), run / CONFIG)
    foreign = find_foreign_code(acting_sections(config)).values()
    if missing := [name for name in foreign if name not in allow]:
        raise ValueError(
            f"{path} uses {', '.join(map(repr, missing))}, and worldloom never imports third-party "
            "code just because a saved file names it; if you trust it, pass "
            f"{format_allow(config).removeprefix(', ')}"
        )
    if config["env"]["_target_"] is None:
        raise ValueError(
            f"{path} was trained without an environment, so there is none to act in; load its "
            "model with worldloom.create_world_model, and act with worldloom.acting.Actor"
        )
    return SavedRun(path, config, config["env"], device)


def add_render_mode(env: Mapping[str, Any], render_mode: str) -> dict[str, Any]:
    """Return an env section with a render mode, if its function takes one."""
    if env["_target_"] is None:
        return dict(env)  # `env_maker` reports it
    takes = inspect.signature(import_target(str(env["_target_"]))).parameters
    accepts = env["_target_"] == MULTITASK or "render_mode" in takes
    accepts = accepts or any(p.kind is p.VAR_KEYWORD for p in takes.values())
    return {**env, **({"render_mode": render_mode} if accepts else {})}
