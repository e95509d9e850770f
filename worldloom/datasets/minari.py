"""Minari datasets on this machine, in any of Minari's formats."""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.datasets.episode import Dataset, Episode, Schema
from worldloom.envs.extras import suggest_extra
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.files import read_text


def open_minari(
    path: Path,
    obs: ObsSpec | None = None,
    actions: ActionSpec | None = None,
    choice: Mapping[str, str | None] = MappingProxyType({}),
) -> Dataset:
    """Open a dataset by its folder (or the folder "data" in it), which contains its spaces.

    obs, actions: of the environment in which a model will act; its observations are converted as
        there, and its actions must have the same bounds.
    choice: without obs, the observations of models, as in `ObsSpec.from_space`.
    """
    folder = path / "data" if (path / "data").is_dir() else path
    _require_spaces(folder)
    with suggest_extra(str(path)):
        from minari import MinariDataset

        with _name_dataset(path):
            data = MinariDataset(folder)
            about = list(data.storage.get_episode_metadata(data.episode_indices))
    lengths = [int(episode["total_steps"]) for episode in about]
    schema = Schema(
        obs or _choose_obs(path, data.observation_space, choice),
        ActionSpec.from_space(data.action_space),
        "the dataset's spaces" if obs is None else "the environment",
        "The dataset contradicts its action space; copy it again.",
    )
    if actions is not None:
        _require_bounds(path, schema.actions, actions)

    def read() -> Iterator[Episode]:
        episodes = iter(data.iterate_episodes())
        for steps in lengths:
            with _name_dataset(path):
                episode = next(episodes)
            yield _make_episode(f"{path}, episode {episode.id}", episode, steps, schema)

    return Dataset(str(path), schema.obs, schema.actions, lengths, read)


def _choose_obs(path: Path, space: Any, choice: Mapping[str, str | None]) -> ObsSpec:
    try:
        return ObsSpec.from_space(space, recorded=True, **choice)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def _make_episode(source: str, episode: Any, steps: int, schema: Schema) -> Episode:
    actions, rewards = np.asarray(episode.actions), np.asarray(episode.rewards)
    if len(actions) != steps:
        raise ValueError(
            f"{source} has {len(actions)} actions, but {steps} steps in its metadata; copy the "
            "dataset again"
        )
    terminated, truncated = (
        bool(np.asarray(flags)[-1:].any()) for flags in (episode.terminations, episode.truncations)
    )
    return schema.make_episode(
        source, episode.observations, actions, rewards, terminated, truncated, name="observations"
    )


@contextmanager
def _name_dataset(path: Path) -> Iterator[None]:
    """Turn Minari's errors into a ValueError that names the dataset."""
    try:
        yield
    except Exception as error:  # of Minari, HDF5 or Arrow
        raise ValueError(
            f"{path} cannot be read by Minari ({error!r}); copy the dataset again"
        ) from error


def _require_spaces(folder: Path) -> None:
    """Reject data without spaces: Minari would make the environment, which may run any code."""
    try:
        about = json.loads(read_text(folder / "metadata.json"))
    except (ValueError, RecursionError) as error:
        raise ValueError(
            f"{folder / 'metadata.json'} is not valid JSON ({error}); copy the dataset again"
        ) from error
    for key in ("observation_space", "action_space"):
        if not isinstance(about, dict) or key not in about:
            raise ValueError(
                f"{folder / 'metadata.json'} has no {key}; create the dataset again with "
                "observation_space and action_space"
            )


def _require_bounds(path: Path, data: ActionSpec, env: ActionSpec) -> None:
    """Reject an environment in which a model's [-1, 1] stands for other bounds than in the data."""
    a, b = data.space, env.space
    if not (isinstance(a, spaces.Box) and isinstance(b, spaces.Box)) or a.shape != b.shape:
        return  # `require_same_spaces` reports other differences
    if not (np.allclose(a.low, b.low) and np.allclose(a.high, b.high)):
        raise ValueError(
            f"the actions of {path} are in {a}, those of the environment in {b}; choose the "
            "environment in which the dataset was recorded, or env=none"
        )
