"""Plans against toys whose best actions are known in closed form."""

import inspect
import math

import pytest
import torch
from torch.nn import functional as F

from worldloom import planning
from worldloom.planning import CEM, MPPI
from worldloom.protocol import LatentState, Trajectory

PLANNERS = [CEM, MPPI]


class Toy:
    """Imagine with a given step(s, a) -> (next s, reward [B], continue [B]); s is all there is."""

    def __init__(self, step):
        self.step = step

    def imagine(self, initial_state, actions):
        states, rewards, continues = [initial_state], [], []
        for action in actions:
            s, reward, going_on = self.step(states[-1].features, action)
            states.append(state_of(s))
            rewards.append(reward)
            continues.append(going_on)
        return Trajectory(
            states, torch.stack(rewards)[..., None], torch.stack(continues)[..., None]
        )


def state_of(features):
    return LatentState(features, None, features)


def reach(s, action):
    """Columns are position and goal; the reward is minus the squared distance on arrival."""
    position, goal = s[:, :1] + action, s[:, 1:]
    reward = -(position - goal).square().squeeze(1)
    return torch.cat([position, goal], 1), reward, torch.ones_like(reward)


def unlock(s, action):
    """Open a lock by 2, 0, 1 in this order for 1; action 0 earns 0.05, any error starts again."""
    code = F.one_hot(torch.tensor([2, 0, 1, 0]), 3).float()
    right = (action * code[s[:, 0].long()]).sum(1)
    progress = (s[:, 0] + 1) * right
    reward = (progress == 3).float() + 0.05 * action[:, 0]
    return progress[:, None] * (progress != 3)[:, None], reward, torch.ones_like(reward)


def nothing_known(s, action):
    return s, torch.full_like(s[:, 0], math.nan), torch.ones_like(s[:, 0])


@pytest.mark.parametrize("planner", PLANNERS)
def test_goes_to_the_goal_of_each_row(planner):
    torch.manual_seed(0)
    state = state_of(torch.tensor([[0.0, 0.4], [0.0, -0.3], [2.0, 0.3], [-1.0, 5.0]]))
    # Rewards so steep that the weights of MPPI tell elites apart.
    model = Toy(lambda s, a: (lambda n, r, c: (n, 100 * r, c))(*reach(s, a)))
    plan_for = planner(model, 1, horizon=3, iterations=12, num_samples=512)
    action, plan = plan_for(state, deterministic=True)
    # The mean of the elites lies within about one last spread (min_std = 0.05) of the best.
    best = torch.tensor([[0.4, 0, 0], [-0.3, 0, 0], [-1, -0.7, 0], [1, 1, 1]])
    torch.testing.assert_close(plan.squeeze(-1), best, atol=0.05, rtol=0)
    assert torch.equal(action, plan[:, 0])


@pytest.mark.parametrize("planner", PLANNERS)
def test_many_states_are_imagined_in_parts_with_the_same_result(planner, monkeypatch):
    state = state_of(torch.randn(7, 2))
    rows, plans = [], []

    def counted(s, action):
        rows.append(len(s))
        return reach(s, action)

    for limit in (10**6, 50, 1):  # all seven at once, two at a time, one at a time
        monkeypatch.setattr(planning, "CPU_ROWS", limit)
        torch.manual_seed(0)
        plans.append(planner(Toy(counted), 1, horizon=2, num_samples=20, num_elites=5)(state)[1])
    assert torch.equal(plans[0], plans[1]) and torch.equal(plans[0], plans[2])
    assert set(rows) == {7 * 20, 2 * 20, 20}


@pytest.mark.parametrize("planner", PLANNERS)
def test_finds_the_sequence_that_opens_the_lock(planner):
    torch.manual_seed(0)
    # Already one and two digits into the code in rows 1 and 2.
    state = state_of(torch.tensor([[0.0], [1.0], [2.0]]))
    plan_for = planner(Toy(unlock), 3, discrete=True, horizon=3, iterations=8, num_samples=512)
    if planner is MPPI:
        plan_for.temperature = 20.0
    action, plan = plan_for(state, deterministic=True)
    assert action.argmax(1).tolist() == [2, 0, 1]
    assert plan[0].argmax(-1).tolist() == [2, 0, 1]
    torch.testing.assert_close(plan.sum(-1), torch.ones(3, 3))


