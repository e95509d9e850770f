"""The command `python -m worldloom.collect`: record episodes.

usage: worldloom collect env=gymnasium env.id=Pendulum-v1 policy=random
       episodes=100 out=data/pendulum [seed=0] [num_envs=…] [append=false]
   or: worldloom collect policy=<run folder> [env.KEY=VALUE …]
       episodes=100 out=data/cartpole [deterministic=false] …

The environment is chosen as for worldloom.run; the policy of a run acts in the run's environment
unless another is chosen. The folder receives one .npz per episode and a dataset.yaml (format:
worldloom/datasets/folder.py). append=true adds to a folder with episodes of the same environment.
"""

import math
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from worldloom.acting import Act, make_act, play, share_episodes, use_seed
from worldloom.app.command_line import parse_settings, run_command, split_settings
from worldloom.app.compose import Overrides, compose_env, quote_value
from worldloom.app.run_dir import reject_links
from worldloom.app.saved_config import env_overrides
from worldloom.app.task import Task, load_actor, open_saved_run
from worldloom.app.validation import RUNNING
from worldloom.datasets import Episode
from worldloom.datasets.folder import read_about
from worldloom.datasets.writer import FolderWriter
from worldloom.envs.spaces import Obs
from worldloom.envs.vector import RowStream
from worldloom.errors import quote, require_positive

LOG_INTERVAL = 20.0  # seconds between two lines of progress


@dataclass
class CollectConfig:
    """What to record.

    policy: "random", or the folder of a run whose model acts.
    episodes: how many; each environment records its share.
    out: the folder to write.
    seed: of environments and policy; the number of episodes already in `out` is added to it.
    deterministic: the policy's mode instead of samples.
    num_envs: None for the number in the environment's configuration.
    max_steps: actions after which an episode is cut off, if there is no shorter time limit.
    append: add to the episodes that are in `out`.
    """

    policy: str
    episodes: int
    out: str
    seed: int = 0
    deterministic: bool = False
    num_envs: int | None = None
    max_steps: int = 100_000
    append: bool = False

    def __post_init__(self) -> None:
        """Raise ValueError for impossible numbers."""
        require_positive(episodes=self.episodes, max_steps=self.max_steps)
        if self.num_envs is not None:
            require_positive(num_envs=self.num_envs)
        if not 0 <= self.seed < 2**32:
            raise ValueError(f"seed is {self.seed}; expected from 0 to {2**32 - 1}")


def collect(config: CollectConfig, args: Iterable[str] = ()) -> str:
    """Record episodes as configured; return a summary and the command to train on them.

    args: overrides of the environment, and those that name a run's third-party code.
    """
    overrides = Overrides(tuple(args))
    run = None if config.policy == "random" else Path(config.policy).expanduser()
    if run is not None and not run.exists():
        raise ValueError(f"policy is '{config.policy}'; expected random, or the folder of a run")
    if run is None and not overrides.args:
        raise ValueError("no environment was named; add env=gymnasium env.id=CartPole-v1")
    if run is None:
        settings, section = None, compose_env(overrides)
    else:
        settings, section = open_saved_run(run, overrides)
    out = Path(config.out).expanduser()
    _require_room(out, config.append, section)
    num_envs = min(config.num_envs or section.get("num_envs", 1), config.episodes)
    task = Task.from_config({**section, "num_envs": num_envs})
    actor = None
    if run is not None and settings is not None:
        torch.set_num_threads(settings["threads"] or torch.get_num_threads())
        actor = load_actor(run, settings, task)
    writer = FolderWriter(out, task.obs, task.actions, section)
    seed = config.seed + writer.existing
    vector_env = task.vector_env(config.max_steps)
    limited = (task.episode_length or math.inf) <= config.max_steps
    progress = Progress(config.episodes, math.inf if limited else config.max_steps)
    try:
        with use_seed(seed, torch.device("cpu") if actor is None else actor.device):
            rows = RowStream(vector_env, task.obs, task.actions)
            rows.reset(seed)
            masks = task.collecting().get("masks")
            act = make_act(actor, config.deterministic) if actor else at_random(seed, masks)
            for ended in record(act, rows, config.episodes):
                for episode in ended:
                    writer.add(episode)
                progress.count(int(np.count_nonzero(~rows.is_first)), ended)  # no resets
    finally:
        vector_env.close()
    held = writer.finish()
    size = sum(file.stat().st_size for file in out.iterdir())
    return (
        f"{progress.summary()}\n{out}: {len(held):,} episodes, {held.steps:,} steps, "
        f"{size / 1e6:,.1f} MB\ntrain on it: python -m worldloom.run data=offline "
        f"{quote(f'data.path={quote_value(str(out))}')} model=dreamerv3_size1m "
        f"training.total_steps=20000 {env_overrides(section)}".rstrip()
    )


