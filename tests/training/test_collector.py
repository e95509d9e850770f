import io
import sys

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

import worldloom.envs.suites.catch  # noqa: F401  (registers worldloom/Catch-v0)
from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.protocol import LatentState, ReplayField
from worldloom.training.collector import Collector

# No process can import this file by its name.
cloudpickle.register_pickle_by_value(sys.modules[__name__])
FIELDS = ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal")


class Scripted(gym.Env):
    """Observe (episode, step) and log true transitions; a negative length is a truncation.

    The reward is 100 * episode + step, so each belongs to one observation only.
    """

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, lengths):
        self.lengths, self.episode, self.transitions = lengths, -1, []
        self.seeds = []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.seeds.append(seed)
        self.episode, self.count = self.episode + 1, 0
        return self._obs(), {}

    def step(self, action):
        before = self._obs()
        self.count += 1
        length = self.lengths[self.episode % len(self.lengths)]
        end = self.count == abs(length)
        reward = 100.0 * self.episode + self.count
        self.transitions.append((*before, action[0], reward, *self._obs(), end and length > 0, end))
        info = {"success": length > 0} if end else {}
        return self._obs(), reward, end and length > 0, end and length < 0, info

    def _obs(self):
        return np.array([self.episode, self.count], np.float32)


class Recorder:
    """A buffer that keeps copies of all rows."""

    def __init__(self):
        self.rows, self.latents = [], []

    def add(self, obs, actions, rewards, is_first, is_last, is_terminal, fields=None):
        self.rows.append(
            [np.copy(x) for x in (obs, actions, rewards, is_first, is_last, is_terminal)]
        )
        self.latents.append(fields)

    def column(self, name):
        """All rows of a field, [rows, N, ...]."""
        return np.stack([row[FIELDS.index(name)] for row in self.rows])


