"""Data sets of Minari that lie on this machine, in any of its formats."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from gymnasium import spaces

from worldloom.datasets.episode import Dataset, Episode, Specs
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.suites.extras import naming_the_extra


def open_minari(
    path: Path, obs: ObsSpec | None = None, actions: ActionSpec | None = None
) -> Dataset:
    """Open a data set by its folder (or the folder "data" in it); its own spaces describe it.

    obs, actions: of the environment that a model will act in. Its observations are read as there;
    its actions must have the same bounds.
    """
    folder = path / "data" if (path / "data").is_dir() else path
    _require_spaces(folder)
    with naming_the_extra(str(path)):
        from minari import MinariDataset

        with _reading(path):
            data = MinariDataset(folder)
            about = list(data.storage.get_episode_metadata(data.episode_indices))
    lengths = [int(episode["total_steps"]) for episode in about]
    specs = Specs(
        obs or ObsSpec.from_space(data.observation_space),
        ActionSpec.from_space(data.action_space),
        like="the data set's own spaces have it" if obs is None else "the environment has it",
        advice="The data set contradicts itself.",
    )
    if actions is not None:
        _require_bounds(path, specs.actions, actions)

    def read() -> Iterator[Episode]:
        episodes = iter(data.iterate_episodes())
        for steps in lengths:
            with _reading(path):
                episode = next(episodes)
            yield _episode(f"{path}, episode {episode.id}", episode, steps, specs)

    return Dataset(str(path), specs.obs, specs.actions, lengths, read)


def _episode(source: str, episode: Any, steps: int, specs: Specs) -> Episode:
    actions, rewards = np.asarray(episode.actions), np.asarray(episode.rewards)
    if len(actions) != steps:
        raise ValueError(
            f"{source} has {len(actions)} actions but its metadata counts {steps} steps; copy the "
            "data set again"
        )
    terminated, truncated = (
        bool(np.asarray(flags)[-1:].any()) for flags in (episode.terminations, episode.truncations)
    )
    return specs.episode(
        source, episode.observations, actions, rewards, terminated, truncated, name="observations"
    )


@contextmanager
def _reading(path: Path) -> Iterator[None]:
    """Name the data set where Minari stumbles over what lies in it."""
    try:
        yield
    except (OSError, ValueError, KeyError, AssertionError, StopIteration) as error:
        raise ValueError(
            f"{path} cannot be read by Minari ({error!r}); copy the data set again"
        ) from error


def _require_spaces(folder: Path) -> None:
    """Refuse data without spaces: Minari would make the environment, which may run any code."""
    try:
        about = json.loads((folder / "metadata.json").read_text())
    except ValueError as error:
        raise ValueError(
            f"{folder / 'metadata.json'} is no JSON ({error}); copy the data set again"
        ) from error
    for key in ("observation_space", "action_space"):
        if key not in about:
            raise ValueError(
                f"{folder / 'metadata.json'} has no {key}; expected a data set that says what it "
                "holds; make it again with observation_space and action_space"
            )


def _require_bounds(path: Path, data: ActionSpec, env: ActionSpec) -> None:
    """Refuse an environment in which a model's [-1, 1] means something else than in the data."""
    a, b = data.space, env.space
    if not (isinstance(a, spaces.Box) and isinstance(b, spaces.Box)) or a.shape != b.shape:
        return  # other differences are found where those of every format are
    if not (np.allclose(a.low, b.low) and np.allclose(a.high, b.high)):
        raise ValueError(
            f"the actions of {path} lie in {a}, those of the environment in {b}; choose the "
            "environment that the data set was made with, or env=none"
        )
