"""Acting with a model in an environment's own observations and actions.

Letters used in shapes: N environments.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch
from gymnasium import Space, spaces

from worldloom.acting import Actor, Memory
from worldloom.envs.contract import describe_value, to_array
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.trees import flatten_tree


class Agent:
    """Chooses actions for one environment, or for the N environments of a vector environment.

    Observations and actions are those of gymnasium's `reset` and `step`; the agent converts them
    for the model and keeps the model's memory between the steps of an episode.

    actor: acts in model units.
    obs_spec, action_spec: the spaces of a single environment, and how the model sees them.
    deterministic: choose the policy's mode instead of samples.
    seed: of the agent's random numbers, which models also draw in order to sample latent states.
        The same seed and observations give the same actions.
    """

    def __init__(
        self,
        actor: Actor,
        obs_spec: ObsSpec,
        action_spec: ActionSpec,
        deterministic: bool = True,
        seed: int = 0,
    ) -> None:
        self.actor, self.obs_spec, self.action_spec = actor, obs_spec, action_spec
        self.deterministic, self.seed = deterministic, seed
        self._random: list[torch.Tensor] | None = None  # random states of CPU and GPU
        leaves = flatten_tree(obs_spec.space)
        self._leaves = {key: leaves[key] for key in obs_spec.parts}
        self._memory: Memory | None = None

    def reset(self, seed: int | None = None) -> None:
        """Forget everything; the next observation is the first of an episode in all environments.

        Call this whenever you call `reset` of the environment.

        seed: restarts the agent's random numbers, which otherwise continue.
        """
        self._memory = None
        if seed is not None:
            self.seed, self._random = seed, None

    def act(self, obs: Any, is_first: Any = None) -> Any:
        """Return the action for an observation, as `step` of the environment accepts it.

        obs: what `reset` or `step` returned: an observation of the single space, or those of a
            vector environment, whose arrays have one axis more, [N, ...]. The number of axes
            tells them apart.
        is_first: whether an episode starts with obs, so that the memory of the one before is
            dropped: a bool, or [N] bool for a vector environment. It can be left out in the first
            call after `reset`, and in a single environment whenever no episode starts. A vector
            environment resets its environments itself, so every later call needs it:
            docs/acting.md shows how to compute it in both of gymnasium's autoreset modes.

        Raises:
            ValueError: obs does not fit the observation space or contains NaN or infinity,
                is_first is missing or has another length, or the model's action is not finite.
        """
        arrays, single = self._read_obs(obs)
        first = self._read_is_first(is_first, len(next(iter(arrays.values()))), single)
        if first.all():
            self._memory = None
        model_obs = self.obs_spec.encode(arrays.get("", arrays))
        with self._own_random_numbers():
            chosen, self._memory = self.actor(model_obs, first, self._memory, self.deterministic)
        actions = self.action_spec.decode(chosen.cpu().numpy())
        return actions[0] if single else actions

    @contextmanager
    def _own_random_numbers(self) -> Iterator[None]:
        """Draw from the agent's random state in a block, not from torch's global one."""
        device = self.actor.device
        gpus = [device] if device.type == "cuda" else []
        with torch.random.fork_rng(gpus):
            if self._random is None:
                torch.manual_seed(self.seed)
            else:
                torch.set_rng_state(self._random[0])
                for gpu in gpus:
                    torch.cuda.set_rng_state(self._random[1], gpu)
            yield
            self._random = [torch.get_rng_state(), *map(torch.cuda.get_rng_state, gpus)]

    def _read_obs(self, obs: Any) -> tuple[dict[str, np.ndarray], bool]:
        """Return the arrays [N, ...] of the keys that the model sees, and whether obs is single."""
        given = flatten_tree(obs)
        if isinstance(obs, tuple) or ("" in given) != ("" in self._leaves):
            keys = ", ".join(self._leaves)
            expected = f"a dict with the keys {keys}" if keys else "an array"
            raise ValueError(
                f"the observation is a {type(obs).__name__}; expected {expected}; pass the "
                "observation alone: obs, info = env.reset()"
            )
        arrays, ranks = {}, {}
        for key, space in self._leaves.items():
            if key not in given:
                raise ValueError(
                    f"the observation has no '{key}'; expected the keys "
                    f"{', '.join(self._leaves)} of the run's environment; make it with "
                    "run.make_env()"
                )
            array = to_array(given[key])
            if array is None:
                raise ValueError(
                    f"the observation{f' {key!r}' * bool(key)} is {describe_value(given[key])}; "
                    f"expected an array of {space}; pass what the run's environment returns"
                )
            ranks[key] = array.ndim - len(space.shape)
            arrays[key] = _read_array(
                f"observation '{key}'" if key else "observation", array, space
            )
        sizes = {array.shape[0] for array in arrays.values()}
        if len(set(ranks.values())) > 1 or len(sizes) > 1:
            shapes = {key: np.shape(given[key]) for key in arrays}
            raise ValueError(
                f"the observation has the shapes {shapes}; expected one environment, or the same "
                "number of environments in the first axis of every key"
            )
        return arrays, not any(ranks.values())

    def _read_is_first(self, is_first: Any, num: int, single: bool) -> np.ndarray:
        """Return is_first as [N] bool."""
        if is_first is None:
            if self._memory is not None and not single:
                raise ValueError(
                    "is_first is missing; a vector environment starts new episodes by itself, and "
                    f"the agent has to forget the old ones; pass is_first [{num}] bool "
                    "(docs/acting.md), or call agent.reset() after env.reset()"
                )
            first = np.full(num, self._memory is None)
        else:
            given = np.asarray(is_first)
            if given.dtype != bool or given.shape != (() if single else (num,)):
                raise ValueError(
                    f"is_first is {given.dtype} of shape {given.shape}; expected "
                    f"{'a bool' if single else f'[{num}] bool, one for each environment'}"
                )
            first = given.reshape(num)
        before = num if self._memory is None else len(self._memory.action)
        if before != num and not first.all():
            raise ValueError(
                f"the observations are those of {num} environments, but the previous ones were "
                f"those of {before}; call agent.reset() before acting in other environments"
            )
        return first


def _read_array(name: str, array: np.ndarray, space: Space) -> np.ndarray:
    """Return an array of a space's leaf as [N, ...] of the space's dtype, or raise ValueError."""
    shape = space.shape or ()
    dtype = np.dtype(space.dtype)
    if array.shape not in (shape, (*array.shape[:1], *shape)) or not array.size:
        raise ValueError(
            f"the {name} has shape {array.shape}; expected {shape}, or [N, *{shape}] of a vector "
            "environment; pass what the run's environment returns, unchanged"
        )
    # What a vector environment does with the observations that a run is trained on.
    if not np.can_cast(array.dtype, dtype, "same_kind"):
        raise ValueError(
            f"the {name} is {array.dtype}; expected {dtype} as {space} has it; pass what the "
            "run's environment returns, unchanged"
        )
    if dtype.kind == "f" and not np.isfinite(array).all():
        raise ValueError(
            f"the {name} contains NaN or infinity; expected finite numbers; the environment has "
            "probably diverged: reset it"
        )
    array = array.astype(dtype, copy=False).reshape(-1, *shape)
    if not isinstance(space, spaces.Box):
        for value in array:
            if not space.contains(value):
                raise ValueError(
                    f"the {name} is {value}; expected an element of {space}; pass what the run's "
                    "environment returns, unchanged"
                )
    return array
