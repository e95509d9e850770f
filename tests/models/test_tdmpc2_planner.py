"""The planner of TD-MPC2 against rewards, values and ends that are known in closed form."""

import copy
import math
from types import SimpleNamespace

import pytest
import torch

from worldloom import create_world_model
from worldloom.models.tdmpc2 import draws
from worldloom.models.tdmpc2.planner import EXPLORE_UNIFORM, LatentMPPI
from worldloom.nn import distributions
from worldloom.planning import CEM, MPPI, CategoricalPlan, GaussianPlan
from worldloom.protocol import LatentState

SMALL = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_channels=1, num_q=3)
SMALL |= dict(num_samples=16, num_elites=4, num_pi_trajs=3)
MANY = dict(num_samples=512, num_elites=32, iterations=12)
TASKS = dict(action_dims=[3, 1, 2], task_dim=4)
B, H = 3, 3


def build(action_dim=2, discrete=False, **options):
    """A small model of random weights: reward and Q-functions would begin at zero."""
    torch.manual_seed(0)
    model = create_world_model("tdmpc2:1m", (4,), action_dim, discrete, **(SMALL | options))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def knows(model, reward=None, value=None, **others):
    """Replace what a model predicts by functions of latents and actions; nothing by default."""

    def nothing(z, action, task, target=False):
        return z.new_zeros(z.shape[:-1])

    reward, value = reward or nothing, value or nothing
    model.predict_reward = lambda z, action, task: reward(z, action, task)
    model.estimate_values = lambda z, action, task: value(z, action, task).expand(2, -1)
    for name, function in others.items():
        setattr(model, name, function)
    return model


def unknown(z, action, task):
    return torch.full_like(z[..., 0], math.nan)


def start(model, task=None, rows=B):
    torch.manual_seed(1)
    return model.encode(torch.randn(rows, 4, dtype=model.scale.value.dtype), task)


@pytest.fixture
def watched(monkeypatch):
    """What each call of the planner's steps was given, by name."""
    seen = SimpleNamespace(compute_returns=[], select_action=[])

    def watch(method, calls):
        def call(self, *args):
            calls.append(args)
            return method(self, *args)

        return call

    for name, calls in vars(seen).items():
        monkeypatch.setattr(LatentMPPI, name, watch(getattr(LatentMPPI, name), calls))
    return seen


# ---- several environments ------------------------------------------------------------------------


class Noise:
    """Random numbers of several environments, each from a generator of its own."""

    def __init__(self, envs, monkeypatch):
        self.generators = [torch.Generator().manual_seed(100 + env) for env in envs]
        monkeypatch.setattr(distributions, "standard_normal", self.normal)
        monkeypatch.setattr(draws, "draw_exponential", self.exponential)
        monkeypatch.setattr(draws, "draw_two_heads", lambda count, device: torch.tensor([2, 0]))

    def normal(self, like, *shape):
        total, *rest = shape or like.shape
        rows = total // len(self.generators)
        each = [torch.randn(rows, *rest, generator=g, dtype=like.dtype) for g in self.generators]
        return torch.cat(each)

    def exponential(self, like):
        each = [torch.empty_like(like[:1]).exponential_(generator=g) for g in self.generators]
        return torch.cat(each)


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("several_tasks", [False, True])
def test_planning_for_all_is_planning_for_each(several_tasks, deterministic, monkeypatch):
    # Nothing ends: sequences that die in their first step would tie, and ties may break either way.
    model = build(3, **(TASKS if several_tasks else {})).double()
    torch.manual_seed(3)
    obs = torch.randn(2, B, 4, dtype=torch.float64)
    tasks = torch.tensor([2, 0, 1]) if several_tasks else None

    def two_steps(envs):
        Noise(envs, monkeypatch)
        task = None if tasks is None else tasks[envs]
        action, state = model.policy(model.encode(obs[0, envs], task), deterministic)
        action_2, state = model.policy(model.observe(state, action, obs[1, envs]), deterministic)
        return torch.stack([action, action_2], 1), state.extras["plan"]

    together = two_steps([0, 1, 2])
    for env in range(B):
        alone = two_steps([env])
        for ours, single in zip(together, alone, strict=True):
            # Double precision; matrix products of other sizes may add up in another order.
            torch.testing.assert_close(ours[env : env + 1], single, rtol=1e-10, atol=1e-12)
    assert not torch.isclose(together[0][0], together[0][1]).all()


# ---- the plan in the state -----------------------------------------------------------------------


def test_after_encode_there_is_no_plan():
    assert torch.equal(start(build()).extras["plan"], torch.zeros(B, H, 2))
    uniform = start(build(4, True)).extras["plan"]
    assert torch.equal(uniform, torch.full((B, H, 4), 0.25))


