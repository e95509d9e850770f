"""Films of episodes, as .mp4 or .gif files.

Letters used in shapes: H, W height and width.
"""

import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from fractions import Fraction
from pathlib import Path
from typing import Any, BinaryIO

import gymnasium as gym
import numpy as np
from gymnasium.vector import SyncVectorEnv
from PIL import Image

from worldloom.envs.extras import suggest_extra
from worldloom.envs.renderer import render_rgb
from worldloom.envs.reward_panel import RewardPanel
from worldloom.envs.spaces import is_channels_last, is_image
from worldloom.envs.vector import frames_per_step
from worldloom.files import atomic_write
from worldloom.trees import flatten_tree

FPS = 30.0  # of an environment whose metadata has no render_fps
SMALLEST = 256  # pixels of the shorter side, to which smaller images are enlarged
LARGEST = 320  # of the shorter side, above which images of a run's films are reduced


class _Gif:
    """A .gif file, in memory until it is closed."""

    max_frames = 1_000

    def __init__(self, stream: BinaryIO, fps: float, height: int, width: int) -> None:
        # In hundredths of a second; browsers play anything faster than 2 at 10 frames a second.
        self.stream, self.duration = stream, 10 * max(2, round(100 / fps))
        self.images: list[Image.Image] = []

    def add(self, image: np.ndarray) -> None:
        method, dither = Image.Quantize.FASTOCTREE, Image.Dither.NONE
        self.images.append(Image.fromarray(image).quantize(256, method=method, dither=dither))

    def close(self) -> None:
        first, *others = self.images
        options: Any = {"save_all": True, "append_images": others, "loop": 0}
        first.save(self.stream, "GIF", duration=self.duration, **options)


class _Mp4:
    """An H.264 video."""

    max_frames = 20_000

    def __init__(self, stream: BinaryIO, fps: float, height: int, width: int) -> None:
        import av

        self.container = av.open(stream, "w", format="mp4")
        self.video: Any = self.container.add_stream("h264", Fraction(fps).limit_denominator(1000))
        self.video.pix_fmt = "yuv420p"  # what every player can show; its sides are even
        self.video.height, self.video.width = height - height % 2, width - width % 2
        self.make_frame = av.VideoFrame.from_ndarray

    def add(self, image: np.ndarray) -> None:
        image = np.ascontiguousarray(image[: self.video.height, : self.video.width])
        self.container.mux(self.video.encode(self.make_frame(image, format="rgb24")))

    def close(self) -> None:
        self.container.mux(self.video.encode(None))
        self.container.close()


ENCODERS: dict[str, type[_Gif | _Mp4]] = {".gif": _Gif, ".mp4": _Mp4}


class Film:
    """Images of the first environment of a vector environment; `open_film` opens one.

    fps: images per second, those of the environment's metadata divided by its action repeat.
    episodes, frames: recorded so far.
    predict: returns the reward that the model predicts for the step that is recorded next.
    """

    fps = FPS
    episodes = frames = 0

    def __init__(self, stream: BinaryIO, make_encoder: type[_Gif | _Mp4]) -> None:
        self.panel = RewardPanel()
        self.predict: Callable[[], float] = lambda: math.nan
        self._stream, self._make_encoder = stream, make_encoder
        self._encoder: _Gif | _Mp4 | None = None

    @property
    def is_full(self) -> bool:
        """Whether the film has the maximum number of images."""
        return self.frames >= self._make_encoder.max_frames

    def record(self, env: SyncVectorEnv, episodes: int) -> None:
        """Record the next episodes of the first environment.

        The environment is rendered, or, if it cannot render, its first image is recorded.

        Raises:
            ValueError: it neither renders nor observes an image.
        """
        first: Any = env.envs[0]
        self.fps = float(first.metadata.get("render_fps") or FPS) / frames_per_step(first)
        env.envs[0] = _Recorder(first, self, episodes)

    def add(self, image: np.ndarray) -> None:
        """Add an image [H, W, 3] uint8, enlarged if it is small, with the rewards below it."""
        image = self.panel.draw(enlarge(image))
        if self._encoder is None:
            self._encoder = self._make_encoder(self._stream, self.fps, *image.shape[:2])
        self._encoder.add(image)
        self.frames += 1

    def describe(self) -> str:
        """Return the numbers of images."""
        more = " (the maximum length)" if self.is_full else ""
        return f"{self.frames:,} images, {self.fps:g} per second{more}"

    def close(self) -> None:
        """Complete the file."""
        if self._encoder is not None:
            self._encoder.close()


