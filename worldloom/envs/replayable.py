"""Environments whose current episode can be saved, and replayed in another process.

A simulator cannot be saved, but an episode follows from its seed and its actions.

Letters used in shapes: N environments, T steps.
"""

import logging
import math
import zlib
from collections.abc import Callable, Collection, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from worldloom.envs.contract import (
    FLOAT32_MAX,
    MAX_FAULTS,
    EnvError,
    Fault,
    explain_exception,
    raise_failure,
    read_reset,
    read_step,
    read_success,
    report_once,
    require_finite,
    to_array,
)
from worldloom.envs.reader import ObsReader
from worldloom.envs.time_limit import TimeLimit
from worldloom.trees import flatten_tree

log = logging.getLogger(__name__)

# One environment's episode: "seed" and "episode" (as in `episode_seed`), "actions" [T, ...] of the
# environment, and "checksum" of their result (None: the episode could not be saved).
SavedEpisode = dict[str, Any]
# Longest episode that is saved. Actions of an endless episode would fill the memory and take hours
# to replay; the longest episode of the suites has 27,000 steps.
MAX_STEPS = 100_000
# Result of a step of N environments: obs, rewards, terminated, truncated and infos.
StepResult = tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def episode_seed(seed: int, episode: int) -> int:
    """Return the seed of an environment's n-th episode since reset(seed=seed), which is the 0th."""
    # 31 bits, which every simulator accepts. numpy's SeedSequence would mix them better, but takes
    # as long as a step of CartPole, and simulators mix their seeds themselves.
    return zlib.crc32(b"%d %d" % (seed, episode)) >> 1 if episode else seed


def make_unsaved(seed: int | None) -> SavedEpisode:
    """Return the substitute for an unsaved episode; restoring it starts a new one."""
    return {"seed": seed, "episode": 0, "actions": np.zeros(0), "checksum": None}


