"""An agent speaks gymnasium: what it accepts, what it returns, and what it remembers."""

import re
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

import worldloom
from worldloom.acting import Actor
from worldloom.agent import Agent
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.protocol import LatentState


class Counting(nn.Module):
    """The action in an episode's n-th observation is its n-th corner of the action space."""

    def __init__(self, space):
        super().__init__()
        self.spec = ActionSpec.from_space(space)
        self.seen = []

    def encode(self, obs):
        return self._state(obs, 0)

    def observe(self, state, action, obs):
        return self._state(obs, state.deterministic + 1)

    def _state(self, obs, count):
        self.seen.append(obs)
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        count = torch.zeros(rows, 1) + count
        return LatentState(count, None, count)

    def policy(self, state, deterministic=False):
        wanted = np.array([nth_action(self.spec.space, int(n)) for n in state.deterministic])
        return torch.as_tensor(self.spec.encode(wanted))


def nth_action(space, n):
    """Return actions that differ from step to step, in the terms of a space."""
    if isinstance(space, spaces.Box):
        share = np.full(space.shape, (n % 5) / 4)
        return (space.low + share * (space.high - space.low)).astype(space.dtype)
    if isinstance(space, spaces.Discrete):
        return space.start + n % space.n
    if isinstance(space, spaces.MultiDiscrete):
        return (space.start + n % space.nvec).astype(space.dtype)
    return np.full(space.shape, n % 2, space.dtype)


class Strict(gym.Env):
    """Accepts the n-th action of an episode only, exactly; episodes have 1, 2, 3... steps."""

    def __init__(self, obs_space, action_space):
        self.observation_space, self.action_space = obs_space, action_space
        obs_space.seed(0)
        self.episode = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.age = self.episode + 1, 0
        return self.observation_space.sample(), {}

    def step(self, action):
        wanted = nth_action(self.action_space, self.age)
        assert self.action_space.contains(action)
        assert np.asarray(action).dtype == np.asarray(wanted).dtype
        np.testing.assert_allclose(action, wanted, rtol=1e-6)
        self.age += 1
        return self.observation_space.sample(), 1.0, self.age >= self.episode, False, {}


IMAGE = spaces.Box(0, 255, (16, 32, 3), np.uint8)
NESTED = spaces.Dict(
    {
        "view": IMAGE,
        "sensors": spaces.Dict(
            {"now": spaces.Box(-1, 1, (2, 2)), "mode": spaces.Discrete(3, start=-1)}
        ),
    }
)
OBS = {
    "vector": spaces.Box(-1, 1, (4,), np.float64),
    "scalar": spaces.Box(-1, 1, ()),
    "image": IMAGE,
    "channels first": spaces.Box(0, 255, (3, 16, 32), np.uint8),
    "choice": spaces.Discrete(5, start=2),
    "choices": spaces.MultiDiscrete([3, 2]),
    "bits": spaces.MultiBinary(3),
    "dict": NESTED,
}
ACTIONS = {
    "box": spaces.Box(0, 5, (1,)),
    "box of doubles": spaces.Box(np.array([-1.0, 2]), np.array([3.0, 9]), dtype=np.float64),
    "matrix": spaces.Box(0, 5, (2, 2)),
    "choice": spaces.Discrete(4, start=1),
    "choices": spaces.MultiDiscrete([3, 2], start=[1, -1]),
    "bits": spaces.MultiBinary(3),
}
PAIRS = [(obs, "box") for obs in OBS] + [("dict", action) for action in ACTIONS]


def make_agent(obs_space, action_space, **options):
    actor = Actor(Counting(action_space))
    return Agent(actor, ObsSpec.from_space(obs_space), ActionSpec.from_space(action_space))


@pytest.mark.parametrize(("obs", "action"), PAIRS)
def test_a_single_environment(obs, action):
    """The environment checks every action, so the memory begins with each episode."""
    env, agent = Strict(OBS[obs], ACTIONS[action]), make_agent(OBS[obs], ACTIONS[action])
    for _ in range(4):
        seen, _ = env.reset()
        agent.reset()
        ended = False
        while not ended:
            seen, _, ended, _, _ = env.step(agent.act(seen))
    assert env.episode == 4 and env.age == 4


@pytest.mark.parametrize(("obs", "action"), PAIRS)
@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
def test_a_vector_environment(obs, action, mode):
    """The loop of docs/acting.md; the environments check every action."""

    def make(episode):
        env = Strict(OBS[obs], ACTIONS[action])
        env.episode = episode
        return env

    envs = SyncVectorEnv([lambda e=e: make(e) for e in range(3)], autoreset_mode=mode)
    agent = make_agent(OBS[obs], ACTIONS[action])
    next_step = envs.metadata["autoreset_mode"] == AutoresetMode.NEXT_STEP
    seen, _ = envs.reset()
    is_first, ended = np.ones(3, bool), np.zeros(3, bool)
    for _ in range(12):
        action_batch = agent.act(seen, is_first)
        seen, _, terminated, truncated, _ = envs.step(action_batch)
        before, ended = ended, terminated | truncated
        is_first = before if next_step else ended
    assert all(env.episode >= 4 for env in envs.envs)


