"""Crafter, a survival game in a small 2-D world."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.extras import suggest_extra
from worldloom.envs.suites.settings import require_pixels
from worldloom.envs.suites.simulator import SimulatorEnv
from worldloom.envs.wrappers import wrap

LENGTH = 10_000  # steps of an episode at most, as in the benchmark


def make_env(
    *,
    reward: bool = True,
    image_size: int | None = None,
    pixels: bool = True,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
) -> gym.Env:
    """Make Crafter, with or without its reward.

    image_size: side of the image in pixels, 64 by default.
    pixels: must be true, because there are no other observations.
    action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`.
    time_limit: simulator steps after which an episode is truncated, 10,000 by default.
    """
    require_pixels(pixels, "Crafter")
    with suggest_extra("crafter"):
        import crafter  # noqa: F401  (reports a missing package before anything is made)
    limit = LENGTH if time_limit is None else time_limit
    env = wrap(Crafter(reward, image_size or 64), limit, action_repeat, frame_stack)
    return Achievements(env)


class Crafter(SimulatorEnv):
    """A crafter.Env; observations are images [size, size, 3] uint8, actions one of 17.

    terminated means death. There is no time limit.
    """

    name = "crafter"

    def __init__(self, reward: bool, size: int) -> None:
        self.reward, self.size = reward, size
        self.simulator = self._make_simulator()
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Discrete(len(self.simulator.action_names))
        self.achievements: dict[str, int] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start in a new world; a seed determines this world and all that follow."""
        super().reset(seed=seed)
        if seed is not None:
            # A new simulator would read all its textures again.
            self.simulator._seed, self.simulator._episode = self._draw_seed(), 0
        return self.simulator.reset(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act once."""
        image, reward, _, info = self.simulator.step(int(action))
        self.achievements = info["achievements"]
        return image, float(reward), info["discount"] == 0, False, {}

    def render(self) -> np.ndarray:
        """Return the current image, [size, size, 3] uint8."""
        return self.simulator.render()

    def _draw_seed(self) -> int:
        return int(self.np_random.integers(2**31 - 1))

    def _make_simulator(self) -> Any:
        """Make a simulator; the seeds of its worlds count up from the one that it is made with."""
        import crafter

        size = (self.size, self.size)
        simulator: Any = crafter.Env(
            size=size, reward=self.reward, length=None, seed=self._draw_seed()
        )
        balance = simulator._balance_object

        def balance_in_order(chunk: Any, creatures: Any, *args: Any) -> None:
            # Crafter picks a creature at random from a set, whose order differs between processes.
            # Without sorting, two runs with equal seeds and actions diverge within some hundred
            # steps.
            balance(chunk, sorted(creatures, key=lambda creature: tuple(creature.pos)), *args)

        simulator._balance_object = balance_in_order
        return simulator


class Achievements(gym.Wrapper):
    """Add to the info of an episode's last step how often each achievement was unlocked in it."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            unwrapped: Any = self.unwrapped
            info["achievements"] = dict(unwrapped.achievements)
        return obs, reward, terminated, truncated, info
