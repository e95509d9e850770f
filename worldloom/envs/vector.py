"""Vector environments, and the stream of rows that a replay stores.

Letters used in shapes: N environments, A = width of a model's action.
"""

import logging
import math
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.wrappers import TimeLimit

from worldloom.envs.contract import raise_failure, read_success, report_once
from worldloom.envs.replayable import LocalVectorEnv, ReplayableEpisodes
from worldloom.envs.spaces import ActionSpec, Obs, ObsSpec
from worldloom.envs.time_limit import SECONDS
from worldloom.envs.workers import WorkerVectorEnv, choose_workers
from worldloom.envs.wrappers import ActionRepeat
from worldloom.errors import require_positive

log = logging.getLogger(__name__)

MakeEnv = Callable[[], gym.Env]
# Attributes in which wrappers of gymnasium and of others keep running statistics.
RUNNING_STATISTICS = ("obs_rms", "return_rms", "ret_rms")
MAX_TIMEOUT = 86_400  # seconds; select() does not accept infinity


def episode_length(env: gym.Env) -> int | None:
    """Return the number of steps after which a time limit truncates an episode, or None.

    A step of the outermost wrapper may repeat its action in several steps of the simulator.
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
    """Return the number of simulator steps per step of the outermost wrapper.

    An environment that repeats actions itself has an attribute `frames_per_step`.
    """
    frames = getattr(env.unwrapped, "frames_per_step", 1)
    while isinstance(env, gym.Wrapper):
        frames *= env.repeat if isinstance(env, ActionRepeat) else 1
        env = env.env
    return frames


def order_vectors(env: gym.Env, obs: ObsSpec) -> tuple[str, ...] | None:
    """Return the keys of the vectors that a model sees, in the environment's order, if it has one.

    The order is that of an attribute `obs_order` of the environment, which names all of its
    vectors; the order of a gymnasium Dict is none, because it sorts its keys. None for fewer than
    two vectors.
    """
    given = getattr(env.unwrapped, "obs_order", None)
    vectors = [key for key, part in obs.parts.items() if len(part.shape) < 3]
    if not isinstance(given, list | tuple) or len(vectors) < 2:
        return None
    order = tuple(key for key in given if key in vectors)
    return order if sorted(order) == sorted(vectors) else None


def make_limited_env(make_env: MakeEnv, steps: int) -> gym.Env:
    """Make an environment whose episodes are truncated after a number of steps."""
    return TimeLimit(make_single_env(make_env), steps)


def make_vector_env(
    make_env: MakeEnv | Sequence[MakeEnv],
    num_envs: int = 1,
    workers: int | Literal["auto"] = 0,
    timeout: float = SECONDS,
    keys: Collection[str] | None = None,
) -> VectorEnv:
    """Make N copies of an environment that are stepped together.

    make_env: any function without arguments that returns a new gymnasium environment, or a list of
        N of them, whose environments have the same spaces.
    workers: number of processes that step the copies, which pays if a step takes over 1 ms; 0
        steps them one after the other in this process; "auto" measures a step and chooses.
    timeout: seconds for a step before a worker is replaced, as after a crash. In this process, a
        reset or step that takes longer is an EnvError, as far as it can be interrupted (`TimeLimit`
        in time_limit.py).
    keys: of the flattened observations ("a/b") that are read and returned; None for all.

    The step after the end of an episode ignores its action and returns the next episode's first
    observation (gymnasium's NEXT_STEP autoreset); `RowStream` turns that into rows.
    """
    makers = [make_env] * num_envs if callable(make_env) else make_env
    if (
        isinstance(makers, str)
        or not isinstance(makers, Sequence)
        or not all(map(callable, makers))
    ):
        raise TypeError(
            f"make_env is {make_env!r}; expected a function that makes an environment; for example "
            "make_vector_env(lambda: gymnasium.make('CartPole-v1'))"
        )
    require_positive(num_envs=num_envs)
    if len(makers) != num_envs:
        raise ValueError(
            f"make_env has {len(makers)} functions, but num_envs is {num_envs}; expected one for "
            "each environment"
        )
    if workers != "auto" and (isinstance(workers, str) or workers < 0):
        raise ValueError(f"workers is {workers!r}; expected 'auto' or at least 0")
    if not 0 < timeout <= MAX_TIMEOUT:
        raise ValueError(
            f"timeout is {timeout}; expected seconds, above 0 and at most {MAX_TIMEOUT} (a day); "
            "set it to several times the duration of the slowest reset"
        )
    if workers == "auto":
        probe = ReplayableEpisodes(make_single_env(makers[0]), timeout)
        workers = choose_workers(probe, num_envs)
        probe.close()
    make_envs = partial(_make_envs, makers, None if keys is None else {*keys})
    if workers:
        return WorkerVectorEnv(make_envs, num_envs, workers, timeout)
    return make_envs(range(num_envs), timeout)


def _make_envs(
    makers: Sequence[MakeEnv], keys: set[str] | None, indices: range, timeout: float = math.inf
) -> LocalVectorEnv:
    """Make the environments with these numbers, stepped one after the other in this process."""
    env = LocalVectorEnv([partial(make_single_env, makers[i]) for i in indices], keys, timeout)
    if len({id(copy.unwrapped) for copy in env.envs}) < len(indices):
        raise ValueError(
            f"make_env returned the same {env.envs[0]} more than once for num_envs={len(makers)}; "
            "expected a new environment from each call; create it inside the function"
        )
    return env


def make_single_env(make_env: MakeEnv) -> gym.Env:
    """Call `make_env`, or raise TypeError if it returns anything but a gymnasium environment."""
    try:
        env: Any = make_env()
    except BaseException as error:
        raise_failure(error, "when it was made")
    if isinstance(env, gym.Env):
        reject_running_statistics(env)
        return env
    kind = f"{type(env).__module__}.{type(env).__qualname__}"
    old = any(base.__module__.split(".")[0] == "gym" for base in type(env).__mro__)
    raise TypeError(
        f"make_env returned a {kind}{', an environment of old gym' if old else ''}; expected a "
        "gymnasium.Env, whose reset returns (obs, info) and whose step returns (obs, reward, "
        "terminated, truncated, info); derive it from gymnasium.Env"
    )


def reject_running_statistics(env: Any) -> None:
    """Raise ValueError for a wrapper that normalises with statistics of the steps so far.

    Each copy of the environment would have its own statistics; those of evaluations and of resumed
    runs would be empty at the start.
    """
    while env is not None:
        held = getattr(env, "__dict__", {})
        running = any("RunningMeanStd" in type(value).__name__ for value in held.values())
        if (running or held.keys() & {*RUNNING_STATISTICS}) and getattr(
            env, "update_running_mean", True
        ):
            raise ValueError(
                f"the environment has the wrapper {type(env).__name__}, whose running statistics "
                "differ between copies and evaluations and are not saved; expected observations "
                "and rewards that do not depend on earlier episodes; remove it, because the models "
                "normalise their inputs, or fix its statistics: wrapper.update_running_mean = False"
            )
        env = held.get("env")


class RowStream:
    """A vector environment as a stream of rows, one per environment and step.

    After `reset` and after each `step`, these attributes are the current row of each environment:

    obs: [N, *obs_shape], or a dict of arrays, as models see them.
    rewards: [N] float32, received together with obs; 0 in an episode's first row.
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
        reject_running_statistics(env)
        self.env, self.obs_spec, self.action_spec = env, obs_spec, action_spec
        self.num_envs = env.num_envs
        self._faults = 0  # episodes that ended because an environment returned NaN or infinity

    @property
    def restarts(self) -> int:
        """Count the environment processes that were replaced, and the faults, so far."""
        return getattr(self.env, "restarts", 0) + self._faults

    def reset(self, seed: int | None = None) -> None:
        """Start a new episode in every environment; environment i gets seed + i."""
        obs, infos = self.env.reset(seed=seed)
        self._find_started(infos)
        self.obs = self.obs_spec.encode(obs)
        self.rewards = np.zeros(self.num_envs, np.float32)
        self.is_first = np.ones(self.num_envs, bool)
        self.is_last = np.zeros(self.num_envs, bool)
        self.is_terminal = np.zeros(self.num_envs, bool)
        self._returns = np.zeros(self.num_envs)
        self._lengths = np.zeros(self.num_envs, np.int64)

    def step(self, actions: np.ndarray) -> list[tuple[int, dict[str, float]]]:
        """Act with model actions [N, A] and advance to the next rows.

        After the last row of an episode the action is ignored, and the next row is the first of a
        new episode. If an environment crashes in its worker, its episode ends without a last row.
        Returns (environment, {"return", "length", "success" if the environment's info has it}) for
        the episodes that ended.
        """
        *row, infos = self.env.step(self.action_spec.decode(actions))
        self.is_first = self.is_last | self._find_started(infos)
        rewards = self._set_row(*row)
        self._returns = np.where(self.is_first, 0.0, self._returns + rewards)
        self._lengths = np.where(self.is_first, 0, self._lengths + 1)
        return [(int(i), self._summarize(int(i), infos)) for i in np.flatnonzero(self.is_last)]

    def state_dict(self) -> dict[str, Any] | None:
        """Return the state that restores the current rows, as arrays and plain data.

        None before the first reset, and for environments that `make_vector_env` has not made.
        """
        if not (hasattr(self, "obs") and hasattr(self.env, "save")):
            return None
        return {
            "envs": self.env.save(),
            "is_first": self.is_first,
            "returns": self._returns,
            "lengths": self._lengths,
            "faults": self._faults,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the current rows by replaying the current episodes.

        An environment that does not reach the same row again starts a new episode.
        """
        if len(state["is_first"]) != self.num_envs:
            raise ValueError(
                f"env.num_envs is {self.num_envs}, but the checkpoint has the episodes of "
                f"{len(state['is_first'])} environments; set env.num_envs={len(state['is_first'])}"
            )
        env: Any = self.env
        steps = sum(len(episode["actions"]) for episode in state["envs"]["episodes"])
        log.info("replaying %d steps up to the state in which the run was saved", steps)
        *row, infos = env.restore(state["envs"])
        lost = infos.get("lost", np.full(self.num_envs, ""))
        for index in np.flatnonzero(lost != ""):
            log.warning(
                "the episode of environment %d could not be replayed (%s), so a new one starts; "
                "the rows collected from it stay in the replay",
                index,
                lost[index],
            )
        self._faults = state.get("faults", 0)  # older checkpoints have none
        started = (lost != "") | self._find_started(infos)
        self._set_row(*row)
        self.is_first = state["is_first"] | started
        self._returns = np.where(started, 0.0, state["returns"])
        self._lengths = np.where(started, 0, state["lengths"])

    def _find_started(self, infos: dict[str, Any]) -> Any:
        """Return which environments had to start a new episode, after reporting why."""
        report_once(infos.get("notes", []))
        faulty = infos.get("faulty", False)
        self._faults += int(np.sum(faulty))
        return infos.get("restarted", False) | faulty

    def _set_row(
        self, obs: Any, rewards: np.ndarray, terminated: np.ndarray, truncated: np.ndarray
    ) -> np.ndarray:
        """Set the current row except for `is_first`; return the rewards unchanged."""
        self.obs = self.obs_spec.encode(obs)
        self.rewards = rewards.astype(np.float32)
        self.is_last, self.is_terminal = terminated | truncated, terminated
        return rewards

    def _summarize(self, index: int, infos: dict[str, Any]) -> dict[str, float]:
        episode = {"return": float(self._returns[index]), "length": int(self._lengths[index])}
        if "success" in infos and infos["_success"][index]:
            notes: list[tuple[str, str]] = []
            success = read_success({"success": infos["success"][index]}, notes)
            if success is not None:
                episode["success"] = success
            report_once(notes)
        return episode
