"""Conversion of gymnasium's observations for models, and of models' actions for gymnasium.

Letters used in shapes: N environments, A = `ActionSpec.width`.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from worldloom.envs.advice import UnreadableError, advise, remark_vector, require_distinct
from worldloom.envs.time_limit import TimeLimit, TookTooLong
from worldloom.trees import flatten_tree

Obs = np.ndarray | dict[str, np.ndarray]
MATCH_SECONDS = 2.0  # for a regular expression, which may come from a file


def is_image(space: Space) -> bool:
    """Return whether a space is an image: a box of three axes of uint8, with values up to 255.

    Boxes with a lower bound, such as boards and masks, are vectors.
    """
    if not isinstance(space, spaces.Box) or space.dtype != np.uint8 or len(space.shape) != 3:
        return False
    return bool(space.high.max(initial=0) == 255)


def is_channels_last(shape: tuple[int, ...]) -> bool:
    """Return whether an image shape is [H, W, C]: a short last axis, shorter than the others."""
    return shape[2] <= 12 and shape[2] < min(shape[:2])


@dataclass(frozen=True)
class _Part:
    """One array of an observation: its shape and dtype for models, and the conversion."""

    shape: tuple[int, ...]
    dtype: str
    encode: Callable[[np.ndarray], np.ndarray]


@dataclass(frozen=True)
class ObsSpec:
    """Conversion of the observations of a space for a model.

    space: of a single environment.
    parts: the arrays that a model sees, by key; "" for a single array. dropped: all other keys.
    remarks: observations that may be meant as images but are read as vectors, and what changes it.
    """

    space: Space
    parts: dict[str, _Part]
    dropped: tuple[str, ...] = ()
    remarks: tuple[str, ...] = ()

    @classmethod
    def from_space(
        cls,
        space: Space,
        *,
        keep: str | None = None,
        image: str | None = None,
        vector: str | None = None,
        recorded: bool = False,
    ) -> "ObsSpec":
        """Derive the arrays that a model sees from a single environment's observation space.

        Images (3-D uint8 boxes up to 255) stay uint8 and become channels first; other boxes become
        float32 vectors; Discrete and MultiDiscrete become one-hot vectors and MultiBinary a vector
        of zeros and ones; a Dict becomes a flat dict of these, its nested keys joined by "/".

        keep: regular expression for the keys that models see; None for all.
        image: for keys of images in another form: a box of two axes (grey), or of floats, whose
            bounds become 0 and 255.
        vector: for keys of vectors in the form of images, such as maps of symbols.
        recorded: whether the space is that of a dataset, for the advice in messages.

        Raises:
            ValueError: models cannot read a kept observation, two have the same flattened name, or
                an argument matches none.
        """
        require_distinct(space)
        leaves = flatten_tree(space)
        if not leaves:
            raise ValueError(
                f"The observation space {space} is empty; a model needs at least one array; add an "
                "entry to the environment's observation_space."
            )
        kept = set(leaves) if keep is None else _match_keys("keep", keep, leaves)
        images = set() if image is None else _match_keys("image", image, leaves)
        vectors = set() if vector is None else _match_keys("vector", vector, leaves)
        if both := images & vectors:
            raise ValueError(
                f"env.obs.image and env.obs.vector both match '{min(both)}'; change one of them"
            )
        parts, remarks = {}, []
        for key, leaf in leaves.items():
            if key in kept:
                name = f"The observation '{key}'" if key else "The observation"
                make = _make_image if key in images else _make_part
                is_vector = key in vectors and isinstance(leaf, spaces.Box)
                try:
                    parts[key] = _make_vector(leaf) if is_vector else make(name, leaf)
                except UnreadableError as error:
                    raise ValueError(f"{error}; {advise(error, key, leaves, recorded)}") from None
                if key not in images | vectors and not is_image(leaf):
                    remarks += remark_vector(key, name, leaf)
        dropped = tuple(key for key in leaves if key not in kept)
        return cls(space, parts, dropped, tuple(remarks))

    @property
    def shape(self) -> tuple[int, ...] | dict[str, tuple[int, ...]]:
        """Return the shape of one observation: a tuple, or a dict of tuples for Dict spaces."""
        if "" in self.parts:
            return self.parts[""].shape
        return {key: part.shape for key, part in self.parts.items()}

    def describe(self, key: str) -> str:
        """Return the shape of a key's array for models, and the kind of its encoder."""
        shape = self.parts[key].shape
        return f"{shape!s:<16}{'image' if len(shape) == 3 else 'vector'} encoder"

    def encode(self, obs: Any) -> Obs:
        """Convert a vector environment's observations [N, ...] to [N, *shape], or a dict."""
        if "" in self.parts:
            return self.parts[""].encode(np.asarray(obs))
        arrays = flatten_tree(obs)
        return {key: part.encode(np.asarray(arrays[key])) for key, part in self.parts.items()}


