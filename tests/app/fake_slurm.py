"""SLURM's commands for tests: they schedule and really run batch scripts on this machine.

`install(folder)` makes sbatch, srun, squeue, sacct, scancel and scontrol in a folder. Jobs are the
files state/ID.json there; each has a process that runs its script, again after a requeue. Signals
reach all processes of a step, but not the batch script, as on a cluster. While the file `full`
exists, jobs stay pending; while `down` exists, squeue fails.
"""

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

HOME = Path(__file__).parent
STATE = HOME / "state"
ENDED = ("COMPLETED", "FAILED", "CANCELLED")


def install(folder):
    """Make the commands in a new folder."""
    (folder / "state").mkdir(parents=True)
    for name in ("sbatch", "srun", "squeue", "sacct", "scancel", "scontrol"):
        text = Path(__file__).read_text()
        (folder / name).write_text(f"#!{sys.executable} -S\n{text}")
        (folder / name).chmod(0o755)


def read(job):
    return json.loads((STATE / f"{job}.json").read_text())


def change(job, **values):
    file = STATE / f"{job}.json"
    held = {**(read(job) if file.exists() else {}), **values}
    temporary = file.with_suffix(f".{os.getpid()}")
    temporary.write_text(json.dumps(held))
    temporary.replace(file)
    return held


def select(wanted):
    """All jobs with an id, or of an array."""
    jobs = sorted(file.stem for file in STATE.glob("*.json"))
    return [job for job in jobs if {job, job.partition("_")[0]} & {*wanted.split(",")}]


def sbatch(script):
    text = Path(script).read_text()
    number = str(1000 + len([*STATE.glob("*.sh")]))
    (STATE / f"{number}.sh").write_text(text)
    if "--partition=none" in text:
        sys.exit("sbatch: error: invalid partition specified: none")
    array = re.search(r"--array=0-(\d+)", text)
    for job in [f"{number}_{i}" for i in range(int(array[1]) + 1)] if array else [number]:
        change(job, state="PENDING", restarts=0, requeue=False, steps=[])
        quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
        subprocess.Popen([sys.argv[0], "--job", job], start_new_session=True, **quiet)
    print(f"Submitted batch job {number}")


def run_job(job):
    number, _, index = job.partition("_")
    text = (STATE / f"{number}.sh").read_text()
    tasks = re.search(r"--ntasks-per-node=(\d+)", text)
    env = {**os.environ, "SLURM_JOB_ID": str(os.getpid()), "SLURM_JOB_NAME": "sweep"}
    env |= {"SLURM_NTASKS": tasks[1] if tasks else "1", "FAKE_JOB": job}
    if index:
        env |= {"SLURM_ARRAY_JOB_ID": number, "SLURM_ARRAY_TASK_ID": index}
    else:
        env["SLURM_JOB_ID"] = number
    while True:
        while (HOME / "full").exists() and read(job)["state"] == "PENDING":
            time.sleep(0.02)
        if read(job)["state"] in ENDED:
            return
        restarts = change(job, state="RUNNING", steps=[])["restarts"]
        if restarts:
            env["SLURM_RESTART_COUNT"] = str(restarts)
        code = subprocess.call(["bash", str(STATE / f"{number}.sh")], env=env)
        held = read(job)
        if not held["requeue"]:
            break
        change(job, state="PENDING", requeue=False, restarts=restarts + 1)
    if held["state"] == "RUNNING":
        change(job, state="FAILED" if code else "COMPLETED")


def srun(*args):
    options = {"--output": "", "--error": ""}
    words = list(args)
    while words[0].startswith("--"):
        word = words.pop(0)
        if word in options:
            options[word] = words.pop(0)
    job, tasks = os.environ["FAKE_JOB"], []
    for rank in range(int(os.environ["SLURM_NTASKS"])):
        files = []
        for pattern in options.values():
            for key, value in {"%A_%a": job, "%j": job, "%t": rank}.items():
                pattern = pattern.replace(key, str(value))
            files.append(Path(pattern or os.devnull).open("a"))  # noqa: SIM115
        env = {**os.environ, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)}
        env |= {
            "SLURM_NODEID": "0",
            "SLURM_JOB_NODELIST": "localhost",
            "SLURM_NODELIST": "localhost",
        }
        env["SLURM_NTASKS_PER_NODE"] = env["SLURM_NTASKS"]
        out, err = files
        tasks.append(
            subprocess.Popen(words, env=env, stdout=out, stderr=err, start_new_session=True)
        )
    change(job, steps=[task.pid for task in tasks])
    sys.exit(max(task.wait() % 256 for task in tasks))


def squeue(*args):
    (HOME / "asked").touch()
    if (HOME / "down").exists():
        sys.exit("slurm_load_jobs error: Unable to contact slurm controller")
    jobs = select(next(arg for arg in args if arg.startswith("--jobs="))[7:])
    if not jobs:
        sys.exit("slurm_load_jobs error: Invalid job id specified")
    for job in jobs:
        if (state := read(job)["state"]) not in ENDED:
            print(f"{job}|{state}")


def sacct(*args):
    for job in select(args[-1]):
        print(f"{job}|{read(job)['state']}\n{job}.0|{read(job)['state']}")


def send(job, number):
    for step in read(job)["steps"]:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(step, number)


def scancel(*args):
    chosen = [arg for arg in args if arg.startswith("--signal=")]
    numbers = [getattr(signal, f"SIG{chosen[0][9:]}")] if chosen else []
    wanted = ",".join(arg for arg in args if not arg.startswith("--"))
    for group, indices in re.findall(r"(\d+)_\[([\d,]+)\]", wanted):
        wanted += "," + ",".join(f"{group}_{index}" for index in indices.split(","))
    for job in select(wanted):
        if not chosen and read(job)["state"] not in ENDED:
            change(job, state="CANCELLED")
        for number in numbers or (signal.SIGCONT, signal.SIGTERM):
            send(job, number)


def scontrol(*args):
    job = args[-1]
    if "show" in args:
        print(f"JobId={job} JobState={read(job)['state']} Reason=None")
    elif args[0] == "requeue" and read(job)["state"] == "RUNNING":
        change(job, requeue=True)
    else:
        sys.exit(f"scontrol: error: cannot {args}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["--job"]:
        run_job(sys.argv[2])
    else:
        globals()[Path(sys.argv[0]).name](*sys.argv[1:])
