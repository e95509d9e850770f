"""Time whole training updates of worldloom beside those of other implementations, turn by turn.

usage: python experiments/speed/updates.py [--size size1m|size12m|size12m-images|5m]
       [--peers FOLDER] [--before FOLDER] [--rounds 7] [--only NAME…] [--threads 2]

NAME-bf16 computes matrix products in bfloat16: worldloom in bf16-mixed, the official JAX code with
its own default, bfloat16. --before is another checkout of worldloom, such as an earlier commit,
which takes its turns too.

Every implementation lives in a process of its own, with its own Python, and works only when asked:
in each round all of them make updates and decisions, one after another, and a matrix product is
timed before each turn. So other load on the machine slows all of them down alike, and
ratios are taken within a round. See README.md for how to install the others.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from statistics import median

import torch

HERE = Path(__file__).resolve().parent
CLOCK_TICKS = os.sysconf("SC_CLK_TCK")
DREAMER = {"batch": 16, "length": 64, "horizon": 15}
IMAGES = {"batch": 8, "length": 32, "horizon": 15, "obs": [3, 64, 64]}
JOBS = {
    "size1m": DREAMER | {"size": "size1m"},
    "size12m": DREAMER | {"size": "size12m"},
    "size12m-images": IMAGES | {"size": "size12m"},
    "5m": {"size": "5m", "batch": 256, "horizon": 3},
}
# FLOPs of the official update, which the floor is the time of: 29.1 and 428.9 were counted
# in the jaxpr after removing what nothing depends on, 39.9 (and a plan's 46.4) by torch.
WORK = {
    "size1m": {"update": 29.1e9},
    "size12m": {"update": 428.9e9},
    "5m": {"update": 39.9e9, "plan, 1 env": 46.4e9},
}
REPEATS = {"update": 1, "policy": 30, "plan": 1}  # timed in a turn
MATRIX = 2048


@dataclass(frozen=True)
class Entrant:
    """A driver, the clone it drives and the virtual environment it runs in, both in --peers.

    Without a venv it is worldloom itself.
    """

    driver: str
    clone: str = ""
    venv: str = ""
    options: dict = field(default_factory=dict)


BF16 = {"precision": "bf16-mixed"}
ENTRANTS = {
    "worldloom": Entrant("worldloom_own.py"),
    "worldloom-bf16": Entrant("worldloom_own.py", options=BF16),
    "before": Entrant("worldloom_own.py"),
    "dreamerv3": Entrant("dreamerv3_official.py", "dreamerv3", "venv-jax"),
    "dreamerv3-bf16": Entrant("dreamerv3_official.py", "dreamerv3", "venv-jax", BF16),
    "r2dreamer": Entrant("r2dreamer.py", "r2dreamer", "venv-torch"),
    "sheeprl": Entrant("sheeprl_dreamer_v3_5.py", "", "venv-torch"),
    "tdmpc2": Entrant("tdmpc2_official.py", "tdmpc2", "venv-torch"),
}


def entrants(size, only=None, before=False):
    """Return the names that implement the model of this size, worldloom always and first.

    only: the other names that are wanted; None for all of them.
    """
    unfit = ("dreamerv3", "r2dreamer", "sheeprl") if size == "5m" else ("tdmpc2",)
    names = [name for name in ENTRANTS if name.removesuffix("-bf16") not in unfit]
    wanted = ENTRANTS if only is None else [*only, "before"]
    names = [name for name in names if name in wanted or name == "worldloom"]
    return [name for name in names if name != "before" or before]


class Child:
    """A process that builds one implementation and times it on request."""

    def __init__(self, name, size, peers, before=None):
        entrant = ENTRANTS[name]
        python = f"{peers}/{entrant.venv}/bin/python" if entrant.venv else sys.executable
        if not Path(python).exists():
            raise FileNotFoundError(
                f"{name} needs {python}; install it as README.md says, or --only"
            )
        job = JOBS[size] | entrant.options
        job["folder"] = f"{peers}/{entrant.clone}" * bool(entrant.clone)
        root = Path(before).resolve() if name == "before" else HERE.parents[1]
        environment = os.environ | ({} if entrant.venv else {"PYTHONPATH": str(root)})
        drivers = root / "experiments" / "speed" / "drivers"
        self.name, self.log = name, tempfile.TemporaryFile("w+")  # noqa: SIM115
        self.process = subprocess.Popen(
            [python, str(drivers / entrant.driver), json.dumps(job)],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True,
            env=environment,
        )  # fmt: skip
        self.facts = self._answer()

    def time(self, task, repeats):
        """Return the seconds of `repeats` runs of a task."""
        print(json.dumps({"task": task, "repeats": repeats}), file=self.process.stdin, flush=True)
        return self._answer()["seconds"]

    def cpu_seconds(self):
        """Return the processor time that the process has used, of all its threads."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / CLOCK_TICKS

    def _answer(self):
        line = self.process.stdout.readline()
        if not line:
            self.process.wait()
            self.log.seek(0)
            tail = "".join(self.log.readlines()[-15:])
            raise RuntimeError(f"{self.name} ended; its last words:\n{tail}")
        return json.loads(line)


