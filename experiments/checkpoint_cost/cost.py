"""Cost of a checkpoint of a large replay for the training that continues meanwhile.

Fills a replay with 64 x 64 frames and the latents of DreamerV3 size12m, then makes checkpoints of
it while rows are added, sequences drawn and their latents written back as fast as they can be.
"""

import argparse
import csv
import shutil
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch

from worldloom.protocol import ReplayField
from worldloom.training import ReplayBuffer

STREAMS = 8
LATENTS = {
    "deter": ReplayField((2048,), torch.float16),
    "stoch": ReplayField((32, 16), torch.uint8),
}
BATCH, LENGTH = 16, 65  # 64 rows that are trained on behind one of context


class Memory:
    """Watch the resident memory of this process: all of it, and its own part (not of files)."""

    def __init__(self) -> None:
        self.most = self.most_own = 0.0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def close(self) -> None:
        self._stop.set()
        self._thread.join()

    def _watch(self) -> None:
        while not self._stop.wait(0.02):
            self.most = max(self.most, status("VmRSS"))
            self.most_own = max(self.most_own, status("RssAnon"))


def status(name: str) -> float:
    """Return a figure of /proc/self/status in GB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name)) * 1024 / 1e9


class Work:
    """What training does with a replay, each part timed."""

    def __init__(self, buffer: ReplayBuffer) -> None:
        rng = np.random.default_rng(0)
        self.buffer = buffer
        self.frames = rng.integers(0, 256, (64, STREAMS, 3, 64, 64), np.uint8)
        shape = (STREAMS, *LATENTS["deter"].shape)
        self.deter = torch.from_numpy(rng.normal(size=shape).astype(np.float16))
        self.latents = {
            "deter": torch.randn(BATCH, LENGTH - 1, 2048),
            "stoch": torch.randint(0, 2, (BATCH, LENGTH - 1, 32, 16)).float(),
        }
        self.steps = 0
        self.seconds: dict[str, list[float]] = {"add": [], "sample": [], "write_fields": []}

    def add(self) -> None:
        no = np.zeros(STREAMS, bool)
        first, last = no | (self.steps % 500 == 0), no | (self.steps % 500 == 499)
        stoch = torch.zeros(STREAMS, 32, 16, dtype=torch.uint8)
        latents = {"deter": self.deter, "stoch": stoch}
        frames = self.frames[self.steps % 64]
        actions, rewards = np.zeros((STREAMS, 6), np.float32), np.zeros(STREAMS, np.float32)
        self.buffer.add(frames, actions, rewards, first, last, no, latents)
        self.steps += 1

    def update(self) -> None:
        """Add a row to each stream, draw a batch and write its latents back."""
        self._timed("add", self.add)
        batch = self._timed("sample", lambda: self.buffer.sample(BATCH, LENGTH))
        self._timed(
            "write_fields", lambda: self.buffer.write_fields(batch["index"], self.latents, LENGTH)
        )

    def longest(self) -> dict[str, float]:
        """Return the longest times in milliseconds since the last call, and forget them."""
        longest = {name: 1000 * max(times, default=0.0) for name, times in self.seconds.items()}
        for times in self.seconds.values():
            times.clear()
        return longest

    def _timed(self, name: str, call: Callable):
        start = time.perf_counter()
        result = call()
        self.seconds[name].append(time.perf_counter() - start)
        return result


def checkpoint(work: Work) -> dict[str, float]:
    """Make a checkpoint, writing it in a thread while work goes on; say what it cost."""
    start = time.perf_counter()
    state = work.buffer.state_dict()
    stall = time.perf_counter() - start
    writer = threading.Thread(target=work.buffer.finish, args=(state,))
    work.longest()
    start, updates = time.perf_counter(), 0
    writer.start()
    while writer.is_alive():
        work.update()
        updates += 1
    finish = time.perf_counter() - start
    work.buffer.keep(state["files"])
    return {
        "state_dict ms": 1000 * stall,
        "finish s": finish,
        "updates/s": updates / finish,
        **{f"longest {name} ms": value for name, value in work.longest().items()},
    }


def rate(work: Work, updates: int = 200) -> dict[str, float]:
    """Work without a checkpoint, for comparison."""
    work.longest()
    start = time.perf_counter()
    for _ in range(updates):
        work.update()
    seconds = time.perf_counter() - start
    longest = {f"longest {name} ms": value for name, value in work.longest().items()}
    return {"updates/s": updates / seconds, **longest}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=1_000_000)
    parser.add_argument("--storage", choices=["ram", "memmap"], default="memmap")
    parser.add_argument("--folder", help="a disk with room for the files; a new folder goes there")
    parser.add_argument("--out", type=Path, help="csv to append the figures to")
    args = parser.parse_args()
    torch.set_num_threads(1)
    folder = Path(tempfile.mkdtemp(prefix="replay-", dir=args.folder))
    rows = []

    def report(what: str, figures: dict[str, float]) -> None:
        size = sum(path.stat().st_size for path in folder.iterdir()) / 1e9
        figures |= {"RSS GB": memory.most, "own GB": memory.most_own, "files GB": size}
        rows.append({"storage": args.storage, "rows": args.rows, "what": what} | figures)
        print(what, *(f"{name} {value:.3g}" for name, value in figures.items()), sep=" | ")
        sys.stdout.flush()
        memory.most = memory.most_own = 0.0

    def new_buffer() -> ReplayBuffer:
        where = {"storage": args.storage, "folder": folder}
        return ReplayBuffer(args.rows, (3, 64, 64), 6, num_envs=STREAMS, fields=LATENTS, **where)

    memory = Memory()
    try:
        at_start = status("VmRSS")
        buffer = new_buffer()
        buffer.finish(buffer.state_dict())  # a run also saves its empty replay first
        print(f"{at_start:.2f} GB resident before;", buffer.resources)
        work = Work(buffer)
        start = time.perf_counter()
        while len(buffer) < buffer.capacity:
            work.add()
        report("fill", {"rows/s": len(buffer) / (time.perf_counter() - start)})
        report("no checkpoint", rate(work))
        report("first checkpoint, all latents", checkpoint(work))
        report("no checkpoint", rate(work))
        report("next checkpoint", checkpoint(work))
        state = buffer.state_dict()
        buffer.finish(state)
        del buffer, work.buffer
        start = time.perf_counter()
        resumed = new_buffer()
        resumed.load_state_dict(state)
        report("resume", {"seconds": time.perf_counter() - start})
        print(f"VmHWM {status('VmHWM'):.2f} GB")
    finally:
        memory.close()
        shutil.rmtree(folder)
    if args.out:
        write(args.out, rows)


def write(path: Path, rows: list[dict]) -> None:
    """Append figures to a csv file with a column for every name."""
    old = list(csv.DictReader(path.open())) if path.exists() else []
    every = old + [
        {k: f"{v:.3g}" if isinstance(v, float) else v for k, v in row.items()} for row in rows
    ]
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, list(dict.fromkeys(k for row in every for k in row)))
        writer.writeheader()
        writer.writerows(every)


if __name__ == "__main__":
    main()
