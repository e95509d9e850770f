"""Wrappers for any environment: time limit, action repeat, pixels, image size, frame stack.

Letters used in shapes: H, W height and width, C channels.
"""

from collections import deque
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from PIL import Image

from worldloom.envs.contract import read_step
from worldloom.envs.renderer import place_camera, render_rgb
from worldloom.envs.spaces import is_channels_last, is_image
from worldloom.trees import flatten_tree


def wrap(
    env: gym.Env,
    time_limit: int | None = None,
    action_repeat: int = 1,
    frame_stack: int = 1,
    pixels: bool = False,
    image_size: int | None = None,
) -> gym.Env:
    """Put the wrappers around an environment that its settings require.

    time_limit: simulator steps (not affected by `action_repeat`) after which an episode is
        truncated.
    action_repeat: number of times that each action is applied; the rewards are summed.
    frame_stack: number of newest images observed at once, concatenated along their channels, the
        oldest first; for models without memory, such as TD-MPC2.
    pixels: observe only the rendered image, [size, size, 3], 64 pixels a side by default.
    image_size: side in pixels to which images are resized; a multiple of 16.
    """
    given = {"action_repeat": action_repeat, "frame_stack": frame_stack, "image_size": image_size}
    for name, value in given.items():
        off = None if name == "image_size" else 1
        if value != off and (not isinstance(value, int) or value < 1):
            raise ValueError(
                f"{name} is {value}; expected at least 1; set env.{name}={off or 'null'} for none"
            )
    if time_limit is not None:
        env = TimeLimit(env, time_limit)
    if action_repeat > 1:
        env = ActionRepeat(env, action_repeat)
    if pixels:
        env = RenderedObservation(env, image_size or 64)
    elif image_size is not None:
        env = ResizedImages(env, image_size)
    return env if frame_stack == 1 else StackedImages(env, frame_stack)


class ActionRepeat(gym.Wrapper):
    """Apply every action several times, or until the episode ends, and sum the rewards."""

    def __init__(self, env: gym.Env, repeat: int) -> None:
        super().__init__(env)
        self.repeat = repeat

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Return the last observation and info, and the sum of the rewards."""
        total = 0.0
        for _ in range(self.repeat):
            # A copy, because an environment may change its action.
            given = action.copy() if isinstance(action, np.ndarray) else action
            obs, reward, terminated, truncated, info = read_step(self.env.step(given))
            total += reward
            if terminated or truncated:
                break
        return obs, total, terminated, truncated, info


class RenderedObservation(gym.ObservationWrapper):
    """Replace the observation by the rendered image, [size, size, 3] uint8."""

    def __init__(self, env: gym.Env, size: int) -> None:
        super().__init__(env)
        self.size = size
        self.observation_space = spaces.Box(0, 255, (size, size, 3), np.uint8)
        self._placed = False

    def observation(self, observation: Any) -> np.ndarray:
        """Render the environment; its own observation is dropped."""
        if not self._placed:
            render_rgb(self.env)  # the first call creates the camera
            place_camera(self.env)
            self._placed = True
        return resize_image(render_rgb(self.env), self.size)


class _ImageWrapper(gym.ObservationWrapper):
    """Change every image of the observations; other arrays stay as they are."""

    def __init__(self, env: gym.Env, setting: str, advice: str) -> None:
        super().__init__(env)
        space = env.observation_space
        if not any(is_image(leaf) for leaf in flatten_tree(space).values()):
            raise ValueError(
                f"{setting} was given, but the observation space of {env.unwrapped}, {space}, has "
                f"no images; expected a 3-D box of uint8 up to 255; {advice}"
            )
        self.observation_space = self._change_space(space)

    def observation(self, observation: Any) -> Any:
        """Change the images of one observation."""
        return self._change(self.env.observation_space, observation, "")

    def change_shape(self, shape: list[int], axis: int) -> None:
        """Change the shape of an image, a list of which item `axis` is the channels."""
        raise NotImplementedError

    def change_image(self, key: str, image: np.ndarray, axis: int) -> np.ndarray:
        """Change an image with its channels along `axis`; key: its place in the observation."""
        raise NotImplementedError

    def _change_space(self, space: Any) -> spaces.Space:
        if isinstance(space, spaces.Dict):
            return spaces.Dict({key: self._change_space(part) for key, part in space.items()})
        if not is_image(space):
            return space
        shape = list(space.shape)
        self.change_shape(shape, _channel_axis(space))
        return spaces.Box(0, 255, tuple(shape), np.uint8)

    def _change(self, space: Any, obs: Any, key: str) -> Any:
        if isinstance(space, spaces.Dict):
            return {k: self._change(part, obs[k], f"{key}/{k}") for k, part in space.items()}
        return self.change_image(key, obs, _channel_axis(space)) if is_image(space) else obs


class ResizedImages(_ImageWrapper):
    """Resize every image of the observations."""

    def __init__(self, env: gym.Env, size: int) -> None:
        self.size = size
        advice = "set env.pixels=true to observe rendered images, or leave env.image_size out"
        super().__init__(env, f"image_size={size}", advice)

    def change_shape(self, shape: list[int], axis: int) -> None:
        """Set height and width."""
        shape[:] = [n if i == axis else self.size for i, n in enumerate(shape)]

    def change_image(self, key: str, image: np.ndarray, axis: int) -> np.ndarray:
        """Resize one image."""
        if axis == 2:
            return resize_image(image, self.size)
        return np.moveaxis(resize_image(np.moveaxis(image, axis, -1), self.size), -1, axis)


class StackedImages(_ImageWrapper):
    """Concatenate the last images of an episode along their channels.

    At the start of an episode its first image is repeated.
    """

    def __init__(self, env: gym.Env, stack: int) -> None:
        self.stack = stack
        self._frames: dict[str, deque[np.ndarray]] = {}
        super().__init__(env, f"frame_stack={stack}", "leave env.frame_stack out")

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Drop the images of the last episode."""
        self._frames = {}
        return super().reset(seed=seed, options=options)

    def change_shape(self, shape: list[int], axis: int) -> None:
        """Multiply the channels."""
        shape[axis] *= self.stack

    def change_image(self, key: str, image: np.ndarray, axis: int) -> np.ndarray:
        """Return the newest images, this one last."""
        image = image.copy()  # an environment may reuse the array
        frames = self._frames.setdefault(key, deque([image] * self.stack, self.stack))
        if frames[-1] is not image:
            frames.append(image)
        return np.concatenate(frames, axis)


def _channel_axis(space: spaces.Space) -> int:
    return 2 if is_channels_last(space.shape or ()) else 0


def resize_image(image: np.ndarray, size: int) -> np.ndarray:
    """Resize [H, W, C] uint8 to [size, size, C]: average areas, or repeat pixels if larger."""
    if image.shape[:2] == (size, size):
        return image
    # Channel by channel: Pillow has no mode for 9 channels, and treats a fourth one as alpha.
    planes = [Image.fromarray(plane) for plane in np.moveaxis(image, -1, 0)]
    box = Image.Resampling.BOX
    return np.stack([np.asarray(plane.resize((size, size), box)) for plane in planes], axis=-1)
