"""What a job of a sweep runs on a cluster: a worldloom command, continued whenever it is requeued.

submitit loads a `Task` from a folder that only its submission writes. Nothing large is imported.
"""

import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from worldloom.app.cluster_queue import ENDED, JOBS, QUEUED, RUNNING, is_held
from worldloom.app.run_dir import CONFIG, SCORES, is_claimed
from worldloom.app.sweep_folder import read_record
from worldloom.files import write_text

POLL = 0.1  # seconds between looks at the process
# Exit codes of a run that was saved, or killed while it started, and continues in the same job.
REQUEUED = {
    code
    for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM)
    for code in (128 + number, -number)
}


@dataclass
class Task:
    """A run of a sweep, as submitit calls it in each process of the job.

    submission: name of the folder in jobs/ that belongs to this submission.
    cwd: working directory. new, resume: arguments that start the run, and continue it.
    """

    name: str
    sweep: Path
    submission: str
    log: Path
    cwd: Path
    new: list[str]
    resume: list[str]
    job_id: str = ""
    process: Any = None
    waiter: Any = None  # the thread that waits for the process

    def __call__(self) -> None:
        """Run the command; end with its exit code."""
        from submitit import JobEnvironment

        os.chdir(self.cwd)
        place = JobEnvironment()
        if place.global_rank > 0:  # as the first process says, which also reports failures
            self._run(place)
            return
        self.job_id = place.job_id
        if self._is_replaced():
            print(f"{self.name} was submitted again, so this job ends")
            return
        self._note(RUNNING)
        while (self.sweep / self.name).is_dir() and is_claimed(self.sweep / self.name):
            time.sleep(POLL)  # a process of an earlier job still saves
        if (self.sweep / self.name / SCORES).is_file():
            self._end(0)
        code = self._run(place)
        if code in REQUEUED and (abs(code) % 128 != signal.SIGTERM or is_held(place.job_id)):
            signal.raise_signal(signal.SIGUSR2)  # to submitit, which requeues the job
        self._end(code)

    def checkpoint(self) -> Any:
        """Stop the run, which saves; return what the requeued job calls. submitit calls it."""
        from submitit.core.utils import DelayedSubmission

        for number in (signal.SIGUSR1, signal.SIGUSR2, signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
        if self.waiter is not None:
            self._send(signal.SIGUSR2, None)
            if (code := self._wait()) not in REQUEUED:
                self._end(code)
        self._note(QUEUED)
        self.process = self.waiter = None
        return DelayedSubmission(self)

    def _run(self, place: Any) -> int:
        """Run the command in a process of its own; return its exit code."""
        from submitit import JobEnvironment

        requeue: Any = signal.getsignal(getattr(signal, f"SIG{JobEnvironment.USR_SIG}"))
        for number in (signal.SIGUSR1, signal.SIGUSR2):
            signal.signal(number, requeue)
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, self._send)
        drop = ("HYDRA_FULL_ERROR", "SLURM_RESTART_COUNT")  # this class continues the run
        env = {k: v for k, v in os.environ.items() if k not in drop}
        env |= {"WORLDLOOM_PARENT": str(os.getpid()), **_name_ranks(place)}
        resumes = (self.sweep / self.name / CONFIG).is_file()
        command = [sys.executable, "-m", "worldloom.run", *(self.resume if resumes else self.new)]
        with self.log.open("ab") as log:  # the others print into submitit's logs
            out = log if place.global_rank == 0 else None
            self.process = subprocess.Popen(
                command, env=env, stdin=subprocess.DEVNULL, stdout=out, stderr=out
            )
        # Not Popen.poll, which a signal handler cannot call while it is being called.
        self.waiter = threading.Thread(target=self.process.wait, daemon=True)
        self.waiter.start()
        return self._wait()

    def _wait(self) -> int:
        while self.waiter.is_alive():
            time.sleep(POLL)
        code: int = self.process.returncode
        return code

    def _send(self, number: int, frame: Any) -> None:
        if self.process is not None and self.process.returncode is None:
            self.process.send_signal(number)

    def _is_replaced(self) -> bool:
        """Return whether the sweep has submitted this run again, after it lost this job's id."""
        with suppress(ValueError, KeyError, TypeError):
            cluster = read_record(self.sweep)["jobs"][self.name]["cluster"]
            return cluster is None or bool(cluster["submission"] != self.submission)
        return False

    def _end(self, code: int) -> None:
        self._note(ENDED, code)
        sys.exit(code if code >= 0 else 128 - code)

    def _note(self, state: str, code: int | str = "-") -> None:
        """Leave a note for the sweep, which reads it without asking the cluster."""
        now = datetime.now(timezone.utc).isoformat(timespec="seconds")
        file = self.sweep / JOBS / self.submission / f"{self.name}.txt"
        with suppress(OSError):
            write_text(file, f"{state} {self.job_id} {code} {now}\n")


def _name_ranks(place: Any) -> dict[str, str]:
    """Return torchrun's variables for a job of several processes; srun's need no translation."""
    if place.cluster != "local" or place.num_tasks == 1:
        return {}
    names = {"RANK": place.global_rank, "LOCAL_RANK": place.local_rank}
    names |= {"WORLD_SIZE": place.num_tasks, "LOCAL_WORLD_SIZE": place.num_tasks}
    names |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": 20_000 + int(place.job_id) % 20_000}
    return {name: str(value) for name, value in names.items()}
