"""What models see of gymnasium's spaces, and how their actions go back.

Letters used in shapes: N environments, A = `ActionSpec.width`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gymnasium import Space, spaces

Obs = np.ndarray | dict[str, np.ndarray]


def is_image(space: Space) -> bool:
    """Tell whether a space is a picture: three axes of uint8."""
    return isinstance(space, spaces.Box) and space.dtype == np.uint8 and len(space.shape) == 3


def is_channels_last(shape: tuple[int, ...]) -> bool:
    """Tell whether an image shape is [H, W, C]: a short last axis, shorter than the others."""
    return shape[2] <= 12 and shape[2] < min(shape[:2])


def flatten(tree: Any, prefix: str = "") -> dict[str, Any]:
    """Flatten nested dicts (Dict spaces too) to one level, keys joined by "/".

    What is no dict stands alone, under the key "".
    """
    if not isinstance(tree, Mapping):
        return {prefix: tree}
    leaves: dict[str, Any] = {}
    for key, value in tree.items():
        leaves |= flatten(value, f"{prefix}/{key}" if prefix else str(key))
    return leaves


@dataclass(frozen=True)
class _Part:
    """One array of an observation: what it becomes, and the function that makes it so."""

    shape: tuple[int, ...]
    dtype: str
    encode: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ObsSpec:
    """How observations of a space are given to a model.

    parts: what a model sees, by key. dropped: keys that it does not see.
    """

    parts: dict[str, _Part]
    dropped: tuple[str, ...] = ()

    @classmethod
    def from_space(
        cls,
        space: Space,
        *,
        keep: str | None = None,
        image: str | None = None,
        vector: str | None = None,
    ) -> "ObsSpec":
        """Work out the arrays that a model sees of a single environment's observation space.

        Images (3-D uint8 boxes) stay uint8 and become channels first; other boxes become float32
        vectors; Discrete and MultiDiscrete become one-hot vectors and MultiBinary a vector of
        zeros and ones; a Dict becomes a flat dict of these, its nested keys joined by "/".

        keep: regular expression for the keys that models see; None for all.
        image: for keys that are images although they do not look so: a box of two axes (grey), or
            of floats, whose bounds become 0 and 255.
        vector: for keys that are vectors although they look like images, such as maps of symbols.
        """
        leaves = flatten(space)
        if not leaves:
            raise ValueError(
                f"The observation space {space} is empty; a model needs at least one array to see; "
                "add an entry to the environment's observation_space."
            )
        kept = set(leaves) if keep is None else _matching("keep", keep, leaves)
        images, vectors = (
            set() if pattern is None else _matching(name, pattern, leaves)
            for name, pattern in (("image", image), ("vector", vector))
        )
        if both := images & vectors:
            raise ValueError(
                f"env.obs.image and env.obs.vector both match '{min(both)}'; an observation is "
                "one of them; narrow one of the two"
            )
        parts = {
            key: _as_image(key, leaf)
            if key in images
            else _as_vector(key, leaf)
            if key in vectors
            else _part(key, leaf)
            for key, leaf in leaves.items()
            if key in kept
        }
        return cls(parts, tuple(key for key in leaves if key not in kept))

    @property
    def shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """Shape of a single observation: a tuple, or a dict of tuples for Dict spaces."""
        if "" in self.parts:
            return self.parts[""].shape
        return {key: part.shape for key, part in self.parts.items()}

    @property
    def dtypes(self) -> str | dict[str, str]:
        """Give "uint8" for images, else "float32": one string, or one per key, as in `shape`."""
        if "" in self.parts:
            return self.parts[""].dtype
        return {key: part.dtype for key, part in self.parts.items()}

    def describe(self, key: str) -> str:
        """Say what a model sees of a key, and with which encoder."""
        shape = self.parts[key].shape
        return f"{shape!s:<16}{'image' if len(shape) == 3 else 'vector'} encoder"

    def encode(self, obs: Any) -> Obs:
        """Turn a vector environment's observations [N, ...] into [N, *shape], or a dict of such."""
        arrays = flatten(obs)
        if "" in self.parts:
            return self.parts[""].encode(np.asarray(arrays[""]))
        return {key: part.encode(np.asarray(arrays[key])) for key, part in self.parts.items()}


def _matching(setting: str, pattern: str, keys: Mapping[str, Any]) -> set[str]:
    """Return the keys that a pattern of the env.obs section matches as a whole."""
    try:
        found = {key for key in keys if re.fullmatch(pattern, key)}
    except re.error as error:
        raise ValueError(
            f"env.obs.{setting} is {pattern!r}, which is no regular expression ({error}); such as "
            "'camera|wrist_.*'"
        ) from error
    if not found:
        known = ", ".join(keys) if "" not in keys else "a single array, which has no key"
        raise ValueError(
            f"env.obs.{setting} is {pattern!r}, which matches no observation; there is {known}"
        )
    return found


def _name(key: str) -> str:
    return f"The observation '{key}'" if key else "The observation"


