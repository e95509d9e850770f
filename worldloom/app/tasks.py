"""The tasks of env=multitask: their names, environments and scores."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from worldloom.app.run_dir import CONFIG, describes_run, find_run, read_config
from worldloom.app.validation import RUNNING
from worldloom.errors import list_names, suggest
from worldloom.presets import choice_files, read_choice

if TYPE_CHECKING:
    from worldloom.datasets import Dataset
    from worldloom.envs.suites.multitask import TaskInfo

MULTITASK = "worldloom.envs.suites.multitask.make_env"
NOT_SUITES = ("suite_base", "none", "from_data", "custom", "multitask")
# Ranges of returns that become 0 and 100, or "success" for the percentage of successes.
SCORES: dict[str, Any] = {"dmc": [0.0, 1000.0], "metaworld": "success"}

# nicklashansen/tdmpc2, commit e9f5932, tdmpc2/common/__init__.py, TASK_SET; the order matters.
DMC30 = (
    *("walker-stand", "walker-walk", "walker-run", "cheetah-run", "reacher-easy", "reacher-hard"),
    *("acrobot-swingup", "pendulum-swingup", "cartpole-balance", "cartpole-balance-sparse"),
    *("cartpole-swingup", "cartpole-swingup-sparse", "cup-catch", "finger-spin"),
    *("finger-turn-easy", "finger-turn-hard", "fish-swim", "hopper-stand", "hopper-hop"),
    *("walker-walk-backwards", "walker-run-backwards", "cheetah-run-backwards"),
    *("cheetah-run-front", "cheetah-run-back", "cheetah-jump", "hopper-hop-backwards"),
    *("reacher-three-easy", "reacher-three-hard", "cup-spin", "pendulum-spin"),
)
METAWORLD50 = (  # noqa: SIM905 (a list of them is hard to read)
    "assembly basketball button-press-topdown button-press-topdown-wall button-press "
    "button-press-wall coffee-button coffee-pull coffee-push dial-turn disassemble door-open "
    "door-close drawer-close drawer-open faucet-open faucet-close hammer handle-press-side "
    "handle-press handle-pull-side handle-pull lever-pull peg-insert-side peg-unplug-side "
    "pick-out-of-hole pick-place pick-place-wall plate-slide plate-slide-side plate-slide-back "
    "plate-slide-back-side push-back push push-wall reach reach-wall shelf-place soccer stick-push "
    "stick-pull sweep-into sweep window-open window-close bin-picking box-close door-lock "
    "door-unlock hand-insert"
).split()
# Observations and actions of the tasks that only that repository and its datasets have.
OFFICIAL_ONLY = {
    **dict.fromkeys(("walker-walk-backwards", "walker-run-backwards"), (24, 6)),
    **dict.fromkeys(("cheetah-run-backwards", "cheetah-run-front", "cheetah-run-back"), (17, 6)),
    **{"cheetah-jump": (17, 6), "hopper-hop-backwards": (15, 4), "cup-spin": (8, 2)},
    **dict.fromkeys(("reacher-three-easy", "reacher-three-hard"), (8, 3)),
    "pendulum-spin": (3, 1),
}
TASK_SETS = {"mt30": DMC30, "mt80": (*DMC30, *(f"mw-{name}" for name in METAWORLD50))}


@dataclass(frozen=True)
class TaskChoice:
    """One task of a run.

    name: in metrics. env: the env section that makes it. info: of a task without a simulator.
    score: the range of returns that becomes 0 to 100, "success", or None if it is not known.
    """

    name: str
    env: dict[str, Any]
    score: Any = None
    info: "TaskInfo | None" = None

    def normalize(self, scores: Mapping[str, float]) -> float | None:
        """Return the score from 0 to 100 for means of "return" and "success", None if unknown.

        The official one is the return / 10 in DeepMind Control, and the percentage of successes in
        Meta-World.
        """
        if self.score == "success":
            return 100 * scores["success"] if "success" in scores else None
        if self.score is None:
            return None
        low, high = self.score
        return 100 * (scores["return"] - low) / (high - low)


def list_entries(tasks: Any) -> list[Any]:
    """Return the entries of env.tasks, with the names of sets replaced by their tasks."""
    single = isinstance(tasks, str) or not isinstance(tasks, Sequence)
    entries = [] if tasks is None else [tasks] if single else list(tasks)
    return [x for e in entries for x in (TASK_SETS.get(e, [e]) if isinstance(e, str) else [e])]


def count_tasks(tasks: Any) -> int:
    """Return the number of tasks, at least 1; the default of env.num_envs."""
    return max(1, len(list_entries(tasks)))


def expand_tasks(env: Mapping[str, Any]) -> list[TaskChoice]:
    """Return the tasks of the env section of env=multitask.

    Raises:
        ValueError: an entry is not a task, or two tasks have the same name.
    """
    shared = {
        key: value
        for key, value in env.items()
        if value is not None and key not in (*RUNNING, "obs", "tasks", "_target_")
    }
    tasks = [_read_entry(entry, shared) for entry in list_entries(env.get("tasks"))]
    names = [task.name for task in tasks]
    if twice := [name for name in names if names.count(name) > 1]:
        raise ValueError(
            f"env.tasks has {twice[0]} twice; expected different names; give one of them another: "
            f"{{env: gymnasium, id: Pendulum-v1, name: other}}"
        )
    return tasks


def find_tasks(env: Mapping[str, Any]) -> list[str]:
    """Return the names of the tasks of an env section, [] for one that is not of env=multitask."""
    return [t.name for t in expand_tasks(env)] if env.get("_target_") == MULTITASK else []


def require_same_tasks(source: Any, trained: Mapping[str, Any], env: Mapping[str, Any]) -> None:
    """Raise ValueError if a model of several tasks is to act in others, or in another order.

    trained, env: the env sections of its training and of now. The number of a task in the list is
    what the model knows, so other tasks in the same places would be taken for the old ones.
    """
    before, now = find_tasks(trained), find_tasks(env)
    if before and before != now:
        other = f"env.tasks has {list_names(now)}" if now else "this environment has a single task"
        raise ValueError(
            f"the model of {source} was trained on the tasks {list_names(before, 30)}, but "
            f"{other}; expected the same tasks in the same order; leave env.tasks out"
        )


def require_known_tasks(source: str, env: Mapping[str, Any]) -> None:
    """Raise ValueError if a run of several tasks is to start from weights of a run of others."""
    run = find_run(Path(source))
    if find_tasks(env) and describes_run(run / CONFIG):
        trained = read_config(run)["env"]
        if find_tasks(trained):
            require_same_tasks(source, trained, env)


def require_tasks_of_data(
    choices: Sequence[TaskChoice], action_dims: Sequence[int] | None, dataset: "Dataset"
) -> None:
    """Raise ValueError if a task of a dataset uses more actions than env.tasks has there.

    action_dims: of the tasks of the environment.
    """
    pairs = zip(choices, action_dims or (), dataset.action_dims or (), strict=False)
    for choice, has, uses in pairs:
        if uses > has:
            raise ValueError(
                f"{choice.name} has {has} actions, but its episodes in {dataset.path} use {uses}; "
                "expected the tasks of the data in their order; correct env.tasks"
            )


def _read_entry(entry: Any, shared: Mapping[str, Any]) -> TaskChoice:
    if not isinstance(entry, str | Mapping) or not entry:
        raise ValueError(
            f"env.tasks has {entry!r}; expected a name such as dmc/walker-walk, or keys such as "
            "{env: gymnasium, id: Pendulum-v1}"
        )
    if isinstance(entry, str) and entry in OFFICIAL_ONLY:
        from worldloom.envs.suites.multitask import TaskInfo  # imports gymnasium

        width, actions = OFFICIAL_ONLY[entry]
        return TaskChoice(entry, {}, SCORES["dmc"], TaskInfo(entry, width, {}, actions, 500, 2))
    own = {"env": "custom"} if isinstance(entry, Mapping) and "_target_" in entry else {}
    own |= dict(entry) if isinstance(entry, Mapping) else _parse_name(entry)
    suite, name, score = str(own.pop("env", "")), own.pop("name", None), own.pop("score", None)
    files = {key: file for key, file in choice_files("env").items() if key not in NOT_SUITES}
    if unused := [key for key in own if key in (*RUNNING, "obs")]:
        raise ValueError(
            f"env.tasks: {entry} has {unused[0]}, which all tasks share; set env.{unused[0]}"
        )
    if "_target_" in own:
        section: dict[str, Any] = {}
    elif suite in files:
        section = read_choice(files[suite])
    else:
        raise ValueError(
            f"env.tasks: {entry} has the environment {suite!r}{suggest(suite, files)}; expected "
            f"one of {', '.join(files)}; such as {{env: gymnasium, id: Pendulum-v1}}"
        )
    section = {k: value for k, value in section.items() if k not in (*RUNNING, "obs")}
    section = {**section, **shared, **own}
    if name is None:
        key = next((key for key in ("task", "id", "game") if section.get(key)), "_target_")
        name = entry if isinstance(entry, str) and entry.startswith("mw-") else section[key]
    name = re.sub(r"[^\w./-]", "_", str(name).rpartition(":")[2])
    score = SCORES.get(suite) if score is None else score
    _require_score(name, score)
    return TaskChoice(name, section, score)


def _parse_name(entry: str) -> dict[str, Any]:
    """Return the suite of a task that is given by its name, and the setting with the name."""
    suite, _, name = entry.partition("/")
    files = choice_files("env")
    if suite not in files or suite in NOT_SUITES or not name:
        suite, name = "dmc", entry
        if entry.startswith("mw-"):
            suite = "metaworld"
        elif ":" in entry or re.search(r"-v\d+$", entry):
            suite = "gymnasium"
    section = read_choice(files[suite])
    key = next((key for key in ("task", "id", "game") if key in section), "task")
    return {"env": suite, key: name}


def _require_score(name: str, score: Any) -> None:
    numbers = isinstance(score, Sequence) and not isinstance(score, str) and len(score) == 2
    if numbers and all(type(x) in (int, float) for x in score) and score[0] < score[1]:
        return
    if score not in (None, "success"):
        raise ValueError(
            f"env.tasks: {name} has the score {score!r}; expected success, or two returns that "
            "become 0 and 100, such as [0, 1000]"
        )