class Model(nn.Module):
    """Its state counts the observations of an episode, and remembers the last action."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))

    def encode(self, obs):
        return self._state(torch.ones(len(obs), 1), torch.zeros(len(obs), 1))

    def observe(self, state, action, obs):
        return self._state(state.deterministic + 1, action)

    def policy(self, state, deterministic=False):
        return torch.rand(len(state), 1) - 0.5 + 0 * self.weight

    def _state(self, count, action):
        count = count + 0 * self.weight
        return LatentState(count, None, count, {"action": action})


class Remembering(Model):
    def __init__(self):
        super().__init__()
        self.replay_fields = {"count": ReplayField((1,)), "action": ReplayField((1,))}

    def replay_values(self, state):
        return {"count": state.deterministic + 0 * self.weight, "action": state.extras["action"]}


def make(*lengths, model=None, **kwargs):
    scripts = iter(lengths)
    env = make_vector_env(lambda: Scripted(next(scripts)), num_envs=len(lengths))
    return Collector(
        env,
        Actor(model or Model()),
        Recorder(),
        obs_spec=ObsSpec.from_space(env.single_observation_space),
        action_spec=ActionSpec.from_space(env.single_action_space),
        **kwargs,
    )


def scripted(collector):
    return [env.unwrapped for env in collector.rows.env.envs]


def run(collector, ticks):
    for _ in range(ticks):
        collector.step()
    return collector


def transitions_in(buffer, env):
    """Read the transitions of one environment back out of its rows."""
    obs, actions, rewards, _, is_last, is_terminal = (
        buffer.column(name)[:, env] for name in FIELDS
    )
    return [
        (*obs[t], actions[t, 0], rewards[t + 1], *obs[t + 1], is_terminal[t + 1], is_last[t + 1])
        for t in range(len(obs) - 1)
        if not is_last[t]
    ]


SCRIPTS = ([3, -2, 1], [-4], [7, 7], [1, -1])


def test_rows_hold_exactly_the_true_transitions():
    collector = run(make(*SCRIPTS), 40)
    for index, env in enumerate(scripted(collector)):
        stored = transitions_in(collector.buffer, index)
        # The newest transition has no second row yet, unless the environment has just reset.
        pending = 0 if collector.rows.is_first[index] else 1
        assert len(env.transitions) >= 20
        assert stored == env.transitions[: len(env.transitions) - pending]


def test_flags_at_the_ends_of_episodes():
    buffer = run(make(*SCRIPTS), 40).buffer
    is_first, is_last, is_terminal = map(buffer.column, ("is_first", "is_last", "is_terminal"))
    assert is_first[0].all()
    assert (is_first[1:] == is_last[:-1]).all()
    # [3, -2, 1] is 4, 3 and 2 rows; the second episode ends by truncation.
    assert np.flatnonzero(is_last[:, 0])[:4].tolist() == [3, 6, 8, 12]
    assert np.flatnonzero(is_terminal[:, 0])[:3].tolist() == [3, 8, 12]
    assert is_last[4, 1] and not is_terminal[:, 1].any()
    assert (is_last & is_terminal == is_terminal).all()


def test_first_rows_have_no_reward_and_last_rows_no_action():
    buffer = run(make(*SCRIPTS), 40).buffer
    is_first, is_last = buffer.column("is_first"), buffer.column("is_last")
    actions, rewards = buffer.column("actions"), buffer.column("rewards")
    assert (rewards[is_first] == 0).all() and (rewards[1:][~is_first[1:]] != 0).all()
    assert (actions[is_last] == 0).all() and (actions[~is_last] != 0).all()
    assert actions.dtype == rewards.dtype == np.float32


def test_the_final_observation_is_kept():
    buffer = run(make([3]), 10).buffer
    expected = [[0, 0], [0, 1], [0, 2], [0, 3], [1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
    assert buffer.column("obs")[:, 0].tolist() == expected


def test_counts_are_exact():
    collector = make(*SCRIPTS)
    for tick in range(1, 30):
        collector.step()
        envs = scripted(collector)
        assert collector.env_steps == sum(len(env.transitions) for env in envs)
        assert collector.episodes == sum(t[-1] for env in envs for t in env.transitions)
        assert len(collector.buffer.rows) == tick
    assert collector.num_envs == 4


def test_finished_episodes_are_told():
    def at(steps, episodes):
        return {"env_steps": steps, "frames": steps, "episodes": episodes, "restarts": 0}

    collector = make([3, -2], [4])
    collector.step()
    assert collector.finished == []
    run(collector, 8)
    # Steps done after ticks 3, 4, 6 and 9: two per tick, less the resets (ticks 4, 5, 7).
    assert collector.finished == [
        {"return": 6.0, "length": 3, "success": 1.0, **at(6, 1)},
        {"return": 10.0, "length": 4, "success": 1.0, **at(7, 2)},
        {"return": 203.0, "length": 2, "success": 0.0, **at(10, 3)},
        {"return": 410.0, "length": 4, "success": 1.0, **at(15, 4)},
    ]


def test_random_steps_come_first():
    class Silent(Model):
        def policy(self, state, deterministic=False):
            return torch.full((len(state), 1), 5.0)

    collector = run(make([3], [4], model=Silent(), random_steps=7), 9)
    actions = collector.buffer.column("actions")[..., 0]
    last = collector.buffer.column("is_last")
    # Steps before each tick: 0, 2, 4, 6, then 7 (environment 0 resets in the fourth tick).
    assert (np.abs(actions[:4]) <= 1).all() and (actions[:4][~last[:4]] != 0).all()
    assert (actions[4:][~last[4:]] == 5).all()


def test_random_actions_reach_the_latent_state():
    collector = run(make([5], model=Remembering(), random_steps=3), 5)
    states = [latents["action"].item() for latents in collector.buffer.latents]
    actions = collector.buffer.column("actions")[:, 0, 0]
    assert states == [0.0, *actions[:4].tolist()]


def test_latents_come_with_their_rows():
    collector = run(make([2], [3], model=Remembering()), 7)
    counts = torch.stack([latents["count"] for latents in collector.buffer.latents])[..., 0]
    assert counts.T.tolist() == [[1, 2, 3, 1, 2, 3, 1], [1, 2, 3, 4, 1, 2, 3]]
    assert not counts.requires_grad


def test_models_that_keep_no_latents_add_none():
    assert run(make([2]), 3).buffer.latents == [None] * 3


def rows_for(seed, **kwargs):
    torch.manual_seed(0)
    collector = run(make([3, 5], [4], seed=seed, **kwargs), 12)
    seeds = [env.seeds for env in scripted(collector)]
    return collector.buffer.column("actions").tolist(), seeds


@pytest.mark.parametrize("random_steps", [0, 100])
def test_seeds_reproduce_and_differ(random_steps):
    actions, seeds = rows_for(1, random_steps=random_steps)
    assert rows_for(1, random_steps=random_steps) == (actions, seeds)
    other = rows_for(2, random_steps=random_steps)
    assert other[1] != seeds
    assert (other[0] != actions) == bool(random_steps)  # the policy draws from torch's own seed
    # Each episode has a seed of its own.
    assert seeds[1][0] == seeds[0][0] + 1
    assert len({*seeds[0], *seeds[1]}) == len(seeds[0]) + len(seeds[1])


def test_a_state_without_episodes_starts_new_ones_and_goes_on_counting():
    collector = run(make([3], [4], random_steps=100), 5)
    file = io.BytesIO()
    torch.save(collector.state_dict(), file)
    file.seek(0)
    copies = [make([3], [4], seed=9, random_steps=100) for _ in range(2)]
    state = torch.load(file, weights_only=True)
    for name in ("rows", "memory"):
        del state[name]
    for copy in copies:
        copy.load_state_dict(state)
        assert (
            (copy.env_steps, copy.episodes) == (collector.env_steps, collector.episodes) == (8, 2)
        )
        assert copy.finished == collector.finished
        run(copy, 4)
        assert copy.env_steps == 15  # environment 0 has reset once
    assert (
        copies[0].buffer.column("actions").tolist() == copies[1].buffer.column("actions").tolist()
    )
    # The restart draws on: it does not repeat the first episodes.
    seeds = [scripted(one)[0].seeds[0] for one in (collector, *copies)]
    assert seeds[0] != seeds[1] == seeds[2]


def test_episodes_that_cannot_be_played_again_are_begun_anew(caplog):
    """Scripted counts its episodes, so what it does follows from no seed after the first one."""
    collector = run(make([5], [3], model=Remembering()), 5)
    copy = make([5], [3], model=Remembering())
    copy.load_state_dict(collector.state_dict())
    run(copy, 6)
    assert [r.getMessage()[:60] for r in caplog.records] == [
        "the episode of environment 1 could not be replayed (its seed"
    ]
    # Environment 0 has come back to the last row of its episode; environment 1 was in its second.
    flags = [np.flatnonzero(copy.buffer.column("is_first")[:, i]).tolist() for i in (0, 1)]
    assert flags == [[1], [0, 4]]
    obs = copy.buffer.column("obs")
    assert obs[:, 0].tolist() == [[0, 5], *([1, step] for step in range(5))]
    # One episode of it went into the attempt.
    assert obs[:, 1].tolist() == [[1, 0], [1, 1], [1, 2], [1, 3], [2, 0], [2, 1]]
    assert (copy.buffer.column("rewards")[0] == [5, 0]).all()
    counts = [latents["count"][:, 0].tolist() for latents in copy.buffer.latents]
    assert counts == [[6, 1], [1, 2], [2, 3], [3, 4], [4, 1], [5, 2]]
    assert [e["length"] for e in copy.finished] == [3, 5, 3, 5]
    assert [e["return"] for e in copy.finished[2:]] == [101 + 102 + 103, 5 * 103]


class Lottery(gym.Env):
    """Episodes of 1 to 5 steps that end in either way; all is drawn from the reset's seed."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,))
    action_space = spaces.Box(-1, 1, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 6))
        return self._obs(), {}

    def step(self, action):
        self.left -= 1
        ended, terminal = self.left == 0, bool(self.np_random.integers(2))
        info = {"success": terminal} if ended else {}
        reward = float(action[0] + self.np_random.normal())
        return self._obs(), reward, ended and terminal, ended and not terminal, info

    def _obs(self):
        return self.np_random.normal(size=2).astype(np.float32)


