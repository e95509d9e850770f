"""Measure updates and decisions on a GPU, one kernel at a time and as recorded CUDA graphs.

usage: python experiments/gpu/measure.py [--seconds 10] [--json FILE] [--device cuda]
       [--cases NAME…] [--precisions 32-true bf16-mixed] [--ways eager captured] [--no-reference]

Needs one GPU, installs nothing and takes about ten minutes. It first passes the reference arrays of
the official implementations on the GPU, then times each case in turns and prints one table. The
ways "compiled" and "both" (compiled, then captured) take minutes more to compile.
"""

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from pathlib import Path
from statistics import median
from typing import Any

import torch

from worldloom.bench import BenchConfig, TrainedModel
from worldloom.cuda_graphs import WARM_UP, record_graph
from worldloom.protocol import split_result
from worldloom.training.capture import CapturedLoss, CapturedStep
from worldloom.training.compile import compile_networks
from worldloom.training.precision import computing_in

ROOT = Path(__file__).resolve().parents[2]
IMAGES = {"obs": "3,64,64", "batch": 8, "length": 32}
CASES: dict[str, dict[str, Any]] = {
    "size1m": {"model": "dreamerv3:size1m"},
    "size12m": {"model": "dreamerv3:size12m"},
    "size50m": {"model": "dreamerv3:size50m"},
    "size12m images": {"model": "dreamerv3:size12m", **IMAGES},
    "tdmpc2 5m": {"model": "tdmpc2:5m"},
}
WAYS = ("eager", "compiled", "captured", "both")


@dataclass(frozen=True)
class Row:
    """What one way of computing a case's update took.

    ms: median milliseconds of an update. launches: kernels and graphs that the host launches in an
    update; None without a GPU. decision: milliseconds of a decision in one environment (a plan of
    TD-MPC2). peak: bytes. reason: why nothing was captured.
    """

    case: str
    precision: str
    way: str
    ms: float
    least: float
    launches: int | None
    decision: float
    peak: int
    reason: str


class Update:
    """An update of a case, computed in one way."""

    def __init__(self, config: BenchConfig, way: str) -> None:
        torch.manual_seed(0)
        self.trained, self.captures = TrainedModel(config), way in ("captured", "both")
        if way in ("compiled", "both"):
            compile_networks(self.trained.model)
        self.batch = self.trained.random_batch(config)
        self.loss = CapturedLoss(self.trained.model)
        if self.captures:
            self.trained.optimizer.step = CapturedStep(self.trained.optimizer, self.loss)

    def __call__(self) -> float:
        """Update once; return the seconds."""
        trained, start = self.trained, self.trained.clock()
        found = None
        with computing_in(trained.precision, trained.device):
            if self.captures:
                found = self.loss(self.batch)
            if found is None:
                loss = split_result(trained.model.compute_loss(self.batch))[0]["loss"]
        if found is None:
            loss.backward()
        else:
            self.loss.attach()
        trained.optimizer.step()
        trained.optimizer.zero_grad()
        trained.model.after_update()
        return trained.clock() - start

    def launches(self) -> int | None:
        """Count what the host launches in an update."""
        if self.trained.device.type != "cuda":
            return None
        activities = [torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        with torch.profiler.profile(activities=activities) as profile:
            self()
        names = ("cudaLaunchKernel", "cudaGraphLaunch", "cuLaunchKernel")
        return sum(event.count for event in profile.key_averages() if event.key.startswith(names))


def measure(
    case: str, precision: str, device: str, seconds: float, least: int, ways: Sequence[str]
) -> list[Row]:
    """Time the updates of a case in some ways, in turns, and then the decisions."""
    config = BenchConfig(**CASES[case], precision=precision, device=device)
    spent: dict[str, list[float]] = {way: [] for way in ways}
    updates, peaks = {}, {}
    for way in ways:
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
        updates[way] = Update(config, way)
        for _ in range(WARM_UP + 3):
            updates[way]()
        peaks[way] = torch.cuda.max_memory_allocated() if device == "cuda" else 0
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(spent[ways[0]]) < least:
        for way in ways:
            spent[way].append(updates[way]())
    repeats = 5 if least > 1 else 1
    decisions = {}
    for way, update in updates.items():
        record = record_graph if update.captures else None
        decisions[way] = median(update.trained.act(config, 1, repeats, record))
    return [
        Row(
            case,
            precision,
            way,
            median(spent[way]) * 1e3,
            min(spent[way]) * 1e3,
            updates[way].launches(),
            decisions[way] * 1e3,
            peaks[way],
            updates[way].loss.reason,
        )
        for way in ways
    ]


def pass_reference(device: str) -> str:
    """Run the tests of the reference arrays on a device; return pytest's last line."""
    command = [sys.executable, "-m", "pytest", "-q", "-n0", "-p", "no:cacheprovider"]
    env = {**os.environ, "WORLDLOOM_DEVICE": device}
    done = subprocess.run(
        [*command, "tests/reference"], cwd=ROOT, env=env, capture_output=True, text=True
    )
    return "\n".join(done.stdout.splitlines()[-40 if done.returncode else -1 :])


def table(rows: Sequence[Row]) -> str:
    """Return all rows as a table in Markdown."""
    lines = [
        "| case | precision | way | update ms | least | launches | decision ms | peak MB |",
        "|---|---|---|---:|---:|---:|---:|---:|",
    ]
    for row in rows:
        launches = "" if row.launches is None else f"{row.launches:,}"
        way = f"{row.way}: no, {row.reason}" if row.reason else row.way
        numbers = f"{row.ms:,.2f} | {row.least:,.2f} | {launches} | {row.decision:,.2f}"
        lines.append(
            f"| {row.case} | {row.precision} | {way} | {numbers} | {row.peak / 1e6:,.0f} |"
        )
    return "\n".join(lines)


def main(args: Sequence[str] | None = None) -> list[Row]:
    """Measure all cases, print the table and write the JSON."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--seconds", type=float, default=10.0, help="for each case and precision")
    parser.add_argument("--least", type=int, default=10, help="updates of each case")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--cases", nargs="+", default=list(CASES), choices=list(CASES))
    parser.add_argument("--precisions", nargs="+", default=["32-true", "bf16-mixed"])
    parser.add_argument("--ways", nargs="+", default=["eager", "captured"], choices=WAYS)
    parser.add_argument("--no-reference", action="store_true")
    options = parser.parse_args(args)
    reference = "" if options.no_reference else pass_reference(options.device)
    print(f"reference arrays: {reference or 'not run'}", flush=True)
    rows: list[Row] = []
    for case in options.cases:
        for precision in options.precisions:
            settings = options.device, options.seconds, options.least, options.ways
            found = measure(case, precision, *settings)
            print(*table(found).splitlines()[2:], sep="\n", flush=True)
            rows += found
    name = torch.cuda.get_device_name() if options.device == "cuda" else options.device
    print(f"\n{name}, torch {torch.__version__}\n\n{table(rows)}")
    if options.json:
        result = {"device": name, "torch": torch.__version__, "reference": reference}
        result |= {"date": datetime.now(UTC).date().isoformat(), "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(result, indent=1) + "\n")
    return rows


if __name__ == "__main__":
    main()
