"""Plans are recorded as the planner arrives at them, and watching changes no decision."""

import numpy as np
import pytest
import torch
from torch import nn

from worldloom import create_world_model
from worldloom.acting import Actor
from worldloom.planning import CEM
from worldloom.protocol import LatentState, Trajectory
from worldloom.view.plans import ELITES, watch_plans

SMALL = {"num_samples": 64, "num_elites": 16, "horizon": 3, "iterations": 6}


class Target(nn.Module):
    """The reward of each action is -(action - target)², for the classes of discrete ones too."""

    def __init__(self, target):
        super().__init__()
        self.target = torch.tensor(target)

    def encode(self, obs):
        return LatentState(obs)

    observe = predict = compute_loss = decode = None

    def imagine(self, initial_state, actions):
        rewards = -(actions - self.target).square().sum(-1, keepdim=True)
        states = [initial_state] * (len(actions) + 1)
        return Trajectory(states, rewards, torch.ones_like(rewards))


def act(actor, seed=0):
    torch.manual_seed(seed)
    obs = torch.zeros(1, *getattr(actor.model, "obs_shape", (2,)))
    return actor(obs, np.ones(1, bool), None, True)[0]


@pytest.mark.parametrize("discrete", [False, True])
def test_the_plan_of_a_known_optimum_is_recorded(discrete):
    model = Target([0.0, 1.0, 0.0] if discrete else [0.3, -0.8, 0.1])
    planner = CEM(model, 3, discrete, **SMALL)
    actor = Actor(model, planner)
    before = act(actor)
    with watch_plans(actor) as plans:
        during = act(actor)
    assert torch.equal(before, during) and torch.equal(before, act(actor)) and len(plans) == 1
    (plan,) = plans
    assert plan.mean.shape == (3, 3) and plan.elites.shape == (16, 3, 3)
    assert np.abs(plan.mean - model.target.numpy()).max() < 0.2
    assert (plan.std is None) == discrete
    assert np.allclose(plan.weights, 1 / 16)
    # The returns are those of the sequences next to them, the best one first.
    error = np.square(plan.elites - model.target.numpy()).sum(-1)
    np.testing.assert_allclose(plan.returns, -(error * 0.99 ** np.arange(3)).sum(1), atol=1e-4)
    assert (np.diff(plan.returns) <= 0).all()


def test_the_plan_of_tdmpc2_is_recorded():
    options = {"num_samples": 64, "num_elites": 32, "num_pi_trajs": 4, "iterations": 3}
    shape = {"obs_shape": (2,), "action_dim": 2}
    model = create_world_model("tdmpc2:1m", **shape, **options).eval()
    actor = Actor(model)
    before = act(actor)
    with watch_plans(actor) as plans:
        assert torch.equal(act(actor), before)
        act(actor, seed=1)
    assert "make_planner" not in vars(model) and len(plans) == 2
    for plan in plans:
        assert plan.elites.shape == (ELITES, 3, 2) and (abs(plan.elites) <= 1).all()
        # MPPI weights sequences by their returns.
        ratios = np.exp(0.5 * (plan.returns - plan.returns[0]))
        np.testing.assert_allclose(plan.weights / plan.weights[0], ratios, rtol=1e-3)
    first = np.abs(plans[0].elites[:, 0] - before.numpy()).max(1)
    assert first.min() < 1e-6  # the action is one of the sequences


def test_nothing_is_recorded_of_a_policy():
    class Policy(Target):
        def policy(self, state, deterministic=False):
            return torch.zeros(1, 3)

    with watch_plans(actor := Actor(Policy([0.0] * 3))) as plans:
        act(actor)
    assert plans == []
