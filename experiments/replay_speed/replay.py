"""Speed of storing rows and drawing sequences, against other replays and against copying memory.

`vectors`: 1000 rows added and a batch of 16 x 65 drawn, with 24 numbers and 6 actions in a row, by
worldloom and by the replays of official DreamerV3, sheeprl and torchrl. `images`: batches of
16 x 64 frames of 3 x 64 x 64 bytes, and copies of as many bytes for comparison.

Everything is measured turn by turn in one process. The others' sources are looked for below
--peers: dreamerv3/ and sheeprl/, as their repositories have them; torchrl where it is installed.
"""

import argparse
import csv
import sys
import tempfile
import time
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import numpy as np
import torch

from worldloom.protocol import ReplayField
from worldloom.training import ReplayBuffer

OBS, ACTIONS, EPISODE = 24, 6, 500
BATCH, LENGTH, FRAMES = 16, 65, 64
FRAME = (3, 64, 64)
# Of size1m.
LATENTS = {"deter": ReplayField((512,), torch.float16), "stoch": ReplayField((32, 4), torch.uint8)}
SAMPLES = 50  # batches drawn in one round


class Steps:
    """The rows that every replay is given: the same for all, made before anything is timed."""

    def __init__(self, num_envs: int) -> None:
        rng = np.random.default_rng(0)
        self.num_envs = num_envs
        self.obs = rng.normal(size=(EPISODE, num_envs, OBS)).astype(np.float32)
        self.actions = rng.uniform(-1, 1, (EPISODE, num_envs, ACTIONS)).astype(np.float32)
        self.rewards = rng.normal(size=(EPISODE, num_envs)).astype(np.float32)
        ticks = np.arange(EPISODE)[:, None] + np.zeros((1, num_envs), int)
        self.is_first, self.is_last = ticks == 0, ticks == EPISODE - 1
        self.is_terminal = np.zeros_like(self.is_last)

    def named(self) -> dict[str, np.ndarray]:
        """Return all fields, [EPISODE, num_envs, ...]."""
        return {
            "obs": self.obs,
            "action": self.actions,
            "reward": self.rewards,
            "is_first": self.is_first,
            "is_last": self.is_last,
            "is_terminal": self.is_terminal,
        }


class Subject(Protocol):
    """A replay under test."""

    def add(self, tick: int) -> None:
        """Store one row of every environment."""

    def sample(self) -> Any:
        """Return a batch of torch tensors with all keys."""


class Worldloom:
    """Our replay: as a script makes it, with the files that a run keeps, or with latents."""

    def __init__(
        self, steps: Steps, capacity: int, folder: Path | None = None, latents: bool = False
    ) -> None:
        envs = steps.num_envs
        kept = LATENTS if latents else None
        self.replay = ReplayBuffer(
            capacity, (OBS,), ACTIONS, num_envs=envs, fields=kept, folder=folder
        )
        self.rows: list[tuple[Any, ...]] = [
            row for row in zip(*steps.named().values(), strict=True)
        ]
        if latents:
            made = {
                name: torch.zeros((envs, *x.shape), dtype=x.dtype) for name, x in LATENTS.items()
            }
            self.rows = [(*row, made) for row in self.rows]

    def add(self, tick: int) -> None:
        self.replay.add(*self.rows[tick])

    def sample(self) -> Any:
        return self.replay.sample(BATCH, LENGTH)


class DreamerV3:
    """The official replay: one step of one worker at a time, batches of numpy arrays."""

    def __init__(self, steps: Steps, capacity: int) -> None:
        from embodied.core.replay import Replay

        self.replay = Replay(length=LENGTH, capacity=capacity, chunksize=1024)
        envs, named = range(steps.num_envs), steps.named().items()
        self.rows = [
            [{name: x[tick, env] for name, x in named} for env in envs] for tick in range(EPISODE)
        ]

    def add(self, tick: int) -> None:
        for env, row in enumerate(self.rows[tick]):
            self.replay.add(row, env)

    def sample(self) -> Any:
        return {name: torch.from_numpy(x) for name, x in self.replay.sample(BATCH).items()}