def lottery(num_envs, workers=0, model=None, actor=Actor):
    env = make_vector_env(Lottery, num_envs, workers)
    return Collector(
        env,
        actor(model or Remembering()),
        Recorder(),
        obs_spec=ObsSpec.from_space(env.single_observation_space),
        action_spec=ActionSpec.from_space(env.single_action_space),
        random_steps=20,
    )


def assert_same_rows(buffer, other, since):
    assert len(buffer.rows) - since == len(other.rows) > 0
    for row, again in zip(buffer.rows[since:], other.rows, strict=True):
        for x, y in zip(row, again, strict=True):
            assert x.dtype == y.dtype
            np.testing.assert_array_equal(x, y)
    for latents, again in zip(buffer.latents[since:], other.latents, strict=True):
        for key in latents:
            torch.testing.assert_close(latents[key], again[key], rtol=0, atol=0)


@pytest.mark.parametrize("case", range(12))
def test_a_loaded_collector_goes_on_as_if_nothing_had_happened(case):
    rng = np.random.default_rng(case)
    num_envs, ticks = int(rng.integers(1, 5)), int(rng.integers(0, 25))
    here, there = (1, 2) if case == 0 else (0, 2) if case == 1 else (2, 0) if case == 2 else (0, 0)
    torch.manual_seed(case)
    collector = run(lottery(num_envs, here), ticks)
    torch.save(collector.state_dict(), file := io.BytesIO())
    numbers = torch.get_rng_state()
    run(collector, 20)
    after = torch.rand(())
    file.seek(0)
    copy = lottery(num_envs, there)
    copy.load_state_dict(torch.load(file, weights_only=True))
    torch.set_rng_state(numbers)
    run(copy, 20)
    assert_same_rows(collector.buffer, copy.buffer, since=ticks)
    assert torch.rand(()) == after
    for name in ("env_steps", "episodes", "returns", "finished"):
        assert getattr(copy, name) == getattr(collector, name)
    assert len(copy.finished) > 3
    collector.close()
    copy.close()


