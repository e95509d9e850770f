"""Whether the jobs of a sweep are still on a cluster: their own notes, and what SLURM answers.

Nothing is unpickled. A submission is a folder in jobs/ of the sweep. Each job leaves a note there,
a line of text: running, queued (again) or ended; its id; its exit code, or "-"; the time.
"""

import os
import platform
import re
import subprocess
from collections.abc import Collection, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

JOBS = "jobs"  # folder of the submissions in that of the sweep
QUEUED, RUNNING, ENDED, UNKNOWN = "queued", "running", "ended", "unknown"
LIVE = (QUEUED, RUNNING)
# States of SLURM in which a job has not begun, or begins again.
PENDING = ("PENDING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "CONFIGURING")
ANSWER = 60  # seconds that SLURM's commands have to answer


def make_record(executor: str, submission: str, log_start: int) -> dict[str, Any]:
    """Return what sweep.yaml records of a job, before its id is known."""
    record = {"executor": executor, "submission": submission, "id": None}
    return {**record, "host": platform.node(), "log_start": log_start}


def find_states(
    sweep: Path, records: Mapping[str, Any], ask: bool = True
) -> dict[str, tuple[str, int | None]]:
    """Return {name: (state, exit code)} of submitted jobs.

    The state is queued, running, ended or unknown. The exit code is None unless the job has left
    it; a job that was killed or cancelled has not.

    records: {name: the part "cluster" of the job in sweep.yaml}. They may come from anyone. An id
        that is missing, because the sweep was killed while it submitted, is added.
    ask: whether to ask SLURM; without it, jobs that have left no note are queued.
    """
    notes = {name: _read_note(sweep, name, record) for name, record in records.items()}
    ids = [
        record["id"]
        for name, record in records.items()
        if notes[name][0] in (QUEUED, RUNNING) and record["executor"] == "slurm"
    ]
    queue = _ask_slurm(ids) if ids and ask else None
    found = {}
    for name, record in records.items():
        state, code = notes[name]
        if state in (QUEUED, RUNNING) and ask:
            if record["executor"] == "local":
                state = _look_local(record, state)
            elif queue is None:
                state = UNKNOWN
            else:
                # A job that begins, or is about to be requeued, has left its note before.
                answer = queue.get(record["id"], ENDED)
                state = ENDED if answer == ENDED else QUEUED if answer in PENDING else state
        found[name] = state, code
    return found


def _read_note(sweep: Path, name: str, record: Any) -> tuple[str, int | None]:
    """Return the state and exit code that a job has left; ended if it never was submitted.

    Its id is taken from the note if the record lacks it.
    """
    if not isinstance(record, dict) or record.get("executor") not in ("slurm", "local"):
        return ENDED, None
    submission = str(record.get("submission"))
    if not re.fullmatch("[0-9a-f]{8}", submission):
        return ENDED, None
    words: list[str] = []
    with suppress(OSError):
        file = sweep / JOBS / submission / f"{name}.txt"
        words = file.read_text(encoding="utf-8", errors="replace").split()
    state, job_id, code, *_ = [*words, "", "", ""]
    record["id"] = str(record.get("id") or job_id)
    if state == ENDED or not re.fullmatch(r"\d+(_\d+)?", record["id"]):
        return ENDED, int(code) if re.fullmatch(r"-?\d+", code) else None
    return (RUNNING if state == RUNNING else QUEUED), None


def _look_local(record: Mapping[str, Any], state: str) -> str:
    """Return the state of a job of submitit's local executor; its id is that of a process."""
    if record.get("host") != platform.node():
        return UNKNOWN
    try:
        os.kill(int(record["id"]), 0)
        command = Path("/proc", record["id"], "cmdline")
        held = record["submission"] in command.read_text() if Path("/proc/self").exists() else True
        return state if held else ENDED  # another process has the number now
    except OSError:
        return ENDED


def _ask_slurm(ids: Collection[str]) -> dict[str, str] | None:
    """Return the states of those jobs that are queued or running; None if SLURM does not answer."""
    jobs = ",".join(sorted({job_id.partition("_")[0] for job_id in ids}))
    code, out, err = _call("squeue", "--noheader", "--array", "--format=%i|%T", f"--jobs={jobs}")
    if code != 0 and "Invalid job id" not in err:
        return None
    pairs = (line.strip().partition("|") for line in out.splitlines())
    return {job_id: state for job_id, _, state in pairs}


def explain_end(job_id: str) -> str:
    """Return the state with which SLURM's accounting has recorded the end of a job, or ""."""
    code, out, _ = _call("sacct", "--noheader", "--parsable2", "--format=JobID,State", "-j", job_id)
    pairs = [line.strip().split("|")[:2] for line in out.splitlines()] if code == 0 else []
    return next((pair[1] for pair in pairs if pair[0] == job_id and len(pair) == 2), "")


def is_held(job_id: str) -> bool:
    """Return whether SLURM runs a job on: it was neither cancelled nor requeued already."""
    code, out, _ = _call("scontrol", "--oneliner", "show", "job", job_id)
    return code == 0 and "JobState=RUNNING" in out


def _call(*command: str) -> tuple[int, str, str]:
    try:
        done = subprocess.run(
            command,
            capture_output=True,
            text=True,
            errors="replace",
            timeout=ANSWER,
            start_new_session=True,  # which Ctrl-C does not reach
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        return 1, "", str(error)
    return done.returncode, done.stdout, done.stderr
