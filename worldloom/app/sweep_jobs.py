"""The jobs of a sweep: processes that run next to each other, each a worldloom command."""

import os
import signal
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from worldloom.app.cluster import Cluster
from worldloom.app.cluster_jobs import Queue, Submitted
from worldloom.app.cluster_queue import LIVE, QUEUED, RUNNING
from worldloom.app.run_dir import CONFIG, SCORES, is_claimed, read_scores
from worldloom.app.sweep_folder import STOPPED, SweepFolder
from worldloom.envs.workers import count_cores
from worldloom.errors import escape
from worldloom.starting import handling_signals, write_error

POLL = 0.1  # seconds between looks at the processes


@dataclass
class Job:
    """One run of a sweep.

    log: what its process prints. differs: {key: value} in which it differs from the others.
    new, resume: arguments of `python -m worldloom.run` that start the run, and continue it.
    log_start: position in the log at which this process has begun.
    metric: what is scored: "return" for final/return.
    ending: (state, reason) with which the job is stopped before its end; it is not started then.
    """

    name: str
    folder: Path
    log: Path
    differs: dict[str, Any]
    overrides: list[str]
    cfg: DictConfig
    new: list[str]
    resume: list[str]
    process: Any = None
    gpus: list[str] = field(default_factory=list)
    start: float = 0.0
    log_start: int = 0
    metric: str = "return"
    ending: tuple[str, str] | None = None

    @property
    def finished(self) -> bool:
        """Return whether the run has its final scores."""
        return (self.folder / SCORES).is_file()

    @property
    def score(self) -> float | None:
        """Return the final score; None if the run is not finished, or has no environment."""
        if not self.finished:
            return None
        return read_scores(self.folder).get(f"final/{self.metric}")

    def describe_end(self) -> str:
        """Return the last error that the process printed, or else its last line."""
        with self.log.open(errors="replace") as file:
            file.seek(self.log_start)
            lines = [line.strip() for line in file.read().splitlines() if line.strip()]
        said = [line for line in lines if line.startswith(("error:", "stopped by"))] or lines
        code, reason = self.process.returncode, getattr(self.process, "reason", "")
        if reason:
            return f"{said[-1]}, {reason}" if said and lines is not said else reason
        ended = f"killed by {signal.Signals(-code).name}" if code < 0 else f"exit code {code}"
        return said[-1].removesuffix("; to continue:") if said and code >= 0 else ended


class Source:
    """Where a `Runner` takes its jobs from.

    To stop a job, or to keep it from starting, set its `ending`.
    """

    def take(self) -> list[Job]:
        """Return jobs to start, in this order; empty if there are none now."""
        raise NotImplementedError

    def watch(self, job: Job) -> None:
        """Look at a running job, several times a second."""

    def end(self, job: Job, state: str, error: str | None) -> None:
        """Take note that a job has ended, before it is printed."""

    def count(self) -> str:
        """Return how far the sweep is: "2 of 6 finished"."""
        raise NotImplementedError


class JobList(Source):
    """The jobs of a sweep that are known from the start; finished ones are not run again."""

    def __init__(self, sweep: SweepFolder, jobs: Sequence[Job]) -> None:
        self.sweep, self.left = sweep, [job for job in jobs if not job.finished]
        for job in jobs:
            held = sweep.jobs.setdefault(job.name, {})
            on_cluster = held.get("cluster") and held.get("state") in LIVE
            state = "finished" if job.finished else held["state"] if on_cluster else "waiting"
            held.update(differs=job.differs, state=state)
        sweep.write()
        done = len(jobs) - len(self.left)
        _print(f"sweep {sweep.path}: {len(jobs)} jobs, {done} of them finished")

    def take(self) -> list[Job]:
        """Return all jobs at once."""
        left, self.left = self.left, []
        return left

    def count(self) -> str:
        """Return how many jobs of the folder are finished."""
        done = sum(held["state"] == "finished" for held in self.sweep.jobs.values())
        return f"{done} of {len(self.sweep.jobs)} finished"


