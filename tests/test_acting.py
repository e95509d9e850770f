import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from torch import nn

from worldloom.acting import Actor, Memory, evaluate
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.protocol import LatentState


class Tally(nn.Module):
    """A model whose state is (number of observations, sum of actions) of the present episode."""

    def __init__(self, action_dim=2):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))
        self.action_dim = action_dim
        self.calls = []

    def encode(self, obs):
        self.calls.append("encode")
        return self._state(torch.ones(len(obs), 1), torch.zeros(len(obs), 1), obs)

    def observe(self, state, action, obs):
        self.calls.append("observe")
        count, total = state.deterministic.split(1, -1)
        return self._state(count + 1, total + action.sum(-1, keepdim=True), obs)

    def _state(self, count, total, obs):
        deter = torch.cat([count, total], -1) + 0 * self.weight
        return LatentState(deter, None, deter, {"obs": obs})


class Acting(Tally):
    def policy(self, state, deterministic=False):
        self.calls.append(("policy", deterministic, torch.is_grad_enabled(), self.training))
        return state.deterministic[:, :1].repeat(1, self.action_dim).double()


OBS = np.arange(6, dtype=np.float32).reshape(3, 2)


def first(*rows):
    return np.array(rows, bool)


def test_the_first_call_encodes():
    model = Acting()
    action, memory = Actor(model)(OBS, first(0, 0, 0))
    assert model.calls[0] == "encode" and "observe" not in model.calls
    assert action.shape == (3, 2) and action.dtype == torch.float32
    assert memory.state.deterministic.tolist() == [[1, 0]] * 3
    assert (memory.state.extras["obs"].numpy() == OBS).all()
    assert memory.action is action and memory.plan is None


class Remembering(Tally):
    """A policy that counts in the state how often it was asked."""

    def policy(self, state, deterministic=False):
        asked = state.extras.get("asked", torch.zeros(len(state), 1)) + 1
        action = asked.repeat(1, self.action_dim)
        return action, LatentState(state.deterministic, None, state.features, {"asked": asked})

    def observe(self, state, action, obs):
        new = super().observe(state, action, obs)
        return LatentState(new.deterministic, None, new.features, dict(state.extras))

    def encode(self, obs):
        new = super().encode(obs)
        return LatentState(new.deterministic, None, new.features, {"asked": torch.zeros(3, 1)})


def test_a_policy_may_return_a_state_that_carries_on():
    actor, memory = Actor(Remembering()), None
    for asked in (1, 2, 3):
        action, memory = actor(OBS, first(0, 0, 0), memory)
        assert action.tolist() == [[asked, asked]] * 3
    action, _ = actor(OBS, first(0, 1, 0), memory)  # a new episode begins without it
    assert action[:, 0].tolist() == [4, 1, 4]


def test_later_calls_observe_with_the_last_action():
    model = Acting()
    actor = Actor(model)
    _, memory = actor(OBS, first(1, 1, 1))
    model.calls.clear()
    action, memory = actor(OBS + 1, first(0, 0, 0), memory)
    assert "encode" not in model.calls
    assert memory.state.deterministic.tolist() == [[2, 2]] * 3
    assert action.tolist() == [[2, 2]] * 3


def test_rows_where_an_episode_starts_forget():
    actor = Actor(Acting())
    _, memory = actor(OBS, first(1, 1, 1))
    _, memory = actor(OBS, torch.tensor([False, True, False]), memory)
    assert memory.state.deterministic.tolist() == [[2, 2], [1, 0], [2, 2]]
    _, memory = actor(OBS, first(0, 0, 1), memory)
    assert memory.state.deterministic.tolist() == [[3, 6], [2, 2], [1, 0]]


def test_all_rows_first_is_the_same_as_no_memory():
    model = Acting()
    actor = Actor(model)
    _, memory = actor(OBS, first(1, 1, 1))
    model.calls.clear()
    _, memory = actor(OBS, first(1, 1, 1), memory)
    assert "observe" not in model.calls
    assert memory.state.deterministic.tolist() == [[1, 0]] * 3


def test_observe_alone_takes_the_actions_it_is_given():
    actor = Actor(Tally(), planner=lambda *_: None)
    state = actor.observe(OBS, first(1, 1, 1))
    memory = Memory(state, torch.tensor([[5.0, 0], [6, 0], [7, 0]]))
    assert actor.observe(OBS, first(0, 0, 0), memory).deterministic.tolist() == [
        [2, 5],
        [2, 6],
        [2, 7],
    ]


@pytest.mark.parametrize("training", [True, False])
def test_acts_without_gradients_and_leaves_the_training_mode(training):
    model = Acting().train(training)
    action, memory = Actor(model)(OBS, first(1, 1, 1), deterministic=True)
    assert model.calls[-1] == ("policy", True, False, training)
    assert model.training is training
    assert not action.requires_grad and not memory.state.features.requires_grad


def test_dict_observations():
    class Dicts(Acting):
        def encode(self, obs):
            assert obs["image"].dtype == torch.uint8
            return super().encode(obs["vector"])

    obs = {"vector": OBS, "image": np.zeros((3, 3, 16, 16), np.uint8)}
    assert Actor(Dicts())(obs, first(1, 1, 1))[0].shape == (3, 2)


