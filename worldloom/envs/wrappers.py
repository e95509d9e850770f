"""What may be put around any environment: action repeat, pixels, sizes, stacks, a time limit.

Letters used in shapes: H, W height and width, C channels.
"""

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from PIL import Image

from worldloom.envs.renderer import make_current, place_camera
from worldloom.envs.spaces import flatten, is_channels_last, is_image
from worldloom.envs.suites.extras import naming_the_extra


def wrap(
    env: gym.Env,
    *,
    action_repeat: int = 1,
    pixels: bool = False,
    image_size: int | None = None,
    frame_stack: int = 1,
) -> gym.Env:
    """Put the wrappers around an environment that its configuration asks for.

    action_repeat: do each action so many times; their rewards are summed.
    pixels: observe the rendered picture, [size, size, 3] (64 by default), and nothing else.
    image_size: side in pixels to which images are resized; a multiple of 16.
    frame_stack: newest images that are observed at once, on top of each other along their channels,
        oldest first; for models without memory, such as TD-MPC2.
    """
    for name, value, usual in (
        ("action_repeat", action_repeat, 1),
        ("frame_stack", frame_stack, 1),
        ("image_size", image_size, None),
    ):
        if value != usual and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{name} is {value}; expected at least 1; set env.{name}={usual or 'null'} for none"
            )
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if pixels:
        env = RenderedObservation(env, image_size or 64)
    elif image_size is not None:
        env = ResizedImages(env, image_size)
    return env if frame_stack == 1 else StackedImages(env, frame_stack)


class ActionRepeat(gym.Wrapper):
    """Do every action several times, or until the episode ends, and sum the rewards."""

    def __init__(self, env: gym.Env, repeat: int) -> None:
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return the last observation and info, and the sum of the rewards."""
        total = 0.0
        for _ in range(self.repeat):
            obs, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class RenderedObservation(gym.ObservationWrapper):
    """Observe the rendered picture, [size, size, 3] uint8, instead of the observation."""

    def __init__(self, env: gym.Env, size: int) -> None:
        super().__init__(env)
        self.size = size
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self._placed = False

    def observation(self, observation: Any) -> np.ndarray:
        """Render the environment; its own observation is dropped."""
        name = str(self.unwrapped)
        with naming_the_extra(name):
            make_current(self.env)
            if not self._placed:
                self.env.render()  # there is no camera before
                place_camera(self.env)
                self._placed = True
            frame: Any = self.env.render()
        if not isinstance(frame, np.ndarray) or frame.shape[2:] != (3,):
            raise TypeError(
                f"{name} rendered {getattr(frame, 'shape', type(frame).__name__)}; expected an "
                "RGB picture [H, W, 3]; set env.pixels=false if it cannot render 'rgb_array'"
            )
        return resize_image(frame, self.size)


class ResizedImages(gym.ObservationWrapper):
    """Resize every image of the observations; other arrays stay as they are."""

    def __init__(self, env: gym.Env, size: int) -> None:
        super().__init__(env)
        self.size = size
        if not any(is_image(space) for space in flatten(env.observation_space).values()):
            raise ValueError(
                f"image_size={size} was given, but {env.unwrapped} observes no image but "
                f"{env.observation_space}; expected images (3-D uint8); set env.pixels=true to "
                "observe what it renders, or leave env.image_size out"
            )
        self.observation_space = self._resized_space(env.observation_space)

    def observation(self, observation: Any) -> Any:
        """Resize the images of one observation."""
        return self._resized(self.env.observation_space, observation)

    def _resized_space(self, space: spaces.Space) -> spaces.Space:
        if isinstance(space, spaces.Dict):
            return spaces.Dict({key: self._resized_space(value) for key, value in space.items()})
        if not is_image(space):
            return space
        shape = space.shape or ()
        last = is_channels_last(shape)
        new = (self.size, self.size, shape[2]) if last else (shape[0], self.size, self.size)
        return spaces.Box(0, 255, new, np.uint8)

    def _resized(self, space: spaces.Space, obs: Any) -> Any:
        if isinstance(space, spaces.Dict):
            return {key: self._resized(value, obs[key]) for key, value in space.items()}
        if not is_image(space):
            return obs
        if is_channels_last(space.shape or ()):
            return resize_image(obs, self.size)
        return np.moveaxis(resize_image(np.moveaxis(obs, 0, -1), self.size), -1, 0)


class StackedImages(gym.ObservationWrapper):
    """Observe the last images of an episode along their channels; other arrays stay as they are.

    At its start the first image stands for those that there were not.
    """

    def __init__(self, env: gym.Env, stack: int) -> None:
        super().__init__(env)
        leaves = flatten(env.observation_space)
        if not any(is_image(space) for space in leaves.values()):
            raise ValueError(
                f"frame_stack={stack} was given, but {env.unwrapped} observes no image but "
                f"{env.observation_space}; expected images (3-D uint8); leave env.frame_stack out"
            )
        self.stack = stack
        self._frames: dict[str, deque[np.ndarray]] = {}
        self.observation_space = self._mapped(self._stacked_space, env.observation_space)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Forget the images of the last episode."""
        self._frames = {}
        return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> Any:
        """Return the observation with its newest images stacked."""
        return self._mapped(self._stacked, self.env.observation_space, observation)

    def _stacked_space(self, key: str, space: spaces.Space) -> spaces.Space:
        shape = list(space.shape or ())
        shape[2 if is_channels_last(space.shape or ()) else 0] *= self.stack
        return spaces.Box(0, 255, tuple(shape), np.uint8)

    def _stacked(self, key: str, space: spaces.Space, image: np.ndarray) -> np.ndarray:
        image = image.copy()  # an environment may draw into the same array again
        frames = self._frames.setdefault(key, deque([image] * self.stack, self.stack))
        if frames[-1] is not image:
            frames.append(image)
        return np.concatenate(frames, axis=2 if is_channels_last(space.shape or ()) else 0)

    def _mapped(self, fn: Any, space: Any, obs: Any = None, key: str = "") -> Any:
        """Apply fn to every image of a space, or of an observation of it."""
        if isinstance(space, spaces.Dict):
            parts = {
                k: self._mapped(fn, s, None if obs is None else obs[k], f"{key}/{k}")
                for k, s in space.items()
            }
            return spaces.Dict(parts) if obs is None else parts
        if not is_image(space):
            return space if obs is None else obs
        return fn(key, space) if obs is None else fn(key, space, obs)


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resize [H, W, C] uint8 to [size, size, C] by averaging areas (repeating pixels if larger)."""
    if image.shape[:2] == (size, size):
        return image
    # Channel by channel: Pillow knows no 9 channels, and would weigh colours by a fourth one.
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
    box = Image.Resampling.BOX
    return np.stack([np.asarray(plane.resize((size, size), box)) for plane in planes], axis=-1)