@contextmanager
def open_film(file: Path) -> Iterator[Film]:
    """Write a film, an .mp4 or .gif file by its name, atomically; the folder is created.

    Raises:
        ValueError: the file has another suffix, or is a folder.
        ImportError: the package that encodes .mp4 is not installed.
    """
    encoder = ENCODERS.get(file.suffix.lower())
    if encoder is None or file.is_dir():
        raise ValueError(
            f"video is '{file}'; expected a file whose name ends in .mp4 or .gif, such as "
            "video=episodes.mp4"
        )
    if encoder is _Mp4:
        with suggest_extra(file.name):
            import av  # noqa: F401  (reports the missing package before anything is evaluated)
    file.parent.mkdir(parents=True, exist_ok=True)
    with atomic_write(file) as stream:
        film = Film(stream, encoder)
        try:
            yield film
        finally:
            film.close()


class _Recorder(gym.Wrapper):
    """Add the images of an environment's first episodes to a film."""

    def __init__(self, env: gym.Env, film: Film, episodes: int) -> None:
        super().__init__(env)
        self._film, self._left = film, episodes
        self._get_image = find_camera(env)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        obs, info = self.env.reset(seed=seed, options=options)
        self._film.panel.restart()
        self._left -= 1
        self._film.episodes += self._left >= 0 and not self._film.is_full
        self._record(obs)
        return obs, info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        result = self.env.step(action)
        self._film.panel.add(float(result[1]), self._film.predict())
        self._record(result[0])
        return result

    def _record(self, obs: Any) -> None:
        if self._left >= 0 and not self._film.is_full:
            self._film.add(self._get_image(obs))


def enlarge(image: np.ndarray) -> np.ndarray:
    """Repeat the pixels of a small image [H, W, 3]."""
    factor = max(1, SMALLEST // min(image.shape[:2]))
    return image.repeat(factor, 0).repeat(factor, 1)


def shrink(image: np.ndarray) -> np.ndarray:
    """Reduce a large image [H, W, 3] uint8, so that the films of a run stay small."""
    height, width = image.shape[:2]
    factor = SMALLEST / min(height, width)
    if min(height, width) <= LARGEST:
        return image
    size = round(width * factor), round(height * factor)
    return np.asarray(Image.fromarray(image).resize(size, Image.Resampling.BOX))


def find_camera(env: gym.Env) -> Callable[[Any], np.ndarray]:
    """Return the function that makes an image [H, W, 3] of an environment and its observation.

    Raises:
        ValueError: the environment neither renders nor observes an image.
    """
    if env.render_mode == "rgb_array":
        return lambda obs: render_rgb(env)
    leaves = flatten_tree(env.observation_space)
    key = next((key for key in leaves if is_image(leaves[key])), None)
    if key is None:
        raise ValueError(
            f"{env.unwrapped} cannot be filmed: its render_mode is {env.render_mode!r} and it "
            "observes no image; expected render_mode='rgb_array'; let the function that makes it "
            "take a parameter render_mode and pass it on, or leave video= out"
        )
    return lambda obs: to_rgb(flatten_tree(obs)[key])


def to_rgb(image: np.ndarray) -> np.ndarray:
    """Return the newest colours [H, W, 3] of an observed image, which may be grey or stacked."""
    image = image if is_channels_last(image.shape) else np.moveaxis(image, 0, -1)
    if image.shape[2] % 3:
        image = image[..., -1:].repeat(3, -1)
    return np.ascontiguousarray(image[..., -3:])