def _match_keys(setting: str, pattern: str, keys: Mapping[str, Any]) -> set[str]:
    """Return the keys that a regular expression of the env.obs section matches completely."""
    try:
        with TimeLimit(MATCH_SECONDS):
            found = {key for key in keys if re.fullmatch(pattern, key)}
    except TookTooLong:
        raise ValueError(
            f"env.obs.{setting} is {pattern!r}, which takes too long to match; write a simpler one"
        ) from None
    except re.error as error:
        raise ValueError(
            f"env.obs.{setting} is {pattern!r}; expected a regular expression ({error}) such as "
            "'camera|wrist_.*'"
        ) from error
    if not found:
        known = ", ".join(keys) if "" not in keys else "a single array, which has no key"
        raise ValueError(
            f"env.obs.{setting} is {pattern!r}, which matches no observation; expected {known}"
        )
    return found


def _make_vector(space: Space) -> _Part:
    return _Part((int(np.prod(space.shape or ())),), "float32", _flatten_rows)


def _make_image(name: str, space: Space) -> _Part:
    """Treat a box of two or three axes as an image."""
    if not isinstance(space, spaces.Box) or len(space.shape) not in (2, 3):
        raise ValueError(
            f"{name} has the space {space}, which cannot be an image; expected a box of two or "
            "three axes; leave it out of env.obs.image"
        )
    low, high = float(space.low.min()), float(space.high.max())
    if not np.isfinite([low, high]).all():
        raise ValueError(
            f"{name} has the bounds [{low}, {high}]; expected finite ones, which become 0 and "
            "255; give its space a finite low and high"
        )
    grey = len(space.shape) == 2
    part = _make_uint8_image(name, (1, *space.shape) if grey else space.shape)
    bounds = None if space.dtype == np.uint8 and high == 255 else (low, high)
    encode = partial(_encode_image, grey=grey, bounds=bounds, then=part.encode)
    return _Part(part.shape, "uint8", encode)


