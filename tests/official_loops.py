"""The official rules of sampling and training, written again from the official sources.

The second truth for tests/training/test_official_loops.py: plain Python that shares no code with
worldloom.

DreamerV3: danijar/dreamerv3 e3f0224, embodied/core/replay.py, embodied/core/selectors.py,
embodied/run/train.py; danijar/elements, elements/when.py.
TD-MPC2: nicklashansen/tdmpc2 e9f5932, tdmpc2/common/buffer.py, tdmpc2/trainer/online_trainer.py;
pytorch/rl v0.8.1, SliceSampler in torchrl/data/replay_buffers/samplers.py.
"""

from collections import Counter, deque

import numpy as np


class Starts:
    """DreamerV3's replay: the newest start positions, and a queue of stretches that are new."""

    def __init__(self, length, capacity, online=True, seed=0):
        self.length, self.capacity, self.online = length, capacity, online
        self.rows = Counter()
        self.items = []
        self.queue = deque()
        self.rng = np.random.default_rng(seed)

    def add(self, worker):
        number = self.rows[worker]
        self.rows[worker] += 1
        if number + 1 < self.length:
            return
        start = worker, number + 1 - self.length
        self.items.append(start)
        del self.items[: -self.capacity]
        if self.online and number % self.length == 0:
            self.queue.append(start)

    def draw(self):
        if self.queue:
            return self.queue.popleft()
        return self.items[self.rng.integers(len(self.items))]


class Ratio:
    """How many updates are due: one at the first call, then `ratio` for each step."""

    def __init__(self, ratio):
        self.ratio, self.last = ratio, None

    def __call__(self, step):
        if self.last is None:
            self.last = step
            return 1
        due = int((step - self.last) * self.ratio)
        self.last += due / self.ratio
        return due


def train_dreamer(replay, workers, ticks, batch_size, batch_length, train_ratio):
    """Return the updates of a run: (rows collected before it, start positions of its batch)."""
    should_train = Ratio(train_ratio / (batch_size * batch_length))
    step, updates = 0, []
    for _ in range(ticks):
        for worker in range(workers):
            step += 1
            replay.add(worker)
            if len(replay.items) < batch_size * batch_length:
                continue
            for _ in range(should_train(step)):
                updates.append((step, [replay.draw() for _ in range(batch_size)]))
    return updates


class Slices:
    """TD-MPC2's replay: a ring of rows, added by finished episodes, and slices within episodes."""

    def __init__(self, capacity, length, seed=0):
        self.capacity, self.length = capacity, length
        self.ring = []  # (episode, step) of each row
        self.head = self.episodes = 0
        self.rng = np.random.default_rng(seed)

    def add(self, rows):
        for step in range(rows):
            if len(self.ring) < self.capacity:
                self.ring.append(None)
            self.ring[self.head] = self.episodes, step
            self.head = (self.head + 1) % self.capacity
        self.episodes += 1

    def trajectories(self):
        """Return (first slot, rows) of the episodes with rows in the ring, the oldest first."""
        size = len(self.ring)
        order = (
            [(self.head + n) % size for n in range(size)] if size == self.capacity else range(size)
        )
        found = []
        for slot in order:
            if found and self.ring[slot][0] == self.ring[found[-1][0]][0]:
                found[-1][1] += 1
            else:
                found.append([slot, 1])
        return found

    def draw(self, count):
        """Return (episode, step) of the first row of each slice."""
        usable = [x for x in self.trajectories() if x[1] >= self.length]
        drawn = []
        for number in self.rng.integers(len(usable), size=count):
            first, rows = usable[number]
            start = first + int(self.rng.random() * (rows - self.length + 1))
            drawn.append(self.ring[start % self.capacity])
        return drawn


def train_tdmpc2(replay, lengths, steps, batch_size, seed_steps):
    """Return the updates of a run: (environment steps before it, starts of its batch).

    lengths: environment steps of each episode.
    """
    lengths, updates = iter(lengths), []
    length = taken = 0
    for step in range(steps):
        if taken == length:
            if step:
                replay.add(length + 1)
            length, taken = next(lengths), 0
        taken += 1
        if step >= seed_steps:
            for _ in range(seed_steps if step == seed_steps else 1):
                updates.append((step + 1, replay.draw(batch_size)))
    return updates
