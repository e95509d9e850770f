"""Composition of a configuration from the overrides of a command line and the files in conf/."""

import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from omegaconf import DictConfig, OmegaConf

from worldloom.app.cluster_config import ClusterConfig, ProcessesConfig
from worldloom.app.hints import FLAGS
from worldloom.app.search_config import SearchConfig
from worldloom.app.sweep_names import name_sweep
from worldloom.app.tasks import count_tasks
from worldloom.app.validation import quote_text, suggest_key, validate_env
from worldloom.errors import list_names
from worldloom.presets import config_dir, extra_dirs, file_name, preset_names
from worldloom.training.config import EvaluationConfig, TrainingConfig

# Starts of the overrides that name an environment.
NAMES_ENV = ("env=", "env.id=", "env._target_=")
# The launchers of sweeps, worldloom.app.launcher, under the names that Hydra accepts.
PLUGIN = "hydra_plugins.worldloom"
LAUNCHERS: dict[str, dict[str, Any]] = {
    "processes": {"_target_": f"{PLUGIN}.Processes", **asdict(ProcessesConfig())},
    "slurm": {"_target_": f"{PLUGIN}.Slurm", **asdict(ClusterConfig())},
    "local": {"_target_": f"{PLUGIN}.Local", **asdict(ClusterConfig())},
}
# Names that submitit, its Hydra plugin or sbatch have for settings of a cluster.
SUBMITIT = {
    **dict.fromkeys(("timeout_min", "timeout", "time_limit"), "time=4:00:00"),
    **dict.fromkeys(("ntasks_per_node", "tasks", "ntasks"), "tasks_per_node"),
    **dict.fromkeys(("gpus", "gres"), "gpus_per_node"),
    **dict.fromkeys(("cpus", "cores"), "cpus_per_task"),
    **dict.fromkeys(("mem_gb", "memory"), "mem=16G"),
    **dict.fromkeys(("jobs", "parallelism"), "array_parallelism"),
}
# Arguments that make a command line a sweep.
SWEEPS = {"-m", "--multirun", "hydra.mode=MULTIRUN"}