class Sheeprl:
    """sheeprl's replay: as its DreamerV3 uses it, or without a buffer for each environment."""

    def __init__(self, steps: Steps, capacity: int, independent: bool) -> None:
        from sheeprl.data.buffers import EnvIndependentReplayBuffer, SequentialReplayBuffer

        envs, rows = steps.num_envs, capacity // steps.num_envs
        self.replay = (
            EnvIndependentReplayBuffer(rows, envs, buffer_cls=SequentialReplayBuffer)
            if independent
            else SequentialReplayBuffer(rows, envs)
        )
        named = steps.named().items()
        self.rows = [
            {name: x[tick].reshape(1, envs, -1) for name, x in named} for tick in range(EPISODE)
        ]

    def add(self, tick: int) -> None:
        self.replay.add(self.rows[tick])

    def sample(self) -> Any:
        return self.replay.sample_tensors(BATCH, sequence_length=LENGTH, from_numpy=True)


class TorchRL:
    """torchrl's replay with slices of episodes, whose ends it remembers until a row is added."""

    def __init__(self, steps: Steps, capacity: int) -> None:
        from tensordict import TensorDict
        from torchrl.data import LazyTensorStorage, ReplayBuffer
        from torchrl.data.replay_buffers.samplers import SliceSampler

        several = steps.num_envs > 1
        shape = (steps.num_envs, 1) if several else (1,)
        self.replay = ReplayBuffer(
            storage=LazyTensorStorage(capacity, ndim=len(shape)),
            sampler=SliceSampler(
                slice_len=LENGTH,
                end_key="is_last",
                cache_values=True,
                truncated_key=None,
                init_key=None,
            ),
            batch_size=BATCH * LENGTH,
            dim_extend=len(shape) - 1,
        )
        named = steps.named().items()
        self.rows = [
            TensorDict(
                {name: torch.tensor(x[tick]).reshape(*shape, -1) for name, x in named}, shape
            )
            for tick in range(EPISODE)
        ]

    def add(self, tick: int) -> None:
        self.replay.extend(self.rows[tick])

    def sample(self) -> Any:
        return self.replay.sample().reshape(BATCH, LENGTH)


def find_peers(folder: Path) -> None:
    """Let single modules of the others be imported without what their packages import."""
    for package in ("embodied", "embodied.core", "sheeprl", "sheeprl.data", "sheeprl.utils"):
        repository = "dreamerv3" if package.startswith("embodied") else "sheeprl"
        module = types.ModuleType(package)
        module.__path__ = [str(folder / repository / package.replace(".", "/"))]
        sys.modules[package] = module


def seconds(call: Callable[[], Any]) -> float:
    """Return how long a call takes."""
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def middle(values: list[float]) -> str:
    """Return the median of values, and the least and the greatest."""
    return f"{np.median(values):.3g} ({min(values):.3g}-{max(values):.3g})"


