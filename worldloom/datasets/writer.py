"""Writer of folders of episodes; their format is documented in worldloom/datasets/folder.py."""

import os
from pathlib import Path
from typing import Any

import numpy as np

from worldloom.datasets.episode import Dataset, Episode, make_action_spec, require_same_spaces
from worldloom.datasets.folder import ABOUT, FLAGS, FORMAT, open_folder, read_about
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.files import write_yaml


class FolderWriter:
    """Write episodes into a folder, next to existing ones; no file is ever overwritten.

    obs, actions: spaces as models see them; must match existing episodes.
    env: section of the configuration that made the environment.
    existing: number of episodes that the folder held before.
    """

    def __init__(
        self, folder: Path, obs: ObsSpec, actions: ActionSpec, env: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.choices = make_action_spec(actions.action_dim, True) if actions.discrete else None
        self.existing = self._next = len(list(folder.glob("*.npz")))
        spaces = {"action_dim": actions.action_dim, "discrete": actions.discrete}
        about = {"env": env, **spaces, "obs_shape": obs.shape}
        if self.existing:
            require_same_spaces(open_folder(folder, obs, actions), obs, actions)
            about = read_about(folder)
        counts = ("episodes", "steps")  # `finish` writes them
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_about({key: x for key, x in about.items() if key not in counts})
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be written ({error.strerror}); choose another folder"
            ) from error

    def add(self, episode: Episode) -> Path:
        """Write one episode under a free number; the file appears when it is complete.

        Several writers may share a folder: the one that creates a number's temporary file
        (exclusively, so no existing file or link is ever opened) owns the number.
        """
        arrays = self._arrays(episode)
        while True:
            file = self.folder / f"{self._next:06}.npz"
            temporary = self.folder / f".{file.stem}.tmp"
            self._next += 1
            try:
                opened = temporary.open("xb")
            except FileExistsError:
                continue
            try:
                with opened:
                    if file.exists():
                        continue
                    np.savez(opened, **arrays)
                os.replace(temporary, file)
                return file
            finally:
                temporary.unlink(missing_ok=True)

    def finish(self) -> Dataset:
        """Write the numbers of episodes and steps to dataset.yaml, and open the dataset."""
        dataset = open_folder(self.folder)
        counts = {"episodes": len(dataset), "steps": dataset.steps}
        self._write_about(read_about(self.folder) | counts)
        return dataset

    def _arrays(self, episode: Episode) -> dict[str, Any]:
        obs = episode.obs if isinstance(episode.obs, dict) else {"": episode.obs}
        arrays: dict[str, Any] = {f"obs/{k}" if k else "obs": array for k, array in obs.items()}
        arrays["actions"] = episode.actions
        if self.choices is not None:
            arrays["actions"] = self.choices.decode(episode.actions)
        arrays["rewards"] = episode.rewards
        flags = {name: getattr(episode, name) for name in FLAGS}
        return arrays | {name: flag for name, flag in flags.items() if flag is not None}

    def _write_about(self, about: dict[str, Any]) -> None:
        write_yaml(self.folder / ABOUT, about, FORMAT)
