"""Write a folder of episodes; worldloom/datasets/folder.py says what lies in it."""

import os
from pathlib import Path
from typing import Any

import numpy as np
from omegaconf import OmegaConf

from worldloom.datasets.episode import Dataset, Episode, model_actions, require_agreement
from worldloom.datasets.folder import ABOUT, FLAGS, open_folder, plain, read_about
from worldloom.envs.spaces import ActionSpec, ObsSpec


class FolderWriter:
    """Write episodes into a folder, next to those that are there; none is ever overwritten.

    obs, actions: what models see and do, the same as in the episodes that are there.
    env: the section of the configuration that made the environment.
    seen: how many episodes were there before.
    """

    def __init__(
        self, folder: Path, obs: ObsSpec, actions: ActionSpec, env: dict[str, Any] | None = None
    ) -> None:
        self.folder = folder
        self.choices = model_actions(actions.action_dim, True) if actions.discrete else None
        self.seen = self._next = len(list(folder.glob("*.npz")))
        spaces = {"action_dim": actions.action_dim, "discrete": actions.discrete}
        if self.seen:
            require_agreement(open_folder(folder, obs, actions), obs, actions)
            kept = {k: v for k, v in read_about(folder).items() if k not in ("episodes", "steps")}
            self._write_about(kept)  # counts are there again when all is written
            return
        try:
            folder.mkdir(parents=True, exist_ok=True)
            self._write_about({"env": env, **spaces, "obs_shape": obs.shape})
        except OSError as error:
            raise ValueError(
                f"{folder} cannot be written ({error.strerror}); choose a folder that can be"
            ) from error

    def add(self, episode: Episode) -> Path:
        """Write one episode under a free number; the file appears when it is complete."""
        arrays = self._arrays(episode)
        while True:
            file = self.folder / f"{self._next:06}.npz"
            temporary = self.folder / f".{file.stem}.tmp"
            self._next += 1
            try:
                opened = temporary.open("xb")  # who makes it has the number, so two can write
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
        """Write into dataset.yaml how much the folder holds, and open it."""
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
        temporary = self.folder / f".{ABOUT}.tmp"
        temporary.write_text(OmegaConf.to_yaml(OmegaConf.create(plain(about))))
        os.replace(temporary, self.folder / ABOUT)
