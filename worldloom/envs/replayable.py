"""Environments whose current episode can be saved, and replayed in another process.

A simulator cannot be saved, but an episode follows from its seed and its actions.

Letters used in shapes: N environments, T steps.
"""

import zlib
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate

from worldloom.trees import flatten_tree

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
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
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
        result = self.env.step(action)
        self._obs, reward, terminated, truncated, _ = result
        self._return += float(reward)
        self._ended = terminated or truncated
        return result

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
        except Exception as error:
            lost = " ".join(f"{type(error).__name__}: {error}".split())
        return (row, "") if not lost else ((self.reset()[0], 0.0, False, False), lost)

    def _start(self, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert self._seed is not None
        self._actions, self._return, self._ended = [], 0.0, False
        seed = episode_seed(self._seed, self._episode)
        obs, info = self.env.reset(seed=seed, options=options)
        self._obs = obs
        return obs, info

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
            array = np.asarray(value)
            if array.dtype != object:  # the bytes of an object are its address
                crc = zlib.crc32(array.tobytes(), crc)
        return crc


class LocalVectorEnv(SyncVectorEnv):
    """N environments that are stepped one after the other; can be saved and restored."""

    def __init__(self, make_env: Callable[[], gym.Env], num_envs: int) -> None:
        makers = [lambda: ReplayableEpisodes(make_env())] * num_envs
        super().__init__(makers, autoreset_mode=AutoresetMode.NEXT_STEP)
        self._seed: int | None = None

    def reset(
        self,
        *,
        seed: int | list[int | None] | None = None,
        options: dict[str, Any] | None = None,
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes, as a SyncVectorEnv does."""
        self._seed = seed if isinstance(seed, int) else None
        return super().reset(seed=seed, options=options)

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
        pairs = zip(self._get_envs(), state["episodes"], strict=True)
        rows, lost = zip(*[env.restore(episode, beat) for env, episode in pairs], strict=True)
        obs, rewards, terminated, truncated = (list(column) for column in zip(*rows, strict=True))
        # As after a step of SyncVectorEnv; its flags decide which environments the next one resets.
        self._env_obs = obs
        self._rewards = np.array(rewards, np.float64)
        self._terminations = np.array(terminated, bool)
        self._truncations = np.array(truncated, bool)
        self._autoreset_envs = self._terminations | self._truncations
        self._observations = concatenate(self.single_observation_space, obs, self._observations)
        flags = self._terminations.copy(), self._truncations.copy()
        infos = {"lost": np.array(lost)} if any(lost) else {}
        return deepcopy(self._observations), self._rewards.copy(), *flags, infos

    def _get_envs(self) -> list[Any]:
        return self.envs