class ReplayableEpisodes(gym.Wrapper):
    """Give every episode its own seed and remember its actions.

    reset(seed=s) starts the episode of seed s, and each reset without a seed the next one of the
    sequence that follows from s. An episode is then a function of its seed and its actions, if
    the environment draws all random numbers from the seed of its reset.

    Rewards and flags become plain numbers and bools. What cannot be read, and exceptions of any
    type, are raised as EnvError; an exception in `close` is only a warning.

    timeout: seconds after which a reset or step that does not return is an EnvError (`TimeLimit`).
    """

    def __init__(self, env: gym.Env, timeout: float = math.inf) -> None:
        super().__init__(env)
        self._limit = TimeLimit(timeout)
        self._seed: int | None = None
        self._episode = 0
        self._actions: list[np.ndarray] = []
        self._obs: Any = None
        self._return, self._ended = 0.0, False

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start the episode of this seed, or the next one."""
        self._episode += 1
        if seed is None and self._seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
        if seed is not None:
            self._seed, self._episode = seed, 0
        return self._start(options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        if len(self._actions) <= MAX_STEPS:
            # A vector environment may reuse the array for its next actions.
            self._actions.append(action.copy() if isinstance(action, np.ndarray) else action)
        try:
            with self._limit:
                result = self.env.step(action)
        except BaseException as error:
            raise_failure(error, "in step", self._limit.seconds)
        result = read_step(result)
        self._obs, reward, terminated, truncated, _ = result
        self._return += reward
        self._ended = terminated or truncated
        return result

    def close(self) -> None:
        """Close the environment; it is not needed any more, so errors are only reported."""
        try:
            super().close()
        except Exception as error:
            text = f"the environment raised {explain_exception(error)} in close; results are kept"
            report_once([("close", text)])
        except BaseException as error:
            raise_failure(error, "in close")

    def save(self) -> SavedEpisode:
        """Return the current episode up to now; reset must have been called."""
        if len(self._actions) > MAX_STEPS:
            assert self._seed is not None
            return make_unsaved(episode_seed(self._seed, self._episode + 1))
        return {
            "seed": self._seed,
            "episode": self._episode,
            "actions": np.array(self._actions),
            "checksum": self._checksum(),
        }

    def restore(
        self, saved: SavedEpisode, beat: Callable[[], None]
    ) -> tuple[tuple[Any, float, bool, bool], str]:
        """Replay a saved episode; start the next one if the result differs.

        beat: called after every step, because the replay may take long.

        Returns (obs, reward, terminated, truncated) of the last step (with reward 0 if there is
        none), and the reason why the episode is lost, "" if it is not.
        """
        if saved["checksum"] is None:
            return (self.reset(seed=saved["seed"])[0], 0.0, False, False), "it could not be saved"
        self._seed, self._episode = saved["seed"], saved["episode"]
        try:
            row = self._replay(saved["actions"], beat)
            same = self._checksum() == saved["checksum"]
            lost = "" if same else "its seed and actions led to a different result"
        except EnvError as error:
            lost = f"it {error.problem}"
        except ValueError as error:
            lost = str(error)
        return (row, "") if not lost else ((self.reset()[0], 0.0, False, False), lost)

    def _start(self, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert self._seed is not None
        self._actions, self._return, self._ended = [], 0.0, False
        seed = episode_seed(self._seed, self._episode)
        try:
            with self._limit:
                result = self.env.reset(seed=seed, options=options)
        except BaseException as error:
            raise_failure(error, "in reset", self._limit.seconds)
        self._obs, info = read_reset(result)
        return self._obs, info

    def _replay(
        self, actions: np.ndarray, beat: Callable[[], None]
    ) -> tuple[Any, float, bool, bool]:
        row: Any = (self._start()[0], 0.0, False, False)
        for number, action in enumerate(actions):
            if self._ended:
                raise ValueError(f"it ended after {number} of {len(actions)} steps")
            row = self.step(action)[:4]
            beat()
        return row

    def _checksum(self) -> int:
        """Return the checksum of the newest observation and of the return, for the rows before."""
        crc = zlib.crc32(np.float64(self._return).tobytes(), int(self._ended))
        for _, value in sorted(flatten_tree(self._obs, lists=True).items()):
            array = to_array(value)
            if array is not None:  # the bytes of other objects are their address
                crc = zlib.crc32(array.tobytes(), crc)
        return crc


class LocalVectorEnv(SyncVectorEnv):
    """N environments that are stepped one after the other; can be saved and restored.

    It returns what a SyncVectorEnv does, except for infos, which have only these keys, and only
    where there is something to say:

    success: [N] float of episodes that have ended; _success: [N] bool, whether there is one.
    faulty: [N] bool, environments that returned NaN or infinity. Their row is the first one of a
        new episode, with reward 0, as after a restart of a worker.
    notes: pairs (kind, text) for `report_once`.

    makers: a function for each environment, which makes it.
    keys: of the flattened observations that are read; None for all. Others are left out.
    timeout: seconds for a reset or step of an environment.
    first: number of the first environment, for messages.

    Raises:
        EnvError: an environment fails, in any method, or has several faults without a finished
            episode in between.
    """

    def __init__(
        self,
        makers: Sequence[Callable[[], gym.Env]],
        keys: Collection[str] | None = None,
        timeout: float = math.inf,
    ) -> None:
        wrapped = [lambda make=make: ReplayableEpisodes(make(), timeout) for make in makers]
        super().__init__(wrapped, autoreset_mode=AutoresetMode.NEXT_STEP)
        num_envs = len(makers)
        self.first = 0
        self._seed: int | None = None
        self._reader = ObsReader(self.single_observation_space, num_envs, keys)
        self._faults = [0] * num_envs  # since an episode has ended

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, as a SyncVectorEnv does."""
        self._seed = seed if isinstance(seed, int) else None
        faults = {}
        for index in range(self.num_envs):
            own = seed[index] if isinstance(seed, list) else seed
            own = own + index if isinstance(seed, int) and own is not None else own
            if problem := self._start(index, seed=own, options=options):
                faults[index] = problem
        obs, *_, infos = self._finish_step(faults, {})
        return obs, infos

    def step(self, actions: Any) -> StepResult:
        """Step all environments; actions [N, ...]."""
        faults: dict[int, str] = {}
        last: dict[int, Any] = {}  # infos of the episodes that end
        ends, read, envs = self._autoreset_envs.tolist(), self._reader.read, self._get_envs()
        self._terminations[:] = self._truncations[:] = False
        for index, env in enumerate(envs):
            if ends[index]:
                if problem := self._start(index):
                    faults[index] = problem
                continue
            try:
                obs, reward, terminated, truncated, info = env.step(actions[index])
                read(index, obs)  # at once: environments may share or reuse the array
                if not -FLOAT32_MAX <= reward <= FLOAT32_MAX:
                    require_finite(reward)
            except EnvError as error:
                raise error.at(self.first + index) from error.__cause__
            except Fault as fault:
                faults[index] = str(fault)
                continue
            self._rewards[index] = reward
            if terminated or truncated:
                self._terminations[index], self._truncations[index] = terminated, truncated
                last[index] = info
        return self._finish_step(faults, last)

    def _start(self, index: int, **options: Any) -> str:
        """Start an episode; return the fault of its first row, or ""."""
        try:
            self._set_row(index, self.envs[index].reset(**options)[0], 0.0, False, False)
        except EnvError as error:
            raise error.at(self.first + index) from error.__cause__
        except Fault as fault:
            return str(fault)
        return ""

    def _set_row(
        self, index: int, obs: Any, reward: float, terminated: bool, truncated: bool
    ) -> None:
        require_finite(reward)
        self._reader.read(index, obs)
        self._rewards[index] = reward
        self._terminations[index], self._truncations[index] = terminated, truncated

    def _finish_step(self, faults: dict[int, str], last: dict[int, Any]) -> StepResult:
        """Return the rows, after those with faults are replaced.

        faults: by environment. last: the infos of the episodes that have ended.
        """
        infos: dict[str, Any] = {}
        notes = self._reader.find_outside(self.first)
        if faults := {**self._reader.find_faults(), **faults}:
            infos["faulty"] = np.isin(np.arange(self.num_envs), [*faults])
            for index, problem in faults.items():
                last.pop(index, None)
                self._replace(index, problem, notes)
        for index, info in last.items():
            self._faults[index] = 0
            if (success := read_success(info, notes)) is not None:
                blank = np.zeros(self.num_envs), np.zeros(self.num_envs, bool)
                values = infos.setdefault("success", blank[0])
                known = infos.setdefault("_success", blank[1])
                values[index], known[index] = success, True
        if notes:
            infos["notes"] = notes
        self._autoreset_envs = self._terminations | self._truncations
        flags = self._terminations.copy(), self._truncations.copy()
        return self._reader.copy(), self._rewards.copy(), *flags, infos

    def _replace(self, index: int, problem: str, notes: list[tuple[str, str]]) -> None:
        """Start new episodes in an environment until one has no fault in its first row."""
        while problem:
            self._faults[index] += 1
            if self._faults[index] >= MAX_FAULTS:
                raise EnvError(
                    f"{problem}, {MAX_FAULTS} times without a finished episode in between; fix the "
                    "environment",
                    self.first + index,
                )
            kind = f"fault {problem.partition(' ')[2].partition(' ')[2].partition(';')[0]}"
            text = (
                f"environment {self.first + index} {problem}; its episode ends without this row, "
                "and a new one starts; later faults are only counted (restarts)"
            )
            notes.append((kind, text))
            problem = self._start(index) or self._reader.find_faults().get(index, "")

    def save(self) -> dict[str, Any]:
        """Return the state of all environments, as arrays and plain data.

        "seed" is that of the last reset. The lists have one item per environment, so that another
        number of workers can restore them: "episodes", and the "restarts" and "crashes" (since an
        episode ended) of its worker.
        """
        episodes = [env.save() for env in self._get_envs()]
        none = [0] * self.num_envs
        return {"seed": self._seed, "episodes": episodes, "restarts": none, "crashes": none}

    def restore(self, state: dict[str, Any], beat: Callable[[], None] = lambda: None) -> StepResult:
        """Bring the environments to their saved state and return their current rows.

        infos["lost"] [N] str gives the reason for each environment whose episode could not be
        replayed and that has started a new one, else ""; it is left out if all are "".

        beat: called after every step, because the replay may take long.
        """
        self._seed = state["seed"]
        lost, faults = [], {}
        pairs = zip(self._get_envs(), state["episodes"], strict=True)
        for index, (env, episode) in enumerate(pairs):
            try:
                row, reason = env.restore(episode, beat)
                self._set_row(index, *row)
            except EnvError as error:
                raise error.at(self.first + index) from error.__cause__
            except Fault as fault:
                faults[index], reason = str(fault), "it has a fault"
            lost.append(reason)
        # The flags decide which environments the next step resets.
        *row, infos = self._finish_step(faults, {})
        if any(lost):
            infos["lost"] = np.array(lost)
        return *row, infos

    def _get_envs(self) -> list[Any]:
        return self.envs
