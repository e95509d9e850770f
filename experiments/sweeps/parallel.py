"""Compare sweeps that run one job and two jobs at a time on the same cores: wall-clock times.

usage: python experiments/sweeps/parallel.py [rounds=2] [jobs=2] [KEY=VALUE ...]

KEY=VALUE are overrides of `python -m worldloom.run`, for both. Both sweeps train the same four
seeds with one thread each. They run in turns. The acceptance is a ratio below 0.7 on two cores.
"""

import statistics
import subprocess
import sys
import time
from tempfile import TemporaryDirectory

SETTINGS = [
    *("experiment=cartpole", "model=dreamerv3_tiny", "training.total_steps=1500", "threads=1"),
    *("evaluation.every=0", "evaluation.episodes=2", "seed=0,1,2,3"),
]


def measure(overrides: list[str], jobs: int) -> float:
    """Return the seconds that a sweep takes."""
    with TemporaryDirectory() as folder:
        words = [*SETTINGS, *overrides, f"folder={folder}/sweep", f"hydra.launcher.jobs={jobs}"]
        command = [sys.executable, "-m", "worldloom.run", "-m", *words]
        start = time.monotonic()
        subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
        return time.monotonic() - start


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    rounds, jobs = int(given.pop("rounds", 2)), int(given.pop("jobs", 2))
    overrides = [f"{key}={value}" for key, value in given.items()]
    seconds: dict[int, list[float]] = {1: [], jobs: []}
    for _ in range(rounds):
        for number, times in seconds.items():
            times.append(measure(overrides, number))
            print(f"{number} at a time: {times[-1]:.1f} s", flush=True)
    one, several = (statistics.median(times) for times in seconds.values())
    print(f"{jobs} at a time / one at a time: {several / one:.2f}")


if __name__ == "__main__":
    main()