def vectors(num_envs: int, full: bool, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Measure all replays, with room for all rows or with every row replacing the oldest."""
    steps = Steps(num_envs)
    capacity = 20_000 if full else 1_000_000
    subjects: dict[str, Subject] = {
        "worldloom": Worldloom(steps, capacity),
        "worldloom, with a run's files": Worldloom(steps, capacity, folder),
        "worldloom, with latents": Worldloom(steps, capacity, latents=True),
        "dreamerv3": DreamerV3(steps, capacity),
        "sheeprl SequentialReplayBuffer": Sheeprl(steps, capacity, independent=False),
        "sheeprl EnvIndependentReplayBuffer": Sheeprl(steps, capacity, independent=True),
        "torchrl SliceSampler": TorchRL(steps, capacity),
    }
    ticks = [tick % EPISODE for tick in range(1000)]
    adds: dict[str, list[float]] = {name: [] for name in subjects}
    samples: dict[str, list[float]] = {name: [] for name in subjects}
    for subject in subjects.values():
        for tick in range(20_000 // num_envs):
            subject.add(tick % EPISODE)
    for turn in range(rounds + 1):
        shift = turn % len(subjects)  # nobody always comes after the same one
        for name, subject in [*subjects.items()][shift:] + [*subjects.items()][:shift]:
            add = seconds(lambda x=subject: [x.add(tick) for tick in ticks])
            sample = seconds(lambda x=subject: [x.sample() for _ in range(SAMPLES)]) / SAMPLES
            if turn:  # the first round warms up
                adds[name].append(1e6 * add / len(ticks))
                samples[name].append(1e6 * sample)
    others = [name for name in subjects if not name.startswith("worldloom")]
    rows = []
    for name in subjects:
        row = {"envs": num_envs, "replay": "full" if full else "filling", "what": name}
        for what, times in (("add", adds), ("sample", samples)):
            fastest = [min(pair) for pair in zip(*(times[other] for other in others), strict=True)]
            ratios = [x / y for x, y in zip(times[name], fastest, strict=True)]
            row |= {f"{what} us": middle(times[name]), f"{what} / fastest other": middle(ratios)}
        rows.append(row)
    return rows


def images(frames: int, rounds: int, folder: Path) -> list[dict[str, Any]]:
    """Measure drawing frames, and copying as many bytes from random places of as large a memory."""
    rng = np.random.default_rng(0)
    episode = rng.integers(0, 256, (EPISODE + 1, *FRAME), np.uint8)
    buffers = {
        "ram": ReplayBuffer(frames, FRAME, ACTIONS),
        "memmap": ReplayBuffer(frames, FRAME, ACTIONS, storage="memmap", folder=folder),
    }
    none = np.zeros((EPISODE, ACTIONS), np.float32), np.zeros(EPISODE, np.float32)
    for buffer in buffers.values():
        while len(buffer) < buffer.capacity:
            buffer.add_episode(episode, *none)
    count = BATCH * FRAMES
    source = np.ones((frames, *FRAME), np.uint8)
    resident, target = source[:count].copy(), np.ones((count, *FRAME), np.uint8)

    def part() -> np.ndarray:
        start = int(rng.integers(frames - count))
        return source[start : start + count]

    into = torch.from_numpy(target)
    copies: dict[str, Callable[[], Any]] = {
        "torch, one block, into a new array": lambda: torch.from_numpy(part()).clone(),
        "torch, one block, into the same array": lambda: into.copy_(torch.from_numpy(part())),
        "torch, the same block, into the same array": lambda: into.copy_(
            torch.from_numpy(resident)
        ),
        "numpy, one block, into a new array": lambda: part().copy(),
        "numpy, one block, into the same array": lambda: np.copyto(target, part()),
    }
    draws = {name: lambda x=x: x.sample(BATCH, FRAMES) for name, x in buffers.items()}
    times: dict[str, list[float]] = {name: [] for name in (*copies, *draws)}
    for turn in range(rounds + 1):
        for name, call in (copies | draws).items():
            taken = np.median([seconds(call) for _ in range(9)])
            if turn:
                times[name].append(1e3 * float(taken))
    rows = []
    for name in times:
        row = {"what": name, "ms": middle(times[name])}
        for storage in draws:
            ratios = [x / y for x, y in zip(times[name], times[storage], strict=True)]
            row[f"rate of {storage} / this"] = middle(ratios)
        rows.append(row)
    return rows


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("part", choices=["vectors", "images"])
    parser.add_argument("--peers", type=Path, help="folder with the others' repositories")
    parser.add_argument("--envs", type=int, default=1)
    parser.add_argument("--full", action="store_true", help="vectors: replace rows, oldest first")
    parser.add_argument("--frames", type=int, default=100_000)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--folder", help="a disk with room for the frames; a new folder goes there")
    parser.add_argument("--out", type=Path, help="csv to append the figures to")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="replay-", dir=args.folder) as name:
        if args.part == "vectors":
            find_peers(args.peers)
            rows = vectors(args.envs, args.full, args.rounds, Path(name))
        else:
            rows = images(args.frames, args.rounds, Path(name))
    print("| " + " | ".join(rows[0]) + " |", "|---" * len(rows[0]) + "|", sep="\n")
    for row in rows:
        print("| " + " | ".join(str(value) for value in row.values()) + " |")
    if args.out:
        new = not args.out.exists()
        with args.out.open("a", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]))
            if new:
                writer.writeheader()
            writer.writerows(rows)


if __name__ == "__main__":
    main()
