"""Sampling and the training loop against a second implementation of the official ones.

The environments are scripted: an observation is (environment, episode, step), so every sampled row
tells where it comes from.
"""

from collections import Counter

import gymnasium
import numpy as np
import pytest
import torch
from torch import nn

from tests.official_loops import Slices, Starts, train_dreamer, train_tdmpc2
from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.protocol import LatentState, ReplayField
from worldloom.training import Collector, ReplayBuffer, ReplayDataModule

OFFICIAL_DREAMER = {"prefill_counts": "starts", "count_resets": True}
OFFICIAL_SLICES = {"draw_by": "episode", "finished_episodes": True}
LOOP = {"batch_size": 8, "sequence_length": 4, "total_steps": 10**5, "across_episodes": False}


class Script(gymnasium.Env):
    """Episodes of given lengths, in turn."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (3,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, number, lengths):
        self.number, self.lengths, self.episode = number, lengths, -1

    def reset(self, *, seed=None, options=None):
        self.episode, self.taken = self.episode + 1, 0
        return self._observe(), {}

    def step(self, action):
        self.taken += 1
        ends = self.taken == self.lengths[self.episode % len(self.lengths)]
        return self._observe(), 0.0, ends, False, {}

    def _observe(self):
        return np.array([self.number, self.episode, self.taken], np.float32)


class Idle(nn.Module):
    """Acts, and does nothing else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, obs):
        zeros = torch.zeros(len(obs), 1)
        return LatentState(zeros, None, zeros)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def policy(self, state, deterministic=False):
        return torch.zeros(len(state), 1)


def collect(lengths, envs=1, capacity=10**5, context=False, queue=False, buffer=(), **settings):
    """Return a data module that collects scripted episodes."""
    numbers = iter(range(envs + 1))
    env = make_vector_env(lambda: Script(next(numbers), lengths), num_envs=envs)
    obs = ObsSpec.from_space(env.single_observation_space)
    actions = ActionSpec.from_space(env.single_action_space)
    fields = {"latent": ReplayField((1,))} if context else None
    options = {"num_envs": envs, "fields": fields, "online_queue": queue} | dict(buffer)
    replay = ReplayBuffer(capacity, (3,), 1, **options)
    collector = Collector(env, Actor(Idle()), replay, obs_spec=obs, action_spec=actions)
    return ReplayDataModule(replay, collector, **settings)


def updates_of(data, ticks):
    """Return the updates of `ticks` steps of all environments: (rows collected, index, obs)."""
    found = []
    for batch in data.train_dataloader():
        if data.buffer.rows_added > ticks * data.buffer.num_envs:
            break
        found.append((data.buffer.rows_added, batch["index"].tolist(), batch["obs"].numpy()))
    return found


