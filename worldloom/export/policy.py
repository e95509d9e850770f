"""Policies to export: of a run, or of a saved model alone."""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np
import torch
from gymnasium import spaces

import worldloom
from worldloom.acting import Actor
from worldloom.app.compose import Overrides
from worldloom.app.run_dir import SCORES, find_run, read_scores
from worldloom.app.saved_config import require_trusted
from worldloom.app.saved_run import SavedRun
from worldloom.app.validation import RUNNING
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.export.formats import describe_step, make_file, open_file, write_file
from worldloom.export.step import PolicyStep, name_obs
from worldloom.export.verify import compare
from worldloom.factory import create_world_model
from worldloom.protocol import count_parameters
from worldloom.records import REGISTERED
from worldloom.saving import get_config, read_weights
from worldloom.trees import flatten_tree

FORMAT = 1  # of the metadata


@dataclass
class Policy:
    """What chooses the actions, and the spaces of a single environment.

    actions: None for named actions, which no environment has; they stay in the model's units.
    observations: {input: array} of one environment at successive steps.
    facts: the part of the metadata about model, training and environment.
    """

    actor: Actor
    obs: ObsSpec
    actions: ActionSpec | None
    observations: list[dict[str, np.ndarray]]
    facts: dict[str, Any]


def export_policy(policy: Policy, file: Path, settings: Any) -> str:
    """Export a policy, compare it with the model, write the file, and return a summary.

    settings: an `ExportConfig`.

    Raises:
        ValueError: the policy cannot be exported, or the graph acts differently from the model.
    """
    model: Any = policy.actor.model
    step, seen = make_step(policy, settings)
    plans = policy.actor.planner is not None or getattr(model, "plans_in_bfloat16", False)
    kind = settings.policy or ("plan" if plans else "policy")
    metadata = {
        "format": FORMAT,
        "worldloom": worldloom.__version__,
        "torch": torch.__version__,
        **policy.facts,
        "policy": {
            "kind": kind,
            "deterministic": settings.deterministic,
            "batch": settings.batch,
        },
        **describe_step(step),
    }
    contents = make_file(step, file.suffix, metadata)
    actor = Actor(model, policy.actor.planner)  # in the precision of the weights
    found = compare(open_file(contents, file.suffix), step, actor, seen, settings.seed)
    if not found.holds:
        raise ValueError(
            f"the exported graph does not act as {type(model).__name__}: {found.describe()}, the "
            f"others by up to {max(found.differences):.1e}; {file} was not written. A model that "
            "predicts the same value for all plans, such as an untrained TD-MPC2, chooses among "
            "equals"
        )
    write_file(file, contents)
    mode = "mode" if settings.deterministic else "samples"
    runtime = "ONNX Runtime" if file.suffix == ".onnx" else "torch.export"
    return "\n".join(
        [
            f"{type(model).__name__}: {kind}, {mode}, {settings.batch} environment(s) a call",
            *(f"  {_format(entry)}" for entry in [*metadata["inputs"], *metadata["outputs"]]),
            found.describe(),
            f"milliseconds a step: {found.exported:.2f} ({runtime}), {found.torch:.2f} (PyTorch)",
            f"{file}: {len(contents) / 1e6:.1f} MB",
        ]
    )


def make_step(policy: Policy, settings: Any) -> tuple[PolicyStep, list[dict[str, np.ndarray]]]:
    """Return the function to export, and observations {input: [N, ...]} of successive steps."""
    if settings.policy == "prior":
        use_prior(policy.actor)
    seen = []
    for start in range(settings.steps):
        rows = policy.observations[start : start + settings.batch]
        seen.append({name: np.stack([row[name] for row in rows]) for name in rows[0]})
    examples = [{name: torch.from_numpy(x) for name, x in obs.items()} for obs in seen[:4]]
    return PolicyStep(
        policy.actor, policy.obs, policy.actions, settings.deterministic, examples
    ), seen


def _format(entry: Mapping[str, Any]) -> str:
    role = entry.get("distribution") or entry.get("kind", "output")
    return f"{entry['name']:<24} {entry['dtype']:<8} {entry['shape']!s:<18} {role}"


