"""Images of an episode that has ended, rendered in a process of its own.

A renderer that fails, crashes or hangs ends that process only, and an evaluation whose environments
run in other processes can be filmed too.

Letters used in shapes: T steps; H, W height and width.
"""

import os
import pickle
import time
from collections.abc import Callable, Iterator
from functools import partial
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.vector.utils import CloudpickleWrapper

from worldloom.envs.film import find_camera
from worldloom.envs.process import Crash, EnvProcess
from worldloom.envs.replayable import LocalVectorEnv
from worldloom.envs.vector import make_single_env

STEP_SECONDS = 30.0  # for one step, after which the process is ended
FILM_SECONDS = 60.0  # for a film, which then ends early: the other processes of a run wait


def render_episode(
    make_env: Callable[[], gym.Env], seed: int, actions: Any, rewards: list[float], every: int
) -> Iterator[tuple[int, np.ndarray]]:
    """Replay an episode and yield (step, image [H, W, 3] uint8) of the start and of its steps.

    seed: of its reset. actions: [T, ...], as `step` of the environment takes them.
    rewards: T rewards, with which those of the replay are compared.
    every: steps from one image to the next; the last step always has one.

    Raises:
        ValueError: the environment cannot be made or rendered, its process ends, or the replay has
            other rewards.
    """
    make = partial(_make_camera, make_env, every, len(rewards))
    code = pickle.dumps(CloudpickleWrapper(partial(LocalVectorEnv, [make])))
    process, end = EnvProcess(code, range(1), STEP_SECONDS), time.monotonic() + FILM_SECONDS
    try:
        process.start()
        process.ask("reset", [seed])
        yield 0, _read(process)[0][0]
        for step, reward in enumerate(rewards, 1):
            process.ask("step", actions[step - 1 : step])
            images, found, terminated, truncated, _ = _read(process)
            ended = bool(terminated[0] or truncated[0]) and step < len(rewards)
            if ended or np.float32(found[0]) != np.float32(reward):
                raise ValueError(
                    f"the replay of an episode differs from it at step {step}; expected an "
                    "environment that draws all its random numbers from the seed of reset"
                )
            if step % every == 0 or step == len(rewards):
                yield step, images[0]
            if time.monotonic() > end:
                return
    finally:
        EnvProcess.stop([process], 0.0)


def _read(process: EnvProcess) -> Any:
    answer = process.answer()
    if isinstance(answer, Crash):
        raise ValueError(answer.reason)
    return answer


def _make_camera(make_env: Callable[[], gym.Env], every: int, length: int) -> gym.Env:
    os.environ.setdefault("SDL_VIDEODRIVER", "dummy")  # pygame would look for a screen
    return Camera(make_single_env(make_env), every, length)


class Camera(gym.Wrapper):
    """Return images as observations: of the first row, of every n-th step and of the last one.

    In between, the previous image is returned again.
    """

    def __init__(self, env: gym.Env, every: int, length: int) -> None:
        super().__init__(env)
        self._every, self._length, self._steps = every, length, 0
        self._get_image = find_camera(env)
        self._image = self._get_image(env.reset(seed=0)[0])
        self.observation_space = spaces.Box(0, 255, self._image.shape, np.uint8)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode."""
        obs, info = self.env.reset(seed=seed, options=options)
        self._steps, self._image = 0, self._get_image(obs)
        return self._image, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        """Act once."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        self._steps += 1
        if self._steps % self._every == 0 or self._steps == self._length:
            self._image = self._get_image(obs)
        return self._image, reward, terminated, truncated, info
