"""Hydra's launcher for `-m`: each job of a sweep is a worldloom command in its own process."""

import re
import sys
from collections.abc import Sequence
from pathlib import Path
from types import ModuleType
from typing import Any, ClassVar

from hydra.core.plugins import Plugins
from hydra.core.utils import JobReturn, JobStatus
from hydra.plugins.launcher import Launcher
from omegaconf import DictConfig, OmegaConf, open_dict

from worldloom import starting
from worldloom.app.cluster import Cluster
from worldloom.app.cluster_config import ProcessesConfig
from worldloom.app.cluster_jobs import list_cancel
from worldloom.app.cluster_queue import JOBS
from worldloom.app.compose import LAUNCHERS, key_of, quote_value
from worldloom.app.hints import FLAGS
from worldloom.app.saved_config import list_trusted
from worldloom.app.sweep_folder import LOGS, SweepFolder, hold_sweep, open_search
from worldloom.app.sweep_jobs import Job, JobList, Runner
from worldloom.app.sweep_names import name_run, parse_overrides, text_of
from worldloom.app.validation import build_settings, validate_config
from worldloom.errors import quote

# Hydra's own overrides that belong to the sweep and not to its jobs.
OF_SWEEP = re.compile(r"\+*hydra[./](sweep|sweeper|launcher|run|mode)\b")

REJECTED = {
    "hydra.run.dir": "choose the folder of the sweep: folder=PATH or sweep=NAME",
    "hydra.sweep.subdir": "runs are in folders that are named after what differs; leave it out",
}


class Processes(Launcher):
    """Run the jobs of a sweep as processes, `jobs` at a time.

    Finished runs are read, unfinished ones continue, and missing ones are started.
    """

    arguments: ClassVar[tuple[str, ...]] = ()  # of the command line
    executor: ClassVar[str] = ""  # of the cluster that runs the jobs

    def __init__(self, **settings: Any) -> None:
        self.settings: Any = OmegaConf.to_container(OmegaConf.create(settings))
        self.composed: dict[tuple[str, ...], DictConfig] = {}

    def _make_cluster(self) -> Cluster | None:
        """Return where the jobs are submitted, after checking the settings of the launcher."""
        if self.executor:
            return Cluster(self.executor, self.settings)
        build_settings("hydra.launcher", self.settings, ProcessesConfig)
        return None

    def setup(self, *, hydra_context: Any, task_function: Any, config: DictConfig) -> None:
        """Store the configuration of the sweep.

        Hydra's sweeper composes each job to validate it; these compositions are kept for the jobs.
        """
        self.config = config
        loader = hydra_context.config_loader
        self.compose = loader.load_sweep_config

        def compose(master_config: DictConfig, sweep_overrides: list[str]) -> DictConfig:
            cfg: DictConfig = self.compose(master_config, sweep_overrides)
            self.composed[tuple(sweep_overrides)] = cfg
            return cfg

        loader.load_sweep_config = compose

    def launch(
        self, job_overrides: Sequence[Sequence[str]], initial_job_idx: int
    ) -> Sequence[JobReturn]:
        """Run the jobs with these overrides; return their final returns in the same order.

        Raises:
            ValueError: a job is not valid, or the folder belongs to another sweep; nothing has
                been started.
        """
        if starting.has_others():
            raise ValueError(
                "a sweep starts the processes of its jobs, but torchrun or srun has started "
                "several of this command; start it once, without them"
            )
        for word in self.config.hydra.overrides.hydra:
            if (advice := REJECTED.get(key_of(word))) is not None:
                raise ValueError(f"{word} has no effect with -m; {advice}")
        cluster = self._make_cluster()
        if "search" in self.config:
            return self._search([list(words) for words in job_overrides], cluster)
        fixed = {
            part.key_or_group: text_of(part)
            for part in parse_overrides(self.config.hydra.overrides.task)
            if not part.is_sweep_override()
        }
        keys = (part.key_or_group for words in job_overrides for part in parse_overrides(words))
        varied = list(dict.fromkeys(key for key in keys if key not in fixed))
        with hold_sweep(Path(self.config.hydra.sweep.dir), varied, fixed) as sweep:
            jobs = [self._make_valid_job(sweep, list(words), cluster) for words in job_overrides]
            names = [job.name for job in jobs]
            if twice := {name for name in names if names.count(name) > 1 or name in (LOGS, JOBS)}:
                raise ValueError(
                    f"several jobs of the sweep would have the folder {sweep.path / min(twice)}; "
                    "give each value once"
                )
            most = self.settings.get("jobs", 1) if cluster is None else cluster.most or len(jobs)
            runner = Runner(sweep, most, JobList(sweep, jobs), cluster)
            runner.run()
            done = sum(job.finished for job in jobs)
            print(f"{done} of {len(jobs)} jobs are finished; results: {sweep.path}", flush=True)
            if done < len(jobs):
                self._print_again("wait for the jobs again" if runner.running else "continue")
            if held := [job.process for job in runner.running]:
                print(f"{len(held)} jobs stay on the cluster; to cancel them:", flush=True)
                print(*list_cancel(held), sep="\n", flush=True)
            if runner.signal is not None:
                sys.exit(128 + runner.signal)
            return _returns(jobs, sweep)

    def _print_again(self, purpose: str) -> None:
        print(f"to {purpose}:\npython -m worldloom.run {quote(*self.arguments)}", flush=True)

    def _search(
        self, combinations: Sequence[Sequence[str]], cluster: Cluster | None
    ) -> Sequence[JobReturn]:
        """Run a search; each trial has one run for each combination of the values that are swept.

        Raises:
            ValueError: the space, the sampler or the pruner is not valid, or a run at an end of the
                space is not; nothing has been started.
        """
        if cluster is not None:
            raise ValueError(
                "a search starts its runs on this machine, so hydra/launcher=processes; submit "
                "the command itself several times: each job works on the same search"
            )
        from worldloom.app.samplers import read_search
        from worldloom.app.search_plan import SearchPlan

        section: Any = OmegaConf.to_container(self.config.search, resolve=True)
        settings = read_search(section)
        from worldloom.app.search import Search  # which imports optuna

        path, task = Path(self.config.hydra.sweep.dir), self.config.hydra.overrides.task
        plan = SearchPlan(settings, path, task, combinations, self._make_job)
        plan.validate()
        sweep = open_search(path, list(plan.space), plan.fixed, plan.describe(self.arguments))
        search = Search(sweep, settings, plan.make_jobs)
        runner = Runner(sweep, self.settings.get("jobs", 1), search)
        try:
            runner.run()
        finally:
            search.close()
        print(*search.report(), sep="\n", flush=True)
        if runner.signal is not None or search.left:
            self._print_again("continue")
        if runner.signal is not None:
            sys.exit(128 + runner.signal)
        search.require_result()
        return []

    def _make_valid_job(self, sweep: SweepFolder, words: list[str], cluster: Cluster | None) -> Job:
        """Return a job of a sweep; raise ValueError if it is not valid."""
        parts = {part.key_or_group: part for part in parse_overrides(words)}
        differs = {key: part for key, part in parts.items() if key in sweep.varied}
        name = name_run({key: text_of(part) for key, part in differs.items()})
        try:
            typed = {key: part.value() for key, part in differs.items()}
            return self._make_job(sweep.path, name, typed, words, cluster)
        except (ValueError, TypeError) as error:
            raise ValueError(f"{name}: {error}") from error

    def _make_job(
        self,
        path: Path,
        name: str,
        differs: dict[str, Any],
        words: list[str],
        cluster: Cluster | None = None,
    ) -> Job:
        """Compose and validate a job of a sweep's folder; raise ValueError if it is not valid."""
        folder, log = path / name, path / LOGS / f"{name}.log"
        cfg = self.composed.pop(tuple(words), None) or self.compose(self.config, words)
        with open_dict(cfg):
            cfg.folder, hydra = str(folder), cfg.pop("hydra")
        validate_config(cfg, hydra.runtime.choices, devices=self.executor != "slurm")
        if cluster is not None:
            cluster.require_processes(cfg.trainer)
        flags = [
            word
            for pair in zip(self.arguments, self.arguments[1:], strict=False)
            if FLAGS.get(pair[0])
            for word in pair
        ]
        new = [
            *flags,
            *(word for word in self.config.hydra.overrides.hydra if not OF_SWEEP.match(word)),
            *(re.sub(r"^(~.*)=null$", r"\1", word) for word in words),
            f"sweep={quote_value(path.name)}",
            f"hydra.run.dir={quote_value(str(folder))}",
        ]
        plain: Any = OmegaConf.to_container(cfg, resolve=True)
        resume = [f"resume={folder}", *list_trusted(plain)]
        return Job(name, folder, log, differs, words, cfg, new, resume)