@pytest.mark.parametrize("planner", PLANNERS)
def test_chooses_in_every_group_of_a_multi_discrete_action(planner):
    torch.manual_seed(0)

    def step(s, action):
        reward = action[:, 1] + action[:, 4]
        return s, reward, torch.ones_like(reward)

    plan_for = planner(Toy(step), (2, 3), discrete=True, horizon=2, num_samples=64, num_elites=8)
    action, plan = plan_for(state_of(torch.zeros(2, 1)), deterministic=True)
    assert action.tolist() == [[0, 1, 0, 0, 1]] * 2
    for group in plan.split((2, 3), -1):
        torch.testing.assert_close(group.sum(-1), torch.ones(2, 2))


def test_returns_by_hand():
    rewards = iter([1.0, 2.0, 4.0])
    continues = iter([1.0, 0.5, 0.25])

    def step(s, action):
        return s + 1, torch.full((len(s),), next(rewards)), torch.full((len(s),), next(continues))

    planner = CEM(
        Toy(step), 1, horizon=3, discount=0.9, terminal_value=lambda state: 10 * state.features
    )
    found = planner.compute_returns(state_of(torch.zeros(2, 1)), torch.zeros(2, 5, 3, 1))
    # The last state's features are 3: its value is 30, after three steps and all three continues.
    expected = 1 + 0.9 * 1 * 2 + 0.81 * 0.5 * 4 + 0.729 * 0.125 * 30
    torch.testing.assert_close(found, torch.full((2, 5), expected))


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(("ends", "best"), [(True, 0), (False, 1)])
def test_rewards_after_the_end_do_not_count(planner, ends, best):
    """Action 1 earns 1 and may end the episode; action 0 earns 0.6 and never does."""
    torch.manual_seed(0)

    def step(s, action):
        going_on = 1 - action[:, 1] if ends else torch.ones(len(s))
        return s, action @ torch.tensor([0.6, 1.0]), going_on

    plan_for = planner(Toy(step), 2, discrete=True, horizon=3, iterations=8)
    if planner is MPPI:
        plan_for.temperature = 20.0
    action, plan = plan_for(state_of(torch.zeros(1, 1)), deterministic=True)
    assert action.argmax(1).item() == best
    # At the horizon nothing comes after, so there the greater reward is right either way.
    assert plan[0].argmax(-1).tolist() == [best, best, 1]


@pytest.mark.parametrize("planner", PLANNERS)
def test_terminal_value_stands_for_what_comes_after(planner):
    torch.manual_seed(0)

    def step(s, action):
        position, _, going_on = reach(s, action)
        return position, torch.zeros(len(s)), going_on

    def value(state):
        return -100 * (state.features[:, :1] - state.features[:, 1:]).square()

    plan_for = planner(Toy(step), 1, horizon=1, iterations=8, terminal_value=value)
    action, _ = plan_for(state_of(torch.tensor([[0.0, 0.4], [0.0, -0.9]])), deterministic=True)
    torch.testing.assert_close(action, torch.tensor([[0.4], [-0.9]]), atol=0.05, rtol=0)


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_what_is_not_finite_is_never_preferred(planner, bad):
    torch.manual_seed(0)

    def step(s, action):
        reward = 100 * torch.where(action[:, 0] > 0.3, bad, action[:, 0])
        return s, reward, torch.ones_like(reward)

    plan_for = planner(Toy(step), 1, horizon=1, iterations=8, min_std=0.01)
    action, _ = plan_for(state_of(torch.zeros(1, 1)), deterministic=True)
    assert 0.2 < action.item() <= 0.3


@pytest.mark.parametrize("planner", PLANNERS)
def test_warm_start_is_the_plan_shifted_by_one_step(planner):
    # A model that knows nothing leaves the plan where it started from.
    plan_for = planner(Toy(nothing_known), 2, horizon=3)
    old = torch.arange(12.0).reshape(2, 3, 2) / 12
    _, plan = plan_for(state_of(torch.zeros(2, 1)), old)
    assert torch.equal(plan, torch.cat([old[:, 1:], torch.zeros(2, 1, 2)], 1))


@pytest.mark.parametrize("planner", PLANNERS)
def test_is_first_forgets_the_plan_of_its_rows_only(planner):
    state, old = state_of(torch.zeros(2, 1)), torch.ones(2, 3, 1)
    _, plan = planner(Toy(nothing_known), 1, horizon=3)(state, old, torch.tensor([True, False]))
    assert plan.squeeze(-1).tolist() == [[0, 0, 0], [1, 1, 0]]


@pytest.mark.parametrize("planner", PLANNERS)
def test_a_certain_discrete_plan_is_taken_up_half_forgotten(planner):
    plan_for = planner(Toy(nothing_known), (2, 4), discrete=True, horizon=2)
    old = torch.tensor([[[1.0, 0, 0, 0, 0, 1], [0, 1.0, 1, 0, 0, 0]]])
    _, plan = plan_for(state_of(torch.zeros(1, 1)), old)
    expected = [[[0.25, 0.75, 0.625, 0.125, 0.125, 0.125], [0.5, 0.5, 0.25, 0.25, 0.25, 0.25]]]
    assert plan.tolist() == expected