def one_round(children):
    """Let everyone work once; return seconds by (name, task), "product", and idle processor use.

    Idle use is the largest share of a turn for which one of those who wait keeps a core busy.
    """
    seconds, products, idle = {}, [], 0.0
    square = torch.randn(MATRIX, MATRIX)
    for child in children:
        for _ in range(2):  # the first one wakes up the threads
            start = time.perf_counter()
            torch.mm(square, square)
            product = time.perf_counter() - start
        products.append(product)
        waiting = [other for other in children if other is not child]
        used, start = [other.cpu_seconds() for other in waiting], time.perf_counter()
        for task in child.facts["tasks"]:
            # The first run of a turn is left out: memory and threads have been idle for long.
            times = child.time(task, 1 + REPEATS[task.split(",")[0]])[1:]
            seconds[child.name, task] = median(times)
        wall = time.perf_counter() - start
        idle = max(
            [idle, *((o.cpu_seconds() - u) / wall for o, u in zip(waiting, used, strict=True))]
        )
    return {"seconds": seconds, "product": median(products), "idle": idle}


def table(children, rounds, work):
    """Return one line per task and implementation; ratios are medians over rounds."""
    rate = 2 * MATRIX**3
    facts = {child.name: child.facts for child in children}
    lines = [
        "| what | implementation | median ms | min | max | worldloom / it | it / floor | GFLOP |",
        "|---|---|---:|---:|---:|---:|---:|---:|",
    ]
    tasks = dict.fromkeys(task for child in children for task in child.facts["tasks"])
    for task in tasks:
        counted = {"update": "flops", "plan, 1 env": "plan flops"}.get(task, "")
        for name in facts:
            times = [r["seconds"][name, task] for r in rounds if (name, task) in r["seconds"]]
            if not times:
                continue
            ours = [r["seconds"]["worldloom", task] for r in rounds]
            shown = [f"{f(times) * 1e3:,.1f}" for f in (median, min, max)]
            shown.append(f"{median(a / b for a, b in zip(ours, times, strict=True)):.3f}")
            floors = [r["product"] * work.get(task, 0) / rate for r in rounds]
            over = [t / f for t, f in zip(times, floors, strict=True) if f]
            shown.append(f"{median(over):.2f}" if over else "")
            flops = facts[name].get(counted)
            shown.append(f"{flops / 1e9:.1f}" if flops else "")
            lines.append(f"| {task} | {name} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def remarks(children, rounds):
    """Return what was run, and what the reader of the table needs to judge it."""
    rates = [2 * MATRIX**3 / r["product"] / 1e9 for r in rounds]
    lines = [
        f"{child.name}: {child.facts['version']}, {child.facts['parameters']:,} parameters, "
        f"losses of the first updates {[round(loss, 3) for loss in child.facts['losses']]}"
        for child in children
    ]
    lines.append(
        f"floor: the official update's FLOPs at the rate of a {MATRIX} x {MATRIX} matrix product, "
        f"{median(rates):.0f} ({min(rates):.0f} to {max(rates):.0f}) GFLOP/s"
    )
    lines.append(f"processor use of those who wait: at most {max(r['idle'] for r in rounds):.1%}")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0])
    parser.add_argument("--size", choices=list(JOBS), default="size1m", help="5m is TD-MPC2")
    parser.add_argument("--peers", default=os.environ.get("WORLDLOOM_PEERS", "/work/peers"))
    parser.add_argument("--before", help="another checkout of worldloom")
    parser.add_argument("--rounds", type=int, default=7)
    choices = [name for name in ENTRANTS if name not in ("worldloom", "before")]
    parser.add_argument("--only", nargs="*", choices=choices)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    if hasattr(os, "sched_setaffinity"):  # JAX has no other setting; children inherit it
        os.sched_setaffinity(0, sorted(os.sched_getaffinity(0))[: given.threads])
    os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = str(given.threads)
    torch.set_num_threads(given.threads)
    children = []
    for name in entrants(given.size, given.only, bool(given.before)):
        children.append(Child(name, given.size, given.peers, given.before))
        print(name, "is ready", file=sys.stderr)
    rounds = []
    for count in range(given.rounds):
        rounds.append(one_round(children))
        print(f"round {count + 1} of {given.rounds}", file=sys.stderr)
    print(f"size {given.size}, {given.rounds} rounds, {given.threads} threads\n")
    print(table(children, rounds, WORK.get(given.size, {})), remarks(children, rounds), sep="\n\n")


if __name__ == "__main__":
    main()
