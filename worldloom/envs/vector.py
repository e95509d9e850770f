"""Several copies of an environment at once, as the rows that a replay stores.

Letters used in shapes: N environments, A = width of a model's action.
"""

import logging
import math
from collections.abc import Callable
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import TimeLimit

from worldloom.envs.replayable import LocalVectorEnv
from worldloom.envs.spaces import ActionSpec, Obs, ObsSpec
from worldloom.envs.workers import WorkerVectorEnv, measured_workers
from worldloom.envs.wrappers import ActionRepeat

log = logging.getLogger(__name__)

MakeEnv = Callable[[], gym.Env]
MAX_TIMEOUT = 86_400  # seconds; the system's way of waiting cannot count to infinity


def episode_length(env: gym.Env) -> int | None:
    """Return after how many decisions a time limit truncates an episode; None for no limit.

    A wrapper that repeats actions makes decisions fewer than the simulator's steps.
    """
    repeat = 1
    while isinstance(env, gym.Wrapper):
        if isinstance(env, TimeLimit):
            return math.ceil(env._max_episode_steps / repeat)
        repeat *= env.repeat if isinstance(env, ActionRepeat) else 1
        env = env.env
    limit = env.spec.max_episode_steps if env.spec else None
    return None if limit is None else math.ceil(limit / repeat)


def frames_per_step(env: gym.Env) -> int:
    """Return how many steps of the simulator a decision is.

    An environment that repeats actions by itself says so in an attribute `frames_per_step`.
    """
    frames = getattr(env.unwrapped, "frames_per_step", 1)
    while isinstance(env, gym.Wrapper):
        frames *= env.repeat if isinstance(env, ActionRepeat) else 1
        env = env.env
    return frames


def make_vector_env(
    make_env: MakeEnv,
    num_envs: int = 1,
    workers: int | Literal["auto"] = 0,
    timeout: float = 120.0,
) -> VectorEnv:
    """Make N copies of an environment that are stepped together.

    make_env: any function without arguments that returns a new gymnasium environment.
    workers: 0 steps the copies one after the other in this process. More share them out to so many
        processes, which is worth it when a step takes over 1 ms; "auto" measures that first.
    timeout: seconds that a worker has for a step before it is replaced, as one that crashed is.

    The step after an end ignores its action and returns the next episode's first observation
    (gymnasium's NEXT_STEP autoreset); `Rows` turns that into rows.
    """
    if not callable(make_env):
        raise TypeError(
            f"make_env is {make_env!r}; expected a function that makes an environment; wrap what "
            "you have: make_vector_env(lambda: gymnasium.make('CartPole-v1'))"
        )
    if isinstance(workers, str) and workers != "auto":
        raise ValueError(f"workers is {workers!r}; expected a number or auto; set env.workers=auto")
    if num_envs < 1 or (workers != "auto" and workers < 0):
        raise ValueError(
            f"Got num_envs={num_envs} and workers={workers}; expected at least one environment "
            "and no negative number of workers; set env.num_envs=1 and env.workers=0"
        )
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(
            f"timeout is {timeout}; expected seconds, above 0 and at most {MAX_TIMEOUT} (a day); "
            "set it to several times what the slowest reset takes"
        )
    if workers == "auto":
        probe = _make_checked(make_env)
        workers = measured_workers(probe, num_envs)
        probe.close()
    make_envs = partial(_make_envs, make_env)
    if workers:
        return WorkerVectorEnv(make_envs, num_envs, workers, timeout)
    return make_envs(num_envs)


def _make_envs(make_env: MakeEnv, num_envs: int) -> LocalVectorEnv:
    """Make environments that are stepped one after the other in this process."""
    env = LocalVectorEnv(partial(_make_checked, make_env), num_envs)
    if len({id(copy.unwrapped) for copy in env.envs}) < num_envs:
        raise ValueError(
            f"make_env returned the same {env.envs[0]} more than once for num_envs={num_envs}; "
            "expected a new environment from each call; create it inside the function"
        )
    return env


def _make_checked(make_env: MakeEnv) -> gym.Env:
    env: Any = make_env()
    if isinstance(env, gym.Env):
        return env
    kind = f"{type(env).__module__}.{type(env).__qualname__}"
    old = any(base.__module__.split(".")[0] == "gym" for base in type(env).__mro__)
    raise TypeError(
        f"make_env returned a {kind}{', an environment of the old gym' if old else ''}; expected "
        "a gymnasium.Env, whose reset returns (obs, info) and whose step returns (obs, reward, "
        "terminated, truncated, info); derive it from gymnasium.Env"
    )


