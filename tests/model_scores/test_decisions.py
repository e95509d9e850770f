"""Decisions with models that rank action sequences rightly, wrongly or not at all."""

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.model_scores.walks import Walk
from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import RowStream, make_vector_env
from worldloom.model_scores.decisions import HELD, STEPS, Decision, DecisionTest


class Point(gym.Env):
    """The world of walks.py in one environment: the action moves a point [2]."""

    observation_space = spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = spaces.Box(-1, 1, (2,), np.float32)

    def __init__(self, length=1000, noise=False):
        self.length, self.noise, self.actions = length, noise, []

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        rng = np.random.default_rng() if self.noise else self.np_random
        self.point, self.age = rng.normal(size=2).astype(np.float32), 0
        self.actions.append([])
        return self.point.copy(), {}

    def step(self, action):
        self.actions[-1].append(action.copy())
        self.point = self.point + action
        self.age += 1
        return self.point.copy(), float(self.point[0]), False, self.age >= self.length, {}


class Agent(Walk):
    """Knows the world, except that episodes may end, and acts at random."""

    sign = 1.0

    def decode(self, state):
        heads = super().decode(state)
        return heads | {"continue": torch.ones_like(heads["reward"])}

    def imagine(self, initial_state, actions):
        trajectory = super().imagine(initial_state, actions)
        trajectory.rewards *= self.sign
        trajectory.continues = torch.ones_like(trajectory.rewards)
        return trajectory

    def policy(self, state, deterministic=False):
        return torch.rand(len(state), 2) * 2 - 1


def decide(model, envs=3, candidates=8, make=Point, seed=4):
    env = make_vector_env(make, envs)
    rows = RowStream(
        env,
        ObsSpec.from_space(env.single_observation_space),
        ActionSpec.from_space(env.single_action_space),
    )
    test = DecisionTest(Actor(model), rows, candidates, seed)
    steps = sum(1 for _ in test.run())
    return test, env, steps


def test_a_perfect_model_loses_nothing():
    test, _, _ = decide(Agent())
    assert len(test.decisions) == 3 and test.error is None
    for decision in test.decisions:
        assert decision.predicted == pytest.approx(decision.actual, rel=1e-4)
        scores = decision.score()
        assert scores["decision_loss"] == 0 and scores["decision_loss_random"] > 0


def test_a_model_that_is_always_wrong_loses_the_most():
    model = Agent()
    model.sign = -1.0
    for decision in decide(model)[0].decisions:
        actual = decision.actual
        assert decision.score()["decision_loss"] == pytest.approx(np.ptp(actual))


@pytest.mark.parametrize("sign", [0.0, float("nan")])
def test_a_model_that_cannot_tell_loses_as_much_as_a_random_choice(sign):
    model = Agent()
    model.sign = sign
    for decision in decide(model)[0].decisions:
        scores = decision.score()
        assert scores["decision_loss"] == pytest.approx(scores["decision_loss_random"])
        assert scores["decision_loss"] > 0


def test_the_loss_is_that_of_the_first_rank():
    decision = Decision(np.array([1.0, 3.0, 2.0]), np.array([10.0, 6.0, 2.0]))
    assert decision.score() == {"decision_loss": 4.0, "decision_loss_random": 4.0}
    tied = Decision(np.array([3.0, 3.0, 2.0]), np.array([10.0, 6.0, 2.0]))
    assert tied.score()["decision_loss"] == 2.0


def test_every_sequence_starts_from_the_same_state_and_holds_its_actions():
    _, env, steps = decide(Agent(), envs=1, candidates=4)
    policy, *sequences = (np.array(part) for part in env.envs[0].unwrapped.actions)
    assert len(sequences) == 4 and steps == len(policy) + sum(map(len, sequences))
    (length,) = {len(part) for part in sequences}
    start = length - STEPS
    assert 0 <= start < len(policy)
    for sequence in sequences:
        assert (sequence[:start] == policy[:start]).all()
        held = sequence[start:].reshape(-1, HELD, 2)
        assert (held == held[:, :1]).all()
    assert len({part[start:].tobytes() for part in sequences}) == 4


def test_rewards_after_the_end_of_an_episode_do_not_count():
    """Episodes of 6 steps are shorter than a sequence."""
    test, env, _ = decide(Agent(), make=lambda: Point(length=6))
    assert len(test.decisions) == 3
    for env_index, decision in enumerate(test.decisions):
        parts = env.envs[env_index].unwrapped.actions
        assert decision.actual.shape == (8,) and len({*decision.actual}) == 8
        assert max(map(len, parts)) <= 6


def test_environments_that_do_not_repeat_themselves_are_left_out():
    assert decide(Agent(), make=lambda: Point(noise=True))[0].decisions == []


def test_the_same_seed_gives_the_same_decisions():
    def run(seed):
        torch.manual_seed(0)
        return [
            (d.predicted.tolist(), d.actual.tolist())
            for d in decide(Agent(), seed=seed)[0].decisions
        ]

    assert run(1) == run(1) != run(2)


def test_an_error_of_the_model_is_kept():
    class Unable(Agent):
        def imagine(self, initial_state, actions):
            raise NotImplementedError("cannot imagine")

    test, _, _ = decide(Unable())
    assert test.decisions == [] and "cannot imagine" in str(test.error)
