"""Row schema: the fields of a row, and the conversion of the user's arrays to rows.

Letters: E streams, N steps of an episode, A action_dim. `lead` stands for the leading axes of
rows: [E] for one row of every stream, [N + 1] for the rows of an episode.
"""

import math
import warnings
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.protocol import ReplayField

Array = np.ndarray | Tensor
ArrayObs = Array | Mapping[str, Array]
Arrays = dict[str, np.ndarray]
Fields = dict[str, tuple[tuple[int, ...], np.dtype]]  # name -> shape and dtype of one row

# The settings of a run that determine a part of the layout.
SETTINGS = {
    "num_envs": "env.num_envs",
    "capacity": "data.capacity",
    "obs": "the observations (env=…, env.image_size, env.frame_stack, env.obs)",
    "actions": "the actions (env=…, env.task)",
    "fields": "the sizes of the model (model=…)",
}
FLAGS = ("is_first", "is_last", "is_terminal")


class RowSchema:
    """The fields of a row, in the order and with the dtypes in which they are stored.

    fields: {name: (shape, dtype)} of all fields, with the names that messages show.
    obs_names: {key: name} of dict observations, or None for a single array.
    model_names: {key: name} of the fields that are stored for the model.
    every_row: keys of those of which a batch contains all rows.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
        action_dim: int,
        model_fields: Mapping[str, ReplayField],
        obs_dtypes: Any,
        num_envs: int = 1,
    ) -> None:
        self.obs_names = _names("obs", obs_shape) if isinstance(obs_shape, Mapping) else None
        self.model_names = _names("fields", model_fields)
        self.fields: Fields = {
            **_obs_fields(obs_shape, obs_dtypes),
            "actions": ((action_dim,), np.dtype(np.float32)),
            "rewards": ((), np.dtype(np.float32)),
            **{name: ((), np.dtype(bool)) for name in FLAGS},
            "episode": ((), np.dtype(np.int64)),  # number of the first row of this row's episode
        }
        self.every_row = [name for name, field in model_fields.items() if field.every_row]
        self._model_dtypes = {
            self.model_names[key]: field.dtype for key, field in model_fields.items()
        }
        for name, field in model_fields.items():
            stored_as = torch.empty(0, dtype=field.dtype).numpy().dtype
            self.fields[self.model_names[name]] = (tuple(field.shape), stored_as)
        self._lead = (num_envs,)
        self._row = {
            name: ((num_envs, *shape), dtype, dtype.kind == "f")
            for name, (shape, dtype) in self.fields.items()
        }

    def name_obs(self, obs: ArrayObs) -> dict[str, Array]:
        """Return {field name: observation} in a new dict."""
        if self.obs_names is None and (type(obs) is np.ndarray or not isinstance(obs, Mapping)):
            return {"obs": obs}
        want = "a single array" if self.obs_names is None else sorted(self.obs_names)
        got = sorted(obs) if isinstance(obs, Mapping) else "a single array"
        if self.obs_names is None or not isinstance(obs, Mapping) or got != want:
            raise ValueError(f"obs is {got} but obs_shape says {want}; give exactly these keys")
        return {name: obs[key] for key, name in self.obs_names.items()}

    def convert(self, name: str, value: Array, lead: tuple[int, ...], where: str) -> np.ndarray:
        """Convert a user's array for a field to [*lead, *shape] and the stored dtype.

        where: description of a row for messages, with {} for its index.

        Raises:
            ValueError, TypeError: shape, dtype or a value is wrong.
        """
        shape, dtype = self.fields[name]
        array = to_numpy(value)
        if name == "actions" and array.shape == lead and array.dtype.kind in "iu":
            raise ValueError(
                f"actions are integers of shape {array.shape} but one-hot rows are stored; give "
                f"np.eye({shape[0]}, dtype=np.float32)[actions]"
            )
        _require_shape(name, array, lead, shape)
        if dtype == np.uint8 and array.dtype != np.uint8:
            raise TypeError(
                f"{name} is {array.dtype} but this replay stores uint8 images; give pixels as "
                f"uint8 from 0 to 255, or set obs_dtypes to float32"
            )
        with np.errstate(over="ignore"):  # an overflow becomes inf, which is reported below
            array = array.astype(dtype, copy=False)
        if dtype.kind == "f" and not np.isfinite(array).all():
            at = tuple(np.argwhere(~np.isfinite(array))[0])
            raise ValueError(
                f"{name} of {where.format(at[0])} holds {array[at]}; only finite numbers can be "
                f"trained on, so fix the environment or the dataset that it comes from"
            )
        return array

    def convert_row(self, given: dict[str, Any]) -> Arrays:
        """Convert one row of every stream in place, like `convert` for each field."""
        row, isfinite = self._row, np.isfinite
        for name, value in given.items():
            shape, dtype, is_float = row[name]
            # Nearly every row needs no conversion; checking that takes a fifth of the time.
            if (
                type(value) is not np.ndarray
                or value.dtype != dtype
                or value.shape != shape
                or (is_float and 0 in isfinite(value).tobytes())
            ):
                given[name] = self.convert(name, value, self._lead, "env {}")
        return given

    def convert_model_fields(
        self, given: Mapping[str, Array] | None, lead: tuple[int, ...], partial: bool = False
    ) -> Arrays:
        """Convert the model's fields to [*lead, *shape] and the stored dtypes; None gives zeros.

        partial: the result has only the given fields.
        """
        known = set(self.model_names)
        if given is not None and (set(given) - known if partial else set(given) != known):
            raise ValueError(
                f"fields are {sorted(given)} but this replay stores {sorted(known)}; give "
                f"{'only' if partial else 'exactly'} these"
            )
        values = {}
        for key, name in self.model_names.items():
            shape, dtype = self.fields[name]
            if given is None:
                values[name] = np.zeros((*lead, *shape), dtype)
                continue
            if key not in given:
                continue
            value = given[key]
            if isinstance(value, Tensor) and dtype.kind == "f":
                value = value.to(self._model_dtypes[name])  # numpy takes 70 times as long
            array = to_numpy(value)
            _require_shape(name, array, lead, shape)
            if array.dtype != dtype:
                # A straight-through one-hot may be slightly below 1: uint8 would truncate it to 0.
                array = (np.rint(array) if dtype.kind == "u" else array).astype(dtype)
            values[name] = array
        return values

    def convert_episode(
        self, obs: ArrayObs, actions: Array, rewards: Array, terminated: bool, where: str
    ) -> tuple[Arrays, int, bool]:
        """Convert an episode of N steps to rows; return them, their number M and if M is N + 1.

        Without a final observation there are N rows, and the last step is left out.
        """
        steps = len(actions)
        actions = self.convert("actions", actions, (steps,), where)
        rewards = self.convert("rewards", rewards, (steps,), where)
        check_action_range(actions)
        named = self.name_obs(obs)
        rows = len(next(iter(named.values())))
        final = has_final_observation(rows, steps)
        values = {name: self.convert(name, x, (rows,), where) for name, x in named.items()}
        values |= {name: np.zeros(rows, bool) for name in FLAGS}
        values |= self.convert_model_fields(None, (rows,))
        values["is_first"][0] = values["is_last"][-1] = True
        values["is_terminal"][-1] = terminated and final
        values["actions"] = np.pad(actions[: rows - 1], [(0, 1), (0, 0)])
        values["rewards"] = np.pad(rewards[: rows - 1], [(1, 0)])
        return values, rows, final


def row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the bytes of one row of a field."""
    return math.prod(shape) * dtype.itemsize


