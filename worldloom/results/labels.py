"""Short names of runs: what differs between their configurations."""

import functools
import hashlib
import re
from collections.abc import Mapping, Sequence
from typing import Any

from worldloom.presets import file_name, load_preset, preset_names
from worldloom.results.runs import Job
from worldloom.trees import flatten_tree

# Settings that do not change what is learned, or that differ between the seeds of one group.
IGNORED = re.compile(
    r"(seed|name|folder|resume|threads|format|sweep)$|(logger|callbacks|checkpoint|hydra)\."
    r"|env\.(workers|timeout)$"
)

LONGEST = 32  # characters of a value


def label_jobs(jobs: Sequence[Job]) -> None:
    """Set the task, the group and the name of each job from what differs between them.

    A group is named by the model, if models differ, and by those settings that the task and the
    model do not determine: a model brings its own training, so model=A,B needs one label and not
    one per setting. The folders that the user named distinguish otherwise equal runs.
    """
    known = [job for job in jobs if job.config]
    if len({job.name for job in jobs}) < len(jobs):  # the names in several sweeps, or none
        for job in jobs:
            job.name = ""
    for job in jobs:
        job.task, job.group = name_task(job.config), str(job.config.get("name", job.folder.name))
    labels: list[list[str]] = [[] for _ in known]
    distinct: list[tuple[Any, ...]] = [(job.task,) for job in known]

    def add(values: Sequence[Any], texts: Sequence[str]) -> None:
        """Label the jobs by these values, if the labels so far do not determine them."""
        wider = [(*before, str(value)) for before, value in zip(distinct, values, strict=True)]
        if len(set(wider)) == len(set(distinct)):
            return
        # Jobs that differ in the value, by their labels so far; the others need no text.
        choices: dict[tuple[Any, ...], set[str]] = {}
        for cell in wider:
            choices.setdefault(cell[1:-1], set()).add(cell[-1])
        for label, cell, text in zip(labels, wider, texts, strict=True):
            label += [text] if text and len(choices[cell[1:-1]]) > 1 else []
        distinct[:] = wider

    keys = dict.fromkeys(k for job in known for k in job.config if not IGNORED.match(k))
    differing = [k for k in keys if len({str(job.config.get(k, "")) for job in known}) > 1]
    if any(key.startswith("model.") for key in differing):
        add(names := name_models([job.config for job in known]), names)
    for key in differing:
        texts = [describe(key, job.config[key]) if key in job.config else "" for job in known]
        add([job.config.get(key, "") for job in known], texts)
    seeds = [job.seed for job in known]
    if len({*zip(distinct, seeds, strict=True)}) < len(known):
        add([job.source for job in known], [job.source.resolve().name for job in known])
    several = len({job.task for job in known}) > 1
    for job, label in zip(known, labels, strict=True):
        job.group = " ".join(label) or job.group
        job.name = job.name or " ".join([job.task] * several + [job.group, f"seed={job.seed}"])
    for job in jobs:
        job.name = job.name or job.folder.name


def name_task(config: Mapping[str, Any]) -> str:
    """Return the short name of the environment of a run, or of its dataset."""
    for key in ("env.id", "env.task", "env.game"):
        if config.get(key) is not None:
            return str(config[key])
    if tasks := config.get("env.tasks"):
        return tasks if isinstance(tasks, str) else f"{len(tasks)} tasks"
    target = str(config.get("env._target_") or config.get("data.path") or "")
    suite = re.fullmatch(r"worldloom\.envs\.suites\.(\w+)\.make_env", target)
    return suite[1] if suite else target.rpartition("/")[2]


def describe(key: str, value: Any) -> str:
    """Return a setting in a few characters: train_ratio=64, optimizer=Adam.

    Of a long value the start is left, with a hash that tells it from similar ones.
    """
    if key.endswith("._target_"):
        key, value = key.removesuffix("._target_"), str(value).rpartition(".")[2]
    text = "null" if value is None else str(value)
    if len(text) > LONGEST:
        text = f"{text[: LONGEST - 5]}…{hashlib.sha256(text.encode()).hexdigest()[:4]}"
    return f"{key.rpartition('.')[2]}={text}"


@functools.cache
def _read_presets() -> dict[str, dict[str, Any]]:
    return {file_name(name): flatten_tree(load_preset(name), ".") for name in preset_names()}


def _count_differences(model: Mapping[str, Any], preset: Mapping[str, Any]) -> tuple[int, int]:
    """Return how many words differ, such as the name of a loss, and how many settings."""
    differing = [value for key, value in preset.items() if model.get(key) != value]
    return sum(isinstance(value, str) for value in differing), len(differing)


def name_models(configs: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the most similar preset of each run's model, such as dreamerv3_tiny, or its class."""
    presets = _read_presets()
    named: dict[str, str] = {}
    names = []
    for config in configs:
        model = {k.removeprefix("model."): v for k, v in config.items() if k.startswith("model.")}
        if (shown := str(model)) not in named:
            target = model.get("_target_")
            differences = {
                name: _count_differences(model, preset)
                for name, preset in presets.items()
                if preset["_target_"] == target
            }
            own_class = str(target).rpartition(".")[2]
            named[shown] = min(differences, key=lambda n: differences[n], default=own_class)
        names.append(named[shown])
    return names
