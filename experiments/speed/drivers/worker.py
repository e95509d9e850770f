"""Time an implementation when a parent process asks for it, over standard input and output.

A driver calls `serve(build)`. Its settings come as JSON in the first argument. It builds the
implementation, makes sure that it trains, writes a line of facts, and answers every line of JSON
by another: {"task": "update", "repeats": 1} -> {"seconds": [1.23]}. Whatever else the
implementation prints goes to standard error.
"""

import json
import math
import os
import sys
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class Job:
    """What to build.

    size: size1m or size12m of DreamerV3, or 5m of TD-MPC2.
    folder: the implementation's clone, if there is one.
    obs: length of a vector, or [3, height, width] of an image of uint8.
    precision: 32-true, or bf16-mixed: products in bfloat16, weights in float32.
    """

    size: str
    folder: str = ""
    batch: int = 16
    length: int = 64
    horizon: int = 15
    obs: int | list[int] = 24
    actions: int = 6
    envs: int = 16
    precision: str = "32-true"


def is_image(obs: int | list[int]) -> bool:
    """Return whether observations of this shape are images."""
    return not isinstance(obs, int)


@dataclass
class Implementation:
    """Functions to time, by task; "update" returns its loss, as something that float() takes.

    weights: one number per network that changes when the network is trained.
    facts: what a reader of the table may want to know.
    """

    tasks: dict[str, Callable[[], Any]]
    weights: Callable[[], dict[str, float]]
    facts: dict[str, Any] = field(default_factory=dict)


def serve(build: Callable[[Job], Implementation]) -> None:
    """Answer requests until standard input ends."""
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # the implementation's own prints must not mix with the answers
    job = Job(**json.loads(sys.argv[1]))
    if job.folder and not Path(job.folder).is_dir():
        sys.exit(f"{job.folder} is no folder; clone the implementation there, see README.md")
    made = build(job)
    check_training(made)
    for name, task in made.tasks.items():
        if name != "update":
            task()  # warms up
    made.facts["tasks"] = list(made.tasks)
    print(json.dumps(made.facts), file=answers, flush=True)
    for line in sys.stdin:
        request = json.loads(line)
        task, seconds = made.tasks[request["task"]], []
        for _ in range(request["repeats"]):
            start = time.perf_counter()
            task()
            seconds.append(time.perf_counter() - start)
        print(json.dumps({"seconds": seconds}), file=answers, flush=True)


def check_training(made: Implementation, updates: int = 3) -> None:
    """Update a few times; raise RuntimeError unless losses are finite and every network changes."""
    before = made.weights()
    losses = [float(made.tasks["update"]()) for _ in range(updates)]
    after = made.weights()
    made.facts["losses"] = losses
    same = [name for name in before if before[name] == after[name]]
    if same or not all(math.isfinite(loss) for loss in losses):
        raise RuntimeError(f"{updates} updates, losses {losses}; not trained: {same or 'nothing'}")


def absolute_sum(tensors: Iterable[Any]) -> float:
    """Add up the absolute values of torch tensors."""
    return sum(float(tensor.detach().double().abs().sum()) for tensor in tensors)


def torch_weights(modules: dict[str, Any]) -> dict[str, float]:
    """Add up the absolute weights of each torch module."""
    return {name: absolute_sum(module.parameters()) for name, module in modules.items()}


def torch_flops(update: Callable[[], Any]) -> int:
    """Return the operations of the matrix products in one update, backward included."""
    from torch.utils.flop_counter import FlopCounterMode

    with FlopCounterMode(display=False) as counter:
        counter.mod_tracker.__exit__()  # totals are enough, and counting by module fails on views
        update()
    return counter.get_total_flops()
