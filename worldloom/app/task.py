"""Tasks: the spaces, environment and model that a configuration describes, and their scores."""

import functools
import math
import time
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import OmegaConf
from torch import nn

from worldloom.acting import Actor, Watch, evaluate, share_episodes
from worldloom.app.compose import Overrides, compose_config, compose_env, key_of, names_env
from worldloom.app.run_dir import CONFIG, describes_run, find_run, read_config
from worldloom.app.saved_config import require_trusted, resolve_saved
from worldloom.app.validation import RUNNING, check_arguments
from worldloom.datasets import Dataset
from worldloom.envs.contract import EnvError
from worldloom.envs.film import Film
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.custom import make_env as make_custom_env
from worldloom.envs.suites.custom import split_options
from worldloom.envs.vector import (
    episode_length,
    frames_per_step,
    make_limited_env,
    make_vector_env,
    order_vectors,
)
from worldloom.envs.workers import choose_workers
from worldloom.errors import escape
from worldloom.factory import build_model, create_world_model, import_target
from worldloom.protocol import REQUIRED, find_missing_methods
from worldloom.ranks import Ranks
from worldloom.records import REGISTERED
from worldloom.saving import get_config, read_weights
from worldloom.training.config import EvaluationConfig

LOG_INTERVAL = 20.0  # seconds between two lines about a long evaluation
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
    """

    obs: ObsSpec
    actions: ActionSpec
    episode_length: int | None
    frames_per_step: int = 1
    make_env: Callable[[], Any] | None = None
    running: dict[str, Any] = field(default_factory=dict)
    obs_order: tuple[str, ...] | None = None

    @classmethod
    def from_config(cls, env: Mapping[str, Any], collects: bool = True) -> "Task":
        """Read the env section; one environment is made, inspected and closed.

        collects: whether a run collects from the environments; False evaluates in this process.
        """
        make_env = env_maker(env)
        with name_failing_env(env["_target_"]):
            probe: Any = make_vector_env(make_env)
        try:
            obs = ObsSpec.from_space(probe.single_observation_space, **(env.get("obs") or {}))
            actions = ActionSpec.from_space(probe.single_action_space)
            times = episode_length(probe.envs[0]), frames_per_step(probe.envs[0])
            order = order_vectors(probe.envs[0], obs)
            running = {k: env[k] for k in RUNNING if k in env and collects}
            if running.get("workers") == "auto":
                running["workers"] = choose_workers(probe.envs[0], running.get("num_envs", 1))
        finally:
            probe.close()
        return cls(obs, actions, *times, make_env, running, order)

    @classmethod
    def from_dataset(cls, dataset: Dataset) -> "Task":
        """Build a task from a dataset; its longest episode serves as the time limit."""
        return cls(dataset.obs, dataset.actions, max(dataset.lengths))

    @property
    def spaces(self) -> tuple[Any, Any, Any]:
        """Return obs_shape, action_dim and discrete, as models take them."""
        return self.obs.shape, self.actions.action_dim, self.actions.discrete

    def vector_env(self, max_steps: int | None = None, **changes: int) -> Any:
        """Make the environments of a run, with changes of num_envs or workers.

        max_steps: actions after which episodes are truncated, if there is no shorter time limit.
        """
        assert self.make_env is not None
        make = self.make_env
        if max_steps is not None and max_steps < (self.episode_length or math.inf):
            make = functools.partial(make_limited_env, make, max_steps)
        return make_vector_env(make, keys=self.obs.parts, **{**self.running, **changes})

    def build_model(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the model section's class for this task.

        `episode_length`, `episodic` and `obs_order` are filled in where the section leaves them
        null.
        """
        known: dict[str, Any] = {"episode_length": self.episode_length, "episodic": "auto"}
        known["obs_order"] = self.obs_order
        filled = {k: v for k, v in known.items() if k in config and config[k] is None}
        model = build_model({**config, **filled}, *self.spaces)
        if lacking := find_missing_methods(model):
            raise ValueError(
                f"{config['_target_']} has no {', '.join(lacking)}; expected the methods of "
                f"worldloom.protocol.WorldModel: {', '.join(REQUIRED)}; write them, and see "
                "worldloom.check_world_model"
            )
        return model

    def build_actor(self, model: Any, planner: Mapping[str, Any]) -> Actor:
        """Return an actor that uses the model's policy, or plans with it if it has none."""
        if callable(getattr(model, "policy", None)):
            return Actor(model)
        options = {k: v for k, v in planner.items() if k != "_target_"}
        cls = import_target(str(planner["_target_"]))
        return Actor(model, cls(model, self.actions.action_dim, self.actions.discrete, **options))

    def describe(self, model: nn.Module) -> str:
        """Return a few lines about the model, its observations and its actions."""
        lines = [f"  {escape(key or 'obs'):<16} {self.obs.describe(key)}" for key in self.obs.parts]
        lines += [f"  {escape(key):<16} not used" for key in self.obs.dropped]
        lines += [f"  {escape(remark)}" for remark in self.obs.remarks]
        kind = "one-hot choices" if self.actions.discrete else "continuous in [-1, 1]"
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return "\n".join(
            [
                f"{type(model).__name__} with {count:,} parameters on "
                f"{next(model.parameters()).device}, {torch.get_num_threads()} threads",
                "observations:",
                *lines,
                f"actions: {self.actions.action_dim} ({kind})",
                *self._describe_workers(),
                *([] if self.episode_length or self.make_env is None else [NO_LIMIT]),
            ]
        )

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
    make = import_target(str(env["_target_"]))
    kept = {k: v for k, v in env.items() if k not in (*RUNNING, "obs") and not k.startswith("_")}
    options, around = split_options(make, kept)
    check_arguments("env", options, make)
    if not around:
        return functools.partial(make, **options)
    return functools.partial(make_custom_env, make, options, **around)


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
    if config["model"]["_target_"] not in REGISTERED:  # the name of a family in a saved model
        require_trusted({"model": config["model"]}, overrides)
    require_trusted({"env": section, "planner": config["planner"]}, overrides)
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
    model: Any = create_world_model(
        path, device=device, allow=(config["model"]["_target_"],)
    ).eval()
    built_with = (get_config(model) or {}).get("arguments", {})
    spaces = {"obs_shape": task.obs.shape, "action_dim": task.actions.action_dim}
    for name, value in spaces.items():
        if built_with.get(name, value) != value:
            raise ValueError(
                f"the model of {path} has {name} {built_with[name]}, but the environment {value}; "
                "choose the environment in which it was trained"
            )
    return task.build_actor(model, config["planner"])


