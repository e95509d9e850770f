"""Episodes of a dataset as models see them, and the checks of recorded arrays.

Letters used in shapes: N steps of an episode, A = width of an action.
"""

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from worldloom.envs.spaces import ActionSpec, Obs, ObsSpec
from worldloom.memory import require_memory
from worldloom.trees import flatten_tree

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Episode:
    """An episode in Gymnasium's order: the reward that followed action t has index t.

    source: file and place that it was read from, for messages.
    obs: [N + 1, *shape] as returned by `ObsSpec.encode`, or a dict of arrays; [N, *shape] if the
        observation after the last action is not known.
    actions: [N, A] float32 in [-1, 1], or one-hot. rewards: [N] float32.
    """

    source: str
    obs: Obs
    actions: np.ndarray
    rewards: np.ndarray
    terminated: bool
    truncated: bool
    success: bool | None = None


@dataclass(frozen=True)
class Dataset:
    """A dataset of known size, whose episodes are read one after the other.

    path: as given by the user. obs, actions: spaces of the data, as models see them.
    lengths: steps of each episode. read: starts reading all episodes.
    env: section of the configuration that made its environment, if the dataset contains it.
    action_dims: how many actions each task uses, if there are several tasks.
    """

    path: str
    obs: ObsSpec
    actions: ActionSpec
    lengths: list[int]
    read: Callable[[], Iterator[Episode]]
    env: dict[str, Any] | None = None
    action_dims: Sequence[int] | None = None

    def __len__(self) -> int:
        """Count the episodes."""
        return len(self.lengths)

    def __iter__(self) -> Iterator[Episode]:
        """Read the episodes in order, one at a time."""
        return self.read()

    @property
    def steps(self) -> int:
        """Count the steps of all episodes."""
        return sum(self.lengths)


@dataclass(frozen=True)
class Schema:
    """Conversion of the arrays of a file to episodes.

    reference: what the arrays have to match, for messages: "expected ..., as in {reference}".
    advice: how to fix actions outside the action space; a sentence.
    """

    obs: ObsSpec
    actions: ActionSpec
    reference: str
    advice: str

    def make_episode(
        self,
        source: str,
        obs: Any,
        actions: np.ndarray,
        rewards: np.ndarray,
        terminated: bool,
        truncated: bool,
        success: bool | None = None,
        *,
        name: str = "obs",
    ) -> Episode:
        """Check the arrays of an episode and convert them for models.

        obs: an array, or a nested dict of arrays. name: the file's name for them.

        Raises:
            ValueError: names the source, the array and the index.
        """
        steps = len(actions)
        if steps == 0:
            raise ValueError(f"{source} has no actions; expected at least one step; delete it")
        require_numbers(f"{source}: actions", actions)
        require_numbers(f"{source}: rewards", rewards)
        if rewards.shape != (steps,):
            raise ValueError(
                f"{source}: rewards has shape {rewards.shape}; expected ({steps},), one for each "
                "action"
            )
        arrays = {k: np.asarray(x) for k, x in flatten_tree(obs, prefix=name).items()}
        return Episode(
            source,
            self._encode_obs(source, arrays, steps, name),
            self._encode_actions(source, actions),
            rewards.astype(np.float32),
            bool(terminated),
            bool(truncated),
            success,
        )

    def _encode_obs(self, source: str, arrays: Arrays, steps: int, name: str) -> Obs:
        parts = {f"{name}/{key}" if key else name: part for key, part in self.obs.parts.items()}
        arrays = drop_keys(arrays, self.obs.dropped, name)
        if set(arrays) != set(parts):
            raise ValueError(
                f"{source} has the observations {', '.join(sorted(arrays))}; expected "
                f"{', '.join(sorted(parts))}, as in {self.reference}"
            )
        encoded = {
            key.removeprefix(name).removeprefix("/"): self._encode_part(
                f"{source}: {key}", array, parts[key], steps
            )
            for key, array in arrays.items()
        }
        return encoded.get("", encoded)

    def _encode_part(self, what: str, array: np.ndarray, part: Any, steps: int) -> np.ndarray:
        """Check and convert one array of the observations; what: its source and name."""
        require_numbers(what, array)
        if len(array) not in (steps, steps + 1):
            raise ValueError(
                f"{what} has {len(array)} rows for {steps} actions; expected {steps + 1}, the last "
                "one after the last action"
            )
        if part.dtype == "uint8" and array.dtype != np.uint8:
            raise ValueError(
                f"{what} is {array.dtype}; expected images as uint8 from 0 to 255, as in "
                f"{self.reference}"
            )
        require_memory(4 * len(array) * math.prod(part.shape), what)
        try:
            encoded = part.encode(array)
        except (ValueError, IndexError) as error:  # an invalid choice, or a wrong number of axes
            raise ValueError(f"{what} does not match {self.reference} ({error})") from error
        if encoded.shape[1:] != part.shape:
            raise ValueError(
                f"{what} has shape {array.shape}, which becomes {encoded.shape[1:]} for models; "
                f"expected {part.shape}, as in {self.reference}"
            )
        return encoded

    def _encode_actions(self, source: str, actions: np.ndarray) -> np.ndarray:
        space, (steps, *width) = self.actions.space, actions.shape
        if self.actions.discrete != (actions.dtype.kind != "f"):
            kinds = ("numbers in [-1, 1]", "choices, which are integers")
            raise ValueError(
                f"{source}: actions are {actions.dtype}; expected {kinds[self.actions.discrete]}, "
                f"as in {self.reference}"
            )
        if np.prod(width) == np.prod(space.shape or ()) == 1:  # with or without an axis for it
            actions = actions.reshape(steps, *(space.shape or ()))
        try:
            return self.actions.encode(actions)
        except ValueError as error:
            raise ValueError(f"{source}: {error} {self.advice}") from error


