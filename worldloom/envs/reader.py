"""Observations of several environments, read into arrays and compared with their space.

Letters used in shapes: N environments.
"""

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from worldloom.envs.contract import FLOAT32_MAX, EnvError, Fault, describe_value, to_array

# Spaces that models can read.
KNOWN = (spaces.Box, spaces.Discrete, spaces.MultiDiscrete, spaces.MultiBinary)
# Sums of squares below these show that all numbers are finite in float32.
FINITE_SQUARES = {4: np.inf, 8: FLOAT32_MAX * FLOAT32_MAX}
WATCHED_STEPS = 100  # at the start, in which observations are compared with their space's bounds


class ObsReader:
    """Read the observations of N environments, one by one, into arrays.

    space: of a single environment. keys: those of the flattened space that are read ("a/b");
        None for all. Others are left out.
    """

    def __init__(self, space: Space, num_envs: int, keys: Collection[str] | None = None) -> None:
        self._leaves: list[_Leaf] = []
        self._arrays = self._make(space, num_envs, keys, ())
        if len(self._leaves) == 1 and not self._leaves[0].path:
            self.read = self._leaves[0].write  # type: ignore[method-assign]
        self._floats = [leaf for leaf in self._leaves if leaf.dtype.kind == "f"]

    def _make(self, space: Space, num: int, keys: Collection[str] | None, path: tuple) -> Any:
        """Return the arrays of a space, and add its leaves."""
        if isinstance(space, spaces.Dict):
            parts = {k: self._make(s, num, keys, (*path, k)) for k, s in space.items()}
            return {key: part for key, part in parts.items() if part is not None}
        if keys is not None and "/".join(map(str, path)) not in keys:
            return None
        self._leaves.append(_Leaf(path, space, num))
        return self._leaves[-1].array

    def read(self, index: int, obs: Any) -> None:
        """Read the observation of one environment.

        Raises:
            EnvError: a key is missing, or something cannot be converted to the space.
            Fault: it contains NaN where the space has integers.
        """
        for leaf in self._leaves:
            value = obs
            for key in leaf.path:
                try:
                    value = value[key]
                except Exception:
                    raise EnvError(
                        f"returned no observation '{leaf.key}', but {_describe_obs(obs)}; expected "
                        "all keys of its observation_space"
                    ) from None
            leaf.write(index, value)

    def find_faults(self) -> dict[int, str]:
        """Return the environments whose observations are not finite in float32, and what is."""
        found: dict[int, str] = {}
        for leaf in self._floats:
            flat = leaf.array.reshape(-1)
            if not flat.dot(flat) < leaf.finite:
                for index, row in enumerate(leaf.array):
                    bad = ~(abs(row.astype(np.float64)) <= FLOAT32_MAX)
                    if bad.any():
                        found.setdefault(index, _explain_fault(leaf.name, row, bad))
        return found

    def find_outside(self, first: int) -> list[tuple[str, str]]:
        """Return notes about observations outside their bounds, in the first calls.

        first: number of the first environment.
        """
        return [note for leaf in self._leaves if leaf.watch for note in leaf.find_outside(first)]

    def copy(self) -> Any:
        """Return copies of the arrays [N, *shape], nested as the space; tuples of anything else."""
        return _copy_arrays(self._arrays)


def _copy_arrays(arrays: Any) -> Any:
    if isinstance(arrays, dict):
        return {key: _copy_arrays(part) for key, part in arrays.items()}
    return tuple(arrays) if isinstance(arrays, list) else arrays.copy()


def _describe_obs(obs: Any) -> str:
    return f"the keys {[*obs]}" if isinstance(obs, Mapping) else describe_value(obs)


def _explain_fault(name: str, row: np.ndarray, bad: np.ndarray) -> str:
    at = np.argwhere(bad)[0].tolist()
    where = f" at index {at}" if at else ""
    return f"returned {row[tuple(at)]} in {name}{where}; expected finite numbers"


