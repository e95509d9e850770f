"""Measure the share of a run's time that pictures and loggers take at its default settings.

usage: python experiments/overhead/pictures.py [updates=150] [RECIPE …]

Each recipe is trained for about `updates` updates with a picture and a row of metrics every 25, so
that updates, rows and pictures alternate in one process; `timings/...` of the run has the time of
each. The share is that of the recipe's whole run: eleven pictures, and a row every
`training.log_every` updates. The first interval, with the prefill and the warm-up, is left out.
"""

import csv
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

from worldloom.app.compose import compose_config

RECIPES = ["cartpole", "catch", "tdmpc2_pendulum"]
EVERY = 25  # updates between pictures, and between rows of metrics
PICTURES = 11  # of a run, at the default settings


def updates_per_step(cfg: object) -> float:
    """Return the updates that follow an environment step."""
    training = cfg.training
    if training.train_ratio is None:
        return 1.0
    return training.train_ratio / (training.batch_size * training.sequence_length)


def train(recipe: str, steps: int, folder: Path) -> list[dict[str, float]]:
    """Run a recipe for some steps; return its rows of timings."""
    words = [f"experiment={recipe}", f"training.total_steps={steps}", f"folder={folder}"]
    words += [f"training.log_every={EVERY}", f"callbacks.open_loop.every={EVERY}"]
    words += ["evaluation.every=0", "evaluation.episodes=1", "training.pretrain=false"]
    subprocess.run([sys.executable, "-m", "worldloom.run", *words], check=True, stdout=sys.stderr)
    with (folder / "metrics.csv").open(newline="") as file:
        rows = [row for row in csv.DictReader(file) if row["timings/update"]]
    return [{k: float(v) for k, v in row.items() if v} for row in rows]


def measure(recipe: str, updates: int) -> dict[str, float]:
    """Return milliseconds per picture, row and update, and the share of pictures and rows."""
    cfg = compose_config(f"experiment={recipe}", "folder=none")
    rate = updates_per_step(cfg)
    with TemporaryDirectory() as scratch:
        prefill = cfg.training.prefill or cfg.training.batch_size * cfg.training.sequence_length
        rows = train(recipe, int(prefill + updates / rate), Path(scratch) / "run")
    rows = rows[1:-1]  # the last interval may be shorter and has no picture
    mean = {name: sum(row.get(f"timings/{name}", 0.0) for row in rows) / len(rows)
            for name in ("pictures", "log", "update", "evaluation", "checkpoint")}  # fmt: skip
    picture, row = EVERY * mean["pictures"], EVERY * mean["log"]
    update = mean["update"] - sum(v for k, v in mean.items() if k != "update")
    count = cfg.training.total_steps * rate
    whole = count * update
    return {
        "picture": picture,
        "row": row,
        "update": update,
        "pictures of a run": PICTURES * picture / whole,
        "rows of a run": row / cfg.training.log_every / update,
    }


def main() -> None:
    """Run the command line."""
    words = [word for word in sys.argv[1:] if "=" not in word]
    options = dict(word.split("=") for word in sys.argv[1:] if "=" in word)
    for recipe in words or RECIPES:
        found = measure(recipe, int(options.get("updates", 150)))
        times = ", ".join(f"{name} {found[name]:.2f} ms" for name in ("picture", "row", "update"))
        shares = {name: value for name, value in found.items() if name.endswith("run")}
        text = ", ".join(f"{name} {value:.2%}" for name, value in shares.items())
        print(f"{recipe}: {times}; {text}; together {sum(shares.values()):.2%}", flush=True)


if __name__ == "__main__":
    main()
