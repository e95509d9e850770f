"""Recorded decisions, with a graph that runs on the CPU: it repeats a function on fixed tensors."""

import random

import pytest
import torch
from torch import nn

from tests.no_host import HostUse, NoHost
from worldloom import create_world_model
from worldloom.acting import Actor
from worldloom.cuda_graphs import MOST, WARM_UP, CapturedFunction
from worldloom.planning import CEM
from worldloom.protocol import LatentState

OBS, ACTIONS, ROWS = 6, 2, 3


class Graphs:
    """Records as CUDA does: a launch overwrites the tensors that the recording has returned."""

    def __init__(self, spoil=lambda result: None):
        self.recorded = self.launched = 0
        self.spoil = spoil

    def record(self, run):
        fixed = run()
        self.recorded += 1

        def launch():
            self.launched += 1
            result = run()
            for kept, new in zip(tensors(fixed), tensors(result), strict=True):
                kept.copy_(new)
            self.spoil(fixed)

        return launch, fixed


def tensors(tree):
    if isinstance(tree, torch.Tensor):
        return [tree]
    if isinstance(tree, LatentState):
        tree = [vars(tree)[name] for name in vars(tree)]
    if isinstance(tree, dict):
        tree = list(tree.values())
    return [x for part in tree for x in tensors(part)] if isinstance(tree, list | tuple) else []


def build(name):
    torch.manual_seed(0)
    spaces = {"obs_shape": (OBS,), "action_dim": ACTIONS}
    if name.startswith("dreamerv3"):
        small = {"units": 8, "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "blocks": 2}
        model = create_world_model("dreamerv3:size1m", **spaces, **small)
        if name == "dreamerv3, planner":
            model.policy = None
            return model, CEM(model, ACTIONS, horizon=2, num_samples=8, num_elites=2, iterations=2)
        return model, None
    small = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 16, "num_bins": 11}
    small |= {"num_samples": 16, "num_pi_trajs": 4, "num_elites": 4, "iterations": 2}
    return create_world_model("tdmpc2:1m", **spaces, **small), None


def act(name, record, steps=12, rows=ROWS, change=lambda step, model: None, deterministic=False):
    """Return the actions and states of some steps; an episode of row 1 ends after the seventh."""
    model, planner = build(name)
    actor = Actor(model.eval(), planner, record=record)
    torch.manual_seed(1)
    memory, found = None, []
    for step in range(steps):
        change(step, model)
        obs = torch.randn(rows, OBS)
        first = torch.tensor([step == 0 or (step == 7 and row == 1) for row in range(rows)])
        action, memory = actor(obs, first, memory, deterministic)
        found.append((action, *tensors(memory.state), *([memory.plan] if planner else [])))
    return actor, found


def require_same(one, other):
    for a, b in zip(one, other, strict=True):
        assert all(torch.equal(x, y) for x, y in zip(a, b, strict=True))


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("name", ["dreamerv3", "dreamerv3, planner", "tdmpc2"])
def test_recorded_decisions_are_the_decisions(name, deterministic):
    _, eager = act(name, None, deterministic=deterministic)
    graphs = Graphs()
    actor, found = act(name, graphs.record, deterministic=deterministic)
    require_same(eager, found)
    # A planner's first call has no plan, which is another kind of call.
    assert graphs.recorded == 2 and not actor._observe.reason and not actor._choose.reason
    planned = 12 - WARM_UP - ("planner" in name)
    assert graphs.launched == 2 + (11 - WARM_UP) + planned


def test_changed_weights_are_used_and_moved_ones_are_recorded_again():
    def change(step, model):
        if step == 6:
            with torch.no_grad():
                model.actor.mlp.first.linear.weight.mul_(2)
        if step == 8:  # as `model.to` does
            for parameter in model.parameters():
                parameter.data = parameter.data * 1.5

    _, eager = act("dreamerv3", None, 20, change=change)
    graphs = Graphs()
    _, found = act("dreamerv3", graphs.record, 20, change=change)
    require_same(eager, found)
    assert graphs.recorded == 4


class Policy(nn.Module):
    """A policy of one layer."""

    def __init__(self, spoil=lambda model: None):
        super().__init__()
        self.net, self.spoil, self.calls = nn.Linear(OBS, ACTIONS), spoil, 0

    def forward(self, x):
        self.spoil(self)
        return self.net(x)


def count(model):
    model.calls += 1


@pytest.mark.parametrize(
    ("name", "spoil"), [("calls", count), ("random numbers", lambda model: random.random())]
)
def test_what_a_graph_would_not_repeat_is_found_and_named(name, spoil, caplog):
    model = Policy(spoil)
    captured = CapturedFunction(model, "the policy", model, Graphs().record)
    for _ in range(WARM_UP + 3):
        x = torch.randn(2, OBS)
        assert torch.equal(captured(x), model.net(x))
    assert captured.reason.startswith("the policy changes ") and name in captured.reason
    assert [r.getMessage() for r in caplog.records] == [
        f"decisions are not recorded as CUDA graphs: {captured.reason}"
    ]


def test_a_graph_with_another_result_is_not_used():
    model = Policy()
    graphs = Graphs(spoil=lambda result: result.add_(0.1))
    captured = CapturedFunction(model, "the policy", model, graphs.record)
    for _ in range(WARM_UP + 3):
        x = torch.randn(2, OBS)
        assert torch.equal(captured(x), model.net(x))
    assert captured.reason == "the recorded result of the policy differs" and graphs.launched == 1


def test_results_stay_after_later_calls_and_few_kinds_of_calls_are_recorded():
    model, graphs = Policy(), Graphs()
    captured = CapturedFunction(model, "the policy", model, graphs.record)
    pairs = []
    for _ in range(WARM_UP + 3):
        for rows in range(1, MOST + 3):
            x = torch.randn(rows, OBS)
            pairs.append((captured(x), model.net(x)))
    assert all(torch.equal(*pair) for pair in pairs)
    assert graphs.recorded == MOST


@pytest.mark.parametrize("name", ["dreamerv3", "tdmpc2"])
def test_no_decision_waits_for_the_device(name):
    model, _ = build(name)
    actor = Actor(model.eval().to("meta"))
    with torch.device("meta"):
        obs, action = torch.empty(ROWS, OBS), torch.empty(ROWS, ACTIONS)
        first = torch.empty(ROWS, dtype=torch.bool)
    with torch.no_grad():
        state = model.encode(obs)
        actor.choose(state, None, first, False)  # creates constants
        with NoHost():
            _, state, plan = actor.choose(state, None, first, False)
            state = model.observe(state, action, obs)
            actor.choose(state, plan, first, True)
            with pytest.raises(HostUse, match="item"):
                action.sum().item()