def record(act: Act, rows: RowStream, episodes: int) -> Iterator[list[Episode]]:
    """Run a number of episodes; after every step of the environments, yield those that ended."""
    open_ones = [_Open(_row(rows.obs, i)) for i in range(rows.num_envs)]
    spec = rows.action_spec
    for actions, ended in play(act, rows, share_episodes(episodes, rows.num_envs)):
        done = spec.encode(spec.decode(actions))  # as the environments clip and round them
        for i in range(rows.num_envs):
            obs = _row(rows.obs, i)
            if rows.is_first[i]:
                open_ones[i] = _Open(obs)
            else:
                open_ones[i].add(obs, done[i], rows.rewards[i])
        yield [open_ones[i].end(bool(rows.is_terminal[i]), summary) for i, summary in ended]


def at_random(seed: int, masks: np.ndarray | None = None) -> Act:
    """Return a function that acts at random; masks [N, A] are 0 for actions that do not exist."""
    rng, scale = np.random.default_rng(seed), 1.0 if masks is None else masks
    return lambda rows: rows.action_spec.sample(rng, rows.num_envs) * np.float32(scale)


class _Open:
    """An episode that has not ended."""

    def __init__(self, obs: Obs) -> None:
        self.obs: list[Any] = [obs]
        self.actions: list[np.ndarray] = []
        self.rewards: list[np.ndarray] = []

    def add(self, obs: Obs, action: np.ndarray, reward: np.ndarray) -> None:
        self.obs.append(obs)
        self.actions.append(action)
        self.rewards.append(reward)

    def end(self, terminated: bool, summary: Mapping[str, float]) -> Episode:
        first = self.obs[0]
        obs = (
            {key: np.stack([o[key] for o in self.obs]) for key in first}
            if isinstance(first, dict)
            else np.stack(self.obs)
        )
        success = bool(summary["success"]) if "success" in summary else None
        actions, rewards = np.stack(self.actions), np.stack(self.rewards)
        return Episode("", obs, actions, rewards, terminated, not terminated, success)


class Progress:
    """Counts recorded steps and returns, and prints a line from time to time.

    max_steps: number after which episodes are cut off.
    """

    def __init__(self, wanted: int, max_steps: float = math.inf) -> None:
        self.wanted, self.max_steps = wanted, max_steps
        self.steps = self.cut = 0
        self.returns: list[float] = []
        self._start = self._logged = time.monotonic()

    def count(self, steps: int, ended: Sequence[Episode]) -> None:
        """Add the steps and ended episodes of one step of the environments."""
        self.steps += steps
        self.cut += sum(len(e.actions) >= self.max_steps for e in ended)
        self.returns += [float(e.rewards.sum(dtype=np.float64)) for e in ended]
        if time.monotonic() - self._logged > LOG_INTERVAL:
            self._logged = time.monotonic()
            last = f"{self.returns[-1]:.4g}" if self.returns else "none yet"
            print(
                f"episodes {len(self.returns):,}/{self.wanted:,} | steps {self.steps:,} | "
                f"{self.steps / (self._logged - self._start):,.0f} steps/s | last return {last}",
                flush=True,
            )

    def summary(self) -> str:
        """Return one line about all new episodes."""
        cut = f", of which {self.cut} were cut off after {self.max_steps:,} steps (max_steps)"
        return (
            f"return {np.mean(self.returns):.2f} ± {np.std(self.returns):.2f} over "
            f"{len(self.returns):,} new episodes{cut if self.cut else ''}"
        )


def _row(obs: Obs, index: int) -> Obs:
    if isinstance(obs, dict):
        return {key: array[index] for key, array in obs.items()}
    return obs[index]


def _require_room(out: Path, append: bool, env: Mapping[str, Any]) -> None:
    """Raise ValueError if the folder contains episodes, unless `append` and of the same kind."""
    if out.exists() and not out.is_dir():
        raise ValueError(f"{out} is a file; expected a folder, or an unused name")
    reject_links(out)
    held = len(list(out.glob("*.npz")))
    if not held:
        return
    if not append:
        raise ValueError(
            f"{out} already contains {held} episodes; choose another folder, or add append=true"
        )
    before = read_about(out).get("env", {})
    keys = [k for k in {**before, **env} if k not in RUNNING and env.get(k) != before.get(k)]
    if keys:
        theirs, ours = ({f"env.{k}": e.get(k) for k in keys} for e in (before, env))
        raise ValueError(f"{out} contains episodes of {theirs}, not {ours}; choose another folder")


def collect_command(overrides: Overrides) -> None:
    """Record episodes as the command line describes, and print the summary."""
    args, config_overrides = split_settings(overrides)
    print(collect(parse_settings(args, CollectConfig), config_overrides))


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), collect_command)


if __name__ == "__main__":
    main()
