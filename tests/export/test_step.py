"""`PolicyStep` acts as `Actor` does with the same random numbers, before any tracing."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from tests.export.conftest import DREAMER_SIZES, TDMPC2_SIZES, disturb
from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.export.policy import read_obs
from worldloom.export.step import PolicyStep
from worldloom.export.verify import compare
from worldloom.factory import create_world_model
from worldloom.planning import CEM
from worldloom.protocol import LatentState, Trajectory

VECTOR = spaces.Box(-1, 1, (3,), np.float32)
IMAGE = spaces.Box(0, 255, (64, 64, 3), np.uint8)
BOTH = spaces.Dict({"b": VECTOR, "a": spaces.Dict({"camera": IMAGE, "mode": spaces.Discrete(3)})})
JOINTS, KEYS = spaces.Box(-2, 2, (2,), np.float32), spaces.Discrete(3)
DREAMER, R2 = ("dreamerv3:tiny", DREAMER_SIZES), ("r2dreamer:size1m", DREAMER_SIZES)
TDMPC2 = ("tdmpc2:tiny", TDMPC2_SIZES)
PRIOR, PIXELS = ({**TDMPC2_SIZES, **more} for more in ({"mpc": False}, {"num_channels": 2}))


def build(preset, obs_space, action_space, **changes):
    """Return a model with random weights in every layer, and the specs of its spaces."""
    obs, actions = ObsSpec.from_space(obs_space), ActionSpec.from_space(action_space)
    spaces = {
        "obs_shape": obs.shape,
        "action_dim": actions.action_dim,
        "discrete": actions.discrete,
    }
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = create_world_model(preset[0], **spaces, device="cpu", **preset[1], **changes)
    disturb(model)
    return model.eval(), obs, actions


def observe(obs, rows, steps, seed=0):
    """Return observations {input: [rows, ...]} of several steps."""
    obs.space.seed(seed)
    found = [[read_obs(obs, obs.space.sample()) for _ in range(rows)] for _ in range(steps)]
    return [{name: np.stack([row[name] for row in each]) for name in each[0]} for each in found]


def make_step(actor, obs, actions, deterministic=True, rows=1):
    seen = observe(obs, rows, 6)
    examples = [{name: torch.from_numpy(x) for name, x in each.items()} for each in seen[:4]]
    return PolicyStep(actor, obs, actions, deterministic, examples), seen


@torch.no_grad()
def run_eagerly(step, inputs):
    outputs = step({name: torch.from_numpy(np.asarray(x)) for name, x in inputs.items()})
    return {name: x.numpy() for name, x in outputs.items()}


CASES = {
    "dreamerv3": (DREAMER, VECTOR, JOINTS, {"deterministic", "stochastic", "action"}),
    "dreamerv3 dict": (DREAMER, BOTH, KEYS, {"deterministic", "stochastic", "action"}),
    "r2dreamer": (R2, IMAGE, KEYS, {"deterministic", "stochastic", "action"}),
    "tdmpc2": (TDMPC2, VECTOR, JOINTS, {"extras/plan"}),
    "tdmpc2 discrete": (TDMPC2, VECTOR, KEYS, {"extras/plan"}),
    "tdmpc2 pixels": (("tdmpc2:tiny", PIXELS), IMAGE, JOINTS, {"extras/plan"}),
    "tdmpc2 prior": (("tdmpc2:tiny", PRIOR), VECTOR, JOINTS, set()),
}


@pytest.mark.parametrize("deterministic", [True, False], ids=["mode", "samples"])
@pytest.mark.parametrize("name", CASES)
def test_a_step_acts_as_the_actor(name, deterministic):
    preset, obs_space, action_space, states = CASES[name]
    model, obs, actions = build(preset, obs_space, action_space)
    actor = Actor(model)
    step, seen = make_step(actor, obs, actions, deterministic, rows=2)
    assert {state.removeprefix("state/") for state in step.states} == states
    assert step.blank is not None  # one of encode and observe is enough
    found = compare(lambda inputs: run_eagerly(step, inputs), step, actor, seen)
    assert all(found.same) and max(found.differences) < 1e-6
    assert found.holds
    # The model itself is left as it was.
    assert all(
        weight.untyped_storage().nbytes() > 4 or weight.numel() < 2 for weight in model.parameters()
    )


def test_inputs_without_an_effect_are_left_out():
    model, obs, actions = build(("tdmpc2:tiny", PRIOR), VECTOR, JOINTS)
    assert list(make_step(Actor(model), obs, actions)[0].example) == ["obs"]
    sampled = make_step(Actor(model), obs, actions, deterministic=False)[0].example
    assert {name: list(x.shape) for name, x in sampled.items()} == {
        "obs": [1, 3],
        "noise/normal": [2],
    }
    stored = make_step(Actor(model), obs, actions)[0].state_dict()
    held = {name for name, x in stored.items() if x.untyped_storage().nbytes() >= 4 * x.numel() > 4}
    assert {name.split(".")[1] for name in held} == {"encoder", "actor"}


def test_rows_that_start_an_episode_ignore_their_memory():
    model, obs, actions = build(DREAMER, VECTOR, JOINTS)
    step, seen = make_step(Actor(model), obs, actions, rows=2)
    inputs = {**step.example, **{k: torch.from_numpy(x) for k, x in seen[1].items()}}
    inputs |= {name: torch.randn_like(inputs[name]) for name in step.states}
    with torch.no_grad():
        never, always, second = (
            step({**inputs, "is_first": torch.tensor(first)})
            for first in ([False, False], [True, True], [False, True])
        )
    for name, value in second.items():
        assert torch.allclose(value[0], never[name][0], atol=1e-6)
        assert torch.allclose(value[1], always[name][1], atol=1e-6)
    assert not torch.allclose(never["action"], always["action"])


def test_each_row_acts_on_its_own_task():
    """With several tasks the start of an episode decides the task, so encode is computed too."""
    space = spaces.Dict({"state": VECTOR, "task": spaces.Discrete(2)})
    tasks = {"action_dims": [1, 2], "episode_lengths": [10, 10], "task_dim": 4}
    model, obs, actions = build(TDMPC2, space, JOINTS, **tasks)
    actor = Actor(model)
    step, seen = make_step(actor, obs, actions, rows=4)
    assert step.blank is None
    assert set(step.states) == {"state/extras/plan", "state/extras/task"}
    found = compare(lambda inputs: run_eagerly(step, inputs), step, actor, seen)
    assert all(found.same)
    inputs = {**step.example, "obs/task": torch.tensor([0, 1, 0, 1])}
    with torch.no_grad():
        action = step(inputs)["action"]  # in the middle of [-2, 2] where a task has no action
    assert ((action[:, 1] == 0) == torch.tensor([True, False, True, False])).all()


class Lines(torch.nn.Module):
    """A custom model without a policy, whose encode draws what its observe does not."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.weight = torch.nn.Parameter(torch.randn(3, 3))
        self.unused = torch.nn.Parameter(torch.randn(100))

    def encode(self, obs):
        return LatentState(obs @ self.weight + 0.1 * torch.randn_like(obs))

    def predict(self, state, action):
        return LatentState(torch.tanh(state.deterministic + action.sum(-1, keepdim=True)))

    def observe(self, state, action, obs):
        return LatentState(0.5 * self.predict(state, action).deterministic + obs @ self.weight)

    def decode(self, state):
        reward = -state.features.square().sum(-1, keepdim=True)
        return {"reward": reward, "continue": torch.ones_like(reward)}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        outs = [self.decode(state) for state in states[1:]]
        return Trajectory(
            states, *(torch.stack([o[k] for o in outs]) for k in ("reward", "continue"))
        )