def test_a_plan_moves_on_by_a_step():
    """Where the model knows nothing the plan stays as it was taken up."""
    state = start(model := knows(build(), unknown))
    old = torch.rand(B, H, 2)
    state.extras["plan"] = old
    _, after = model.policy(state)
    assert torch.equal(after.extras["plan"], torch.cat([old[:, 1:], torch.zeros(B, 1, 2)], 1))
    assert torch.equal(state.extras["plan"], old)

    state = start(model := knows(build(2, True), unknown))
    state.extras["plan"] = torch.tensor([[[1.0, 0], [0, 1], [0.5, 0.5]]] * B)
    _, after = model.policy(state)
    expected = [[0.25, 0.75], [0.5, 0.5], [0.5, 0.5]]  # half way back to uniform
    assert after.extras["plan"].tolist() == [expected] * B


def test_the_plan_is_carried_through_steps_and_forgotten_where_an_episode_begins():
    model = build()
    action, state = model.policy(start(model))
    plan, obs = state.extras["plan"], torch.randn(B, 4)
    assert plan.any(-1).all()
    seen = model.observe(state, action, obs)
    assert torch.equal(seen.extras["plan"], plan)
    assert torch.equal(model.predict(state, action).extras["plan"], plan)
    mixed = LatentState.where(torch.tensor([False, True, False]), model.encode(obs), seen)
    assert torch.equal(mixed.extras["plan"][[0, 2]], plan[[0, 2]])
    assert not mixed.extras["plan"][1].any()
    assert torch.equal(mixed.deterministic, seen.deterministic)  # the same observation


@pytest.mark.parametrize("training", [False, True])
def test_acting_leaves_nothing_on_the_module(training):
    model = build(episodic="auto").train(training)
    weights = copy.deepcopy(model.state_dict())
    hidden = {"_parameters", "_buffers", "_modules"}

    def attributes():
        return {key: value for key, value in vars(model).items() if key not in hidden}

    before = copy.deepcopy({k: v for k, v in attributes().items() if not callable(v)})
    rng = torch.get_rng_state()
    action, state = model.policy(start(model))
    model.policy(model.observe(state, action, torch.randn(B, 4)), deterministic=True)
    assert not torch.equal(torch.get_rng_state(), rng)  # all randomness is torch's
    after = attributes()
    assert set(after) == set(before)
    for name in set(before) - {"obs_spaces", "act_spaces"}:
        assert after[name] == before[name], name
    assert all(module.training == training for module in model.modules())
    torch.testing.assert_close(dict(model.state_dict()), dict(weights), rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())


# ---- choosing the action -------------------------------------------------------------------------


@pytest.mark.parametrize("discrete", [False, True])
def test_without_noise_the_action_is_an_elite_s_first(discrete, watched):
    model = build(3, discrete)
    state = start(model)
    action, _ = model.policy(state, deterministic=True)
    elites = watched.select_action[-1][1][:, :, 0]  # [B, K, A]
    assert (elites == action.unsqueeze(1)).all(-1).any(1).all()
    if not discrete:
        action, _ = model.policy(state)
        elites = watched.select_action[-1][1][:, :, 0]
        assert not (elites == action.unsqueeze(1)).all(-1).any()


def test_exploring_adds_the_plan_s_spread(monkeypatch):
    planner = build().make_planner()
    monkeypatch.setattr(distributions, "standard_normal", lambda like: torch.full_like(like, 0.5))
    std = torch.tensor([[[0.2, 0.4], [9, 9], [9, 9]]])
    plan = GaussianPlan(torch.zeros(1, H, 2), std, 0.05, 2.0)
    elites = torch.tensor([[0.1, 0.1], [0.3, 0.9]])[None, :, None].expand(1, 2, H, 2)
    chosen = planner.select_action(plan, elites, torch.tensor([[0.0, 1.0]]), False)
    torch.testing.assert_close(chosen, torch.tensor([[0.4, 1.0]]))  # 0.9 + 0.2 is cut to 1


def test_elites_are_drawn_by_weight():
    torch.manual_seed(0)
    rows, weights = 20_000, torch.tensor([0.6, 0.0, 0.3, 0.1])
    index = build().make_planner().sample_elite(weights.expand(rows, -1))
    share = index.bincount(minlength=4) / rows
    # Five standard deviations of a share.
    assert ((share - weights).abs() <= 5 * (weights * (1 - weights) / rows).sqrt()).all()


