"""Speed of drawing slices from a full replay of 1,000,000 rows: by start and by episode.

One row is added before every batch of 256 slices of 4 rows, as TD-MPC2 trains. Everything is
measured turn by turn in one process.
"""

import argparse
import time

import numpy as np

from worldloom.training import ReplayBuffer

ROWS, OBS, ACTIONS, BATCH, LENGTH, BATCHES = 1_000_000, 24, 6, 256, 4, 200
# (options of the replay, whether slices cross episodes)
WAYS = {
    "starts, across episodes": ({}, True),
    "starts, inside episodes": ({}, False),
    "episodes": ({"draw_by": "episode"}, False),
    "finished episodes": ({"draw_by": "episode", "finished_episodes": True}, False),
}


def fill(steps: int, options: dict) -> ReplayBuffer:
    """Return a full replay whose episodes have `steps` steps on average."""
    replay, rng = ReplayBuffer(ROWS, (OBS,), ACTIONS, **options), np.random.default_rng(0)
    while replay.rows_added < ROWS:
        length = int(rng.integers(steps // 2, steps + steps // 2 + 1))
        obs = np.zeros((length + 1, OBS), np.float32)
        replay.add_episode(obs, np.zeros((length, ACTIONS), np.float32), np.zeros(length))
    return replay


def measure(replay: ReplayBuffer, across: bool) -> float:
    """Return the median time in microseconds of a batch, with a row added before each."""
    zeros, times = np.zeros((1, OBS), np.float32), []
    for number in range(BATCHES):
        first, last = (np.array([number == n]) for n in (0, BATCHES - 1))
        action = np.zeros((1, ACTIONS), np.float32)
        replay.add(zeros, action, np.zeros(1), first, last, np.array([False]))
        start = time.perf_counter()
        replay.sample(BATCH, LENGTH, across_episodes=across)
        times.append(time.perf_counter() - start)
    return 1e6 * float(np.median(times))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    args = parser.parse_args()
    for steps in (10, 500):
        replays = {name: fill(steps, options) for name, (options, _) in WAYS.items()}
        found: dict[str, list[float]] = {name: [] for name in WAYS}
        for name, replay in replays.items():
            begin = time.perf_counter()
            replay.sample(1, LENGTH, across_episodes=WAYS[name][1])
            print(
                f"{steps} steps, {name}: first batch {1e3 * (time.perf_counter() - begin):.1f} ms"
            )
        for _ in range(args.rounds):
            for name, replay in replays.items():
                found[name].append(measure(replay, WAYS[name][1]))
        base = found["starts, across episodes"]
        for name, times in found.items():
            ratio = np.median([x / y for x, y in zip(times, base, strict=True)])
            print(f"| {steps} | {name} | {np.median(times):.0f} | {ratio:.2f} |")


if __name__ == "__main__":
    main()