@dataclass(frozen=True)
class Overrides:
    """The arguments of a command line: KEY=VALUE overrides and Hydra's flags, in their order."""

    args: tuple[str, ...]

    def __iter__(self) -> Iterator[str]:
        """Iterate over the arguments."""
        return iter(self.args)

    def value(self, key: str) -> str | None:
        """Return the last value given for a key, without quotes; None if there is none."""
        values = [arg.partition("=")[2] for arg in self.args if key_of(arg) == key and "=" in arg]
        return values[-1].strip("'\"") if values else None

    def select(self, pattern: str) -> "Overrides":
        """Return the overrides whose key matches a regular expression from its start."""
        return Overrides(tuple(arg for arg in self.args if re.match(pattern, key_of(arg))))

    def without(self, *keys: str) -> "Overrides":
        """Return all arguments except the overrides of these keys."""
        return Overrides(tuple(arg for arg in self.args if key_of(arg) not in keys))

    def with_implied(self) -> "Overrides":
        """Add the arguments that others imply. These are all implicit rules of the command line.

        1. The default recipe, experiment=cartpole, belongs to one environment. env=NAME,
           env.id=NAME, env._target_=... and data=offline drop it (~experiment), unless a recipe is
           named. (conf/data/offline.yaml cannot do that in its defaults list, because Hydra reads
           the recipe first.)
        2. env._target_=... selects a custom environment, so it implies env=custom and the options
           of the default environment do not apply.
        3. A model preset brings the training, evaluation, data and optimizer sections of its
           family, unless they are chosen on the command line. Hydra applies this rule: see
           `override /training@_global_.training` in conf/model/.
        4. model=FAMILY:SIZE, the name of a preset in Python, means the file FAMILY_SIZE.
        5. folder=PATH means hydra.run.dir=PATH, so that Hydra uses no other folder for the run;
           with -m it is the folder of the sweep, hydra.sweep.dir=PATH.
        6. trainer=ddp trainer.accelerator=cpu implies trainer.precision=32-true, the precision of
           trainer=cpu, which trainer=ddp would replace by bf16-mixed.
        7. -m without a name or folder of the sweep implies sweep=NAME, with a name that is made of
           the overrides.
        8. In a SLURM job that was requeued, resume=auto is implied (`with_restart`).
        9. search.KEY=VALUE without a choice of the group implies search=default;
           search.space.KEY={...} and search.sampler={...} need no + to add keys.
        10. Values with letters that Hydra does not read without quotes, as in folder=läuft, are
            quoted.

        Raises:
            ValueError: folder=PATH or sweep=NAME is given without a value, or a search without -m.
        """
        sweeps = bool(SWEEPS & {*self.args})
        where = "hydra.sweep.dir" if sweeps else "hydra.run.dir"
        if (folder := self.value("folder")) in ("", "null"):
            raise ValueError(f"folder is {folder!r}; expected a path, or leave folder out")
        sweep = self.value("sweep")
        if sweeps and sweep is not None and not re.fullmatch(r"(?!/|null$|.*\.\.).+", sweep):
            raise ValueError(
                f"sweep is {sweep!r}; expected a name, for the folder runs/sweeps/NAME; another "
                "folder is folder=PATH"
            )
        keys = {key_of(arg) for arg in self.args}
        args = [_quote_letters(arg, sweeps) for arg in self.args]
        full: list[str] = []
        for arg in args:
            custom = arg.startswith("env._target_=")
            names_data = arg == "data=offline" or names_env(Overrides((arg,)))
            if names_data and not {"experiment", "~experiment"} & {*keys, *full}:
                full.append("~experiment")
            if custom and "env" not in keys:
                full.append("env=custom")
            arg = re.sub(r"^\+*(search\.(space\.[^=]+|sampler|pruner)=\{)", r"++\1", arg)
            full.append(_name_file(re.sub(r"^\+*folder=", f"{where}=", arg)))
        if sweeps and not {"sweep", "folder", "hydra.sweep.dir"} & keys:
            full.append(f"sweep={name_sweep([_name_file(arg) for arg in args])}")
        if (found := self.select(r"search($|\.)").args) and not sweeps:
            raise ValueError(f"{found[0]} makes a search, which trains many times; add -m")
        if found and "search" not in keys:
            full.append("search=default")
        return Overrides(tuple(full)).with_precision()

    def with_restart(self) -> "Overrides":
        """Add resume=auto to a run of a SLURM job that was requeued, unless resume is given."""
        first = os.environ.get("SLURM_RESTART_COUNT", "") in ("", "0")
        if first or self.value("resume") is not None or SWEEPS & {*self.args}:
            return self
        print("SLURM has restarted this job, so its run continues (resume=auto)", flush=True)
        return Overrides((*self.args, "resume=auto"))

    def with_precision(self) -> "Overrides":
        """Add float32 where trainer=ddp trains on CPUs, unless a precision is given."""
        on_cpu = (self.value("trainer"), self.value("trainer.accelerator")) == ("ddp", "cpu")
        if not on_cpu or self.value("trainer.precision") is not None:
            return self
        return Overrides((*self.args, "trainer.precision=32-true"))


def _name_file(argument: str) -> str:
    """Return model=FAMILY:SIZE, or several of them, with the names of the presets' files."""
    key, _, names = argument.partition("=")
    presets = preset_names() if key == "model" and ":" in names else ()
    parts = [file_name(name) if name.lower() in presets else name for name in names.split(",")]
    return f"{key}={','.join(parts)}" if presets else argument


def _quote_letters(argument: str, sweeps: bool) -> str:
    """Return KEY=VALUE with quotes around a value, or each value of a sweep, that is not ASCII."""
    key, _, value = argument.partition("=")
    if value.isascii() or re.search(r"""['"$()\[\]{}]""", value) or ("," in value and not sweeps):
        return argument
    parts = [part if part.isascii() else quote_text(part) for part in value.split(",")]
    return f"{key}={','.join(parts)}"


def names_env(overrides: Overrides) -> bool:
    """Return whether overrides name an environment, and do not only change one."""
    return any(arg.startswith(NAMES_ENV) for arg in overrides)


def key_of(argument: str) -> str:
    """Return the key of an override such as KEY=VALUE, +KEY=VALUE or ~KEY."""
    return argument.lstrip("+~").partition("=")[0]


