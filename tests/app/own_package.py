"""A user's package outside the checkout: environments that check their actions, and a model."""

from pathlib import Path

ENVS = '''
import gymnasium as gym
import numpy as np
from gymnasium import spaces

VECTOR = spaces.Box(-9, 9, (2,), np.float64)
IMAGE = spaces.Box(0, 255, (16, 32, 3), np.uint8)
OBS = {
    "vector": VECTOR,
    "image": IMAGE,
    "dict": spaces.Dict(view=IMAGE, sensors=spaces.Dict(now=VECTOR, mode=spaces.Discrete(3))),
}
ACTIONS = {
    "box": spaces.Box(0, 5, (2,), np.float32),
    "doubles": spaces.Box(0, 5, (2,), np.float64),
    "choice": spaces.Discrete(3, start=1),
    "choices": spaces.MultiDiscrete([3, 2]),
}


class Dial(gym.Env):
    """Bring a dial to zero; rejects actions that are not exactly of its space."""

    metadata = {"render_modes": ["rgb_array"], "render_fps": 20}

    def __init__(self, obs, actions, render_mode=None):
        self.kind, self.render_mode = obs, render_mode
        self.observation_space, self.action_space = OBS[obs], ACTIONS[actions]

    def observe(self):
        now = np.array([self.now, self.age])
        view = np.full((16, 32, 3), int(128 + 10 * np.clip(self.now, -9, 9)), np.uint8)
        sensors = {"now": now, "mode": self.age % 3}
        return {"vector": now, "image": view, "dict": {"view": view, "sensors": sensors}}[self.kind]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now, self.age = float(self.np_random.uniform(-2, 2)), 0
        self.length = int(self.np_random.integers(3, 9))
        return self.observe(), {}

    def step(self, action):
        space = self.action_space
        assert space.contains(action), (action, space)
        assert np.asarray(action).dtype == space.dtype, (action, space)
        self.now, self.age = self.now + 0.1 * (float(np.sum(action)) - 2.0), self.age + 1
        return self.observe(), 5 - abs(self.now), False, self.age >= self.length, {}

    def render(self):
        color = (255 * self.age // 9, 0, 255) if self.age else (0, 255, 0)
        return np.full((80, 101, 3), color, np.uint8)


def make_env(sees="vector", acts="box", render_mode=None):
    return Dial(sees, acts, render_mode)


def make_silent(sees="vector", acts="box"):
    return Dial(sees, acts)
'''

MODEL = '''
import torch
from torch import nn
from worldloom import LatentState, Trajectory


class Linear(nn.Module):
    """A model without a policy, for vectors."""

    def __init__(self, obs_shape, action_dim, discrete, hidden=8):
        super().__init__()
        width = action_dim if isinstance(action_dim, int) else sum(action_dim)
        self.encoder = nn.Linear(obs_shape[0], hidden)
        self.dynamics = nn.Linear(hidden + width, hidden)
        self.head = nn.Linear(hidden, 1)

    def encode(self, obs):
        code = self.encoder(obs).tanh()
        return LatentState(code, None, code)

    def predict(self, state, action):
        code = self.dynamics(torch.cat([state.features, action], -1)).tanh()
        return LatentState(code, None, code)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def decode(self, state):
        reward = self.head(state.features)
        return {"reward": reward, "continue": torch.ones_like(reward)}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        heads = self.decode(LatentState.stack(states[1:]))
        return Trajectory(states, heads["reward"], heads["continue"])

    def compute_loss(self, batch):
        after = self.predict(self.encode(batch["obs"][:, :-1]), batch["actions"][:, :-1])
        error = self.decode(after)["reward"].squeeze(-1) - batch["rewards"][:, 1:]
        return {"loss": (error.square() * ~batch["is_first"][:, 1:]).mean()}
'''


def write_package(folder: Path) -> Path:
    """Write the package `mine` into a folder, and return the folder."""
    (folder / "mine").mkdir(parents=True)
    (folder / "mine" / "__init__.py").touch()
    (folder / "mine" / "envs.py").write_text(ENVS)
    (folder / "mine" / "models.py").write_text(MODEL)
    return folder
