"""Time updates of DreamerV3 with different representation losses, in turns.

usage: python experiments/representations/updates.py [--size size12m] [--rounds 5] [--batch 8]
       [--length 32] [--obs 3,64,64] [--threads 2] [--precision 32-true]

Ratios are taken within a round, then the median over rounds. See README.md.
"""

import argparse
from collections.abc import Sequence
from statistics import median

import torch

from worldloom.bench import BenchConfig, TrainedModel
from worldloom.memory import keep_freed_memory

FAMILIES = ("dreamerv3", "r2dreamer", "infonce", "dreamerpro")


def measure(options: argparse.Namespace) -> dict[str, list[float]]:
    """Return the seconds of an update of each family, by round."""
    trained, seconds = {}, {family: [] for family in FAMILIES}
    for family in FAMILIES:
        config = BenchConfig(
            model=f"{family}:{options.size}",
            batch=options.batch,
            length=options.length,
            obs=options.obs,
            precision=options.precision,
        )
        torch.manual_seed(0)
        model = TrainedModel(config)
        trained[family] = model, model.random_batch(config)
    for turn in range(options.rounds + 1):
        for family, (model, batch) in trained.items():
            spent = model.update(batch)["update"]
            if turn:  # the first round allocates
                seconds[family].append(spent)
    return seconds


def table(seconds: dict[str, list[float]]) -> str:
    """Return medians, ranges and ratios as a table in Markdown."""
    lines = ["| model | median ms | min | max | it / dreamerv3 |", "|---|---:|---:|---:|---:|"]
    for family, spent in seconds.items():
        ratio = median(a / b for a, b in zip(spent, seconds[FAMILIES[0]], strict=True))
        times = [f"{1e3 * value:,.0f}" for value in (median(spent), min(spent), max(spent))]
        lines.append(f"| {family} | {' | '.join(times)} | {ratio:.2f} |")
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> None:
    """Measure and print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--size", default="size12m")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--length", type=int, default=32)
    parser.add_argument("--obs", default="3,64,64")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--precision", default="32-true")
    options = parser.parse_args(args)
    torch.set_num_threads(options.threads)
    keep_freed_memory()
    print(table(measure(options)))


if __name__ == "__main__":
    main()