def to_numpy(value: Array) -> np.ndarray:
    """Return an array or tensor as an array; bfloat16, which numpy lacks, becomes float32."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def has_final_observation(rows: int, steps: int) -> bool:
    """Return whether `rows` observations of `steps` actions include the final observation."""
    if rows not in (steps, steps + 1):
        raise ValueError(
            f"obs has {rows} rows for {steps} actions; give {steps + 1}, the last one being "
            f"the observation after the last action"
        )
    return rows > steps


def has_terminated(steps: int, dones: Any, terminations: Any, truncations: Any) -> bool:
    """Check the flags [N] of an episode's steps; return whether the environment terminated it."""
    if dones is not None and not (terminations is None and truncations is None):
        raise ValueError(
            "dones was given with terminations or truncations; give dones or the other two"
        )
    if steps == 0:
        raise ValueError("the episode has no actions; give at least one step")
    given = {"dones": dones, "terminations": terminations, "truncations": truncations}
    flags = {name: to_numpy(x).astype(bool) for name, x in given.items() if x is not None}
    for name, flag in flags.items():
        _require_shape(name, flag, (steps,), ())
        if flag[:-1].any():
            at = int(flag.argmax())
            raise ValueError(
                f"{name} is true at index {at} of {steps} steps, before the end of the arrays; "
                f"split them there and call add_episode once per episode"
            )
    return any(bool(flag[-1]) for name, flag in flags.items() if name != "truncations")


