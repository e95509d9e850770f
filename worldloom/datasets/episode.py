"""Episodes of a data set as models see them, and the checks on the way there.

Letters used in shapes: N steps of an episode, A = width of an action.
"""

from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from gymnasium import Space, spaces

from worldloom.envs.spaces import ActionSpec, Obs, ObsSpec

Arrays = dict[str, np.ndarray]


@dataclass(frozen=True)
class Episode:
    """An episode in Gymnasium's order: the reward that followed action t stands at t.

    source: where it was read, for messages.
    obs: [N + 1, *shape] as `ObsSpec.encode` returns them, or a dict of such; [N, *shape] where
        what the last action led to is not known.
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
    """A data set whose sizes are known and whose episodes are read one after the other.

    path: as it was named. obs, actions: what models see and do in it.
    lengths: steps of each episode. read: begins reading all episodes.
    env: the section of a run's configuration that made its environment, where it says so.
    """

    path: str
    obs: ObsSpec
    actions: ActionSpec
    lengths: list[int]
    read: Callable[[], Iterator[Episode]]
    env: dict[str, Any] | None = None

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
class Specs:
    """How the arrays of a file become episodes.

    like: what says so, for messages: "expected …, as {like}".
    advice: what to do about actions that lie outside the action space; a sentence.
    """

    obs: ObsSpec
    actions: ActionSpec
    like: str
    advice: str

    def episode(
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
        """Check an episode's arrays and turn them into what models see.

        obs: an array, or a dict of them, nested too. name: what the file calls them.

        Raises:
            ValueError: names the source, the array and where in it.
        """
        steps = len(actions)
        if steps == 0:
            raise ValueError(f"{source} has no actions; expected at least one step; leave it out")
        require_numbers(source, "actions", actions)
        require_numbers(source, "rewards", rewards)
        if rewards.shape != (steps,):
            raise ValueError(
                f"{source}: rewards has shape {rewards.shape}; expected ({steps},), one for each "
                "action"
            )
        return Episode(
            source,
            self._encode_obs(source, named(obs, name), steps, name),
            self._encode_actions(source, actions),
            rewards.astype(np.float32),
            bool(terminated),
            bool(truncated),
            success,
        )

    def _encode_obs(self, source: str, arrays: Arrays, steps: int, name: str) -> Obs:
        parts = {f"{name}/{key}" if key else name: part for key, part in self.obs.parts.items()}
        arrays = without(arrays, self.obs.dropped, name)
        if set(arrays) != set(parts):
            raise ValueError(
                f"{source} observes {', '.join(sorted(arrays))}; expected "
                f"{', '.join(sorted(parts))}, as {self.like}"
            )
        encoded = {}
        for key, array in arrays.items():
            require_numbers(source, key, array)
            if len(array) not in (steps, steps + 1):
                raise ValueError(
                    f"{source}: {key} has {len(array)} rows for {steps} actions; expected "
                    f"{steps + 1}, the last one being what the last action led to"
                )
            part = parts[key]
            if part.dtype == "uint8" and array.dtype != np.uint8:
                raise ValueError(
                    f"{source}: {key} is {array.dtype}; expected pictures as uint8 from 0 to 255, "
                    f"as {self.like}"
                )
            try:
                seen = part.encode(array)
            except (ValueError, IndexError) as error:  # as a choice that is none, or of wrong axes
                raise ValueError(f"{source}: {key} does not fit {self.like} ({error})") from error
            if seen.shape[1:] != part.shape:
                raise ValueError(
                    f"{source}: {key} has shape {array.shape}, which models see as {seen.shape[1:]}"
                    f"; expected {part.shape}, as {self.like}"
                )
            encoded[key.removeprefix(name).removeprefix("/")] = seen
        return encoded.get("", encoded)

    def _encode_actions(self, source: str, actions: np.ndarray) -> np.ndarray:
        space, (steps, *width) = self.actions.space, actions.shape
        if self.actions.discrete != (actions.dtype.kind != "f"):
            kinds = ("numbers in [-1, 1]", "choices, which are integers")
            raise ValueError(
                f"{source}: actions are {actions.dtype}; expected {kinds[self.actions.discrete]}, "
                f"as {self.like}"
            )
        if np.prod(width) == np.prod(space.shape or ()) == 1:  # with an axis of its own or without
            actions = actions.reshape(steps, *(space.shape or ()))
        try:
            return self.actions.encode(actions)
        except ValueError as error:
            raise ValueError(f"{source}: {error} {self.advice}") from error


def named(obs: Any, name: str) -> Arrays:
    """Return the arrays of an observation by the names that messages use: "obs", "obs/camera"."""
    if not isinstance(obs, Mapping):
        return {name: np.asarray(obs)}
    leaves: Arrays = {}
    for key, value in obs.items():
        leaves |= named(value, f"{name}/{key}" if key else name)
    return leaves


def without(arrays: Arrays, dropped: Collection[str], name: str = "obs") -> Arrays:
    """Leave out the arrays that models do not see."""
    return {k: x for k, x in arrays.items() if k.removeprefix(f"{name}/") not in dropped}


def require_numbers(source: str, name: str, array: np.ndarray) -> None:
    """Refuse an array that holds no numbers, or some that are not finite in float32."""
    if array.dtype.kind not in "fiub" or array.ndim == 0:
        raise ValueError(
            f"{source}: {name} is {array.dtype} of shape {array.shape}; expected an array of "
            "numbers with one row per step"
        )
    if array.dtype.kind != "f":
        return
    with np.errstate(over="ignore"):  # too large a number becomes infinite, which is reported
        finite = np.isfinite(array.astype(np.float32, copy=False))
    if not finite.all():
        at = np.argwhere(~finite)[0].tolist()
        raise ValueError(
            f"{source}: {name} holds {array[tuple(at)]} at index {at}; only finite numbers can be "
            "trained on; mend the episode or leave it out"
        )


def infer_obs(source: str, arrays: Arrays, name: str = "obs") -> ObsSpec:
    """Work out what models see of an episode's arrays: pictures if 3-D uint8, else vectors."""
    boxes: dict[str, Space] = {}
    for key, array in arrays.items():
        require_numbers(source, key, array)
        picture = array.dtype == np.uint8 and array.ndim == 4
        bounds = (0, 255, array.shape[1:], np.uint8) if picture else (-np.inf, np.inf)
        shape = () if picture else (array.shape[1:],)
        boxes[key.removeprefix(name).removeprefix("/")] = spaces.Box(*bounds, *shape)
    try:
        return ObsSpec.from_space(boxes[""] if "" in boxes else spaces.Dict(boxes))
    except ValueError as error:
        raise ValueError(f"{source}: {error}") from error