# ---- when updates happen ------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [8, 24, 96])
def test_dreamer_updates_follow_the_same_rows_with_short_episodes(ratio):
    """Rows of resets count, and the first update follows at once: 9 steps and a reset each."""
    loop = {"batch_size": 4, "sequence_length": 6, "train_ratio": ratio, "total_steps": 10**5}
    data = collect([9], envs=4, context=True, queue=True, **loop, **OFFICIAL_DREAMER)
    ours = Counter(rows for rows, *_ in updates_of(data, 150))
    official = train_dreamer(Starts(7, 10**5), 4, 150, 4, 6, ratio)
    # Officially updates follow each worker's row, here those of all environments.
    assert ours == Counter(-(-rows // 4) * 4 for rows, _ in official)
    # By default resets are not counted: a tenth fewer updates.
    plain = updates_of(collect([9], envs=4, context=True, queue=True, **loop), 150)
    assert 0.85 < len(plain) / len(official) < 0.95


@pytest.mark.parametrize(("envs", "rows"), [(16, 2048), (1, 1088)])
def test_dreamer_starts_training_at_1024_start_positions(envs, rows):
    loop = {"batch_size": 16, "sequence_length": 64, "train_ratio": 32, "total_steps": 10**5}
    data = collect([50], envs=envs, context=True, queue=True, **loop, **OFFICIAL_DREAMER)
    next(iter(data.train_dataloader()))
    assert data.buffer.rows_added == rows
    assert train_dreamer(Starts(65, 10**6), envs, 1100, 16, 64, 32)[0][0] == rows


def test_tdmpc2_updates_follow_the_same_steps():
    loop = {"batch_size": 8, "sequence_length": 4, "total_steps": 300, "train_ratio": None}
    settings = {"across_episodes": False, "prefill": 60, "pretrain": True}
    data = collect([7, 20, 11, 22], buffer=OFFICIAL_SLICES, **loop, **settings)
    ours = Counter(data.env_steps for _ in data.train_dataloader())
    official = Counter(
        steps for steps, _ in train_tdmpc2(Slices(10**5, 4), [7, 20, 11, 22] * 99, 300, 8, 60)
    )
    # Seed episodes are finished one step later. Officially that step has no update of its own.
    assert official == Counter(range(62, 301)) + Counter({61: 60})
    assert ours == official + Counter({61: 1})


# ---- which sequences are drawn ------------------------------------------------------------------


def compare(ours, official):
    """Require that two lists are draws from the same distribution: chi-square of two samples."""
    ours, official = Counter(ours), Counter(official)
    assert ours.keys() == official.keys()
    scale = (ours.total() / official.total()) ** 0.5
    square = sum(
        (ours[k] / scale - official[k] * scale) ** 2 / (ours[k] + official[k]) for k in ours
    )
    # Its mean is k and its variance 2k: five sigma.
    degrees = len(ours) - 1
    assert square < degrees + 5 * (2 * degrees) ** 0.5


def fill(data, ticks):
    for _ in range(ticks):
        data.collector.step()
    return data.buffer


def test_dreamer_draws_all_stored_starts_alike():
    """Official capacity counts start positions; that of rows is larger by a sequence each."""
    loop = {"batch_size": 4, "sequence_length": 6, "total_steps": 10**5}
    buffer = fill(collect([9, 4], envs=2, capacity=2 * 46, **loop), 130)
    official = Starts(7, 2 * 40, online=False)
    for _ in range(130):
        official.add(0), official.add(1)
    index = buffer.sample(20_000, 7)["index"].tolist()
    compare(map(tuple, index), [official.draw() for _ in range(20_000)])


def test_dreamer_sequences_continue_into_the_next_episode():
    """Episodes of 105 rows: 64 of 105 sequences of 65 rows contain a first row after their own."""
    loop = {"batch_size": 4, "sequence_length": 64, "total_steps": 10**5}
    buffer = fill(collect([104], **loop), 105 * 20 + 64)
    official = Starts(65, 10**6, online=False)
    for _ in range(105 * 20 + 64):
        official.add(0)
    ours = buffer.sample(20_000, 65)["is_first"][:, 1:].any(1).float().mean().item()
    drawn = [official.draw()[1] % 105 for _ in range(20_000)]
    theirs = np.mean([start > 105 - 65 for start in drawn])
    # Five standard deviations of a share of 20,000 draws are 0.017.
    assert abs(ours - 64 / 105) < 0.017 and abs(theirs - 64 / 105) < 0.017


def shares(starts):
    """Return the shares of slices from episodes of 7 steps, and of slices with a termination."""
    short = np.array([length == 7 for length, _ in starts])
    ends = np.array([step == length - 3 for length, step in starts])
    return short.mean(), ends.mean()


@pytest.mark.parametrize(
    ("draw_by", "expected"),
    [("episode", (143 / 170, 143 / 170 / 5 + 27 / 170 / 73)), ("start", (715 / 2686, 170 / 2686))],
)
def test_tdmpc2_slices_by_length_of_the_episode(draw_by, expected):
    """143 episodes of 7 steps and 27 of 75: 84 % or 27 % of the slices are from short ones."""
    lengths = np.random.default_rng(0).permutation([7] * 143 + [75] * 27).tolist()
    buffer = ReplayBuffer(10**4, (3,), 1, draw_by=draw_by)
    for number, steps in enumerate(lengths):
        obs = np.stack([[0, number, t] for t in range(steps + 1)])
        buffer.add_episode(
            obs, np.zeros((steps, 1)), np.zeros(steps), np.arange(steps) == steps - 1
        )
    batch = buffer.sample(20_000, 4, across_episodes=False)
    first = batch["obs"][:, 0].int().tolist()
    ours = shares([(lengths[number], step) for _, number, step in first])
    assert ours[1] == batch["is_terminal"].any(1).numpy().mean()
    np.testing.assert_allclose(ours, expected, atol=0.017)
    if draw_by == "episode":
        official = Slices(10**4, 4)
        for steps in lengths:
            official.add(steps + 1)
        theirs = shares([(lengths[number], step) for number, step in official.draw(20_000)])
        np.testing.assert_allclose(theirs, expected, atol=0.017)


def test_tdmpc2_slices_of_a_full_replay_with_a_part_of_its_oldest_episode():
    lengths = np.random.default_rng(1).integers(2, 20, 40).tolist()
    official, data = Slices(150, 4), collect(lengths, capacity=150, buffer=OFFICIAL_SLICES, **LOOP)
    for steps in lengths:
        official.add(steps + 1)
        fill(data, steps + 1)
        data.buffer.sample(1, 4, across_episodes=False)
    assert official.ring[official.head][1] > 0  # the oldest episode has lost rows
    index = data.buffer.sample(20_000, 4, across_episodes=False)["obs"][:, 0, 1:].int().tolist()
    compare(map(tuple, index), official.draw(20_000))


# ---- when a fresh row is drawn ------------------------------------------------------------------


def delays(updates, length, envs, until):
    """Return the rows collected between each row and its first update, for rows below `until`."""
    served = {}
    for rows, starts in updates:
        for env, start in starts:
            for row in range(start, start + length):
                served.setdefault((env, row), rows - row * envs)
    return np.array([served.get((e, r), np.nan) for e in range(envs) for r in range(10, until)])


def test_dreamer_serves_fresh_rows_as_soon():
    loop = {"batch_size": 4, "sequence_length": 6, "train_ratio": 2, "total_steps": 10**5}
    found = {}
    for queue in (True, False):
        data = collect([9], envs=4, context=True, queue=queue, **loop, **OFFICIAL_DREAMER)
        found[queue] = delays([x[:2] for x in updates_of(data, 600)], 7, 4, 500)
    replay = Starts(7, 10**5)
    official = delays(train_dreamer(replay, 4, 600, 4, 6, 2), 7, 4, 500)
    # Every row of a stretch is drawn at once when the stretch is complete and an update is due.
    assert not np.isnan(official).any() and not np.isnan(found[True]).any()
    assert abs(found[True].mean() - official.mean()) < 2
    assert abs(np.percentile(found[True], 95) - np.percentile(official, 95)) <= 4
    assert np.nanmean(found[False]) > 3 * official.mean() or np.isnan(found[False]).mean() > 0.1


def test_tdmpc2_serves_an_episode_once_it_is_finished():
    """Batches of 512 of at most 20 episodes: every one is in the first batch that can have it."""
    loop = {"batch_size": 512, "sequence_length": 4, "total_steps": 300, "train_ratio": None}
    settings = {"across_episodes": False, "prefill": 60, "pretrain": True}
    lengths = [7, 20, 11, 22]  # the fourth ends with the seed steps
    official = {}
    for steps, starts in train_tdmpc2(Slices(10**5, 4), lengths * 99, 300, 512, 60):
        for episode, _ in starts:
            official.setdefault(episode, steps)
    found = []
    for buffer in (OFFICIAL_SLICES, {"draw_by": "episode"}):
        data, first = collect(lengths, buffer=buffer, **loop, **settings), {}
        for batch in data.train_dataloader():
            for episode in batch["obs"][:, 0, 1].int().tolist():
                first.setdefault(episode, data.env_steps)
        found.append(first)
    assert found[0] == official and len(official) > 17
    # By default an episode is drawn as soon as it has enough rows.
    late = [official[n] - steps for n, steps in found[1].items() if 62 < steps < 280]
    assert set(late) == {length - 3 for length in lengths}