def _encode_image(
    images: np.ndarray,
    grey: bool,
    bounds: tuple[float, float] | None,
    then: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """Add a channel axis to grey images, scale floats to bytes, then call `then`."""
    if grey:
        images = images[:, None]
    if bounds is not None:
        low, high = bounds
        unit = (np.clip(images, low, high) - low) / (high - low)
        images = np.rint(255.0 * unit).astype(np.uint8)
    return then(images)


def _make_part(name: str, space: Space) -> _Part:
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes, start = get_groups(space)
        return _Part((sum(sizes),), "float32", partial(_encode_one_hot, sizes=sizes, start=start))
    if is_image(space):
        return _make_uint8_image(name, space.shape or ())
    box = isinstance(space, spaces.Box)
    few = box and (len(space.shape or ()) <= 2 or space.dtype == np.uint8)
    if isinstance(space, spaces.MultiBinary) or (few and len(space.shape or ()) <= 3):
        return _make_vector(space)
    if box:
        raise UnreadableError(
            f"{name} is a box of shape {space.shape} and dtype {space.dtype}; expected up to two "
            "axes, or an image: three axes of uint8 from 0 to 255",
            "convert images with gymnasium.wrappers.TransformObservation, stack frames along their "
            "channels, or read other arrays as vectors with env.obs.vector",
        )
    raise UnreadableError(
        f"{name} has the space {space}, which models cannot read; expected Box, Discrete, "
        "MultiDiscrete, MultiBinary or a Dict of these"
    )


def _make_uint8_image(name: str, shape: tuple[int, ...]) -> _Part:
    if is_channels_last(shape):
        encode, shape = _move_channels_first, (shape[2], shape[0], shape[1])
    elif shape[0] < min(shape[1:]):
        encode = _identity
    else:
        raise UnreadableError(
            f"{name} is an image of shape {shape} without an axis that can be its channels; "
            "expected [H, W, C] with at most 12 channels, or [C, H, W] with fewer channels than "
            "pixels a side",
            "move the channels first with gymnasium.wrappers.TransformObservation",
        )
    if shape[1] % 16 or shape[2] % 16:
        raise UnreadableError(
            f"{name} is an image of {shape[1]}x{shape[2]} pixels; expected sides divisible by 16",
            "resize it with env.image_size=64, or, if it is not an image, read it as a vector with "
            "env.obs.vector",
        )
    return _Part(shape, "uint8", encode)


def _move_channels_first(images: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(np.moveaxis(images, -1, 1))


def _identity(images: np.ndarray) -> np.ndarray:
    return images


def _flatten_rows(values: np.ndarray) -> np.ndarray:
    return values.reshape(len(values), -1).astype(np.float32)


def get_groups(space: Space) -> tuple[tuple[int, ...], np.ndarray]:
    """Return the number of choices of each group, flattened, and the number of its first choice."""
    if isinstance(space, spaces.Discrete):
        return (int(space.n),), np.asarray([space.start])
    if isinstance(space, spaces.MultiDiscrete):
        return tuple(int(n) for n in space.nvec.flat), space.start.reshape(-1)
    count = int(np.prod(space.shape or ()))
    return (2,) * count, np.zeros(count, np.int64)


def _encode_one_hot(values: np.ndarray, sizes: tuple[int, ...], start: np.ndarray) -> np.ndarray:
    """Convert choices [N, ...] to concatenated one-hot vectors, [N, sum(sizes)]."""
    offsets = np.cumsum((0, *sizes[:-1])) - start
    vectors = np.zeros((len(values), sum(sizes)), np.float32)
    np.put_along_axis(vectors, values.reshape(len(values), -1) + offsets, 1.0, axis=1)
    return vectors


@dataclass(frozen=True)
class ActionSpec:
    """Conversion of a model's action vectors for an environment.

    action_dim: number of choices (Discrete) or of joints (Box), or a tuple with the number of
        choices of each group (MultiDiscrete, MultiBinary).
    discrete: actions are one-hot, group by group; otherwise they are in [-1, 1].
    """

    space: Space
    action_dim: int | tuple[int, ...]
    discrete: bool

    @classmethod
    def from_space(cls, space: Space) -> "ActionSpec":
        """Derive the action vectors of a model from a single environment's action space."""
        if isinstance(space, spaces.Discrete):
            return cls(space, int(space.n), True)
        if isinstance(space, spaces.MultiDiscrete | spaces.MultiBinary):
            return cls(space, get_groups(space)[0], True)
        if isinstance(space, spaces.Box) and np.issubdtype(space.dtype, np.floating):
            if not (np.isfinite(space.low).all() and np.isfinite(space.high).all()):
                raise ValueError(
                    f"The action space {space} has infinite bounds; expected finite ones, to which "
                    "a model's [-1, 1] is scaled; give the environment's action_space a finite low "
                    "and high."
                )
            return cls(space, int(np.prod(space.shape)), False)
        raise ValueError(
            f"The action space {space} is not supported; expected Discrete, MultiDiscrete, "
            "MultiBinary or a Box of floats; convert it with gymnasium.wrappers.TransformAction."
        )

    @property
    def width(self) -> int:
        """Return the length A of an action vector."""
        return self.action_dim if isinstance(self.action_dim, int) else sum(self.action_dim)

    def decode(self, actions: np.ndarray) -> np.ndarray:
        """Convert model actions [N, A] float32 to the argument of a vector environment's `step`.

        Discrete: the choice with the largest value of each group. Box: clipped to [-1, 1], then
        scaled to [low, high].

        Raises:
            ValueError: the actions have another shape, or contain NaN or infinity.
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
                "probably diverged: lower its learning rate or clip its gradients."
            )
        return self._pick_choices(actions) if self.discrete else self._scale_to_space(actions)

    def encode(self, actions: np.ndarray) -> np.ndarray:
        """Convert an environment's actions [N, ...] to model actions [N, A] float32.

        The inverse of `decode`. A joint that cannot move (low = high) becomes 0.

        Raises:
            ValueError: the actions have another shape.
        """
        actions = np.asarray(actions)
        if actions.shape[1:] != self.space.shape:
            raise ValueError(
                f"The actions have shape {actions.shape}; expected [N, *{self.space.shape}] for "
                f"the action space {self.space}."
            )
        return self._encode_choices(actions) if self.discrete else self._scale_to_unit(actions)

    def sample(self, rng: np.random.Generator, num: int) -> np.ndarray:
        """Draw `num` uniform random model actions, [num, A] float32."""
        if not self.discrete:
            return rng.uniform(-1.0, 1.0, (num, self.width)).astype(np.float32)
        sizes, start = get_groups(self.space)
        return _encode_one_hot(rng.integers(sizes, size=(num, len(sizes))) + start, sizes, start)

    def _pick_choices(self, actions: np.ndarray) -> np.ndarray:
        sizes, start = get_groups(self.space)
        # Splitting off a single group costs as much as a step of a small environment.
        groups = [actions]
        if len(sizes) > 1:
            groups = np.split(actions, np.cumsum(sizes)[:-1], axis=1)
        choices = np.stack([group.argmax(1) for group in groups], axis=1) + start
        return choices.reshape(len(actions), *(self.space.shape or ())).astype(self.space.dtype)

    def _encode_choices(self, actions: np.ndarray) -> np.ndarray:
        sizes, start = get_groups(self.space)
        if actions.dtype.kind not in "iub":
            raise ValueError(
                f"The actions are {actions.dtype}; expected integers for {self.space}."
            )
        picks = actions.reshape(len(actions), -1).astype(np.int64) - start
        self._require_inside(actions, (picks < 0) | (picks >= sizes))
        return _encode_one_hot(actions.astype(np.int64), sizes, start)

    def _scale_to_unit(self, actions: np.ndarray) -> np.ndarray:
        assert isinstance(self.space, spaces.Box)
        low, high = self.space.low.astype(np.float64), self.space.high.astype(np.float64)
        # Relative to the middle, so that a space of [-1, 1] returns float32 actions unchanged.
        reach = np.where(high > low, (high - low) / 2.0, np.inf)
        unit = (actions - (low + high) / 2.0) / reach
        # The tolerance covers rounding errors of float32; NaN is outside.
        self._require_inside(actions, ~(abs(unit) <= 1.0 + 1e-6).reshape(len(actions), -1))
        return np.clip(unit, -1.0, 1.0).reshape(len(actions), -1).astype(np.float32)

    def _require_inside(self, actions: np.ndarray, outside: np.ndarray) -> None:
        if outside.any():
            at = int(outside.any(1).argmax())
            raise ValueError(
                f"The action {actions[at].tolist()} at index {at} is outside the action space "
                f"{self.space}; expected actions of the environment."
            )

    def _scale_to_space(self, actions: np.ndarray) -> np.ndarray:
        assert isinstance(self.space, spaces.Box)
        # In float64, so that a space of [-1, 1] returns a model's float32 actions unchanged.
        low, high = self.space.low.astype(np.float64), self.space.high.astype(np.float64)
        unit = (np.clip(actions.astype(np.float64), -1.0, 1.0) + 1.0) / 2.0
        values = low + unit.reshape(len(actions), *self.space.shape) * (high - low)
        return np.clip(values, low, high).astype(self.space.dtype)