def test_the_planner_gets_its_plan_back():
    seen = []

    def planner(state, plan, is_first, deterministic):
        seen.append((plan, is_first.tolist(), deterministic))
        plan = torch.zeros(3, 4, 2) if plan is None else plan + 1
        return plan[:, 0], plan

    actor = Actor(Tally(), planner)
    _, memory = actor(OBS, first(1, 1, 1))
    action, memory = actor(OBS, first(0, 1, 0), memory, deterministic=True)
    assert seen[0] == (None, [True] * 3, False)
    assert seen[1][0].tolist() == torch.zeros(3, 4, 2).tolist()
    assert seen[1][1:] == ([False, True, False], True)
    assert (memory.plan == 1).all() and (action == 1).all()


def test_a_models_own_policy_comes_first():
    actor = Actor(Acting(), planner=lambda *_: pytest.fail("planned"))
    assert actor(OBS, first(1, 1, 1))[0].shape == (3, 2)


def test_models_without_parameters_act():
    class Fixed:
        encode = Acting.encode
        _state = staticmethod(lambda count, total, obs: LatentState(count, None, count))
        policy = staticmethod(lambda state, deterministic: state.features)
        calls = ()

        def __init__(self):
            self.calls = []

    assert Actor(Fixed())(OBS, first(1, 1, 1))[0].tolist() == [[1], [1], [1]]


def test_nothing_to_act_with_is_refused():
    with pytest.raises(ValueError, match=r"Tally has no policy and no planner.*planning\.CEM"):
        Actor(Tally())


# ---- evaluate ------------------------------------------------------------------------------------


class Chance(gym.Env):
    """An episode's length is drawn from 1 to 9; each step's reward is the action."""

    observation_space = spaces.Box(0, 9, (1,))
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, length=None):
        self.fixed = length

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = self.fixed or int(self.np_random.integers(1, 10))
        return np.array([self.left], np.float32), {}

    def step(self, action):
        self.left -= 1
        info = {"success": bool(action[0] > 0)} if self.left == 0 else {}
        return np.array([self.left], np.float32), float(action[0]), self.left == 0, False, info


class Dice(Tally):
    """Acts at random unless it must be deterministic; then always 0.5."""

    def policy(self, state, deterministic=False):
        return torch.full((len(state), 1), 0.5) if deterministic else torch.rand(len(state), 1)


def score(env, episodes, seed=0, model=None, **kwargs):
    obs_spec = ObsSpec.from_space(env.single_observation_space)
    action_spec = ActionSpec.from_space(env.single_action_space)
    return evaluate(Actor(model or Dice(1)), env, obs_spec, action_spec, episodes, seed, **kwargs)


@pytest.mark.parametrize(("num_envs", "episodes"), [(1, 3), (3, 7), (4, 4), (5, 2)])
def test_runs_exactly_so_many_episodes(num_envs, episodes):
    results = score(make_vector_env(Chance, num_envs), episodes)
    assert len(results) == episodes
    for result in results:
        assert result["return"] == pytest.approx(0.5 * result["length"])
        assert result["success"] == 1.0


def test_short_episodes_are_not_favoured():
    lengths = iter([1, 9])
    env = make_vector_env(lambda: Chance(next(lengths)), 2)
    assert [result["length"] for result in score(env, 6)] == [1, 1, 1, 9, 9, 9]


def test_state_starts_afresh_with_each_episode():
    class Counting(Tally):
        def policy(self, state, deterministic=False):
            return state.deterministic[:, :1] / 10  # how many observations it has seen

    lengths = iter([2, 3])
    env = make_vector_env(lambda: Chance(next(lengths)), 2)
    returns = [result["return"] for result in score(env, 4, model=Counting(1))]
    assert returns == pytest.approx([0.3, 0.3, 0.6, 0.6])


def test_seeds_reproduce_and_differ():
    env = make_vector_env(Chance, 2)
    first = score(env, 8, seed=1, deterministic=False)
    torch.rand(3)
    assert score(env, 8, seed=1, deterministic=False) == first
    assert score(env, 8, seed=2, deterministic=False) != first


def test_random_numbers_around_an_evaluation_stay():
    torch.manual_seed(0)
    expected = torch.rand(2).tolist()
    torch.manual_seed(0)
    score(make_vector_env(Chance, 2), 3, deterministic=False)
    assert torch.rand(2).tolist() == expected


def test_success_is_left_out_where_the_environment_does_not_tell():
    env = make_vector_env(lambda: gym.make("Pendulum-v1", max_episode_steps=2))
    assert set(score(env, 1)[0]) == {"return", "length"}


def test_no_episodes_are_refused():
    with pytest.raises(ValueError, match="episodes is 0; expected at least 1"):
        score(make_vector_env(Chance), 0)


# ---- precision -----------------------------------------------------------------------------------


class Multiplying(Acting):
    """Its action shows the dtype of a product."""

    def policy(self, state, deterministic=False):
        product = torch.ones(3, 2) @ torch.ones(2, 2)
        assert not torch.is_grad_enabled()
        self.dtype = product.dtype
        return product


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true", "None"])
@pytest.mark.parametrize("plans", [False, True])
def test_models_that_plan_act_in_the_mixed_precision_of_their_run(precision, plans):
    model = Multiplying()
    model.plans_in_bfloat16 = plans
    action, _ = Actor(model, precision=precision)(OBS, first(1, 1, 1))
    mixed = plans and precision == "bf16-mixed"
    assert model.dtype == (torch.bfloat16 if mixed else torch.float32)
    assert action.dtype == torch.float32