class Slurm(Processes):
    """Submit the jobs of a sweep to SLURM, as a job array, and wait for them."""

    executor = "slurm"


class Local(Processes):
    """Run the jobs of a sweep with submitit's local executor, to try what a cluster does."""

    executor = "local"


class Returned(JobReturn):
    """The end of a job; unlike Hydra's class it prints nothing, since the sweep has printed it."""

    @property
    def return_value(self) -> Any:
        """Return the final return, or raise the error."""
        if self.status == JobStatus.FAILED:
            raise self._return_value
        return self._return_value

    @return_value.setter
    def return_value(self, value: Any) -> None:
        self._return_value = value


def _returns(jobs: Sequence[Job], sweep: SweepFolder) -> list[JobReturn]:
    """Return what Hydra's sweepers expect: final returns, and one error of all failed jobs."""
    states = [sweep.jobs[job.name] for job in jobs]
    failed = [
        not job.finished and state["code"] != 0 for job, state in zip(jobs, states, strict=True)
    ]
    bad = [job.name for job, fails in zip(jobs, failed, strict=True) if fails]
    error = ChildProcessError(
        f"{len(bad)} of {len(jobs)} jobs failed or were stopped: {', '.join(bad)}; what they "
        f"printed is in {sweep.path / LOGS}"
    )
    returns: list[JobReturn] = []
    for job, fails in zip(jobs, failed, strict=True):
        held = Returned(job.overrides, job.cfg, working_dir=str(job.folder), task_name=job.name)
        held.status = JobStatus.FAILED if fails else JobStatus.COMPLETED
        held.return_value = error if fails else job.score
        returns.append(held)
    return returns


def register_launcher(arguments: Sequence[str]) -> None:
    """Make the launcher known to Hydra.

    Hydra accepts launchers only from the namespace package hydra_plugins. This module under such a
    name works in every kind of installation, without a second package next to worldloom.

    arguments: of the command line.
    """
    plugins = Plugins.instance()  # has imported hydra_plugins, if other plugins are installed
    package = sys.modules.setdefault("hydra_plugins", ModuleType("hydra_plugins"))
    module = LAUNCHERS["processes"]["_target_"].rpartition(".")[0]
    sys.modules[module] = sys.modules[__name__]
    setattr(package, module.rpartition(".")[2], sys.modules[__name__])
    Processes.arguments = tuple(arguments)
    for launcher in (Processes, Slurm, Local):
        launcher.__module__ = module
        plugins.register(launcher)
