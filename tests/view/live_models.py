"""Models, recordings and sessions for tests of the live page."""

import gymnasium as gym
import numpy as np
import torch

from worldloom import create_world_model
from worldloom.acting import Actor
from worldloom.envs.spaces import ActionSpec
from worldloom.planning import CEM
from worldloom.protocol import LatentState, Trajectory
from worldloom.view.episodes import Recording
from worldloom.view.names import Names
from worldloom.view.session import Session

STEPS = 6
BOX = gym.spaces.Box(-2, 2, (2,), np.float32)
CHOICE = gym.spaces.Discrete(3)
SMALL = {"deter": 16, "hidden": 8, "units": 8, "classes": 4, "stoch": 2, "depth": 2}


class Sum(torch.nn.Module):
    """The state is the sum of the observation and of all actions; the reward is its first number.

    The methods of the protocol only; `without` names what it cannot do.
    """

    def __init__(self, without=()):
        super().__init__()
        self.without = without

    def encode(self, obs):
        return LatentState(obs.float())

    def observe(self, state, action, obs):
        return self.encode(obs)

    def predict(self, state, action):
        return LatentState(state.features + action[:, :1])

    def decode(self, state):
        if "decode" in self.without:
            raise RuntimeError("no\ndecoder")
        out = {"reward": state.features[:, :1], "continue": torch.full((len(state), 1), 0.5)}
        return out if "obs" in self.without else {**out, "obs": state.features}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        rewards = torch.stack([state.features[:, :1] for state in states[1:]])
        return Trajectory(states, rewards, torch.ones_like(rewards))


def make_model(name):
    """Return a model and the space of its actions."""
    if name == "sum":
        return Sum(), BOX
    space = CHOICE if name.endswith("choices") else BOX
    size = 3 if space is CHOICE else 2
    shape = (3, 16, 16) if name == "dreamer" else (3,)
    options = {"obs_shape": shape, "action_dim": size, "discrete": space is CHOICE}
    torch.manual_seed(0)
    if name == "tdmpc":
        tiny = {"num_samples": 16, "num_elites": 4, "num_pi_trajs": 2, "horizon": 2}
        return create_world_model("tdmpc2:1m", **options, **tiny).eval(), space
    return create_world_model("dreamerv3:size1m", **options, **SMALL).eval(), space


def make_session(model, space=BOX, name="episode 1"):
    """Return a session of a model and an episode of random observations and actions."""
    spec = ActionSpec.from_space(space)
    random = np.random.default_rng(0)
    shape = getattr(model, "obs_shape", (2,))
    high = 255 if len(shape) == 3 else 1
    obs = random.uniform(0, high, size=(STEPS + 1, *shape))
    obs = obs.astype(np.uint8 if high == 255 else np.float32)
    actions = spec.encode(np.array([space.sample() for _ in range(STEPS)]))
    states = []
    with torch.no_grad(), torch.random.fork_rng():
        for t in range(STEPS + 1):
            now = torch.as_tensor(obs[t : t + 1])
            if t == 0:
                states.append(model.encode(now))
            else:
                states.append(model.observe(states[-1], torch.as_tensor(actions[t - 1 : t]), now))
    names = Names({"": ["one", "two", "three"][: shape[0]]} if high == 1 else {}, ["left", "right"])
    if space is CHOICE:
        names.actions.insert(1, "stay")
    rewards = np.arange(STEPS + 1, dtype=np.float32)
    recording = Recording(name, names, {"": obs}, actions, rewards, LatentState.cat(states))
    planner = (
        None if callable(getattr(model, "policy", None)) else CEM(model, spec.width, horizon=2)
    )
    return Session(Actor(model, planner), spec, [recording])