def model_actions(action_dim: int | tuple[int, ...], discrete: bool) -> ActionSpec:
    """Return the space of a model's own actions: choices counted from 0, or [-1, 1]."""
    if not discrete:
        assert isinstance(action_dim, int)
        return ActionSpec.from_space(spaces.Box(-1.0, 1.0, (action_dim,)))
    if isinstance(action_dim, int):
        return ActionSpec.from_space(spaces.Discrete(action_dim))
    return ActionSpec.from_space(spaces.MultiDiscrete(list(action_dim)))


def choices_up_to(most: np.ndarray) -> ActionSpec:
    """Return the choices of which these integers (of each group, or a single one) are the last."""
    sizes = tuple(int(n) + 1 for n in most.reshape(-1))
    return model_actions(sizes if len(sizes) > 1 else sizes[0], True)


def require_agreement(dataset: Dataset, obs: ObsSpec, actions: ActionSpec) -> None:
    """Refuse an environment in which models see or do something else than in the data."""
    ours, theirs = _describe(dataset.obs, dataset.actions), _describe(obs, actions)
    if ours != theirs:
        raise ValueError(
            f"the data set {dataset.path} has {ours}, but the environment has {theirs}; choose the "
            "environment that the data set was made in, or env=none to train without one"
        )


def _describe(obs: ObsSpec, actions: ActionSpec) -> str:
    kind = "choices" if actions.discrete else "continuous actions"
    shape = dict(sorted(obs.shape.items())) if isinstance(obs.shape, dict) else obs.shape
    return f"observations {shape} and {actions.action_dim} {kind}"
