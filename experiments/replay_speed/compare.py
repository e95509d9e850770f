"""Compare adding, sampling and rewriting rows with another checkout of worldloom.

usage: python experiments/replay_speed/compare.py --before FOLDER [--rounds 6]

Each round starts one process per checkout, in alternating order. Prints the median over rounds of
the median call, in microseconds, and the median ratio within rounds.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

from worldloom.training import ReplayBuffer

ENVS, ACTIONS, BATCH, LENGTH = 4, 6, 16, 65
VECTORS, IMAGES = (24,), (3, 64, 64)
LATENTS = {"deter": ((512,), torch.float16), "stoch": ((128,), torch.uint8)}  # size1m
CASES: dict[str, dict[str, Any]] = {
    "vectors, ram": {},
    "vectors, ram and files": {"files": True},
    "vectors and latents, ram": {"latents": True},
    "vectors and latents, ram and files": {"latents": True, "files": True},
    "vectors and latents, memmap": {"latents": True, "files": True, "storage": "memmap"},
    "images, ram": {"shape": IMAGES},
    "images, memmap": {"shape": IMAGES, "files": True, "storage": "memmap"},
}


def declare_latents() -> dict[str, Any]:
    """Return the argument that declares the latents, also to versions before replay fields."""
    try:
        from worldloom.protocol import ReplayField
    except ImportError:
        return {"latents": LATENTS}
    return {"fields": {name: ReplayField(*field) for name, field in LATENTS.items()}}


def time_calls(call: Callable[[], Any], count: int) -> float:
    """Return the median microseconds of a call."""
    seconds = []
    for _ in range(count):
        start = time.perf_counter()
        call()
        seconds.append(time.perf_counter() - start)
    return 1e6 * median(seconds)


def measure(
    folder: Path,
    shape: tuple[int, ...] = VECTORS,
    files: bool = False,
    latents: bool = False,
    storage: str = "ram",
) -> dict[str, float]:
    """Fill a replay past its capacity once, then sample and rewrite."""
    image, declared = len(shape) == 3, declare_latents() if latents else {}
    rows, draws = (3000, 60) if image else (12_000, 300)
    options = declared | ({"folder": folder, "storage": storage} if files else {})
    replay = ReplayBuffer(10_000, shape, ACTIONS, num_envs=ENVS, **options)
    if files:
        replay.finish(replay.state_dict())  # as a run does: blocks are written from now on
    rng = np.random.default_rng(0)
    obs = rng.integers(0, 256, (ENVS, *shape), np.uint8)
    actions = rng.uniform(-1, 1, (ENVS, ACTIONS)).astype(np.float32)
    no = np.zeros(ENVS, bool)
    row = [obs if image else obs.astype(np.float32), actions, np.zeros(ENVS, np.float32)]
    values = {k: torch.zeros(ENVS, *s, dtype=d) for k, (s, d) in LATENTS.items()}
    extra = dict.fromkeys(declared, values)
    replay.add(*row, ~no, no, no, **extra)
    found = {"add": time_calls(lambda: replay.add(*row, no, no, no, **extra), rows)}
    found["sample"] = time_calls(lambda: replay.sample(BATCH, LENGTH), draws)
    if latents:
        new = {name: torch.zeros(BATCH, LENGTH - 1, *s) for name, (s, _) in LATENTS.items()}
        found["sample and rewrite"] = time_calls(lambda: rewrite(replay, new), draws)
    return found


def rewrite(replay: Any, values: dict[str, torch.Tensor]) -> None:
    index = replay.sample(BATCH, LENGTH)["index"]
    if hasattr(replay, "write_fields"):
        replay.write_fields(index, values, LENGTH)
    else:
        replay.write_latents(index, values)


def measure_all() -> dict[str, float]:
    found = {}
    for name, case in CASES.items():
        with tempfile.TemporaryDirectory() as folder:
            each = measure(Path(folder), **case)
        found |= {f"{name}: {what}": value for what, value in each.items()}
    return found


def run(checkout: Path) -> dict[str, float]:
    env = os.environ | {"PYTHONPATH": str(checkout)}
    command = [sys.executable, __file__, "--here"]
    done = subprocess.run(command, env=env, stdout=subprocess.PIPE, text=True, check=True)
    return json.loads(done.stdout)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--before", type=Path, help="another checkout, such as an earlier commit")
    parser.add_argument("--rounds", type=int, default=6)
    parser.add_argument("--here", action="store_true", help="measure this process's worldloom")
    args = parser.parse_args()
    if args.here:
        return print(json.dumps(measure_all()))
    checkouts = [args.before.resolve(), Path(__file__).resolve().parents[2]]
    before, now = [], []
    for turn in range(args.rounds):
        pair = [(before, checkouts[0]), (now, checkouts[1])]
        for results, checkout in pair if turn % 2 == 0 else pair[::-1]:
            results.append(run(checkout))
    print(f"| {'call':<44} | before us | now us | now / before |\n|---|---:|---:|---:|")
    for name in before[0]:
        ratio = median(b[name] / a[name] for a, b in zip(before, now, strict=True))
        middle = [median(each[name] for each in results) for results in (before, now)]
        print(f"| {name:<44} | {middle[0]:.1f} | {middle[1]:.1f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