def warn_of_lost_step(steps: int) -> bool:
    """Warn that an episode lacks its final observation; return True."""
    warnings.warn(
        f"an episode has as many observations as actions ({steps}), so its last reward and "
        f"whether it terminated are not stored; give {steps + 1} observations, including "
        f"the one that the last step returned",
        stacklevel=3,
    )
    return True


def check_action_range(actions: np.ndarray) -> None:
    """Raise ValueError if actions [N, A] are outside [-1, 1]."""
    worst = actions.flat[np.abs(actions).argmax()]
    if abs(worst) > 1 + 1e-6:  # what rescaling in float32 may round to
        raise ValueError(
            f"actions contain {worst} but must be in [-1, 1]; rescale them from the bounds of the "
            f"action space"
        )


def check_episode_flags(begins: np.ndarray, values: Arrays) -> None:
    """Raise ValueError for inconsistent flags of one row per stream.

    begins: [E], whether the row must be the first of an episode.
    """
    for flag, needs, what in (
        (begins, "is_first", "begins without is_first; set it in the row of each reset"),
        (
            values["is_terminal"],
            "is_last",
            "is_terminal but not is_last; a terminal row is also an episode's last",
        ),
    ):
        wrong = flag > values[needs]
        if wrong.any():
            raise ValueError(f"the row of env {wrong.argmax()} {what}")


def check_layout(ours: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Raise ValueError if a saved replay has other streams, another capacity or other fields."""
    for name in dict.fromkeys([*ours, *saved]):
        if ours.get(name) != saved.get(name):
            setting = SETTINGS.get(name.split("[")[0], "env and model")
            raise ValueError(
                f"the saved replay has {name} {saved.get(name, 'none')} but this one "
                f"{ours.get(name, 'none')}; resume without changing {setting}, or start a new run "
                f"from its model: init_from=…"
            )


def _names(what: str, keys: Iterable[str]) -> dict[str, str]:
    """Return {key: field name}, with the names that messages show."""
    return {key: f"{what}['{key}']" for key in keys}


def _obs_fields(obs_shape: Any, obs_dtypes: Any) -> Fields:
    shapes = obs_shape if isinstance(obs_shape, Mapping) else {None: obs_shape}
    fields = {}
    for key, shape in shapes.items():
        dtype = obs_dtypes.get(key) if isinstance(obs_dtypes, Mapping) else obs_dtypes
        if dtype is None:
            dtype = np.uint8 if len(shape) == 3 else np.float32
        name = "obs" if key is None else f"obs['{key}']"
        fields[name] = (tuple(int(n) for n in shape), np.dtype(dtype))
    return fields


def _require_shape(
    name: str, array: np.ndarray, lead: tuple[int, ...], shape: tuple[int, ...]
) -> None:
    if array.shape != (*lead, *shape):
        raise ValueError(
            f"{name} has shape {array.shape}; expected {(*lead, *shape)}: {lead[0]} rows of "
            f"shape {shape}"
        )