class Rows:
    """A vector environment as a stream of rows, one per environment and tick.

    After `reset` and after each `step` these describe the present row of every environment:

    obs: [N, *obs_shape], or a dict of such, as models see them.
    rewards: [N] float32; what arrived with obs; 0 in an episode's first row.
    is_first, is_last, is_terminal: [N] bool.
    """

    obs: Obs
    rewards: np.ndarray
    is_first: np.ndarray
    is_last: np.ndarray
    is_terminal: np.ndarray

    def __init__(self, env: VectorEnv, obs_spec: ObsSpec, action_spec: ActionSpec) -> None:
        mode = env.metadata.get("autoreset_mode")
        if mode != AutoresetMode.NEXT_STEP:
            raise ValueError(
                f"{env} has autoreset mode {mode}; expected AutoresetMode.NEXT_STEP; make it with "
                "worldloom.envs.vector.make_vector_env"
            )
        self.env, self.obs_spec, self.action_spec = env, obs_spec, action_spec
        self.num_envs = env.num_envs

    @property
    def restarts(self) -> int:
        """Count the environment processes that were replaced so far."""
        return getattr(self.env, "restarts", 0)

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode in every environment; environment i gets seed + i."""
        obs, _ = self.env.reset(seed=seed)
        self.obs = self.obs_spec.encode(obs)
        self.rewards = np.zeros(self.num_envs, np.float32)
        self.is_first = np.ones(self.num_envs, bool)
        self.is_last = np.zeros(self.num_envs, bool)
        self.is_terminal = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)

    def step(self, actions: np.ndarray) -> list[tuple[int, dict[str, float]]]:
        """Act with model actions [N, A] and move on to the next rows.

        Where the present row is an episode's last, the action is ignored and the next row is a
        new episode's first. So it is where an environment crashed in its worker: the episode is
        abandoned, without a last row. Returns (environment, {"return", "length", "success" if the
        environment's info has it}) for the episodes that ended.
        """
        *row, infos = self.env.step(self.action_spec.decode(actions))
        self.is_first = self.is_last | infos.get("restarted", False)
        rewards = self._take(*row)
        self._returns = np.where(self.is_first, 0.0, self._returns + rewards)
        self._lengths = np.where(self.is_first, 0, self._lengths + 1)
        return [(int(i), self._summary(int(i), infos)) for i in np.flatnonzero(self.is_last)]

    def state_dict(self) -> dict[str, Any] | None:
        """Return what brings the present rows back, as arrays and plain data.

        None before the first reset, and for environments that `make_vector_env` has not made.
        """
        if not (hasattr(self, "obs") and hasattr(self.env, "save")):
            return None
        return {
            "envs": self.env.save(),
            "is_first": self.is_first,
            "returns": self._returns,
            "lengths": self._lengths,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Bring back the present rows; the next step is that of the saved environments.

        Where an environment does not come to the same row again, a new episode begins.
        """
        if len(state["is_first"]) != self.num_envs:
            raise ValueError(
                f"env.num_envs is {self.num_envs} but the checkpoint's {len(state['is_first'])}; "
                "expected the same number, for the episodes under way go on; set env.num_envs="
                f"{len(state['is_first'])}"
            )
        env: Any = self.env
        steps = sum(len(episode["actions"]) for episode in state["envs"]["episodes"])
        log.info("playing %d steps again, up to where the run was saved", steps)
        *row, infos = env.restore(state["envs"])
        lost = infos.get("lost", np.full(self.num_envs, ""))
        for index in np.flatnonzero(lost != ""):
            log.warning(
                "the episode of environment %d could not be played again (%s), so a new one "
                "begins; what was collected of it stays in the replay",
                index,
                lost[index],
            )
        begun = (lost != "") | infos.get("restarted", False)
        self._take(*row)
        self.is_first = state["is_first"] | begun
        self._returns = np.where(begun, 0.0, state["returns"])
        self._lengths = np.where(begun, 0, state["lengths"])

    def _take(
        self, obs: Any, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> np.ndarray:
        """Take over a row but for what was before it; return the rewards as they are."""
        self.obs = self.obs_spec.encode(obs)
        self.rewards = rewards.astype(np.float32)
        self.is_last, self.is_terminal = terminated | truncated, terminated
        return rewards

    def _summary(self, index: int, infos: dict[str, Any]) -> dict[str, float]:
        episode = {"return": float(self._returns[index]), "length": int(self._lengths[index])}
        if "success" in infos and infos["_success"][index]:
            episode["success"] = float(infos["success"][index])
        return episode
