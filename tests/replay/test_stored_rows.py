"""What the replay holds after collecting, against a script: the true transitions and nothing else.

Every observation is (environment, episode, simulator step), so a row tells where it belongs. The
reward of a simulator step is its action times a factor of the step, so it tells which action led
to it. The expected rows are worked out from the script alone.
"""

import itertools
import math
import sys

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.envs.wrappers import wrap
from worldloom.protocol import LatentState
from worldloom.training import Collector, ReplayBuffer, ReplayDataModule

cloudpickle.register_pickle_by_value(sys.modules[__name__])  # processes cannot import tests

BASE = 1000  # seeds of environments are consecutive, so their remainders tell them apart


class Script(gym.Env):
    """Episodes of given lengths; a negative one is truncated, a positive one terminates."""

    observation_space = spaces.Box(0, np.inf, (3,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, lengths):
        self.lengths, self.episode, self.number = lengths, -1, 0

    def reset(self, *, seed=None, options=None):
        if seed is not None and self.episode < 0:  # later episodes may be seeded as well
            self.number = seed % BASE
        self.episode, self.count = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        self.count += 1
        length = self.lengths[(self.number + self.episode) % len(self.lengths)]
        end = self.count >= abs(length)
        reward = float(action[0]) * factor(self.count)
        return self._obs(), reward, end and length > 0, end and length < 0, {}

    def _obs(self):
        return np.array([self.number, self.episode, self.count], np.float32)


def factor(count):
    return count % 7 + 1


def make_script(lengths, repeat, limit):
    env = Script(lengths)
    return wrap(TimeLimit(env, limit) if limit else env, action_repeat=repeat)


def expected_rows(number, lengths, repeat, limit):
    """Yield (obs, factor of the reward, is_first, is_last, is_terminal) of an environment."""
    for episode in itertools.count():
        length = lengths[(number + episode) % len(lengths)]
        end, terminal = abs(length), length > 0
        if limit and limit < end:
            end, terminal = limit, False
        rows = math.ceil(end / repeat)
        for row in range(rows + 1):
            count = min(row * repeat, end)
            factors = sum(factor(c) for c in range(max(0, row - 1) * repeat + 1, count + 1))
            last = row == rows
            yield (number, episode, count), factors, row == 0, last, last and terminal


class Moody(nn.Module):
    """Act at random, like an agent whose state is of no use."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode(self, obs):
        return LatentState(obs, None, obs)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def policy(self, state, deterministic=False):
        return torch.rand(len(state), 1) * 2 - 1


def collecting(lengths, num_envs, repeat=1, limit=None, workers=0, capacity=10_000, seed=0):
    env = make_vector_env(lambda: make_script(lengths, repeat, limit), num_envs, workers)
    buffer = ReplayBuffer(capacity, (3,), 1, num_envs=num_envs, online_queue=True)
    obs, actions = (
        ObsSpec.from_space(env.single_observation_space),
        ActionSpec.from_space(env.single_action_space),
    )
    return Collector(env, Actor(Moody()), buffer, obs_spec=obs, action_spec=actions, seed=seed)


def check_rows(collector, lengths, repeat, limit):
    """Hold every stored row of every stream to the script."""
    buffer = collector.buffer
    for index, stream in enumerate(buffer.state_dict()["streams"]):
        written = buffer.state_dict()["written"][index]
        stored = {name: np.roll(x.numpy(), -written, 0) for name, x in stream.items()}
        if written < buffer.rows:
            stored = {name: x.numpy() for name, x in stream.items()}
        count = len(stored["obs"])
        assert count == min(written, buffer.rows) > 0
        number = int(stored["obs"][0, 0])
        script = itertools.islice(expected_rows(number, lengths, repeat, limit), written)
        before = 0.0
        for row, (obs, factors, *flags) in enumerate(list(script)[-count:]):
            assert stored["obs"][row].tolist() == list(obs)
            names = ("is_first", "is_last", "is_terminal")
            assert [bool(stored[name][row]) for name in names] == flags
            first, last, _ = flags
            if row > 0:  # the action that led to the oldest row is gone
                wanted = 0.0 if first else before * factors
                assert stored["rewards"][row] == pytest.approx(wanted, abs=1e-5)
            before = float(stored["actions"][row, 0])
            assert before == 0.0 if last else before != 0.0


def check_samples(buffer, length):
    """Sequences are rows that follow each other, and inside an episode where that is asked."""
    if not buffer.can_sample(length):
        return
    batch = buffer.sample(64, length)
    obs, first = batch["obs"], batch["is_first"]
    same = (obs[:, 1:, :2] == obs[:, :-1, :2]).all(-1)
    next_one = (obs[:, 1:, 0] == obs[:, :-1, 0]) & (obs[:, 1:, 1] == obs[:, :-1, 1] + 1)
    assert (same != first[:, 1:]).all() and (next_one == first[:, 1:]).all()
    assert (batch["is_last"][:, :-1] == first[:, 1:]).all()


LENGTHS = st.lists(st.integers(1, 9).flatmap(lambda n: st.sampled_from((n, -n))), min_size=1)


@settings(max_examples=150, deadline=None)
@given(
    lengths=LENGTHS,
    num_envs=st.integers(1, 5),
    repeat=st.integers(1, 4),
    limit=st.none() | st.integers(1, 8),
    ticks=st.integers(1, 60),
    capacity=st.sampled_from((50, 10_000)),
    seed=st.integers(0, 99),
)
def test_the_replay_holds_the_true_transitions(
    lengths, num_envs, repeat, limit, ticks, capacity, seed
):
    collector = collecting(lengths, num_envs, repeat, limit, capacity=capacity, seed=seed)
    for _ in range(ticks):
        collector.step()
    assert len(collector.buffer) == min(ticks, capacity // num_envs) * num_envs
    check_rows(collector, lengths, repeat, limit)
    for length in (2, 5):
        check_samples(collector.buffer, length)


@pytest.mark.parametrize(("num_envs", "workers"), [(1, 1), (3, 2), (4, 4)])
def test_so_it_does_with_environments_in_processes(num_envs, workers):
    lengths = [5, -3, 1, -1, 8]
    collector = collecting(lengths, num_envs, repeat=2, limit=7, workers=workers)
    try:
        for _ in range(60):
            collector.step()
        check_rows(collector, lengths, 2, 7)
    finally:
        collector.rows.env.close()


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("across_episodes", [False, True])
def test_so_it_does_while_batches_are_drawn(overlap, across_episodes):
    lengths = [6, -4, 9]
    collector = collecting(lengths, 2, capacity=200)
    collector.buffer.online_queue = across_episodes
    data = ReplayDataModule(
        collector.buffer,
        collector,
        batch_size=4,
        sequence_length=4,
        train_ratio=16.0,
        total_steps=400,
        across_episodes=across_episodes,
        sync_acting_copy=(lambda: None) if overlap else None,
    )
    for batch in data.train_dataloader():
        obs = batch["obs"]
        assert (obs[:, 1:, 0] == obs[:, :-1, 0]).all()
        same = obs[:, 1:, 1] == obs[:, :-1, 1]
        assert (same != batch["is_first"][:, 1:]).all()
        assert across_episodes or same.all()
    assert data.updates > 300
    check_rows(collector, lengths, 1, None)
