"""What a row of the replay holds, and how the arrays that a user gives become rows.

Letters: E streams, N steps of an episode, A action_dim. `lead` stands for leading axes of rows,
such as [E] for one row of every stream or [N + 1] for those of an episode.
"""

import math
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

# What in a run's configuration decides on a part of the layout.
SETTINGS = {
    "num_envs": "env.num_envs",
    "capacity": "data.capacity",
    "obs": "what the environment shows (env=…, env.image_size, env.frame_stack, env.obs)",
    "actions": "the actions (env=…, env.task)",
    "latents": "the sizes of the model (model=…)",
}
FLAGS = ("is_first", "is_last", "is_terminal")


class RowFormat:
    """The fields of a row, in the order and the dtypes in which they are stored.

    fields: {name: (shape, dtype)} of everything in a row, names written as a message shows them.
    obs_names: field of each key of dict observations, or None for a single array.
    latent_names: field of each array that is stored for the model.
    every_row: those of which a batch has all rows.
    """

    def __init__(
        self,
        obs_shape: tuple[int, ...] | Mapping[str, tuple[int, ...]],
        action_dim: int,
        latents: Mapping[str, ReplayField],
        obs_dtypes: Any,
        num_envs: int = 1,
    ) -> None:
        self.obs_names = _names("obs", obs_shape) if isinstance(obs_shape, Mapping) else None
        self.latent_names = _names("latents", latents)
        self.fields: Fields = {
            **_obs_fields(obs_shape, obs_dtypes),
            "actions": ((action_dim,), np.dtype(np.float32)),
            "rewards": ((), np.dtype(np.float32)),
            **{name: ((), np.dtype(bool)) for name in FLAGS},
            "episode": ((), np.dtype(np.int64)),  # number of the first row of this row's episode
        }
        self.every_row = [name for name, field in latents.items() if field.every_row]
        self._latent_dtypes = {
            self.latent_names[key]: field.dtype for key, field in latents.items()
        }
        for name, field in latents.items():
            stored_as = torch.empty(0, dtype=field.dtype).numpy().dtype
            self.fields[self.latent_names[name]] = (tuple(field.shape), stored_as)
        self._lead = (num_envs,)
        self._row = {
            name: ((num_envs, *shape), dtype, dtype.kind == "f")
            for name, (shape, dtype) in self.fields.items()
        }

    def named(self, obs: ArrayObs) -> dict[str, Array]:
        """Return observations by the names of their fields, in a new dict."""
        if self.obs_names is None and (type(obs) is np.ndarray or not isinstance(obs, Mapping)):
            return {"obs": obs}
        want = "a single array" if self.obs_names is None else sorted(self.obs_names)
        got = sorted(obs) if isinstance(obs, Mapping) else "a single array"
        if self.obs_names is None or not isinstance(obs, Mapping) or got != want:
            raise ValueError(f"obs is {got} but obs_shape says {want}; give exactly these keys")
        return {name: obs[key] for key, name in self.obs_names.items()}

    def convert(self, name: str, value: Array, lead: tuple[int, ...], where: str) -> np.ndarray:
        """Convert what a user gave for a field to [*lead, *shape], or say what is wrong with it.

        where: names a row in messages, with {} for its index.
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
                f"trained on, so mend the environment or the data it comes from"
            )
        return array

    def convert_row(self, given: dict[str, Any]) -> Arrays:
        """Convert one row of every stream, in place, as `convert` does field by field."""
        row, isfinite = self._row, np.isfinite
        for name, value in given.items():
            shape, dtype, is_float = row[name]
            # Nearly every row is right as it is, and seen to be in a fifth of the time.
            if (
                type(value) is not np.ndarray
                or value.dtype != dtype
                or value.shape != shape
                or (is_float and 0 in isfinite(value).tobytes())
            ):
                given[name] = self.convert(name, value, self._lead, "env {}")
        return given

    def convert_latents(
        self, latents: Mapping[str, Array] | None, lead: tuple[int, ...], partly: bool = False
    ) -> Arrays:
        """Convert a model's fields to how they are stored; None gives zeros.

        partly: some fields may be missing, and are then missing in the result.
        """
        known = set(self.latent_names)
        if latents is not None and (set(latents) - known if partly else set(latents) != known):
            raise ValueError(
                f"fields are {sorted(latents)} but this replay stores {sorted(known)}; give "
                f"{'only' if partly else 'exactly'} these"
            )
        values = {}
        for key, name in self.latent_names.items():
            shape, dtype = self.fields[name]
            if latents is None:
                values[name] = np.zeros((*lead, *shape), dtype)
                continue
            if key not in latents:
                continue
            given = latents[key]
            if isinstance(given, Tensor) and dtype.kind == "f":
                given = given.to(self._latent_dtypes[name])  # numpy takes 70 times as long
            array = to_numpy(given)
            _require_shape(name, array, lead, shape)
            if array.dtype != dtype:
                # A straight-through one-hot may lie an ulp below 1, which uint8 would cut to 0.
                array = (np.rint(array) if dtype.kind == "u" else array).astype(dtype)
            values[name] = array
        return values

    def episode(
        self, obs: ArrayObs, actions: Array, rewards: Array, terminated: bool, where: str
    ) -> tuple[Arrays, int, bool]:
        """Lay out an episode of N steps as rows; return them, their number M and if M is N + 1.

        With M = N rows, for want of a final observation, the last step is left out.
        """
        steps = len(actions)
        actions = self.convert("actions", actions, (steps,), where)
        rewards = self.convert("rewards", rewards, (steps,), where)
        require_range(actions)
        named = self.named(obs)
        rows = len(next(iter(named.values())))
        final = has_final_observation(rows, steps)
        values = {name: self.convert(name, x, (rows,), where) for name, x in named.items()}
        values |= {name: np.zeros(rows, bool) for name in FLAGS}
        values |= self.convert_latents(None, (rows,))
        values["is_first"][0] = values["is_last"][-1] = True
        values["is_terminal"][-1] = terminated and final
        values["actions"] = np.pad(actions[: rows - 1], [(0, 1), (0, 0)])
        values["rewards"] = np.pad(rewards[: rows - 1], [(1, 0)])
        return values, rows, final


def row_bytes(shape: tuple[int, ...], dtype: np.dtype) -> int:
    """Return the bytes of one row of a field."""
    return math.prod(shape) * dtype.itemsize


def to_numpy(value: Array) -> np.ndarray:
    """Return an array or tensor as an array, of float32 for bfloat16, which numpy lacks."""
    if isinstance(value, Tensor):
        value = value.detach().cpu()
        return (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return np.asarray(value)


def has_final_observation(rows: int, steps: int) -> bool:
    """Tell whether `rows` observations of `steps` actions include what the last action led to."""
    if rows not in (steps, steps + 1):
        raise ValueError(
            f"obs has {rows} rows for {steps} actions; give {steps + 1}, the last one being "
            f"the observation after the last action"
        )
    return rows > steps


def has_terminated(steps: int, dones: Any, terminations: Any, truncations: Any) -> bool:
    """Check the flags [N] of an episode's steps; tell whether it ended by terminating."""
    if dones is not None and not (terminations is None and truncations is None):
        raise ValueError("dones came with terminations or truncations; give dones or the other two")
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
                f"split them after it and give each episode to add_episode by itself"
            )
    return any(bool(flag[-1]) for name, flag in flags.items() if name != "truncations")