def quote_value(text: str) -> str:
    """Return a text as Hydra reads it as one value."""
    if re.fullmatch(r"[\w./:+-]*", text, re.ASCII):
        return text
    return quote_text(text)


def register_defaults() -> None:
    """Add training, evaluation and search=default, the launchers and a resolver to Hydra's."""
    sections = {"training": TrainingConfig, "evaluation": EvaluationConfig, "search": SearchConfig}
    for name, cls in sections.items():
        ConfigStore.instance().store(group=name, name="default", node=asdict(cls()))
    for name, node in LAUNCHERS.items():
        ConfigStore.instance().store(group="hydra/launcher", name=name, node=node)
    OmegaConf.register_new_resolver("count_tasks", count_tasks, replace=True)


def hint_launcher(name: str, overrides: Overrides) -> str:
    """Return the end of a message about an unknown key hydra.launcher.NAME."""
    chosen = overrides.value("hydra/launcher") or "processes"
    own = [key for key in LAUNCHERS.get(chosen, {}) if key != "_target_"]
    others = [launcher for launcher, node in LAUNCHERS.items() if name in node]
    if others and name not in SUBMITIT:
        return f"; it belongs to hydra/launcher={list_names(others)}: add it"
    if new := SUBMITIT.get(name):
        return f"; write hydra.launcher.{new}"
    more = "; others: hydra.launcher.additional_parameters={NAME: VALUE}" * (chosen == "slurm")
    return suggest_key(name, own, "hydra.launcher.") + more


def compose_config(*overrides: str) -> DictConfig:
    """Compose the configuration as `python -m worldloom.run` does with these arguments."""
    register_defaults()
    GlobalHydra.instance().clear()
    args = [
        arg
        for before, arg in zip(("", *overrides), overrides, strict=False)
        if arg not in FLAGS and not FLAGS.get(before)
    ]
    if folders := ["'file://{}'".format(str(path).replace("'", r"\'")) for path in extra_dirs]:
        args.append(f"hydra.searchpath=[{','.join(folders)}]")
    with initialize_config_dir(version_base="1.3", config_dir=str(config_dir())):
        return compose(config_name="config", overrides=args)


def compose_env(overrides: Overrides, default: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the env section that the overrides env=NAME and env.KEY=VALUE describe, validated.

    default: the section that env.KEY=VALUE changes where env=NAME is absent. Without a default, the
        section is composed as for `python -m worldloom.run`.

    Raises:
        ValueError: an override of another section, or an unknown or impossible value.
    """
    if others := [arg for arg in overrides if not re.match(r"\+*env[.=]", arg)]:
        raise ValueError(f"unknown key '{key_of(others[0])}'; expected env=… or env.KEY=…")
    if default is not None and overrides.value("env") is None:
        section = _changed_env(overrides, default)
    else:
        env = compose_config(*dict.fromkeys(["~experiment", *overrides.with_implied()])).env
        if missing := sorted(OmegaConf.missing_keys(env)):
            raise ValueError(f"{missing[0]} is not set; add {missing[0]}=…")
        section = OmegaConf.to_container(env, resolve=True)
    validate_env(section)
    return section


def _repeats(argument: str, config: DictConfig) -> bool:
    """Return whether an override of code, env._target_ or one in env.tasks, changes nothing."""
    key = key_of(argument)
    if key != "env._target_" and not re.match(r"env\.tasks\.\d+(\.|$)", key):
        return False
    return argument.partition("=")[2].strip("'\"") == str(OmegaConf.select(config, key))


def _changed_env(overrides: Overrides, default: Mapping[str, Any]) -> Any:
    """Return a saved env section after changes; repeating what names its code is allowed."""
    before = OmegaConf.create({"env": dict(default)})
    changes = [arg for arg in overrides if not _repeats(arg, before)]
    for arg in changes:
        key = key_of(arg)
        parent, _, name = key.rpartition(".")
        known = OmegaConf.select(before, parent) or {}
        if name not in known and not arg.startswith("+"):
            raise ValueError(f"unknown key '{key}'{suggest_key(name, known, f'{parent}.')}")
    given = OmegaConf.from_cli([arg.lstrip("+") for arg in changes])
    changed: Any = OmegaConf.to_container(OmegaConf.merge(before, given))
    return changed["env"]
