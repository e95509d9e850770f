"""From a composed configuration to tasks, data and scores; shared by the commands."""

import copy
import logging
import re
import threading
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from omegaconf import DictConfig, OmegaConf

from worldloom.acting import Actor, evaluate
from worldloom.app.run_dir import stands_alone
from worldloom.app.task import RUNNING, Task
from worldloom.datasets import Dataset, open_dataset
from worldloom.datasets.folder import read_about
from worldloom.trees import flatten_tree


def settled(cfg: DictConfig) -> dict[str, Any]:
    """Return the configuration that a run's folder holds: whole, but with its interpolations.

    These let who resumes the run change one number, and what is computed from it follows.
    """
    resolved: Any = OmegaConf.to_container(cfg, resolve=True)
    config = _fixed(OmegaConf.to_container(cfg, resolve=False), resolved)
    config |= {"folder": str(resolved["folder"]), "resume": None}
    if (source := resolved["init_from"]) is not None:
        config["init_from"] = str(Path(source).expanduser().resolve())
    if "path" in config["data"]:
        config["data"]["path"] = resolved["data"]["path"]
    settle_env(config)
    return config


def _fixed(raw: Any, resolved: Any) -> Any:
    """Replace what does not stand for other keys alone, ${oc.env:KEY}, by what it is now."""
    if isinstance(raw, dict):
        return {key: _fixed(raw[key], resolved[key]) for key in raw}
    if isinstance(raw, list):
        return [_fixed(*pair) for pair in zip(raw, resolved, strict=True)]
    return raw if stands_alone(raw) else resolved


def settle_env(plain: dict[str, Any]) -> None:
    """Put the environment that the data set names into the env section, if the user named none.

    The path of the data set becomes absolute, so that the configuration says where it is.
    """
    env, path = plain["env"], plain["data"].get("path")
    wanted = env.pop("from_data", False)
    if path is None:
        return
    folder = Path(str(path)).expanduser()
    if folder.exists():
        plain["data"]["path"] = str(folder.resolve())
    if not wanted:
        return
    given = {key: value for key, value in env.items() if key != "_target_"}
    plain["env"] = {"_target_": None, **read_about(folder).get("env", {}), **given}
    if plain["env"]["_target_"] is not None and (words := words_to_trust(plain["env"])):
        raise ValueError(
            f"{path} names an environment whose code is not part of worldloom; if you trust it, "
            f"say so: {words}; or train without one: env=none"
        )


def words_to_trust(env: Mapping[str, Any]) -> str:
    """Return how a user names this environment, or "" for one that data may name themselves.

    Whoever made a data set must not choose which code is run.
    """
    ours = re.fullmatch(r"worldloom\.envs\.suites\.(\w+)\.make_env", str(env["_target_"]))
    # "module:id" imports the module.
    if (
        ours
        and ours[1] != "custom"
        and not any(":" in v for v in env.values() if isinstance(v, str))
    ):
        return ""
    named = {key: value for key, value in env.items() if key not in (*RUNNING, "_target_")}
    options = {key: value for key, value in flatten_tree(named).items() if value is not None}
    words = [f"env={ours[1]}"] if ours else ["env=custom", f"env._target_={env['_target_']}"]
    words += [f"++env.{key.replace('/', '.')}={value}" for key, value in options.items()]
    return " ".join(words)


def open_task(plain: Mapping[str, Any]) -> tuple[Task, Dataset | None]:
    """Return what a run is to learn, and the data set if it learns from one."""
    env, path = plain["env"], plain["data"].get("path")
    if path is None:
        return Task.from_config(env), None
    if env["_target_"] is None:
        dataset = open_dataset(path)
        return Task.from_dataset(dataset), dataset
    task = Task.from_config(env, collects=False)
    return task, open_dataset(path, task.obs, task.actions)


def build_data(
    plain: Mapping[str, Any], task: Task, actor: Actor, dataset: Dataset | None = None
) -> Any:
    """Build the data module that feeds the trainer, from a data set or what is collected."""
    from worldloom.replay.capacity import rows_per_stream
    from worldloom.training import ReplayBuffer, ReplayDataModule

    training, data = plain["training"], plain["data"]
    capacity = data["capacity"]
    if capacity is None:
        if dataset is None:
            raise ValueError("data.capacity is null; expected steps or memory, such as 2GB")
        capacity = dataset.steps + len(dataset)
    # An episode of one step is two rows.
    most = 2 * (training["total_steps"] + task.running.get("num_envs", 1))
    first = is_first_process()  # of several, the only one that saves
    buffer = ReplayBuffer(
        capacity,
        task.obs.shape,
        task.actions.width,
        num_envs=task.running["num_envs"] if dataset is None else 1,
        fields=getattr(actor.model, "replay_fields", None),
        online_queue=dataset is None and data["online"],
        seed=plain["seed"],
        storage=data["storage"] if first else "ram",
        folder=Path(plain["folder"]) / "checkpoints" / "replay" if first else None,
        expected=most if dataset is None else None,
    )
    names = ("batch_size", "sequence_length", "total_steps")
    options = {k: training[k] for k in names} | {"across_episodes": data["across_episodes"]}
    rows = training["sequence_length"] + buffer.context_rows
    if dataset is None:
        held = rows_per_stream(capacity, buffer.bytes_per_step, buffer.num_envs)
        if held < rows:
            raise ValueError(
                f"data.capacity is {capacity}, {held} rows for each of {buffer.num_envs} "
                f"environments, but a sequence needs {rows}; raise it to {rows * buffer.num_envs}"
            )
        return _online(plain, task, actor, buffer, options)
    filled = fill(buffer, dataset)
    if not buffer.can_sample(rows, across_episodes=data["across_episodes"]):
        raise ValueError(
            f"a sequence needs {rows} rows, but {dataset.path} has {len(buffer)} and its longest "
            f"episode {max(dataset.lengths) + 1}; lower training.sequence_length"
        )
    print(filled, flush=True)
    buffer.freeze()
    return ReplayDataModule(buffer, **options)


