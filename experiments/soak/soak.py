"""Watch the memory, threads and file descriptors of a run for some minutes.

usage: python experiments/soak/soak.py [minutes=10] [OVERRIDE ...]

Trains DreamerV3 on CartPole with an evaluation, a picture and a checkpoint every few seconds, a
small replay that overwrites itself, and two environment workers. Every 5 seconds it reads /proc:
the resident memory of the run and of all its processes, threads, open files and processes. After a
third of the time, when the replay and the allocator are warm, everything has to stay flat: it
compares the medians of the second and of the last third. The run is then stopped by SIGTERM, and
has to end with 143 and leave no process. The exit code is 0 if all of this holds.
"""

import csv
import os
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import median

PERIOD = 5.0  # seconds between two rows
RUN = [
    *("model=dreamerv3_tiny", "experiment=cartpole", "threads=1", "env.workers=2"),
    *("env.num_envs=4", "training.total_steps=100000000", "training.log_every=20"),
    *("evaluation.every=100", "evaluation.episodes_during=2", "callbacks.open_loop.every=100"),
    *("data.capacity=4000", "checkpoint.every=50updates"),
]
# {column: how much the median of the last third may exceed that of the second}
LIMITS = {"run_mb": 1.05, "all_mb": 1.05, "threads": 1.0, "files": 1.0, "processes": 1.0}


def find_family(root: int) -> list[int]:
    """Return the numbers of a process and all processes that it has started."""
    parents: dict[int, list[int]] = {}
    for path in Path("/proc").glob("[0-9]*"):
        try:
            fields = (path / "stat").read_text().rpartition(")")[2].split()
        except OSError:  # it has just ended
            continue
        if fields[0] != "Z":
            parents.setdefault(int(fields[1]), []).append(int(path.name))
    family = [root]
    for pid in family:
        family += parents.get(pid, [])
    return family


def read_row(root: int, seconds: float) -> dict[str, float]:
    """Return what a run uses: memory in MB, threads, open files and processes."""
    memory, threads, files = {}, 0, 0
    family = find_family(root)
    for pid in family:
        try:
            lines = Path(f"/proc/{pid}/status").read_text().splitlines()
            status = dict(line.split(":", 1) for line in lines)
            memory[pid] = int(status["VmRSS"].split()[0]) / 1024
            threads += int(status["Threads"])
            files += len(os.listdir(f"/proc/{pid}/fd"))
        except (OSError, KeyError):
            continue
    return {
        "seconds": round(seconds, 1),
        "run_mb": round(memory.get(root, 0.0), 1),
        "all_mb": round(sum(memory.values()), 1),
        "threads": threads,
        "files": files,
        "processes": len(family),
    }


def judge(rows: list[dict[str, float]]) -> list[str]:
    """Return a line for every column, which ends with "grows" if the column is not flat."""
    third = len(rows) // 3
    lines = []
    for name, limit in LIMITS.items():
        middle = median(row[name] for row in rows[third : 2 * third])
        last = median(row[name] for row in rows[2 * third :])
        text = f"{name}: {middle:g} -> {last:g}, at most {max(row[name] for row in rows):g}"
        lines.append(text + "  grows" * (last > middle * limit))
    return lines


def main() -> None:
    """Train, watch and report."""
    args = sys.argv[1:]
    given = [arg for arg in args if arg.startswith("minutes=")]
    minutes = float(given[-1].partition("=")[2]) if given else 10.0
    overrides = [arg for arg in args if arg not in given]
    rows: list[dict[str, float]] = []
    with tempfile.TemporaryDirectory() as place:
        folder, log = Path(place) / "run", Path(place) / "log"
        command = [sys.executable, "-m", "worldloom.run", *RUN, *overrides, f"folder={folder}"]
        with log.open("w") as opened:
            process = subprocess.Popen(command, stdout=opened, stderr=subprocess.STDOUT)
        while not (folder / "checkpoints" / "previous.ckpt").exists() and process.poll() is None:
            time.sleep(0.5)
        start = time.monotonic()
        family: list[int] = []
        while process.poll() is None and time.monotonic() < start + 60 * minutes:
            rows.append(read_row(process.pid, time.monotonic() - start))
            family = find_family(process.pid)
            time.sleep(PERIOD)
        process.send_signal(signal.SIGTERM)
        code = process.wait()
        time.sleep(PERIOD)
        left = [pid for pid in family if Path(f"/proc/{pid}").exists()]
        said = log.read_text()
        size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file()) / 1e6
    if len(rows) < 6:
        sys.exit(f"the run ended too early (exit code {code}):\n{said}")
    with Path("soak.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    lines = judge(rows)
    print(*lines, sep="\n")
    print(f"{said.count('evaluation at')} evaluations; the folder has {size:.1f} MB")
    print(f"SIGTERM: exit code {code}, {len(left)} processes left; rows: soak.csv")
    faults = [word for word in ("WARNING", "Traceback") if word in said]
    if faults:
        print(f"the run printed {', '.join(faults)}:\n{said}")
    sys.exit(bool(faults or left or code != 143 or any(x.endswith("grows") for x in lines)))


if __name__ == "__main__":
    main()
