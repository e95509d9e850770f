"""Environments whose present episode can be saved, and played again in another process.

A simulator cannot be saved, but what happens in it follows from an episode's seed and its actions.

Letters used in shapes: N environments, T steps.
"""

import zlib
from collections.abc import Callable, Mapping
from copy import deepcopy
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.vector.utils import concatenate

# One environment's episode: "seed" and "episode" (as in `episode_seed`), "actions" [T, ...] as the
# environment takes them, and "checksum" of what they led to (None: it could not be saved).
Episode = dict[str, Any]
# Steps of an episode that are remembered. Where none ever ends, memory would fill up and a resumed
# run would play for hours; the longest of the suites has 27,000.
LONGEST = 100_000
# What a step of N environments returns: obs, rewards, terminated, truncated and infos.
Stepped = tuple[Any, np.ndarray, np.ndarray, np.ndarray, dict[str, Any]]


def episode_seed(seed: int, episode: int) -> int:
    """Return the seed of an environment's n-th episode since reset(seed=seed), which is the 0th."""
    # 31 bits, which every simulator takes. numpy's SeedSequence would mix them better, but takes as
    # long as a step of CartPole, and simulators mix their seeds themselves.
    return zlib.crc32(b"%d %d" % (seed, episode)) >> 1 if episode else seed


def unsaved(seed: int | None) -> Episode:
    """Return what stands for an episode that could not be saved; restored it is a new one."""
    return {"seed": seed, "episode": 0, "actions": np.zeros(0), "checksum": None}


class ReplayableEpisodes(gym.Wrapper):
    """Give every episode a seed of its own and remember its actions.

    reset(seed=s) begins the episode of seed s, and each reset without a seed the next one that
    follows from s. So an episode is a function of its seed and its actions, provided that the
    environment draws all that is random from the seed of its reset.
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
        """Begin the episode of this seed, or the next one."""
        self._episode += 1
        if seed is None and self._seed is None:
            seed = int(np.random.SeedSequence().generate_state(1)[0] >> 1)
        if seed is not None:
            self._seed, self._episode = seed, 0
        return self._begin(options)

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        if len(self._actions) <= LONGEST:
            # A vector environment may write its next actions into the same array.
            self._actions.append(action.copy() if isinstance(action, np.ndarray) else action)
        result = self.env.step(action)
        self._obs, reward, terminated, truncated, _ = result
        self._return += float(reward)
        self._ended = terminated or truncated
        return result

    def save(self) -> Episode:
        """Return the present episode up to now; must have been reset."""
        if len(self._actions) > LONGEST:
            assert self._seed is not None
            return unsaved(episode_seed(self._seed, self._episode + 1))
        return {
            "seed": self._seed,
            "episode": self._episode,
            "actions": np.array(self._actions),
            "checksum": self._checksum(),
        }

    def restore(
        self, saved: Episode, alive: Callable[[], None]
    ) -> tuple[tuple[Any, float, bool, bool], str]:
        """Play a saved episode again, or begin the one after it where that leads elsewhere.

        alive: called after every step, for it may take long.

        Returns (obs, reward, terminated, truncated) of the last step (with reward 0 if there is
        none), and why the episode is lost, "" if it is not.
        """
        if saved["checksum"] is None:
            return (self.reset(seed=saved["seed"])[0], 0.0, False, False), "it could not be saved"
        self._seed, self._episode = saved["seed"], saved["episode"]
        try:
            row = self._play(saved["actions"], alive)
            same = self._checksum() == saved["checksum"]
            lost = "" if same else "its seed and actions led elsewhere"
        except Exception as error:
            lost = " ".join(f"{type(error).__name__}: {error}".split())
        return (row, "") if not lost else ((self.reset()[0], 0.0, False, False), lost)

    def _begin(self, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        assert self._seed is not None
        self._actions, self._return, self._ended = [], 0.0, False
        seed = episode_seed(self._seed, self._episode)
        obs, info = self.env.reset(seed=seed, options=options)
        self._obs = obs
        return obs, info

    def _play(
        self, actions: np.ndarray, alive: Callable[[], None]
    ) -> tuple[Any, float, bool, bool]:
        row: Any = (self._begin()[0], 0.0, False, False)
        for number, action in enumerate(actions):
            if self._ended:
                raise ValueError(f"it ended after {number} of {len(actions)} steps")
            row = self.step(action)[:4]
            alive()
        return row

    def _checksum(self) -> int:
        """Sum up where the episode stands; the return speaks for the rows before."""
        start = zlib.crc32(np.float64(self._return).tobytes(), int(self._ended))
        return _crc(self._obs, start)


def _crc(obs: Any, crc: int) -> int:
    """Checksum of every array in an observation, on from `crc`."""
    if isinstance(obs, Mapping):
        obs = [obs[key] for key in sorted(obs)]
    if isinstance(obs, list | tuple):
        for part in obs:
            crc = _crc(part, crc)
        return crc
    array = np.asarray(obs)
    # The bytes of an object are where it lies; a text's are its letters.
    return crc if array.dtype == object else zlib.crc32(array.tobytes(), crc)


class LocalVectorEnv(SyncVectorEnv):
    """N environments that are stepped one after the other, and can be saved and restored."""

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
        """Start new episodes, as any SyncVectorEnv."""
        self._seed = seed if isinstance(seed, int) else None
        return super().reset(seed=seed, options=options)

    def save(self) -> dict[str, Any]:
        """Return where all environments are, as arrays and plain data.

        Every list has one entry per environment, so that another number of workers can restore
        it: "episodes", and of their workers, if they had any, "restarts" and "crashes" since an
        episode ended. "seed" is that of the last reset.
        """
        episodes = [env.save() for env in self._replayable()]
        none = [0] * self.num_envs
        return {"seed": self._seed, "episodes": episodes, "restarts": none, "crashes": none}

    def restore(self, state: dict[str, Any], alive: Callable[[], None] = lambda: None) -> Stepped:
        """Bring the environments to where they were saved, and return their present rows.

        infos["lost"] [N] str, which is only there if any is, says of which environments the
        episode could not be played again, and why; they have begun a new one.

        alive: called now and then, for it may take long.
        """
        self._seed = state["seed"]
        pairs = zip(self._replayable(), state["episodes"], strict=True)
        rows, lost = zip(*[env.restore(episode, alive) for env, episode in pairs], strict=True)
        obs, rewards, terminated, truncated = (list(column) for column in zip(*rows, strict=True))
        # What a step of gymnasium's leaves behind; the flags decide who is reset by the next one.
        self._env_obs = obs
        self._rewards = np.array(rewards, np.float64)
        self._terminations = np.array(terminated, bool)
        self._truncations = np.array(truncated, bool)
        self._autoreset_envs = self._terminations | self._truncations
        self._observations = concatenate(self.single_observation_space, obs, self._observations)
        flags = self._terminations.copy(), self._truncations.copy()
        infos = {"lost": np.array(lost)} if any(lost) else {}
        return deepcopy(self._observations), self._rewards.copy(), *flags, infos

    def _replayable(self) -> list[Any]:
        return self.envs