def drop_keys(arrays: Arrays, dropped: Collection[str], name: str = "obs") -> Arrays:
    """Return the arrays without those that models do not see."""
    return {k: x for k, x in arrays.items() if k.removeprefix(f"{name}/") not in dropped}


def require_numbers(what: str, array: np.ndarray) -> None:
    """Raise ValueError for an array without numbers, or with numbers not finite in float32.

    what: source and name of the array, for the message.
    """
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise ValueError(
            f"{what} is {array.dtype} of shape {array.shape}; expected an array of numbers with "
            "one row per step"
        )
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):  # too large numbers become infinite, which is reported
        finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        at = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"{what} holds {array[tuple(at)]} at index {at}; expected finite numbers; fix the "
            "episode or delete it"
        )


def infer_obs(
    source: str,
    arrays: Arrays,
    name: str = "obs",
    choice: Mapping[str, str | None] = MappingProxyType({}),
) -> ObsSpec:
    """Infer the observations from an episode's arrays: images if 3-D uint8, else vectors.

    choice: the observations of models, as in `ObsSpec.from_space`.
    """
    boxes: dict[str, Space] = {}
    for key, array in arrays.items():
        require_numbers(f"{source}: {key}", array)
        image = array.dtype == np.uint8 and array.ndim == 4
        bounds = (0, 255, array.shape[1:], np.uint8) if image else (-np.inf, np.inf)
        shape = () if image else (array.shape[1:],)
        boxes[key.removeprefix(name).removeprefix("/")] = spaces.Box(*bounds, *shape)
    try:
        space = boxes[""] if "" in boxes else spaces.Dict(boxes)
        return ObsSpec.from_space(space, recorded=True, **choice)
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def make_action_spec(action_dim: int | tuple[int, ...], discrete: bool) -> ActionSpec:
    """Return the action space of models: choices counted from 0, or [-1, 1]."""
    if not discrete:
        assert isinstance(action_dim, int)
        return ActionSpec.from_space(spaces.Box(-1.0, 1.0, (action_dim,)))
    if isinstance(action_dim, int):
        return ActionSpec.from_space(spaces.Discrete(action_dim))
    return ActionSpec.from_space(spaces.MultiDiscrete(list(action_dim)))


def infer_choices(largest: np.ndarray) -> ActionSpec:
    """Return the action space of choices, given the largest integer of each group (or of one)."""
    sizes = tuple(int(n) + 1 for n in largest.reshape(-1))
    return make_action_spec(sizes if len(sizes) > 1 else sizes[0], True)


def require_same_spaces(dataset: Dataset, obs: ObsSpec, actions: ActionSpec) -> None:
    """Raise ValueError if models see other spaces in an environment than in the data."""
    ours, theirs = _describe(dataset.obs, dataset.actions), _describe(obs, actions)
    if ours != theirs:
        raise ValueError(
            f"the dataset {dataset.path} has {ours}, but the environment has {theirs}; choose the "
            "environment in which the dataset was recorded, or env=none to train without one"
        )


def _describe(obs: ObsSpec, actions: ActionSpec) -> str:
    kind = "choices" if actions.discrete else "continuous actions"
    shape = dict(sorted(obs.shape.items())) if isinstance(obs.shape, dict) else obs.shape
    return f"observations {shape} and {actions.action_dim} {kind}"