class Evaluator:
    """Scores an actor in its own environments.

    ranks: the other processes of a run, which share the episodes and return the same scores.
    stops: returns whether this process asks to stop; called after every step.
    say: prints lines about the progress.
    """

    def __init__(
        self,
        task: Task,
        actor: Actor,
        settings: Mapping[str, Any],
        ranks: Ranks | None = None,
        stops: Callable[[], bool] = lambda: False,
        say: Callable[[str], None] = print,
    ) -> None:
        self.task, self.actor, self.settings = task, actor, settings
        self.ranks, self.stops, self.say = ranks or Ranks(), stops, say

    def score_unfinished(self) -> dict[str, float]:
        """Score an unfinished run, with other seeds than the final evaluation."""
        return self(self.settings["episodes_during"], self.settings["seed"] + 1_000_000)

    def __call__(
        self, episodes: int, seed: int | None = None, film: Film | None = None
    ) -> dict[str, float]:
        """Return the means "return", "length" and, if known, "success", and "return_std".

        film: records the episodes of the first environment.

        Raises:
            EvaluationStopped: a process asked to stop.
        """
        # Environment i has the same seed and episodes, whichever rank runs it.
        count, size = min(self.settings["num_envs"], episodes), self.ranks.size
        shares = share_episodes(episodes, min(max(count, size), episodes))
        first, end = (rank * len(shares) // size for rank in (self.ranks.rank, self.ranks.rank + 1))
        most = self.settings.get("max_steps", EvaluationConfig.max_steps)  # the first runs lack it
        env = self.task.vector_env(most, num_envs=end - first) if end > first else None
        model: Any = self.actor.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            if film is not None and env is not None:
                film.record(env, shares[first])
            results = evaluate(
                self.actor,
                env,
                self.task.obs,
                self.task.actions,
                shares[first:end],
                (self.settings["seed"] if seed is None else seed) + first,
                self.settings["deterministic"],
                self.ranks,
                self._watch(sum(shares[first:end])),
            )
        finally:
            for module, mode in modes:
                module.training = mode
            if env is not None:
                env.close()
        cut = sum(result["length"] >= most for result in results)
        if cut and self.ranks.rank == 0 and (self.task.episode_length or math.inf) > most:
            self.say(
                f"{cut} of the {len(results)} evaluated episodes were cut off after {most:,} steps "
                "(evaluation.max_steps), and their returns are those up to there"
            )
        names = sorted({name for result in results for name in result})
        scores = {
            n: float(np.mean([result[n] for result in results if n in result])) for n in names
        }
        scores["return_std"] = float(np.std([r["return"] for r in results]))
        return scores

    def _watch(self, episodes: int) -> Watch:
        """Return a function that prints a line from time to time, and whether to stop."""
        start = last = time.monotonic()

        def watch(ended: int, steps: int) -> bool:
            nonlocal last
            now = time.monotonic()
            if self.ranks.rank == 0 and now >= last + LOG_INTERVAL:
                last = now
                self.say(
                    f"evaluating: {ended} of {episodes} episodes | {steps:,} steps | "
                    f"{steps / max(now - start, 1e-9):,.0f} steps/s"
                )
            return self.stops()

        return watch