class Runner:
    """Runs the jobs of a sweep, `most` at a time, and prints when each starts and ends.

    A signal is passed on to the jobs, which save; no other job starts after it. Jobs on a cluster
    stay there; the next command with the same folder waits for them.

    cluster: where jobs are submitted; None for processes of this one.
    """

    def __init__(
        self, sweep: SweepFolder, most: int, source: Source, cluster: Cluster | None = None
    ) -> None:
        self.sweep, self.most, self.source, self.cluster = sweep, most, source, cluster
        self.queue = Queue(sweep.path)
        self.waiting: list[Job] = []
        self.running: list[Job] = []
        self.signal: int | None = None
        self._told: set[str] = set()
        self._stopped: set[str] = set()
        self._gpus = find_gpus() if most > 1 and cluster is None else []

    def run(self) -> None:
        """Run all jobs of the source. Also after an error, no process is left behind."""
        with handling_signals(self._receive):
            try:
                self._fill()
                while self._is_needed():
                    time.sleep(POLL)
                    self.queue.look()
                    for job in list(self.running):
                        self.source.watch(job)
                        if job.process.poll() is not None:
                            self._end(job)
                        elif isinstance(job.process, Submitted) and job.process.told != (
                            job.process.state
                        ):
                            self._change(job, job.process)
                        elif job.ending and job.name not in self._stopped:
                            self._stopped.add(job.name)
                            job.process.send_signal(signal.SIGTERM)
                    self._fill()
            except BaseException:
                self._send(signal.SIGTERM)
                for job in self._own():
                    job.process.wait()
                raise

    def _is_needed(self) -> bool:
        if self.signal is None:
            return bool(self.running or self.waiting)
        return bool(self._own())

    def _own(self) -> list[Job]:
        """Return the running jobs that are processes of this one."""
        return [job for job in self.running if not isinstance(job.process, Submitted)]

    def _fill(self) -> None:
        """Start jobs, except those of which a process of an earlier sweep still saves."""
        ready: list[Job] = []
        while len(self.running) + len(ready) < self.most and self.signal is None:
            for held in list(self.waiting):
                if held.ending:
                    self.waiting.remove(held)
                    self.sweep.update(held.name, state=held.ending[0])
                    self.source.end(held, held.ending[0], None)
            job = next((job for job in self.waiting if not self._is_busy(job)), None)
            if job is not None:
                self.waiting.remove(job)
                if job.finished:  # by a process of an earlier sweep
                    self.sweep.update(job.name, state="finished")
                    self.source.end(job, "finished", None)
                elif self.cluster is None:
                    self._start(job)
                else:
                    ready.append(job)
            elif more := self.source.take():
                self._attach(more)
            else:
                break
        if ready and self.cluster is not None:
            self._submit(ready, self.cluster)

    def _attach(self, jobs: Sequence[Job]) -> None:
        """Wait for those jobs that an earlier command has submitted; let the others be started."""
        held = {job.name: self.sweep.jobs.get(job.name, {}).get("cluster") for job in jobs}
        found = self.queue.attach({name: record for name, record in held.items() if record})
        for job in jobs:
            job.process = found.get(job.name)
            if job.process is None:
                self.waiting.append(job)
                if held[job.name]:
                    self.sweep.update(job.name, state="waiting", cluster=None)
                continue
            self.running.append(job)
            job.start, job.log_start = time.monotonic(), job.process.record.get("log_start", 0)
            self.sweep.update(job.name, state=job.process.state)
            _print(f"{job.name}: still {job.process.state}, job {job.process.record['id']}")

    def _submit(self, jobs: Sequence[Job], cluster: Cluster) -> None:
        """Submit jobs to the cluster, all at once."""
        for job in jobs:
            job.log.parent.mkdir(exist_ok=True)
            with job.log.open("ab") as log:
                job.log_start, job.start = log.tell(), time.monotonic()
            now = {"state": QUEUED, "started": None, "ended": None, "code": None, "error": None}
            self.sweep.jobs.setdefault(job.name, {}).update(now)
        try:
            cluster.submit(self.sweep, jobs)
        except ValueError:
            for job in jobs:
                self.sweep.update(job.name, state="waiting", cluster=None)
            raise
        self.running += jobs
        for job in jobs:
            record = self.sweep.jobs[job.name]["cluster"]
            job.process = self.queue.add(job.name, record)
            _print(f"{job.name}: queued, job {record['id']}")

    def _change(self, job: Job, process: Submitted) -> None:
        """Record and print that a job of a cluster has begun, or was requeued."""
        begins = process.state == RUNNING
        process.told = process.state
        self.sweep.update(job.name, state=process.state, **{"started": _now()} if begins else {})
        job.start = time.monotonic() if begins else job.start
        _print(f"{job.name}: {'started' if begins else 'stopped, and queued again'}")

    def _is_busy(self, job: Job) -> bool:
        """Return whether a process of an earlier sweep still writes a run."""
        busy = is_claimed(job.folder)
        if busy and job.name not in self._told:
            self._told.add(job.name)
            _print(f"{job.name}: waiting for the process that still writes {job.folder}")
        return busy

    def _start(self, job: Job) -> None:
        env = {k: v for k, v in os.environ.items() if k != "HYDRA_FULL_ERROR"}
        env["WORLDLOOM_PARENT"] = str(os.getpid())  # if it is killed, the job saves and ends
        if self.most > 1:
            env["WORLDLOOM_JOBS"] = str(self.most)
            env.setdefault("OMP_NUM_THREADS", str(max(1, count_cores() // self.most)))
        job.gpus = choose_gpus(self._gpus, self.running, job.cfg.trainer.get("devices"))
        if job.gpus:
            env["CUDA_VISIBLE_DEVICES"] = ",".join(job.gpus)
        resumes = (job.folder / CONFIG).is_file()
        job.log.parent.mkdir(exist_ok=True)
        with job.log.open("ab") as log:
            job.log_start, job.start = log.tell(), time.monotonic()
            job.process = subprocess.Popen(
                [sys.executable, "-m", "worldloom.run", *(job.resume if resumes else job.new)],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                env=env,
                start_new_session=True,  # a terminal's Ctrl-C reaches the sweep alone
            )
        self.running.append(job)
        if self.signal is not None:  # it came while the process started
            job.process.send_signal(self.signal)
        now = {"state": "running", "started": _now(), "ended": None, "code": None, "error": None}
        self.sweep.update(job.name, **now, cluster=None)
        on = f" on GPU {', '.join(job.gpus)}" if job.gpus else ""
        _print(f"{job.name}: {'resumed' if resumes else 'started'}{on}")

    def _end(self, job: Job) -> None:
        """Record and print how a process has ended."""
        self.running.remove(job)
        code, error, minutes = job.process.returncode, None, (time.monotonic() - job.start) / 60
        if job.finished:
            state, score = "finished", job.score
            said = "finished" if score is None else f"final {job.metric} {score:.1f}"
        elif job.ending:
            state, said = job.ending
        elif code in STOPPED:
            state, said = "interrupted", f"unfinished ({job.describe_end()})"
        else:
            state, error = "failed", job.describe_end().removeprefix("error: ")
            said = f"failed: {error}"
        self.sweep.update(job.name, state=state, ended=_now(), code=code, error=error)
        self.source.end(job, state, error)
        _print(f"{job.name}: {said} ({minutes:.1f} min; {self.source.count()})")
        if error is not None:
            _print(f"  log: {job.log}")

    def _receive(self, number: int, frame: Any) -> None:
        if self.signal is None:
            name = signal.Signals(number).name
            end = "save, then the sweep stops" if self._own() else "stay queued or running"
            write_error(f"\n{name}: the jobs {end}\n")
        self.signal = self.signal or number
        self._send(number)

    def _send(self, number: int) -> None:
        for job in self._own():
            job.process.send_signal(number)


def find_gpus() -> list[str]:
    """Return the GPUs that this process may use, as CUDA_VISIBLE_DEVICES names them."""
    import torch

    given = os.environ.get("CUDA_VISIBLE_DEVICES")
    count = torch.cuda.device_count()
    return given.split(",")[:count] if given else [str(index) for index in range(count)]


def choose_gpus(gpus: Sequence[str], running: Sequence[Job], devices: Any) -> list[str]:
    """Return the GPUs of a new job: those that the fewest of the running jobs use.

    devices: how many it asks for; if that is not a number, it takes all or names them itself.
    """
    if type(devices) is not int or devices < 1:
        return []
    used = Counter(gpu for job in running for gpu in job.gpus)
    return sorted(gpus, key=lambda gpu: used[gpu])[:devices]


def _now() -> str:
    return datetime.now(timezone.utc).isoformat(timespec="seconds")


def _print(text: str) -> None:
    print(escape(text), flush=True)