def require_range(actions: np.ndarray) -> None:
    """Refuse actions [N, A] outside [-1, 1]."""
    worst = actions.flat[np.abs(actions).argmax()]
    if abs(worst) > 1 + 1e-6:  # what rescaling in float32 may round to
        raise ValueError(
            f"actions hold {worst} but must lie in [-1, 1]; rescale them from the bounds of the "
            f"action space"
        )


def require_borders(begins: np.ndarray, values: Arrays) -> None:
    """Check the flags of one row per stream; begins [E]: this row must be an episode's first."""
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


def require_layout(ours: Mapping[str, str], saved: Mapping[str, str]) -> None:
    """Refuse a saved replay that differs in streams, capacity or a field, naming it and both."""
    for name in dict.fromkeys([*ours, *saved]):
        if ours.get(name) != saved.get(name):
            setting = SETTINGS.get(name.split("[")[0], "env and model")
            raise ValueError(
                f"the saved replay has {name} {saved.get(name, 'none')} but this one "
                f"{ours.get(name, 'none')}; resume without changing {setting}, or start a new run "
                f"from its model: init_from=…"
            )


def _names(what: str, keys: Iterable[str]) -> dict[str, str]:
    """Field names by key, written as a message should show them."""
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
            f"{name} has shape {array.shape} but {(*lead, *shape)} is needed: {lead[0]} rows, each "
            f"of shape {shape}"
        )
