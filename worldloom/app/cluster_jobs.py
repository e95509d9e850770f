"""Jobs of a sweep that were submitted to a cluster, as a `Runner` waits for them."""

import os
import signal
import subprocess
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from worldloom.app.cluster_queue import ENDED, JOBS, QUEUED, UNKNOWN, explain_end, find_states

LOOK = 1.0  # seconds between looks at the notes of the jobs
# Seconds between questions to SLURM, after a change and in the long run.
FIRST, LONGEST = 1.0, 60.0
LATE = 15.0  # seconds in which the note of a job that has ended may still appear on a shared disk
# States of SLURM after which the run itself has to be looked at.
FAILED = ("FAILED", "OUT_OF_MEMORY", "BOOT_FAIL")


class Submitted:
    """A job on a cluster, with the methods of a process that a `Runner` uses.

    record: the part "cluster" of the job in sweep.yaml.
    state: queued or running. told: the state that was printed last.
    returncode: its exit code, once it has ended.
    reason: why it has ended without an exit code, "" if it has one.
    """

    def __init__(self, sweep: Path, name: str, record: Mapping[str, Any], state: str) -> None:
        self.sweep, self.name, self.record, self.state = sweep, name, record, state
        self.note = self.told = state
        self.began = state != QUEUED
        self.returncode: int | None = None
        self.reason = ""
        self.gone: float | None = None  # since when the cluster does not know it

    def poll(self) -> int | None:
        """Return the exit code; None before the end."""
        return self.returncode

    def send_signal(self, number: int) -> None:
        """Cancel the job, which saves its run."""
        with suppress(OSError):
            if self.record["executor"] == "local":
                os.kill(int(self.record["id"]), signal.SIGTERM)
            else:
                subprocess.run(["scancel", self.record["id"]], capture_output=True)

    def end(self, code: int | None) -> None:
        """Take note of the end; without an exit code, ask SLURM's accounting for the reason."""
        self.state, self.returncode = ENDED, code
        if code is not None:
            return
        slurm = self.record["executor"] == "slurm"
        found = explain_end(self.record["id"]) if slurm else ""
        failed = found.startswith(FAILED) or not (found or self.began)
        self.returncode = 1 if failed else -signal.SIGTERM
        self.reason = f"SLURM: {found}" if found else "it ended without an exit code"
        log = self.sweep / JOBS / self.record["submission"] / f"{self.record['id']}_0_log.err"
        with suppress(OSError):
            lines = log.read_text(errors="replace").split("\n")
            said = [line.strip() for line in lines if line.strip()]
            self.reason += f" ({said[-1] if said else 'no message'}; see {log})" * failed


class Queue:
    """The submitted jobs of a sweep that have not ended."""

    def __init__(self, sweep: Path) -> None:
        self.sweep = sweep
        self.jobs: list[Submitted] = []
        self._looked = self._asked = self._changed = 0.0

    def attach(self, records: Mapping[str, Mapping[str, Any]]) -> dict[str, Submitted]:
        """Return the jobs that earlier commands have submitted and that have not ended, by name.

        records: {name: the part "cluster" of the job in sweep.yaml}.

        Raises:
            ValueError: the cluster does not answer, so that they may still run.
        """
        states = find_states(self.sweep, records)
        if lost := [records[name] for name, (state, _) in states.items() if state == UNKNOWN]:
            where = "SLURM" if lost[0]["executor"] == "slurm" else f"this, on {lost[0]['host']}"
            raise ValueError(
                f"job {lost[0]['id']} of the sweep may still be queued or running, but {where} "
                "cannot be asked; try again where squeue works, or on that machine"
            )
        live = {name: state for name, (state, _) in states.items() if state != ENDED}
        return {name: self.add(name, records[name], state) for name, state in live.items()}

    def add(self, name: str, record: Mapping[str, Any], state: str = QUEUED) -> Submitted:
        """Return a submitted job, whose state is kept up to date from now on."""
        job = Submitted(self.sweep, name, record, state)
        self.jobs.append(job)
        self._changed = time.monotonic()
        return job

    def look(self) -> None:
        """Bring the states up to date, at most once a second; SLURM is asked ever more rarely."""
        now = time.monotonic()
        if not self.jobs or now < self._looked + LOOK:
            return
        self._looked, records = now, {job.name: job.record for job in self.jobs}
        notes = find_states(self.sweep, records, ask=False)
        local = all(job.record["executor"] == "local" for job in self.jobs)
        wait = min(LONGEST, max(FIRST, (now - self._changed) / 4))
        answers = {}
        if local or now > self._asked + wait:
            self._asked, answers = now, find_states(self.sweep, records)
        for job in list(self.jobs):
            note, code = notes[job.name]
            before = job.state
            if note == ENDED:
                job.end(code)
            elif note != job.note:
                job.note = job.state = note
            answer, code = answers.get(job.name, (UNKNOWN, None))
            if note != ENDED and answer != UNKNOWN:
                self._hear(job, answer, code, now)
            job.began |= job.state not in (QUEUED, ENDED)
            if job.state != before:
                self._changed = now
        self.jobs = [job for job in self.jobs if job.returncode is None]

    def _hear(self, job: Submitted, answer: str, code: int | None, now: float) -> None:
        """Take note of what the cluster answers about a job."""
        if answer != ENDED:
            job.state, job.gone = answer, None
            return
        job.gone = job.gone or now
        self._changed = now  # ask soon again
        if code is not None or job.record["executor"] == "local" or now > job.gone + LATE:
            job.end(code)


def list_cancel(jobs: list[Submitted]) -> list[str]:
    """Return the commands that cancel jobs, one for each cluster."""
    arrays: dict[str, list[str]] = {}
    for job in jobs:
        base, _, index = job.record["id"].partition("_")
        if job.record["executor"] == "slurm":
            arrays.setdefault(base, []).extend([index] if index else [])
    slurm = [f"'{base}_[{','.join(held)}]'" if held else base for base, held in arrays.items()]
    local = [job.record["id"] for job in jobs if job.record["executor"] == "local"]
    pairs = (("scancel", slurm), ("kill", local))
    return [" ".join([command, *ids]) for command, ids in pairs if ids]