@pytest.mark.parametrize("planner", PLANNERS)
def test_rows_do_not_see_each_other_and_calls_leave_nothing_behind(planner):
    plan_for = planner(Toy(reach), 1, horizon=2)
    torch.manual_seed(0)
    _, one = plan_for(state_of(torch.tensor([[0.0, 0.4], [0.0, 0.4]])))
    torch.manual_seed(0)
    _, other = plan_for(state_of(torch.tensor([[0.0, 0.4], [9.0, -5.0]])))
    assert torch.equal(one[0], other[0])
    assert not torch.equal(one[1], other[1])


@pytest.mark.parametrize("planner", PLANNERS)
@pytest.mark.parametrize(("action_dim", "discrete"), [(2, False), (3, True), ((2, 3), True)])
def test_drawn_actions_are_legal_and_carry_no_gradient(planner, action_dim, discrete):
    torch.manual_seed(0)
    state = state_of(torch.zeros(64, 1, dtype=torch.float64, requires_grad=True))

    def step(s, action):
        return s, s[:, 0], torch.ones_like(s[:, 0])

    plan_for = planner(
        Toy(step), action_dim, discrete, horizon=2, iterations=1, num_samples=8, num_elites=4
    )
    action, plan = plan_for(state)
    assert action.dtype == torch.float64
    assert not action.requires_grad and not plan.requires_grad
    assert len(action.unique(dim=0)) > 1
    if discrete:
        sizes = (action_dim,) if isinstance(action_dim, int) else action_dim
        for group in action.split(sizes, -1):
            assert torch.equal(group.sort(-1).values[:, -1], torch.ones(64, dtype=torch.float64))
            assert torch.equal(group.sum(-1), torch.ones(64, dtype=torch.float64))
    else:
        assert action.abs().max() <= 1


def test_cem_counts_finite_elites_alike():
    weights = CEM(Toy(reach), 1).compute_weights(
        torch.tensor([[3.0, 2.0, -math.inf], [-math.inf] * 3])
    )
    assert weights.tolist() == [[0.5, 0.5, 0], [0, 0, 0]]


@pytest.mark.parametrize("temperature", [0.0, 0.5, 3.0])
def test_mppi_counts_elites_by_their_exponential(temperature):
    returns = torch.tensor([[3.0, 2.0, -math.inf], [-math.inf] * 3])
    weights = MPPI(Toy(reach), 1, temperature=temperature).compute_weights(returns)
    ratio = math.exp(-temperature)  # of two returns one apart
    expected = torch.tensor([[1 / (1 + ratio), ratio / (1 + ratio), 0], [0, 0, 0]])
    torch.testing.assert_close(weights, expected)


@pytest.mark.parametrize("planner", PLANNERS)
def test_signature(planner):
    parameters = inspect.signature(planner).parameters
    positional = [p.name for p in parameters.values() if p.kind is p.POSITIONAL_OR_KEYWORD]
    assert positional == ["model", "action_dim", "discrete"]
    assert ("temperature" in parameters) == (planner is MPPI)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_elites": 300}, "num_elites is 300; expected at most num_samples = 256"),
        ({"horizon": 0}, "horizon is 0; expected at least 1"),
        ({"discount": 1.5}, "discount is 1.5; expected a number in"),
        ({"min_std": 3.0}, "min_std is 3.0; expected above 0 and at most max_std"),
        ({"action_dim": 0}, "action_dim is 0; expected sizes of at least 1"),
        ({"action_dim": (2, 3)}, r"action_dim is \(2, 3\); expected one width"),
    ],
)
@pytest.mark.parametrize("planner", PLANNERS)
def test_refuses_settings_that_cannot_plan(planner, options, message):
    with pytest.raises(ValueError, match=message):
        planner(**({"model": Toy(reach), "action_dim": 1} | options))


def test_refuses_a_model_without_imagine_and_a_plan_of_another_size():
    with pytest.raises(TypeError, match="cannot plan with Linear: it has no `imagine`"):
        CEM(torch.nn.Linear(1, 1), 1)
    with pytest.raises(ValueError, match=r"shape \[1, 12, 1\]; expected \[2, 12, 1\]"):
        CEM(Toy(reach), 1)(state_of(torch.zeros(2, 2)), torch.zeros(1, 12, 1))
