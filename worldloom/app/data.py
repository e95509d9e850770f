"""The data of a run: its task and dataset, its replay, and what collects into it."""

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from worldloom.acting import Actor
from worldloom.app.filling import fill_buffer, rows_of_share
from worldloom.app.task import Task
from worldloom.app.tasks import require_tasks_of_data
from worldloom.datasets import Dataset, open_dataset
from worldloom.ranks import rank, seed_of_rank, world_size
from worldloom.training.config import DataConfig, TrainingConfig


def open_task(plain: Mapping[str, Any]) -> tuple[Task, Dataset | None]:
    """Return the task of a run, and the dataset if it learns from one."""
    env, path = plain["env"], plain["data"].get("path")
    if path is None:
        return Task.from_config(env), None
    length = plain["data"].get("episode_length")
    if env["_target_"] is None:
        dataset = open_dataset(path, choice=env.get("obs"), episode_length=length)
        return Task.from_dataset(dataset), dataset
    task = Task.from_config(env, collects=False)
    dataset = open_dataset(path, task.obs, task.actions, episode_length=length)
    require_tasks_of_data(task.choices, task.action_dims, dataset)
    return task, dataset


def build_data(
    plain: Mapping[str, Any], task: Task, actor: Actor, dataset: Dataset | None = None
) -> Any:
    """Build the data module that feeds the trainer, from a dataset or by collecting.

    Raises:
        ValueError: the capacity of the replay is missing or too small, or the episodes are shorter
            than the sequences to sample.
    """
    from worldloom.training import ReplayBuffer, ReplayDataModule

    training, data = plain["training"], DataConfig(**plain["data"])
    capacity = data.capacity
    if capacity is None:
        if dataset is None:
            raise ValueError("data.capacity is null; expected steps or memory, such as 2GB")
        capacity = dataset.steps + len(dataset)
    # An episode of one step has two rows.
    most = 2 * (training["total_steps"] + task.running.get("num_envs", 1))
    share = rank(), world_size()
    if dataset is not None:
        most = rows_of_share(dataset, world_size())
    buffer = ReplayBuffer(
        capacity,
        task.obs.shape,
        task.actions.width,
        num_envs=task.running["num_envs"] if dataset is None else 1,
        fields=getattr(actor.model, "replay_fields", None),
        online_queue=dataset is None and data.online_queue,
        draw_by=data.draw_by,
        finished_episodes=dataset is None and data.finished_episodes,
        seed=seed_of_rank(plain["seed"]),
        storage=data.storage,
        folder=Path(plain["folder"]) / "checkpoints" / "replay",
        expected=most if dataset is None or world_size() > 1 else None,
        share=share,
    )
    names = ("batch_size", "sequence_length", "total_steps")
    options = {k: training[k] for k in names} | {"across_episodes": data.across_episodes}
    rows = training["sequence_length"] + buffer.context_rows
    if dataset is None:
        _require_room(buffer, capacity, rows, task.episode_length)
        return _build_online_data(plain, task, actor, buffer, options)
    filled = fill_buffer(buffer, dataset, capacity, share)
    if not buffer.can_sample(rows, across_episodes=data.across_episodes):
        raise ValueError(
            f"a sequence needs {rows} rows, but {dataset.path} has {len(buffer)} and its longest "
            f"episode {max(dataset.lengths) + 1}; lower training.sequence_length"
        )
    print(filled, flush=True)
    return ReplayDataModule(buffer, **options)


def _require_room(buffer: Any, capacity: int | str, rows: int, length: int | None) -> None:
    """Raise ValueError if a sequence of each environment, or an episode of `length`, lacks room."""
    from worldloom.replay.capacity import rows_per_stream

    held = rows_per_stream(capacity, buffer.bytes_per_step, buffer.num_envs)
    if held < rows:
        raise ValueError(
            f"data.capacity is {capacity}, {held} rows for each of {buffer.num_envs} "
            f"environments, but a sequence needs {rows}; raise it to {rows * buffer.num_envs}"
        )
    if buffer.finished_episodes and held < (needed := (length or 0) + rows + 1):
        raise ValueError(
            f"data.capacity is {capacity}, {held} rows for each of {buffer.num_envs} environments, "
            f"but data.finished_episodes=true needs {needed}: an unfinished episode and a slice; "
            f"raise it to {needed * buffer.num_envs}"
        )


def _build_online_data(
    plain: Mapping[str, Any], task: Task, actor: Actor, buffer: Any, options: dict[str, Any]
) -> Any:
    """Build the data module that collects into the buffer."""
    from worldloom.training import Collector, ReplayDataModule

    training = plain["training"]
    seed_steps = training["seed_episodes"] * (task.episode_length or 0)
    changes = {}
    if plain["data"]["overlap"]:
        actor, options["sync_acting_copy"] = make_acting_copy(actor)
        # At least one worker process: a renderer stays with the thread that created it.
        changes["workers"] = max(1, task.running.get("workers", 0))
    collector = Collector(
        task.vector_env(first=rank() * task.running["num_envs"], **changes),
        actor,
        buffer,
        obs_spec=task.obs,
        action_spec=task.actions,
        seed=seed_of_rank(plain["seed"]),
        random_steps=max(training["random_steps"], seed_steps),
        **task.collecting(),
    )
    settings = TrainingConfig(**training)
    names = ("train_ratio", "pretrain", "prefill_counts", "count_resets")
    options |= {name: getattr(settings, name) for name in names}
    prefill = training["prefill"]
    if prefill is None:
        prefill = training["batch_size"] * training["sequence_length"]
    return ReplayDataModule(buffer, collector, prefill=max(prefill, seed_steps), **options)


def make_acting_copy(actor: Actor) -> tuple[Actor, Callable[[], None]]:
    """Return a copy of an actor, to act while its model is trained, and a function to sync it."""
    acting_copy = copy.deepcopy(actor)
    copied: Any = acting_copy.model
    trained: Any = actor.model

    def sync() -> None:
        copied.to(actor.device).load_state_dict(trained.state_dict())

    return acting_copy, sync