@pytest.mark.parametrize("mode", ["NEXT_STEP", "SAME_STEP"])
def test_the_loops_of_the_documentation(mode, monkeypatch):
    """The code of docs/acting.md, with environments that check every action."""
    page = (Path(__file__).parents[1] / "docs" / "acting.md").read_text()
    single, vector, *_ = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    spaces_ = OBS["scalar"], ACTIONS["choice"]
    made = []

    class Run:
        def make_env(self):
            made.append(Strict(*spaces_))
            return made[-1]

        def agent(self):
            return make_agent(*spaces_)

    monkeypatch.setattr(worldloom, "load_run", lambda path: Run())
    scope = {}
    exec(single, scope)
    assert made[0].age == made[0].episode == 1
    exec(vector.replace("mode=AutoresetMode.NEXT_STEP", f"mode=AutoresetMode.{mode}"), scope)
    assert scope["envs"].metadata["autoreset_mode"] == AutoresetMode[mode]
    assert all(env.episode > 40 for env in made[1:]) and len(made) == 5


def test_images_reach_the_model_channels_first_and_as_bytes():
    agent = make_agent(IMAGE, ACTIONS["box"])
    image = IMAGE.sample()
    agent.act(image)
    agent.act(np.stack([image] * 2), np.ones(2, bool))
    one, two = agent.actor.model.seen
    assert one.dtype == torch.uint8 and one.shape == (1, 3, 16, 32)
    assert (one[0].numpy() == image.transpose(2, 0, 1)).all()
    assert (two.numpy() == image.transpose(2, 0, 1)).all()


def test_is_first_starts_an_episode_of_a_single_environment():
    agent = make_agent(OBS["vector"], ACTIONS["choice"])
    obs = np.zeros(4)
    assert [int(agent.act(obs)) for _ in range(3)] == [1, 2, 3]
    assert [int(agent.act(obs, first)) for first in (True, False, np.bool_(True))] == [1, 2, 1]
    agent.reset()
    assert int(agent.act(obs)) == 1
    assert int(make_agent(OBS["vector"], ACTIONS["choice"]).act(obs, False)) == 1


def test_two_agents_of_one_model_have_their_own_memory():
    one = make_agent(OBS["vector"], ACTIONS["choice"])
    other = Agent(one.actor, one.obs_spec, one.action_spec)
    obs = np.zeros(4)
    assert [int(agent.act(obs)) for agent in (one, one, other, one)] == [1, 2, 1, 3]


def test_the_choice_between_samples_and_the_mode_reaches_the_policy():
    agent = make_agent(OBS["vector"], ACTIONS["box"])
    seen = []
    policy = agent.actor.model.policy
    agent.actor.model.policy = lambda state, deterministic: (
        seen.append(deterministic) or policy(state)
    )
    agent.act(np.zeros(4))
    agent.deterministic = False
    agent.act(np.zeros(4))
    assert seen == [True, False]


def test_what_a_vector_environment_casts_is_accepted():
    """Training casts these too; see gymnasium.vector.utils.concatenate."""
    agent = make_agent(spaces.Box(-1, 1, (2,)), ACTIONS["choice"])
    for obs in (np.zeros(2, np.float64), [0.0, 0.5], np.zeros(2, int), torch.zeros(2)):
        assert int(agent.act(obs, True)) == 1
    agent = make_agent(OBS["choice"], ACTIONS["choice"])
    for obs in (2, np.int32(6), np.array(4)):
        assert int(agent.act(obs, True)) == 1
    assert agent.actor.model.seen[-1].tolist() == [[0, 0, 1, 0, 0]]


def test_keys_that_the_space_does_not_have_are_ignored():
    agent = make_agent(NESTED, ACTIONS["choice"])
    assert int(agent.act({**NESTED.sample(), "debug": object()})) == 1


def test_dropped_keys_need_not_be_there():
    spec = ObsSpec.from_space(NESTED, keep="sensors/now")
    action_spec = ActionSpec.from_space(ACTIONS["choice"])
    agent = Agent(Actor(Counting(ACTIONS["choice"])), spec, action_spec)
    assert int(agent.act({"sensors": {"now": np.zeros((2, 2))}})) == 1


VECTOR = OBS["vector"]
SAMPLE = NESTED.sample()
NAN = np.array([0, 0, np.nan, 0])