@pytest.mark.parametrize("action_space", [JOINTS, spaces.MultiDiscrete([2, 3])], ids=str)
def test_a_planner_acts_for_a_custom_model_without_a_policy(action_space):
    obs, actions = ObsSpec.from_space(VECTOR), ActionSpec.from_space(action_space)
    model, dim = Lines(), actions.action_dim
    options = {"horizon": 3, "num_samples": 16, "num_elites": 4, "iterations": 2}
    actor = Actor(model, CEM(model, dim, actions.discrete, **options))
    step, seen = make_step(actor, obs, actions)
    assert step.blank is None  # encode and observe differ
    assert set(step.states) == {"state/deterministic", "state/action", "state/plan"}
    found = compare(lambda inputs: run_eagerly(step, inputs), step, actor, seen)
    assert all(found.same)
    assert step.state_dict()["model.unused"].untyped_storage().nbytes() == 4


def test_random_numbers_that_cannot_be_inputs_are_an_error():
    class Draws(Lines):
        def policy(self, state, deterministic=False):
            return torch.empty(len(state), 2).cauchy_()

    obs, actions = ObsSpec.from_space(VECTOR), ActionSpec.from_space(JOINTS)
    with pytest.raises(ValueError, match=r"Draws draws random numbers with aten::cauchy_"):
        make_step(Actor(Draws()), obs, actions)


def test_a_different_graph_is_noticed():
    model, obs, actions = build(DREAMER, VECTOR, JOINTS)
    actor = Actor(model)
    step, seen = make_step(actor, obs, actions)

    def run(inputs):
        outputs = run_eagerly(step, inputs)
        return {**outputs, "action": outputs["action"] + 1e-3}

    found = compare(run, step, actor, seen)
    assert not found.holds and found.same == [False] * len(seen)
