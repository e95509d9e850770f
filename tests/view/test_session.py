import numpy as np
import pytest
import torch

from tests.view.live_models import CHOICE, STEPS, Sum, make_model, make_session
from worldloom.acting import use_seed
from worldloom.view import session as sessions

MODELS = ["dreamer", "dreamer-choices", "tdmpc", "sum"]
ACTIONS = {False: [[0.5, -1.0], [-0.25, 1.0]], True: [[0, 1, 0], [1, 0, 0]]}  # discrete


@pytest.fixture(params=MODELS)
def made(request):
    model, space = make_model(request.param)
    return model, space, make_session(model, space)


def seeded(sample, depth):
    seed = int(np.random.SeedSequence([sample, depth]).generate_state(1)[0])
    return use_seed(seed, torch.device("cpu"))


def same(node, state):
    return torch.equal(node.state.features, state.features)


@torch.no_grad()
def test_steps_are_what_the_model_predicts_for_these_actions(made):
    model, space, session = made
    node = session.start(0, 4, sample=9)
    state = session.recordings[0].states[4]
    assert same(node, state) and node.depth == 0 and (node.total, node.reach) == (0, 1)
    total, reach = 0.0, 1.0
    for depth, action in enumerate(ACTIONS[space is CHOICE]):
        node = session.step(node.number, np.array(action, np.float32))
        with seeded(9, depth):
            state = model.predict(state, torch.tensor([action]).float())
        assert same(node, state)
        with seeded(9, depth + 1):
            decoded = model.decode(state)
        total += reach * float(decoded["reward"])
        reach *= float(decoded["continue"])
        assert node.reward == float(decoded["reward"]) and node.proceeds == float(
            decoded["continue"]
        )
        assert (node.total, node.reach) == pytest.approx((total, reach))
        if "obs" in decoded:
            assert (node.obs[""] == decoded["obs"][0].numpy()).all()
        else:
            assert node.obs == {}
        if hasattr(model, "value"):
            assert node.value == pytest.approx(float(model.value(state)), rel=1e-5)
        else:
            assert node.value is None


def test_the_same_actions_lead_to_the_same_states_in_every_branch(made):
    _, space, session = made
    first, second = (np.array(action, np.float32) for action in ACTIONS[space is CHOICE])
    start = session.start(0, 0)
    one = session.step(session.step(start.number, first).number, second)
    session.step(session.step(start.number, second).number, first)
    again = session.step(session.step(start.number, first).number, second)
    assert same(one, again.state) and one.total == again.total
    assert not same(session.nodes[1], session.nodes[3].state)
    assert [n.parent for n in session.nodes.values()] == [None, 0, 1, 0, 3, 0, 5]
    assert [n.depth for n in session.nodes.values()] == [0, 1, 2, 1, 2, 1, 2]


def test_another_sample_draws_other_random_numbers():
    model, _ = make_model("dreamer")
    session, action = make_session(model), np.zeros(2, np.float32)
    ends = []
    for sample in (0, 1, 0):
        session.start(0, 2, sample)
        ends.append(session.step(0, action))
    assert same(ends[0], ends[2].state) and not same(ends[0], ends[1].state)


def test_the_policy_acts_as_it_does_in_the_environment(made):
    model, _, session = made
    node = session.start(0, 3)
    acted = session.step(node.number)
    with seeded(0, 0):
        first = torch.tensor([True])
        action, *_ = session.actor.choose(node.state, None, first, deterministic=True)
    expected = session.spec.encode(session.spec.decode(action.numpy()))[0]
    assert (acted.action == expected).all()
    # The same action by hand has the same result: the policy's random numbers are its own.
    assert same(session.step(node.number, acted.action), acted.state)
    if not hasattr(model, "policy"):
        assert acted.plan is not None and session.step(acted.number).plan is not None


def test_the_random_state_of_the_process_is_not_changed(made):
    _, _, session = made
    before = torch.get_rng_state()
    node = session.start(0, 1)
    session.step(session.step(node.number).number)
    assert torch.equal(before, torch.get_rng_state())


def test_a_state_knows_the_row_of_the_episode_until_an_action_differs():
    session = make_session(Sum())
    actions = session.recordings[0].actions
    node = session.start(0, STEPS - 2)
    follows = [node]
    for t in (STEPS - 2, STEPS - 1):
        follows.append(session.step(follows[-1].number, actions[t]))
    assert [n.row for n in follows] == [STEPS - 2, STEPS - 1, STEPS]
    assert session.step(follows[-1].number, actions[0]).row is None  # after the end
    strays = session.step(node.number, -actions[STEPS - 2])
    assert strays.row is None and session.step(strays.number, actions[STEPS - 1]).row is None


@pytest.mark.parametrize(
    ("without", "notes"),
    [("obs", []), ("decode", ["the model raised RuntimeError in decode: no decoder"])],
)
def test_a_model_that_decodes_less_can_be_acted_in(without, notes):
    session = make_session(Sum(without))
    node = session.step(session.step(session.start(0, 0).number).number)
    assert node.obs == {} and node.depth == 2 and session.notes == notes
    assert (node.reward is None) == (without == "decode") and node.value is None


def test_what_does_not_fit_is_rejected(monkeypatch):
    session = make_session(Sum())
    for args, message in [
        ((1, 0), "episode is 1; expected from 0 to 0"),
        ((0, STEPS + 1), f"step is {STEPS + 1}; expected from 0 to {STEPS}"),
        ((0, 0, -1), "sample is -1; expected from 0 to"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.start(*args)
    node = session.start(0, 0)
    with pytest.raises(ValueError, match="there is no state 7"):
        session.step(7)
    for action, message in [
        ([1.0], r"the action has shape \(1,\); expected 2 finite numbers"),
        ([np.nan, 0], "expected 2 finite numbers"),
        ([1.5, 0], r"the action is \[1.5, 0.0\]; expected -1 to 1"),
    ]:
        with pytest.raises(ValueError, match=message):
            session.step(node.number, np.array(action))
    monkeypatch.setattr(sessions, "MOST_NODES", 2)
    session.step(node.number)
    with pytest.raises(ValueError, match="2 states are kept at most; start again"):
        session.step(node.number)
    assert session.start(0, 0).number == 0 and len(session.nodes) == 1


def test_choices_have_to_be_one_hot():
    model, space = make_model("dreamer-choices")
    session = make_session(model, space)
    for action in ([1, 1, 0], [0, 0, 0], [0.5, 0.5, 0]):
        with pytest.raises(ValueError, match="expected a single 1 in each group of choices"):
            session.read_action(action)
    assert session.read_action([0, 0, 1]).tolist() == [0, 0, 1]