class _Leaf:
    """One array of the observations: [N, *shape], or a list of N objects that models cannot see."""

    def __init__(self, path: tuple[Any, ...], space: Space, num_envs: int) -> None:
        self.path, self.space = path, space
        self.key = "/".join(map(str, path))
        self.name = f"the observation '{self.key}'" if path else "the observation"
        self.is_choice = isinstance(space, spaces.Discrete)
        self.shape, self.dtype = space.shape or (), np.dtype(space.dtype or object)
        self.low, self.high = _find_bounds(space)
        self.finite = FINITE_SQUARES.get(self.dtype.itemsize, -1.0)
        self.is_known = isinstance(space, KNOWN)
        self.is_limited = self.is_known and not isinstance(space, spaces.Box)
        self.watch = 0 if self.low is None or self.is_limited else WATCHED_STEPS
        self.array: Any = [None] * num_envs
        if self.is_known:
            self.array = np.zeros((num_envs, *self.shape), self.dtype)

    def write(self, index: int, obs: Any) -> None:
        """Write the value of one environment, converted if it is not what the space says."""
        if (
            type(obs) is not np.ndarray
            or obs.dtype != self.dtype
            or obs.shape != self.shape
            or self.is_limited
        ):
            obs = self._read(obs)
        self.array[index] = obs

    def _read(self, value: Any) -> Any:
        """Return a value as the space says, or raise EnvError."""
        if not self.is_known:
            return value
        if not (self.is_choice and isinstance(value, (int, np.integer))):
            value = self._convert(value)
        if self.is_limited:
            self._require_inside(value)
        return value

    def _convert(self, value: Any) -> np.ndarray:
        array = to_array(value)
        expected = f"expected an array of {self.dtype} of shape {self.shape}, as in its space"
        if array is None or _squeeze(array.shape) != _squeeze(self.shape):
            shown = value if array is None else array
            shape = "" if array is None or array.size > 4 else f" of shape {array.shape}"
            raise EnvError(f"returned {describe_value(shown)}{shape} as {self.name}; {expected}")
        array = array.reshape(self.shape)
        with np.errstate(all="ignore"):
            converted = array.astype(self.dtype)
            if self.dtype.kind == "f":
                return converted
            if array.dtype.kind == "f" and (bad := ~np.isfinite(array)).any():
                raise Fault(_explain_fault(self.name, array, bad))
            if (wrong := converted != array).any():
                example = array[tuple(np.argwhere(wrong)[0])]
                raise EnvError(
                    f"returned {example} in {self.name}, which cannot be {self.dtype}; {expected}"
                )
        return converted

    def _require_inside(self, value: Any) -> None:
        if ((value < self.low) | (value > self.high)).any():
            raise EnvError(
                f"returned {describe_value(value)} as {self.name}, outside its space {self.space}; "
                "widen the space, or fix the value"
            )

    def find_outside(self, first: int) -> list[tuple[str, str]]:
        """Return a note if a value of a box is outside its bounds."""
        self.watch -= 1
        outside = (self.array < self.low) | (self.array > self.high)
        if not outside.any():
            return []
        self.watch = 0
        at = np.argwhere(outside)[0]
        text = (
            f"environment {first + at[0]} returned {self.array[tuple(at)]} in {self.name}, outside "
            f"its space {shorten_space(self.space)}; models receive it as it is, and an image of "
            "floats is clipped; correct the bounds of the space"
        )
        return [(f"outside {self.key}", text)]


def _squeeze(shape: tuple[int, ...]) -> tuple[int, ...]:
    return tuple(size for size in shape if size != 1)


def _find_bounds(space: Any) -> tuple[Any, Any]:
    """Return the lowest and highest values of a space, or None where every value is inside."""
    if isinstance(space, spaces.Discrete):
        return np.int64(space.start), np.int64(space.start + space.n - 1)
    if isinstance(space, spaces.MultiDiscrete):
        return space.start, space.start + space.nvec - 1
    if isinstance(space, spaces.MultiBinary):
        return np.int8(0), np.int8(1)
    if not isinstance(space, spaces.Box):
        return None, None
    low, high = space.low.astype(np.float64), space.high.astype(np.float64)
    if space.dtype == np.uint8 and low.max(initial=0) == 0 and high.min(initial=255) == 255:
        return None, None
    if np.isinf(low).all() and np.isinf(high).all():
        return None, None
    # The tolerance covers rounding errors.
    return low - 1e-3 * (1 + abs(low)), high + 1e-3 * (1 + abs(high))


def shorten_space(space: Space) -> str:
    """Format a space on one short line; array bounds as their extremes."""
    if isinstance(space, spaces.MultiDiscrete):
        return f"MultiDiscrete({space.nvec.size} choices of up to {space.nvec.max()})"
    if not isinstance(space, spaces.Box):
        return " ".join(str(space).split())
    return f"Box({space.low.min():.4g}, {space.high.max():.4g}, {space.shape}, {space.dtype})"
