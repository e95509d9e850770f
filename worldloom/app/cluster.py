"""Submitting the runs of a sweep to a cluster with submitit, and waiting for them."""

import importlib.util
import io
import os
import secrets
import shutil
import signal
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, redirect_stderr
from pathlib import Path
from typing import Any

from worldloom.app.cluster_config import ClusterConfig
from worldloom.app.cluster_queue import JOBS, make_record
from worldloom.app.cluster_task import Task
from worldloom.app.sweep_folder import SweepFolder
from worldloom.app.validation import build_settings

COMMANDS = ("sbatch", "srun", "squeue", "scontrol", "scancel")


class Cluster:
    """A cluster, or submitit's local executor, with the settings of the launcher.

    Raises:
        ValueError: a setting is unknown or impossible, or SLURM is not installed here.
        ImportError: submitit is not installed.
    """

    def __init__(self, executor: str, settings: Mapping[str, Any]) -> None:
        self.executor = executor
        self.config: ClusterConfig = build_settings("hydra.launcher", settings, ClusterConfig)
        if importlib.util.find_spec("submitit") is None:
            raise ImportError(
                f"hydra/launcher={executor} needs the package submitit; "
                "pip install 'worldloom[sweep]'"
            )
        if executor == "local":
            if self.config.nodes > 1:
                raise ValueError(
                    f"hydra.launcher.nodes is {self.config.nodes}, but hydra/launcher=local uses "
                    "this machine only; leave it out, or use hydra/launcher=slurm"
                )
            return
        if self.config.time is None:
            raise ValueError(
                "hydra.launcher.time is not set; add the time limit of a job, such as "
                "hydra.launcher.time=4:00:00 (runs continue after it)"
            )
        if missing := [name for name in COMMANDS if shutil.which(name) is None]:
            raise ValueError(
                f"hydra/launcher=slurm needs SLURM's commands, but {', '.join(missing)} cannot be "
                "found; start the sweep on a login node, or try hydra/launcher=local"
            )

    @property
    def most(self) -> int | None:
        """Return how many jobs may be submitted at a time; None for all, which SLURM schedules."""
        return None if self.executor == "slurm" else self.config.array_parallelism or 1

    def require_processes(self, trainer: Mapping[str, Any]) -> None:
        """Raise ValueError unless a job has the processes that its run asks for."""
        nodes, tasks = self.config.nodes, self.config.tasks_per_node
        devices, machines = trainer.get("devices", "auto"), trainer.get("num_nodes", 1)
        same = devices in ("auto", tasks) and machines == nodes
        if machines != nodes or (nodes * tasks > 1 and not same):
            raise ValueError(
                f"hydra.launcher.nodes and tasks_per_node are {nodes} and {tasks}, but "
                f"trainer.num_nodes and devices are {machines} and {devices}; set both alike, with "
                "trainer=ddp, or leave tasks_per_node out on one node: one task starts the others"
            )

    def submit(self, sweep: SweepFolder, jobs: Sequence[Any]) -> None:
        """Submit jobs together, as a job array; their ids are in sweep.yaml when it returns.

        jobs: `sweep_jobs.Job`.

        Raises:
            ValueError: SLURM has refused them.
        """
        token = secrets.token_hex(4)
        folder = sweep.path.absolute() / JOBS / token
        folder.parent.mkdir(exist_ok=True)
        folder.mkdir(mode=0o700)  # new, so that a job unpickles nothing but what is written here
        tasks = []
        for job in jobs:
            # Without an id: if this process is killed now, the job ends by itself when it starts.
            sweep.jobs[job.name]["cluster"] = make_record(self.executor, token, job.log_start)
            paths = sweep.path.absolute(), token, job.log.absolute(), Path.cwd()
            tasks.append(Task(job.name, *paths, job.new, job.resume))
        sweep.write()
        for job, job_id in zip(jobs, self._submit(folder, sweep.path.name, tasks), strict=True):
            sweep.jobs[job.name]["cluster"]["id"] = job_id
        sweep.write()
        for link in folder.glob(".submission_file_*"):  # absolute, so it would break in a copy
            link.unlink()

    def _submit(self, folder: Path, name: str, tasks: Sequence[Task]) -> list[str]:
        from submitit import LocalExecutor, SlurmExecutor, helpers

        c = self.config
        inside = "SLURM_JOB_ID" in os.environ  # whose variables would change the new jobs
        said = io.StringIO()  # submitit prints errors of sbatch, which the exception contains too
        try:
            with helpers.clean_env() if inside else nullcontext(), redirect_stderr(said):
                if self.executor == "local":
                    local = LocalExecutor(folder, c.max_num_timeout)
                    local.update_parameters(
                        timeout_min=c.minutes,
                        signal_delay_s=c.signal_delay_s,
                        tasks_per_node=c.tasks_per_node,
                        gpus_per_node=c.gpus_per_node or 0,
                    )
                    with _detached():
                        held: Any = local.submit_array(tasks)
                    _children.extend(job._process for job in held)
                else:
                    slurm = SlurmExecutor(folder, c.max_num_timeout)
                    slurm.update_parameters(**self._describe(name, len(tasks)))
                    held = slurm.submit_array(tasks)
        except (RuntimeError, OSError) as error:
            reason = " ".join(f"{error} {said.getvalue() * (not str(error))}".split())
            raise ValueError(f"the jobs cannot be submitted: {reason}") from error
        return [job.job_id for job in held]

    def _describe(self, name: str, count: int) -> dict[str, Any]:
        """Return the settings under submitit's names for SLURM."""
        c = self.config
        same = "partition account qos constraint nodes cpus_per_task gpus_per_node mem setup"
        return {
            **{key: getattr(c, key) for key in [*same.split(), "signal_delay_s"]},
            "job_name": name,
            "time": c.minutes,
            "ntasks_per_node": c.tasks_per_node,
            "array_parallelism": c.array_parallelism or count,
            "wckey": None,
            # Since SLURM 22.05 srun does not take this over from sbatch.
            "srun_args": [f"--cpus-per-task={c.cpus_per_task}"] if c.cpus_per_task else None,
            "additional_parameters": {"requeue": True, **(c.additional_parameters or {})},
        }


_children: list[Any] = []  # processes of local jobs, which may outlive this one


@contextmanager
def _detached() -> Iterator[None]:
    """Let processes that start inside the block ignore Ctrl-C and the end of the terminal.

    The signals with which a cluster announces a preemption are for the tasks, which handle them.
    """
    numbers = [signal.SIGINT, signal.SIGHUP, signal.SIGUSR1, signal.SIGUSR2]
    before = [signal.signal(number, signal.SIG_IGN) for number in numbers]
    try:
        yield
    finally:
        for number, former in zip(numbers, before, strict=True):
            signal.signal(number, former)