def _online(
    plain: Mapping[str, Any], task: Task, actor: Actor, buffer: Any, options: dict[str, Any]
) -> Any:
    """Build the data module that collects into the buffer."""
    from worldloom.training import Collector, ReplayDataModule

    training = plain["training"]
    seed_steps = training["seed_episodes"] * (task.episode_length or 0)
    changes = {}
    if plain["data"]["overlap"]:
        actor, options["sync_acting_copy"] = make_acting_copy(actor)
        # A process of their own at least: a renderer stays with the thread in which it began.
        changes["workers"] = max(1, task.running.get("workers", 0))
    collector = Collector(
        task.vector_env(**changes),
        actor,
        buffer,
        obs_spec=task.obs,
        action_spec=task.actions,
        seed=plain["seed"],
        random_steps=max(training["random_steps"], seed_steps),
        frames_per_step=task.frames_per_step,
    )
    options |= {name: training[name] for name in ("train_ratio", "pretrain")}
    prefill = training["prefill"]
    if prefill is None:
        prefill = training["batch_size"] * training["sequence_length"]
    return ReplayDataModule(buffer, collector, prefill=max(prefill, seed_steps), **options)


def make_acting_copy(actor: Actor) -> tuple[Actor, Callable[[], None]]:
    """Return a copy of an actor, to act while its model is trained, and a function to sync it."""
    copied = copy.deepcopy(actor)
    theirs: Any = copied.model
    ours: Any = actor.model

    def sync() -> None:
        theirs.to(actor.device).load_state_dict(ours.state_dict())

    return copied, sync


def fill(buffer: Any, dataset: Dataset) -> str:
    """Add the episodes of a data set to a replay, the first ones that fit; tell what it holds.

    The latents that DreamerV3 remembers with every row start as zeros, as at the start of an
    episode, and become what its training writes back.
    """
    returns: list[float] = []
    for episode in dataset:
        steps = len(episode.rewards)
        if len(buffer) + steps + 1 > buffer.capacity:
            break
        ends = np.arange(steps) == steps - 1
        buffer.add_episode(
            episode.obs,
            episode.actions,
            episode.rewards,
            terminations=ends & episode.terminated,
            truncations=ends & episode.truncated,
        )
        returns.append(float(episode.rewards.sum(dtype=np.float64)))
    if not returns:
        raise ValueError(
            f"the first episode of {dataset.path} has {dataset.lengths[0]} steps, but the replay "
            f"holds {buffer.capacity}; raise data.capacity"
        )
    kept = f"the first {len(returns):,} of " if len(returns) < len(dataset) else ""
    why = " (data.capacity has room for no more)" if kept else ""
    return (
        f"data: {kept}{len(dataset):,} episodes{why} of {dataset.path}, {len(buffer):,} rows, "
        f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}"
    )


def is_first_process() -> bool:
    """Tell whether this process is the only one, or the first, of those that train together."""
    from lightning.fabric.utilities.rank_zero import rank_zero_only

    return not getattr(rank_zero_only, "rank", 0)


def prepare(seed: int, threads: int | None) -> None:
    """Seed everything, set the CPU threads of torch, and quieten Lightning.

    Each of its lines then appears once, through Hydra's log, and its adverts not at all.
    """
    import lightning  # adds the handlers that would double every line

    lightning.seed_everything(seed, verbose=False)
    if threads:
        torch.set_num_threads(threads)
    for name in ("lightning", "lightning.pytorch", "lightning.fabric"):
        logging.getLogger(name).handlers.clear()
    logging.getLogger("lightning.pytorch.utilities.rank_zero").setLevel(logging.WARNING)
    threading.excepthook = _threads_error
    warnings.filterwarnings("ignore", message=".*LeafSpec.*")
    warnings.filterwarnings("ignore", message=".*does not have many workers.*")


def _threads_error(error: threading.ExceptHookArgs) -> None:
    """Leave a full disk to the logger, which learns of it from TensorBoard's thread and tells."""
    if not isinstance(error.exc_value, OSError):
        threading.__excepthook__(error)


class Evaluator:
    """Score an actor in environments of its own."""

    def __init__(self, task: Task, actor: Actor, settings: Mapping[str, Any]) -> None:
        self.task, self.actor, self.settings = task, actor, settings

    def during(self) -> dict[str, float]:
        """Score an unfinished run, with other seeds than the final evaluation."""
        return self(self.settings["episodes_during"], self.settings["seed"] + 1_000_000)

    def __call__(self, episodes: int, seed: int | None = None) -> dict[str, float]:
        """Return eval/return (mean), eval/return_std, eval/length and eval/success if there is."""
        num_envs = min(self.settings["num_envs"], episodes)
        env = self.task.vector_env(num_envs=num_envs)
        model: Any = self.actor.model
        modes = [(module, module.training) for module in model.modules()]
        model.eval()
        try:
            results = evaluate(
                self.actor,
                env,
                self.task.obs,
                self.task.actions,
                episodes,
                self.settings["seed"] if seed is None else seed,
                self.settings["deterministic"],
            )
        finally:
            for module, mode in modes:
                module.training = mode
            env.close()
        names = sorted({name for result in results for name in result})
        scores = {
            f"eval/{n}": float(np.mean([result[n] for result in results if n in result]))
            for n in names
        }
        scores["eval/return_std"] = float(np.std([r["return"] for r in results]))
        return scores
