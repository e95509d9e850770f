"""Compare one process with several ranks on the same cores: updates and environment steps a second.

usage: python experiments/ranks/throughput.py [rounds=3] [ranks=2] [KEY=VALUE …]

KEY=VALUE are overrides of `python -m worldloom.run`, for both. One process has as many threads as
there are ranks with one thread each. They run in turns. Rates are those between the first and the
last row of metrics.csv, so start, prefill and the first updates do not count.
"""

import csv
import os
import statistics
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

SETTINGS = [
    *("experiment=cartpole", "model=dreamerv3_size1m", "env.num_envs=4"),
    *("training.total_steps=1200", "training.prefill=1024", "training.log_every=5"),
    "training.train_ratio=256",
    *("evaluation.every=0", "evaluation.episodes=2", "checkpoint.every=60min"),
]


def measure(overrides: list[str], ranks: int, threads: int) -> dict[str, float]:
    """Train once; return the rates."""
    env = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    with TemporaryDirectory() as folder:
        processes = ["trainer=ddp", "trainer.accelerator=cpu", f"trainer.devices={ranks}"]
        words = [*SETTINGS, *overrides, f"hydra.run.dir={folder}/run", f"threads={threads}"]
        words += [*processes, "trainer.precision=32-true"] if ranks > 1 else []
        command = [sys.executable, "-m", "worldloom.run", *words]
        subprocess.run(command, env=env, check=True, stdout=subprocess.DEVNULL)
        with Path(folder, "run", "metrics.csv").open(newline="") as file:
            rows = [row for row in csv.DictReader(file) if row["loss/loss"]]
    first, last = rows[0], rows[-1]
    seconds = float(last["seconds"]) - float(first["seconds"])
    names = ("updates", "env_steps")
    return {name: (float(last[name]) - float(first[name])) / seconds for name in names}


def main() -> None:
    """Measure in turns and print the medians and their ratio."""
    given = dict(arg.split("=", 1) for arg in sys.argv[1:])
    rounds, ranks = int(given.pop("rounds", 3)), int(given.pop("ranks", 2))
    overrides = [f"{key}={value}" for key, value in given.items()]
    found: dict[int, list[dict[str, float]]] = {1: [], ranks: []}
    for _ in range(rounds):
        for size, results in found.items():
            results.append(measure(overrides, size, ranks // size))
            print(size, {name: round(rate, 3) for name, rate in results[-1].items()}, flush=True)
    for name in ("updates", "env_steps"):
        pairs = zip(found[ranks], found[1], strict=True)
        ratios = [many[name] / one[name] for many, one in pairs]
        one, many = (statistics.median(x[name] for x in found[size]) for size in found)
        print(
            f"{name}/s: 1 process with {ranks} threads {one:.3f}, {ranks} ranks {many:.3f}; ratio "
            f"{statistics.median(ratios):.2f} ({min(ratios):.2f} to {max(ratios):.2f})"
        )


if __name__ == "__main__":
    main()