@pytest.mark.parametrize(
    ("space", "obs", "message"),
    [
        (VECTOR, np.zeros(3), r"observation has shape \(3,\); expected \(4,\), or \[N, \*\(4,\)\]"),
        (VECTOR, np.zeros((2, 2, 4)), r"observation has shape \(2, 2, 4\)"),
        (VECTOR, np.zeros((0, 4)), r"observation has shape \(0, 4\)"),
        (VECTOR, np.zeros(4, complex), r"observation is array.*; expected an array of Box"),
        (VECTOR, None, r"observation is None; expected an array of Box"),
        (VECTOR, NAN, "observation contains NaN or infinity"),
        (VECTOR, np.full((2, 4), np.inf), "observation contains NaN or infinity"),
        (VECTOR, (np.zeros(4), {}), "observation is a tuple; expected an array"),
        (VECTOR, {"x": np.zeros(4)}, "observation is a dict; expected an array"),
        (IMAGE, np.zeros((16, 32, 3)), "observation is float64; expected uint8"),
        (IMAGE, np.zeros((3, 16, 32), np.uint8), r"shape \(3, 16, 32\); expected \(16, 32, 3\)"),
        (OBS["choice"], 1, r"observation is 1; expected an element of Discrete\(5, start=2\)"),
        (OBS["choice"], 2.0, "observation is float64; expected int64"),
        (OBS["choices"], np.array([2, 2]), r"is \[2 2\]; expected an element of MultiDiscrete"),
        (OBS["choices"], np.array([[0, 0], [0, -1]]), r"is \[ 0 -1\]; expected an element"),
        (OBS["bits"], np.array([0, 1, 2], np.int8), r"expected an element of MultiBinary"),
        (NESTED, {"view": SAMPLE["view"]}, "has no 'sensors/mode'; expected the keys .*view"),
        (NESTED, SAMPLE["view"], "observation is a ndarray; expected a dict with the keys"),
        (NESTED, {**SAMPLE, "view": SAMPLE["view"][None]}, "has the shapes .*expected one env"),
        (NESTED, {**SAMPLE, "view": SAMPLE["view"][1:]}, r"'view' has shape \(15, 32, 3\)"),
    ],
)
def test_an_observation_that_does_not_fit_is_rejected_in_one_line(space, obs, message):
    agent = make_agent(space, ACTIONS["choice"])
    with pytest.raises(ValueError, match=message) as raised:
        agent.act(obs)
    assert "\n" not in str(raised.value)
    assert agent.actor.model.seen == []  # nothing was remembered


@pytest.mark.parametrize(
    ("is_first", "message"),
    [
        (None, r"is_first is missing; .* pass is_first \[3\] bool"),
        (True, r"is_first is bool of shape \(\); expected \[3\] bool"),
        (np.zeros(2, bool), r"is_first is bool of shape \(2,\); expected \[3\] bool"),
        (np.zeros(3), r"is_first is float64 of shape \(3,\); expected \[3\] bool"),
    ],
)
def test_is_first_of_vector_environments_is_checked(is_first, message):
    agent = make_agent(VECTOR, ACTIONS["choice"])
    obs = np.zeros((3, 4))
    agent.act(obs)  # the first call after reset needs none
    with pytest.raises(ValueError, match=message):
        agent.act(obs, is_first)


def test_is_first_of_a_single_environment_is_checked():
    agent = make_agent(VECTOR, ACTIONS["choice"])
    with pytest.raises(ValueError, match=r"is_first is bool of shape \(1,\); expected a bool"):
        agent.act(np.zeros(4), np.ones(1, bool))


def test_another_number_of_environments_needs_a_reset():
    agent = make_agent(VECTOR, ACTIONS["choice"])
    agent.act(np.zeros((3, 4)))
    with pytest.raises(ValueError, match=r"those of 2 environments, but the previous .* of 3"):
        agent.act(np.zeros((2, 4)), np.array([True, False]))
    with pytest.raises(ValueError, match="those of 1 environments"):
        agent.act(np.zeros(4))
    assert agent.act(np.zeros((2, 4)), np.ones(2, bool)).tolist() == [1, 1]
    agent.reset()
    assert int(agent.act(np.zeros(4))) == 1


def test_an_action_that_is_not_finite_is_rejected():
    agent = make_agent(VECTOR, ACTIONS["box"])
    agent.actor.model.policy = lambda state, deterministic: torch.full((1, 1), torch.nan)
    with pytest.raises(ValueError, match="actions contain NaN or infinity"):
        agent.act(np.zeros(4))


class Drawing(Counting):
    """Every action is drawn, as those of models that sample latent states are."""

    def policy(self, state, deterministic=False):
        return torch.rand(len(state.deterministic), self.spec.width) * 2 - 1


def test_the_random_numbers_of_an_agent_are_its_own():
    space = ActionSpec.from_space(ACTIONS["box"])
    actor, obs = Actor(Drawing(ACTIONS["box"])), np.zeros(4)

    def draw(agent):
        torch.rand(1)  # of the program, between two calls
        return agent.act(obs).tolist()

    agents = [Agent(actor, ObsSpec.from_space(OBS["vector"]), space, seed=s) for s in (0, 0, 1)]
    torch.manual_seed(5)
    one, same, other = ([draw(agent) for _ in range(3)] for agent in agents)
    assert one == same != other
    assert one[0] != one[1]
    after = torch.rand(1)
    torch.manual_seed(5)
    assert torch.equal(after, torch.rand(10)[9:])  # nine of the program, none of the agents
    agents[0].reset()
    assert draw(agents[0]) != one[0]
    agents[0].reset(seed=0)
    assert [draw(agents[0]) for _ in range(3)] == one