def _as_vector(key: str, space: Space) -> _Part:
    """Treat any box as a vector of its numbers, as they are."""
    if not isinstance(space, spaces.Box):
        return _part(key, space)
    return _Part((int(np.prod(space.shape)),), "float32", _vector)


def _as_image(key: str, space: Space) -> _Part:
    """Treat a box of two or three axes as an image."""
    name = _name(key)
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        raise ValueError(
            f"{name} has the space {space}, which cannot be an image; expected a box of two or "
            "three axes; leave it out of env.obs.image"
        )
    low, high = float(space.low.min()), float(space.high.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(
            f"{name} lies in [{low}, {high}]; expected finite bounds, which become 0 and 255; "
            "give its space a finite low and high"
        )
    grey = len(space.shape) == 2
    part = _image_part(name, (1, *space.shape) if grey else space.shape)
    bounds = None if space.dtype == np.uint8 else (low, high)
    return _Part(part.shape, "uint8", partial(_picture, grey=grey, bounds=bounds, then=part.encode))


def _picture(
    images: np.ndarray,
    grey: bool,
    bounds: tuple[float, float] | None,
    then: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Give images a channel and bytes where they lack them, then do as with any image."""
    if grey:
        images = images[:, None]
    if bounds is not None:
        low, high = bounds
        unit = (np.clip(images, low, high) - low) / (high - low)
        images = np.rint(255.0 * unit).astype(np.uint8)
    return then(images)


def _part(key: str, space: Space) -> _Part:
    name = _name(key)
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes, start = _groups(space)
        return _Part((sum(sizes),), "float32", partial(_one_hot, sizes=sizes, start=start))
    if is_image(space):
        return _image_part(name, space.shape or ())
    if isinstance(space, spaces.MultiBinary) or (
        isinstance(space, spaces.Box) and len(space.shape) <= 2
    ):
        return _Part((int(np.prod(space.shape)),), "float32", _vector)
    if isinstance(space, spaces.Box):
        raise ValueError(
            f"{name} is a box of shape {space.shape} and dtype {space.dtype}; expected up to two "
            "axes, or an image: three axes of uint8 from 0 to 255; convert images with "
            "gymnasium.wrappers.TransformObservation, stack frames along their channels, or "
            "flatten what is no picture with gymnasium.wrappers.FlattenObservation."
        )
    raise ValueError(
        f"{name} has the space {space}, which models cannot read; expected Box, Discrete, "
        "MultiDiscrete, MultiBinary or a Dict of these; translate it with "
        "gymnasium.wrappers.TransformObservation."
    )


def _image_part(name: str, shape: tuple[int, ...]) -> _Part:
    if is_channels_last(shape):
        encode, shape = _channels_first, (shape[2], shape[0], shape[1])
    elif shape[0] < min(shape[1:]):
        encode = _unchanged
    else:
        raise ValueError(
            f"{name} is an image of shape {shape} and no axis of it looks like channels; expected "
            "[H, W, C] with at most 12 channels, or [C, H, W] with fewer channels than pixels a "
            "side; move the channels first with gymnasium.wrappers.TransformObservation."
        )
    if shape[1] % 16 or shape[2] % 16:
        raise ValueError(
            f"{name} is an image of {shape[1]}x{shape[2]} pixels; expected sides divisible by 16; "
            "resize it with env.image_size=64, or, if it is no picture, make it a vector with "
            "gymnasium.wrappers.FlattenObservation."
        )
    return _Part(shape, "uint8", encode)


def _channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


def _unchanged(images: np.ndarray) -> np.ndarray:
    return images


def _vector(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).astype(np.float32)


def _groups(space: Space) -> tuple[tuple[int, ...], np.ndarray]:
    """Sizes of the choices in a discrete space, in flat order, and the number each starts at."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), np.asarray([space.start])
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.flat), space.start.reshape(-1)
    count = int(np.prod(space.shape or ()))
    return (2,) * count, np.zeros(count, np.int64)


def _one_hot(values: np.ndarray, sizes: tuple[int, ...], start: np.ndarray) -> np.ndarray:
    """Write choices [N, ...] as one-hot vectors side by side, [N, sum(sizes)]."""
    offsets = np.cumsum((0, *sizes[:-1])) - start
    vectors = np.zeros((len(values), sum(sizes)), np.float32)
    np.put_along_axis(vectors, values.reshape(len(values), -1) + offsets, 1.0, axis=1)
    return vectors


@dataclass(frozen=True)
class ActionSpec:
    """How a model's action vectors become what an environment takes.

    action_dim: number of choices (Discrete) or of joints (Box), or a tuple with the number of
        choices of each group (MultiDiscrete, MultiBinary).
    discrete: actions are one-hot, group by group; otherwise they lie in [-1, 1].
    """

    space: Space
    action_dim: int | tuple[int, ...]
    discrete: bool

    @classmethod
    def from_space(cls, space: Space) -> "ActionSpec":
        """Work out the vectors with which a model acts in a single environment's action space."""
        if isinstance(space, spaces.Discrete):
            return cls(space, int(space.n), True)
        if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
            return cls(space, _groups(space)[0], True)
        if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            _check_bounded(space)
            return cls(space, int(np.prod(space.shape)), False)
        raise ValueError(
            f"The action space {space} is not supported; expected Discrete, MultiDiscrete, "
            "MultiBinary or a Box of floats; translate it with gymnasium.wrappers.TransformAction."
        )

    @property
    def width(self) -> int:
        """Length A of an action vector."""
        return self.action_dim if isinstance(self.action_dim, int) else sum(self.action_dim)

    def decode(self, actions: np.ndarray) -> np.ndarray:
        """Turn model actions [N, A] float32 into what a vector environment's `step` takes.

        Discrete: the likeliest choice of each group. Box: clipped to [-1, 1], then stretched to
        [low, high].
        """
        actions = np.asarray(actions)
        if actions.ndim != 2 or actions.shape[1] != self.width:
            raise ValueError(
                f"The actions have shape {actions.shape}; expected [N, {self.width}] for the "
                f"action space {self.space}; let the model's policy return one such vector for "
                "each environment."
            )
        if not np.isfinite(actions).all():
            raise ValueError(
                "The actions contain NaN or infinity; expected finite numbers; the model has "
                "most likely diverged: lower its learning rate or clip its gradients."
            )
        return self._choices(actions) if self.discrete else self._stretched(actions)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Turn an environment's actions [N, ...] into model actions [N, A] float32.

        The inverse of `decode`. A joint that cannot move (low = high) becomes 0.
        """
        actions = np.asarray(actions)
        if actions.shape[1:] != self.space.shape:
            raise ValueError(
                f"The actions have shape {actions.shape}; expected [N, *{self.space.shape}] for "
                f"the action space {self.space}."
            )
        return self._one_hots(actions) if self.discrete else self._squeezed(actions)

    def sample(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Draw `num` uniform random model actions, [num, A] float32."""
        if not self.discrete:
            return rng.uniform(-1.0, 1.0, (num, self.width)).astype(np.float32)
        sizes, start = _groups(self.space)
        return _one_hot(rng.integers(sizes, size=(num, len(sizes))) + start, sizes, start)

    def _choices(self, actions: np.ndarray) -> np.ndarray:
        sizes, start = _groups(self.space)
        # Splitting off a single group costs as much as a step of a small environment.
        groups = [actions]
        if len(sizes) > 1:
            groups = np.split(actions, np.cumsum(sizes)[:-1], axis=1)
        choices = np.stack([group.argmax(1) for group in groups], axis=1) + start
        return choices.reshape(len(actions), *(self.space.shape or ())).astype(self.space.dtype)

    def _one_hots(self, actions: np.ndarray) -> np.ndarray:
        sizes, start = _groups(self.space)
        if actions.dtype.kind not in "iub":
            raise ValueError(
                f"The actions are {actions.dtype}; expected integers for {self.space}."
            )
        picks = actions.reshape(len(actions), -1).astype(np.int64) - start
        self._require_inside(actions, (picks < 0) | (picks >= sizes))
        return _one_hot(actions.astype(np.int64), sizes, start)

    def _squeezed(self, actions: np.ndarray) -> np.ndarray:
        assert isinstance(self.space, spaces.Box)
        low, high = self.space.low.astype(np.float64), self.space.high.astype(np.float64)
        # From the middle, so that a space of [-1, 1] returns float32 actions unchanged.
        reach = np.where(high > low, (high - low) / 2.0, np.inf)
        unit = (actions - (low + high) / 2.0) / reach
        # What rescaling in float32 may round to is inside; NaN is not.
        self._require_inside(actions, ~(abs(unit) <= 1.0 + 1e-6).reshape(len(actions), -1))
        return np.clip(unit, -1.0, 1.0).reshape(len(actions), -1).astype(np.float32)

    def _require_inside(self, actions: np.ndarray, outside: np.ndarray) -> None:
        if outside.any():
            at = int(outside.any(1).argmax())
            raise ValueError(
                f"The action {actions[at].tolist()} at index {at} lies outside the action space "
                f"{self.space}; expected actions as the environment takes them."
            )

    def _stretched(self, actions: np.ndarray) -> np.ndarray:
        assert isinstance(self.space, spaces.Box)
        # In float64, so that a space of [-1, 1] returns a model's float32 actions unchanged.
        low, high = self.space.low.astype(np.float64), self.space.high.astype(np.float64)
        unit = (np.clip(actions.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0
        values = low + unit.reshape(len(actions), *self.space.shape) * (high - low)
        return np.clip(values, low, high).astype(self.space.dtype)


def _check_bounded(space: spaces.Box) -> None:
    if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
        raise ValueError(
            f"The action space {space} has infinite bounds; expected finite ones, to which a "
            "model's [-1, 1] is stretched; give the environment's action_space a finite low and "
            "high."
        )
