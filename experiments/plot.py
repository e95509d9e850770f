"""Collect the curves of finished runs: python experiments/plot.py FOLDER RUN…

Writes FOLDER/curves.csv (run, seed, step, name, value) and FOLDER/curves.png, in which runs of the
same name= share a style.
"""

import csv
import sys
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
from omegaconf import OmegaConf

NAMES = ("episode/return", "eval/return")  # plotted; "final/return" is one number


def read_run(run: Path) -> list[dict[str, str]]:
    config = OmegaConf.load(run / "config.yaml")
    with (run / "metrics.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    return [
        {
            "run": str(config.name),
            "seed": str(config.seed),
            "step": row["step"],
            "name": name,
            "value": row[name],
        }
        for row in rows
        for name in (*NAMES, "final/return")
        if row.get(name)
    ]


def main() -> None:
    folder, runs = Path(sys.argv[1]), [Path(arg) for arg in sys.argv[2:]]
    folder.mkdir(parents=True, exist_ok=True)
    curves = {run: read_run(run) for run in runs}
    with (folder / "curves.csv").open("w", newline="") as file:
        writer = csv.DictWriter(file, ["run", "seed", "step", "name", "value"])
        writer.writeheader()
        for rows in curves.values():
            writer.writerows(rows)
    kinds = sorted({rows[0]["run"] for rows in curves.values()})
    styles = dict(zip(kinds, ("-", "--", ":", "-."), strict=False))
    figure, axes = plt.subplots(1, 2, figsize=(10, 4), sharey=True)
    for axis, name in zip(axes, NAMES, strict=True):
        for rows in curves.values():
            values: dict[int, list[float]] = {}  # episodes that end together count as their mean
            for row in rows:
                if row["name"] == name:
                    values.setdefault(int(row["step"]), []).append(float(row["value"]))
            points = [(step, mean(found)) for step, found in values.items()]
            kind, seed = rows[0]["run"], rows[0]["seed"]
            label = f"{kind} {seed}" if len(kinds) > 1 else f"seed {seed}"
            axis.plot(*zip(*points, strict=True), styles[kind], label=label, alpha=0.8)
        axis.set(title=name, xlabel="environment steps (offline: updates)")
        axis.grid(alpha=0.3)
    axes[0].legend()
    figure.tight_layout()
    figure.savefig(folder / "curves.png", dpi=110)


if __name__ == "__main__":
    main()