def test_exploring_a_certain_choice_takes_others_now_and_then():
    torch.manual_seed(0)
    rows = 20_000
    planner = build(3, True).make_planner()
    plan = CategoricalPlan(torch.tensor([1.0, 0, 0]).expand(rows, H, 3), (3,))
    elites, weights = plan.sample(2), torch.full((rows, 2), 0.5)
    action = planner.select_action(plan, elites, weights, False)
    assert (action.sum(-1) == 1).all() and ((action == 0) | (action == 1)).all()
    other = EXPLORE_UNIFORM / 3
    spread = math.sqrt(other * (1 - other) / rows)
    assert action[:, 1:].mean(0).tolist() == pytest.approx([other, other], abs=5 * spread)
    assert torch.equal(planner.select_action(plan, elites, weights, True), plan.probs[:, 0])


@pytest.mark.parametrize("discrete", [False, True])
def test_without_planning_the_prior_acts(discrete):
    model = build(3, discrete, mpc=False)
    state = start(model)
    assert "plan" not in state.extras
    action, after = model.policy(state, deterministic=True)
    out = model.actor(state.deterministic)
    best = torch.eye(3)[out.argmax(-1)] if discrete else out[:, :3].tanh()
    assert torch.equal(action, best) and after is state
    torch.manual_seed(7)
    drawn, after = model.policy(state)
    torch.manual_seed(7)
    assert (
        torch.equal(drawn, model.sample_prior(state.deterministic, None).action) and after is state
    )
    assert not drawn.requires_grad


# ---- what is known must be found -----------------------------------------------------------------


def near(z, action, task):
    """So steep that the weights tell elites apart."""
    return -100 * (action - 0.3).square().sum(-1)


def test_finds_the_action_of_a_known_reward():
    model = knows(build(**MANY), near)
    action, state = model.policy(start(model), deterministic=True)
    # The plan lies within about a last spread of the best (min_std is 0.05), a draw within three.
    best = torch.full((B, H, 2), 0.3)
    torch.testing.assert_close(state.extras["plan"], best, atol=0.05, rtol=0)
    torch.testing.assert_close(action, best[:, 0], atol=0.15, rtol=0)


@pytest.mark.parametrize("planner", [CEM, MPPI])
def test_other_planners_find_it_through_imagine(planner):
    model = knows(build(), near)
    action, _ = planner(model, 2, horizon=H, iterations=12)(start(model), deterministic=True)
    torch.testing.assert_close(action, torch.full((B, 2), 0.3), atol=0.05, rtol=0)


def test_finds_the_choice_of_a_known_reward():
    wanted = torch.tensor([0.0, 1.0, 0.4, 0.0])
    model = knows(build(4, True, **MANY), lambda z, action, task: 10 * action @ wanted)
    action, state = model.policy(start(model), deterministic=True)
    assert action.tolist() == [[0, 1, 0, 0]] * B
    plan = state.extras["plan"]
    assert (plan.argmax(-1) == 1).all()
    torch.testing.assert_close(plan.sum(-1), torch.ones(B, H))


def test_the_value_of_the_last_latent_steers():
    """Latents are position and goal; three actions together must reach the goal."""

    def move(z, action, task):
        position = z[..., :1] + action[..., :1]
        return torch.cat([position, z[..., 1:].expand(*position.shape[:-1], -1)], -1)

    def value(z, action, task):
        return -100 * (z[..., 0] - z[..., 1]).square()

    model = knows(
        build(discount_min=0.5, discount_max=0.5, **MANY), value=value, predict_latent=move
    )
    state = start(model)
    goals = torch.tensor([0.6, -1.5, 2.4])
    state.deterministic.zero_()[:, 1] = goals
    _, after = model.policy(state)
    # Each of three means lies within about its spread of 0.05.
    reached = after.extras["plan"][:, :, 0].sum(1)
    torch.testing.assert_close(reached, goals, atol=0.15, rtol=0)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("where", ["reward", "value"])
def test_what_is_not_finite_is_not_preferred(bad, where):
    def mostly(z, action, task):
        first = action[..., 0] if where == "reward" else z[..., 0]
        return 100 * torch.where(first > 0.3, bad, first)

    model = knows(build(**MANY, horizon=1), **{where: mostly}, predict_latent=lambda z, a, task: a)
    model.sample_prior = lambda z, task: SimpleNamespace(action=z.new_zeros(len(z), 2))
    action, _ = model.policy(start(model), deterministic=True)
    assert (action[:, 0] <= 0.3).all() and (action[:, 0] > 0.1).all()


# ---- the value of a sequence ---------------------------------------------------------------------


def line(z, action, task):
    return z + action


ENDS = {
    "goes on": ([0.1, 0.2, 0.1], 0.1 + 0.9 * 1.2 + 0.81 * 3.1 + 0.729 * 2 * 0.4),
    "ends at once": ([0.6, 0.1, 0.1], 0.6),
    "ends after two steps": ([0.2, 0.4, 0.1], 0.2 + 0.9 * 2.4),
    "ends at the horizon": ([0.2, 0.2, 0.2], 0.2 + 0.9 * 2.2 + 0.81 * 4.2),
    "does not rise again": ([0.6, -0.6, 0.1], 0.6),
}