def test_rows_that_could_not_be_added_are_seen_once_after_loading(monkeypatch):
    def full(*row, fields):
        raise OSError("no space left")

    collector, copy = run(lottery(2), 7), lottery(2)
    present = collector.state_dict()["memory"]["state"]["deterministic"]
    with monkeypatch.context() as patch, pytest.raises(OSError, match="no space"):
        patch.setattr(collector.buffer, "add", full)
        collector.step()
    copy.load_state_dict(collector.state_dict())
    first = collector.rows.is_first[:, None]
    expected = torch.where(torch.from_numpy(first), 1.0, present + 1)
    run(copy, 1)
    assert torch.equal(copy.buffer.latents[0]["count"], expected)


def test_what_was_saved_may_be_saved_again_before_a_step():
    collector = run(lottery(2), 7)
    state = collector.state_dict()
    assert state["rows"]["lengths"].dtype == torch.int64
    copy = lottery(2)
    copy.load_state_dict(state)
    again = copy.state_dict()
    torch.save(state, one := io.BytesIO())
    torch.save(again, other := io.BytesIO())
    assert one.getvalue() == other.getvalue()


def test_another_number_of_environments_is_refused_by_name():
    state = run(lottery(2), 3).state_dict()
    with pytest.raises(ValueError, match=r"num_envs is 4, but the checkpoint .* of 2 .*num_envs=2"):
        lottery(4).load_state_dict(state)


def test_a_memory_follows_the_model_to_its_device():
    class Elsewhere(Actor):
        """Act for a model that the trainer has moved after loading."""

        device = torch.device("meta")

        def observe(self, obs, is_first, memory=None):
            devices.append(
                memory and {memory.action.device.type, memory.state.features.device.type}
            )
            return super().observe(obs, is_first)

    devices = []
    collector = lottery(1, actor=Elsewhere, model=Model())
    collector.load_state_dict(run(lottery(1), 3).state_dict())
    with pytest.raises(NotImplementedError, match="meta"):  # it holds no numbers
        collector.step()
    assert devices == [{"meta"}]


def test_an_interrupted_step_starts_new_episodes(monkeypatch):
    collector = run(make([5], [5]), 2)

    def interrupted(actions):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(collector.rows, "step", interrupted)
        collector.step()
    run(collector, 3)
    obs, is_first = collector.buffer.column("obs"), collector.buffer.column("is_first")
    assert obs[:, 0, 0].tolist() == [0, 0, 0, 1, 1, 1]
    assert obs[:, 1, 1].tolist() == [0, 1, 2, 0, 1, 2]
    assert is_first.tolist() == [[True] * 2, *[[False] * 2] * 2, [True] * 2, *[[False] * 2] * 2]
    assert collector.env_steps == 10 and collector.restarts == 0


def test_a_restart_abandons_an_episode():
    collector = run(make([5], [3]), 2)
    env, step = collector.rows.env, collector.rows.env.step

    def crashing(actions):
        """Replace environment 0, as WorkerVectorEnv does it."""
        obs, rewards, terminated, truncated, infos = step(actions)
        obs[0], rewards[0] = (9, 0), 0
        return obs, rewards, terminated, truncated, {**infos, "restarted": np.array([True, False])}

    env.step = crashing
    collector.step()
    env.step, env.restarts = step, 1
    run(collector, 3)
    assert collector.restarts == 1
    # One of six ticks was a reset, and in environment 0 one more was the crash.
    assert collector.env_steps == (6 - 2) + (6 - 1)
    is_first, is_last = map(collector.buffer.column, ("is_first", "is_last"))
    assert np.flatnonzero(is_first[:, 0]).tolist() == [0, 3] and not is_last[:5, 0].any()
    assert np.flatnonzero(is_first[:, 1]).tolist() == [0, 4]
    # The rewards 1 and 2 of before, and 3 of the step that crashed, belong to no episode.
    run(collector, 2)
    assert [e["return"] for e in collector.finished if e["length"] == 2] == [4 + 5.0]


def test_discrete_actions_and_images():
    env = make_vector_env(lambda: gym.make("worldloom/Catch-v0", image_size=16), num_envs=2)
    obs_spec = ObsSpec.from_space(env.single_observation_space)
    action_spec = ActionSpec.from_space(env.single_action_space)
    collector = Collector(
        env,
        Actor(Model()),
        Recorder(),
        obs_spec=obs_spec,
        action_spec=action_spec,
        random_steps=100,
    )
    run(collector, 21)
    assert collector.buffer.column("obs").shape == (21, 2, 3, 16, 16)
    assert collector.buffer.column("obs").dtype == np.uint8
    assert (collector.buffer.column("actions").sum(-1) == ~collector.buffer.column("is_last")).all()
    assert [episode["length"] for episode in collector.finished] == [9] * 4
