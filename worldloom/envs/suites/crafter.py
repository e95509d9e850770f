"""Crafter, a small world to survive in, behind gymnasium's API."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from worldloom.envs.suites.extras import naming_the_extra
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
    """Make Crafter, with its reward or without any.

    image_size: side of the picture in pixels, 64 by default.
    pixels: must be true, for nothing else is observed.
    action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`.
    time_limit: steps of the simulator after which an episode is truncated.
    """
    if not pixels:
        raise ValueError(
            "env.pixels is false, but Crafter is observed from pictures only; leave env.pixels out"
        )
    with naming_the_extra("crafter"):
        import crafter  # noqa: F401  (so that a missing package is named before anything is made)
    env: gym.Env = Crafter(reward, image_size or 64)
    env = Achievements(TimeLimit(env, LENGTH if time_limit is None else time_limit))
    return wrap(env, action_repeat=action_repeat, frame_stack=frame_stack)


class Crafter(gym.Env):
    """A crafter.Env; observations are pictures [size, size, 3] uint8, actions one of 17.

    terminated is death. There is no time limit here.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as in gym.Env)
    render_mode = "rgb_array"

    def __init__(self, reward: bool, size: int) -> None:
        self.reward, self.size = reward, size
        self.world = self._make_world()
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self.action_space = spaces.Discrete(len(self.world.action_names))
        self.achievements: dict[str, int] = {}

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start in a new world; a seed fixes this world and all that follow."""
        super().reset(seed=seed)
        if seed is not None:
            # Making a simulator anew would read all its pictures again.
            self.world._seed, self.world._episode = self._draw_seed(), 0
        return self.world.reset(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act once."""
        image, reward, _, info = self.world.step(int(action))
        self.achievements = info["achievements"]
        return image, float(reward), info["discount"] == 0, False, {}

    def render(self) -> np.ndarray:
        """Return the present picture, [size, size, 3] uint8."""
        return self.world.render()

    def __str__(self) -> str:
        return "<crafter>"

    def _draw_seed(self) -> int:
        return int(self.np_random.integers(2**31 - 1))

    def _make_world(self) -> Any:
        """Make a simulator, which counts its worlds up from the seed that it is made with."""
        import crafter

        world: Any = crafter.Env(
            size=(self.size, self.size),
            reward=self.reward,
            length=None,
            seed=self._draw_seed(),
        )
        balance = world._balance_object

        def balance_in_order(chunk: Any, creatures: Any, *how: Any) -> None:
            # Crafter picks one at random from a set, whose order changes from run to run: without
            # this two runs with the same seed and actions part within some hundred steps.
            balance(chunk, sorted(creatures, key=lambda creature: tuple(creature.pos)), *how)

        world._balance_object = balance_in_order
        return world


class Achievements(gym.Wrapper):
    """Say in the info of an episode's last step how often each achievement was unlocked in it."""

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            unwrapped: Any = self.unwrapped
            info["achievements"] = dict(unwrapped.achievements)
        return obs, reward, terminated, truncated, info