@pytest.mark.parametrize("terminates", [False, True])
@pytest.mark.parametrize("case", ENDS)
def test_returns_by_hand(case, terminates):
    """Reward 10 z + a, values z and 3 z, and the end where z is above a half."""
    actions, expected = ENDS[case]
    model = build(1, episodic=True, discount_min=0.9, discount_max=0.9)
    model.predict_latent, model.predict_reward = line, lambda z, a, task: 10 * z[..., 0] + a[..., 0]
    model.estimate_values = lambda z, a, task: torch.stack([z[..., 0], 3 * z[..., 0]])
    model.is_terminal = lambda z, task: terminates * (z[..., 0] > 0.5).float()
    if not terminates:
        z = [0.0]
        for a in actions:
            z.append(z[-1] + a)
        expected = sum(0.9**t * (10 * z[t] + a) for t, a in enumerate(actions)) + 0.729 * 2 * z[3]
    state = start(model, rows=2)
    state.deterministic.zero_()
    candidates = torch.zeros(2, 4, H, 1)
    candidates[1, 2, :, 0] = torch.tensor(actions)
    found = model.make_planner().compute_returns(state, candidates)
    assert found.shape == (2, 4)
    # Float32 of a few terms below 10.
    assert found[1, 2].item() == pytest.approx(expected, abs=1e-5)
    assert found.count_nonzero() == 1


def test_each_task_has_its_discount():
    lengths = dict(episode_lengths=[50, 500], discount_min=0.5)
    model = build(1, action_dims=[1, 1], task_dim=4, **lengths)
    knows(model, lambda z, action, task: torch.ones_like(z[..., 0]))
    found = model.make_planner().compute_returns(
        start(model, torch.tensor([1, 0, 1])), torch.zeros(B, 2, H, 1)
    )
    expected = [[1 + d + d * d] * 2 for d in (0.99, 0.9, 0.99)]
    torch.testing.assert_close(found, torch.tensor(expected))


def test_the_prior_proposes_what_it_would_do(monkeypatch):
    monkeypatch.setattr(distributions, "standard_normal", lambda like: torch.zeros_like(like))
    model = build()
    state = start(model)
    given = model.make_planner().propose(state)
    assert given.shape == (B, 3, H, 2)
    z = state.deterministic
    for t in range(H):
        action = model.actor(z)[:, :2].tanh()
        torch.testing.assert_close(given[:, :, t], action.unsqueeze(1).expand(-1, 3, -1))
        z = model.predict_latent(z, action, None)


# ---- tasks and settings --------------------------------------------------------------------------


@pytest.mark.parametrize("deterministic", [False, True])
def test_actions_that_a_task_lacks_stay_exactly_zero(deterministic, watched):
    model = build(3, **TASKS)
    state = start(model, torch.tensor([0, 1, 2]))
    lacking = torch.tensor([[0, 0, 0], [0, 1, 1], [0, 0, 1]]).bool()
    for _ in range(2):
        action, state = model.policy(state, deterministic)
        assert torch.equal(action == 0, lacking)
        assert torch.equal(state.extras["plan"] == 0, lacking[:, None].expand(-1, H, -1))
    for _, candidates in watched.compute_returns:
        assert not candidates.masked_select(lacking[:, None, None]).any()
    for plan, _, _, _ in watched.select_action:
        assert torch.equal(plan.std == 0, lacking[:, None].expand(-1, H, -1))
    for choice in (model.sample_prior(state.deterministic, state.extras["task"]) for _ in range(2)):
        assert torch.equal(choice.action == 0, lacking)
        assert torch.equal(choice.mode == 0, lacking)


@pytest.mark.parametrize("discrete", [False, True])
@pytest.mark.parametrize(("width", "rounds"), [(19, 6), (20, 8), (21, 8)])
def test_many_actions_take_two_more_rounds(width, rounds, discrete, watched):
    model = build(width, discrete)
    model.policy(start(model))
    assert len(watched.compute_returns) == rounds


@pytest.mark.parametrize("proposed", [0, 3])
def test_proposals_are_among_the_samples(proposed, watched):
    model = build(num_pi_trajs=proposed)
    model.policy(start(model))
    samples = [actions for _, actions in watched.compute_returns]
    assert {tuple(x.shape) for x in samples} == {(B, 16, H, 2)}
    same = (samples[0] == samples[-1]).flatten(2).all(-1)  # drawn once, tried in every round
    assert same.sum(1).tolist() == [proposed] * B


def test_more_proposals_than_samples_are_refused():
    with pytest.raises(ValueError, match="num_pi_trajs is 17"):
        build(num_pi_trajs=17)
