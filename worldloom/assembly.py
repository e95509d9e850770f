"""From a composed configuration to environments, models and actors; shared by run and eval."""

import functools
import logging
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from worldloom.acting import Actor, evaluate
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import episode_length, make_vector_env
from worldloom.factory import build_model, import_target

# Keys of the env section that say how environments are run, not which.
RUNNING = ("num_envs", "workers")


@dataclass
class Task:
    """An environment as the configuration names it, and what models see of it."""

    make_env: Callable[[], Any]
    num_envs: int
    workers: int
    obs: ObsSpec
    actions: ActionSpec
    episode_length: int | None  # decisions until the time limit, if there is one

    @classmethod
    def from_config(cls, env: Mapping[str, Any]) -> "Task":
        """Read the env section; one environment is made, looked at and closed."""
        options = {k: v for k, v in env.items() if k not in RUNNING and not k.startswith("_")}
        make_env = functools.partial(import_target(str(env["_target_"])), **options)
        probe: Any = make_vector_env(make_env)
        obs = ObsSpec.from_space(probe.single_observation_space)
        actions = ActionSpec.from_space(probe.single_action_space)
        length = episode_length(probe.envs[0])
        probe.close()
        return cls(make_env, int(env["num_envs"]), int(env["workers"]), obs, actions, length)

    def vector_env(self, num_envs: int | None = None) -> Any:
        """Make the environments of a run, or as many as asked for in this process."""
        if num_envs is not None:
            return make_vector_env(self.make_env, num_envs)
        return make_vector_env(self.make_env, self.num_envs, self.workers)

    def build_model(self, config: Mapping[str, Any]) -> nn.Module:
        """Build the model section's class for this task.

        Where the section has a null for something that only the environment knows, it is told.
        """
        knows = {"episode_length": self.episode_length, "episodic": "auto"}
        told = {k: v for k, v in knows.items() if k in config and config[k] is None}
        spaces = (self.obs.shape, self.actions.action_dim, self.actions.discrete)
        return build_model({**config, **told}, *spaces)

    def build_actor(self, model: Any, planner: Mapping[str, Any]) -> Actor:
        """Let the model act with its policy, or plan with it if it has none."""
        if callable(getattr(model, "policy", None)):
            return Actor(model)
        options = {k: v for k, v in planner.items() if k != "_target_"}
        cls = import_target(str(planner["_target_"]))
        return Actor(model, cls(model, self.actions.action_dim, self.actions.discrete, **options))

    def describe(self, model: nn.Module) -> str:
        """Say in a few lines what the model sees, does and weighs."""
        shape = self.obs.shape
        shapes = shape if isinstance(shape, dict) else {"obs": shape}
        kinds = {3: "image encoder", 2: "vector encoder", 1: "vector encoder"}
        lines = [f"  {key:<16}{s!s:<16}{kinds[len(s)]}" for key, s in shapes.items()]
        kind = "one-hot choices" if self.actions.discrete else "continuous in [-1, 1]"
        count = sum(p.numel() for p in model.parameters() if p.requires_grad)
        return "\n".join(
            [
                f"{type(model).__name__} with {count:,} parameters on "
                f"{next(model.parameters()).device}, {torch.get_num_threads()} threads",
                "observations:",
                *lines,
                f"actions: {self.actions.action_dim} ({kind})",
            ]
        )


def build_data(plain: Mapping[str, Any], task: Task, actor: Actor) -> Any:
    """Build the replay, the collector and the data module that feeds the trainer."""
    from worldloom.training import Collector, ReplayBuffer, ReplayDataModule

    training, data, seed = plain["training"], plain["data"], plain["seed"]
    seed_steps = training["seed_episodes"] * (task.episode_length or 0)
    buffer = ReplayBuffer(
        data["capacity"],
        task.obs.shape,
        task.actions.width,
        num_envs=task.num_envs,
        latents=getattr(actor.model, "latents", None),
        online=data["online"],
        seed=seed,
    )
    collector = Collector(
        task.vector_env(),
        actor,
        buffer,
        obs_spec=task.obs,
        action_spec=task.actions,
        seed=seed,
        random_steps=max(training["random_steps"], seed_steps),
    )
    settings = ("batch_size", "sequence_length", "train_ratio", "pretrain", "total_steps")
    options = {k: training[k] for k in settings}
    prefill = training["prefill"]
    if prefill is None:
        prefill = training["batch_size"] * training["sequence_length"]
    options["prefill"] = max(prefill, seed_steps)
    return ReplayDataModule(buffer, collector, across_episodes=data["across_episodes"], **options)


def prepare(seed: int, threads: int | None) -> None:
    """Seed everything, set the CPU threads of torch, and quieten Lightning.

    Each of its lines then appears once, through Hydra's log, and its adverts not at all.
    """
    import lightning  # adds the handlers that would double every line

    lightning.seed_everything(seed, verbose=False)
    if threads:
        torch.set_num_threads(threads)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


class Evaluator:
    """Score an actor in environments of its own."""

    def __init__(self, task: Task, actor: Actor, settings: Mapping[str, Any]) -> None:
        self.task, self.actor, self.settings = task, actor, settings

    def during(self) -> dict[str, float]:
        """Score an unfinished run, with other seeds than the final evaluation."""
        return self(self.settings["episodes_during"], self.settings["seed"] + 1_000_000)

    def __call__(self, episodes: int, seed: int | None = None) -> dict[str, float]:
        """Return eval/return (mean), eval/return_std, eval/length and eval/success if there is."""
        num_envs = min(self.settings["num_envs"], episodes)
        env = self.task.vector_env(num_envs)
        model: Any = self.actor.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            results = evaluate(
                self.actor,
                env,
                self.task.obs,
                self.task.actions,
                episodes,
                self.settings["seed"] if seed is None else seed,
                self.settings["deterministic"],
            )
        finally:
            for module, mode in modes:
                module.training = mode
            env.close()
        names = sorted({name for result in results for name in result})
        scores = {
            f"eval/{n}": float(np.mean([result[n] for result in results if n in result]))
            for n in names
        }
        scores["eval/return_std"] = float(np.std([r["return"] for r in results]))
        return scores