def from_run(path: Path, config: dict[str, Any], section: dict[str, Any], settings: Any) -> Policy:
    """Return the policy of a run, with observations of its environment for random actions."""
    run = SavedRun(path, config, section)
    task, actor = run.task, run.actor
    env = run.make_env()
    try:
        count = settings.steps + settings.batch - 1
        observations = record_observations(env, task.obs, count, settings.seed)
    finally:
        env.close()
    facts = describe_model(actor.model)
    folder = find_run(path)
    if path.suffix != ".ckpt" and (folder / SCORES).is_file():
        facts["training"] = {"step": read_scores(folder).get("step")}
    facts["environment"] = {k: v for k, v in section.items() if k not in RUNNING}
    return Policy(actor, task.obs, task.actions, observations, facts)


def from_model(path: Path, overrides: Overrides, settings: Any) -> Policy:
    """Return the policy of a saved model, with random observations."""
    name = str(read_weights(path)[0].get("model"))
    if name not in REGISTERED:
        require_trusted({"model": {"_target_": name}}, overrides)
    allow = [arg.partition("=")[2] for arg in overrides if "_target_=" in arg]
    model: Any = create_world_model(path, device="cpu", allow=tuple(allow)).eval()
    known = (get_config(model) or {}).get("arguments", {})
    obs_space, action_space = make_spaces(known)
    obs_space.seed(settings.seed)
    obs = ObsSpec.from_space(obs_space)
    count = settings.steps + settings.batch - 1
    observations = [read_obs(obs, obs_space.sample()) for _ in range(count)]
    actions = None if action_space is None else ActionSpec.from_space(action_space)
    return Policy(Actor(model), obs, actions, observations, describe_model(model))


def make_spaces(arguments: Mapping[str, Any]) -> tuple[gym.Space, gym.Space | None]:
    """Return spaces that have the observations and actions of a model; None for named actions."""
    shape, action_dim = arguments["obs_shape"], arguments["action_dim"]
    obs_space: gym.Space
    if isinstance(shape, Mapping):
        obs_space = spaces.Dict({key: _make_box(each) for key, each in shape.items()})
    else:
        obs_space = _make_box(shape)
    if isinstance(action_dim, Mapping):
        return obs_space, None
    if not arguments.get("discrete", False):
        return obs_space, spaces.Box(-1.0, 1.0, (int(action_dim),), np.float32)
    if isinstance(action_dim, int):
        return obs_space, spaces.Discrete(action_dim)
    return obs_space, spaces.MultiDiscrete(list(action_dim))


def _make_box(shape: Any) -> spaces.Box:
    if len(shape) == 3:
        return spaces.Box(0, 255, tuple(shape), np.uint8)
    return spaces.Box(-math.inf, math.inf, tuple(shape), np.float32)


def use_prior(actor: Actor) -> None:
    """Let a model that plans act with its policy prior.

    Raises:
        ValueError: the model has none.
    """
    if not callable(use := getattr(actor.model, "use_prior", None)):
        raise ValueError(
            f"policy is 'prior', but {type(actor.model).__name__} has no policy prior besides its "
            "own policy; leave policy out"
        )
    use()


def describe_model(model: Any) -> dict[str, Any]:
    """Return the part of the metadata about a model."""
    config = get_config(model) or {}
    found = {"class": type(model).__name__, "built_from": config.get("model")}
    return {"model": {**found, "parameters": count_parameters(model)}}


def record_observations(
    env: gym.Env, spec: ObsSpec, count: int, seed: int
) -> list[dict[str, np.ndarray]]:
    """Return observations of successive steps with random actions, {input: array}."""
    env.action_space.seed(seed)
    obs, _ = env.reset(seed=seed)
    found = []
    for _ in range(count):
        found.append(read_obs(spec, obs))
        obs, _, terminated, truncated, _ = env.step(env.action_space.sample())
        if terminated or truncated:
            obs, _ = env.reset()
    return found


def read_obs(spec: ObsSpec, obs: Any) -> dict[str, np.ndarray]:
    """Return an environment's observation by the names of the inputs of an export."""
    values, leaves = flatten_tree(obs), flatten_tree(spec.space)
    return {name_obs(key): np.asarray(values[key], leaves[key].dtype) for key in spec.parts}
