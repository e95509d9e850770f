"""Names of the dimensions of observations and actions, where the environment knows them."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.errors import escape
from worldloom.trees import flatten_tree

LONGEST = 40  # characters of a name
# Gymnasium's documentation has these names, its environments do not.
CLASSIC_CONTROL = {
    "CartPoleEnv": ("cart position", "cart velocity", "pole angle", "pole angular velocity"),
    "PendulumEnv": ("cos(angle)", "sin(angle)", "angular velocity"),
    "MountainCarEnv": ("position", "velocity"),
    "Continuous_MountainCarEnv": ("position", "velocity"),
    "AcrobotEnv": (
        *("cos(angle 1)", "sin(angle 1)", "cos(angle 2)", "sin(angle 2)"),
        *("angular velocity 1", "angular velocity 2"),
    ),
}


@dataclass(frozen=True)
class Names:
    """Names of dimensions.

    obs: {key: a name for each dimension} of the vectors. actions: a name for each dimension.
    """

    obs: dict[str, list[str]]
    actions: list[str]


def find_names(env: Any, obs: ObsSpec, actions: ActionSpec) -> Names:
    """Return the names that an environment knows, and numbered ones for everything else.

    An environment of your own has an attribute `obs_names`, a list of names, or a dict of such
    lists by the key of the observation, and `action_names`, a list.
    """
    inner, leaves = env.unwrapped, flatten_tree(obs.space)
    vectors = {key: part.shape[0] for key, part in obs.parts.items() if len(part.shape) == 1}
    return Names(
        {key: _name_obs(inner, key, leaves.get(key), size) for key, size in vectors.items()},
        _name_actions(inner, actions),
    )


def _name_obs(env: Any, key: str, space: Any, size: int) -> list[str]:
    given = getattr(env, "obs_names", None)
    given = given.get(key) if isinstance(given, Mapping) else given
    if found := _accept(given, size):
        return found
    if not key and (found := _accept(CLASSIC_CONTROL.get(type(env).__name__), size)):
        return found
    if not key and (found := _accept(_try(_name_mujoco, env), size)):
        return found
    base = key.rpartition("/")[2] or "obs"
    if isinstance(space, spaces.Discrete):
        return _shorten(f"{base} = {space.start + i}" for i in range(size))
    return _shorten([base] if size == 1 else (f"{base}[{i}]" for i in range(size)))


def _name_mujoco(env: Any) -> list[str]:
    """Return names of the positions and velocities that gymnasium's MuJoCo tasks observe."""
    parts, model = env.observation_structure, env.model
    if set(parts) - {"skipped_qpos", "qpos", "qvel"}:
        return []
    joints = [model.joint(i).name for i in range(model.njnt)]
    places = [
        _number(joints, model.jnt_qposadr, model.nq),
        _number(joints, model.jnt_dofadr, model.nv),
    ]
    return [*places[0][parts["skipped_qpos"] :], *(f"{name} velocity" for name in places[1])]


def _number(joints: Sequence[str], first: Sequence[int], size: int) -> list[str]:
    """Return a name for each of `size` coordinates; joint i has those from first[i] on."""
    names = []
    for joint, start, end in zip(joints, first, [*first[1:], size], strict=True):
        names += [joint] if end - start == 1 else [f"{joint}[{i}]" for i in range(end - start)]
    return names


def _name_actuator(model: Any, index: int) -> str:
    """Return the name of a motor, or else that of the joint that it turns."""
    return model.actuator(index).name or model.joint(model.actuator_trnid[index][0]).name


def _name_actions(env: Any, actions: ActionSpec) -> list[str]:
    size = actions.width
    sources: list[Callable[[], Any]] = [
        lambda: env.action_names,
        lambda: env.get_action_meanings(),  # Atari
        lambda: [action.name for action in env.actions],  # MiniGrid
        lambda: env.simulator.action_spec().name.split("\t"),  # DeepMind Control
        lambda: [_name_actuator(env.model, i) for i in range(env.model.nu)],  # MuJoCo
    ]
    for source in sources:
        if found := _accept(_try(source), size):
            return found
    if isinstance(actions.action_dim, tuple):
        groups = enumerate(actions.action_dim)
        return [f"action {group} = {i}" for group, count in groups for i in range(count)]
    if actions.discrete:
        return [f"action {i}" for i in range(size)]
    return ["action"] if size == 1 else [f"action[{i}]" for i in range(size)]


def _try(source: Callable[..., Any], *args: Any) -> Any:
    """Return what an attribute of an environment of any kind gives, None if it has none."""
    with suppress(Exception):
        return source(*args)
    return None


def _accept(names: Any, size: int) -> list[str]:
    """Return names if they are a list of `size` texts that are not empty, else an empty list."""
    if not isinstance(names, list | tuple | np.ndarray) or len(names) != size:
        return []
    return _shorten(names) if all(isinstance(name, str) and name for name in names) else []


def _shorten(names: Any) -> list[str]:
    return [escape(name)[:LONGEST] for name in names]
