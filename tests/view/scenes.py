"""An environment and models whose predictions are known, for the tests of the playback page.

A ball moves by a tenth of each action, within [-0.5, 0.5]. `Drift` predicts that, plus a constant
error per step, so all that it imagines can be computed by hand.
"""

import gymnasium as gym
import numpy as np
import torch
from torch import nn

from worldloom.protocol import LatentState, Trajectory

HOSTILE = "<img src=x onerror=hacked=1>"
SIZE = 64
TEXTURE = np.random.default_rng(0).normal(60, 20, (SIZE, SIZE, 1)).repeat(3, -1)


def paint(position):
    """Return an image [64, 64, 3] of a bright band at a position, on a rough background."""
    columns = np.arange(SIZE)
    band = 180 * np.exp(-(((columns - 32 - 40 * position) / 4) ** 2))
    return np.clip(TEXTURE + band[None, :, None], 0, 255).astype(np.uint8)


class Ball(gym.Env):
    """sees: "vector", "image", or "dict" with both and a key that is markup."""

    action_space = gym.spaces.Box(-2, 2, (1,), np.float32)

    def __init__(self, sees="vector", length=12, terminates=False, names=()):
        vector = gym.spaces.Box(-10, 10, (2,), np.float32)
        image = gym.spaces.Box(0, 255, (SIZE, SIZE, 3), np.uint8)
        both = gym.spaces.Dict({HOSTILE: vector, "camera": image})
        self.observation_space = {"vector": vector, "image": image, "dict": both}[sees]
        self.sees, self.length, self.terminates = sees, length, terminates
        self.obs_names = list(names)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position, self.age = float(self.np_random.uniform(-0.3, 0.3)), 0
        return self.look(), {}

    def step(self, action):
        self.position = float(np.clip(self.position + 0.05 * action[0], -0.5, 0.5))
        self.age += 1
        ends = self.age >= self.length
        return self.look(), self.position, ends and self.terminates, ends, {}

    def look(self):
        vector = np.array([self.position, 3 * self.position], np.float32)
        if self.sees == "dict":
            return {HOSTILE: vector, "camera": paint(self.position)}
        return vector if self.sees == "vector" else paint(self.position)


class Drift(nn.Module):
    """Imagines the position exactly, except that it adds `drift` in each step."""

    def __init__(self, obs_shape, action_dim, discrete, drift=0.0, fails=False):
        super().__init__()
        self.obs_shape, self.drift, self.fails = obs_shape, drift, fails
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, obs):
        if isinstance(obs, dict):
            obs = obs[HOSTILE]
        if obs.ndim == 4:  # the brightest column
            bright = obs.float().mean((1, 2)) - torch.as_tensor(TEXTURE).float().mean((0, 2))
            weights = bright.clamp(min=20) - 20
            obs = ((weights * torch.arange(SIZE)).sum(1) / weights.sum(1) - 32)[:, None] / 40
        return self._state(obs[:, :1].float())

    def _state(self, position):
        return LatentState(torch.cat([position, torch.ones_like(position)], 1))

    def predict(self, state, action):
        moved = (state.deterministic[:, :1] + 0.1 * action).clamp(-0.5, 0.5)
        return self._state(moved + self.drift)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def decode(self, state):
        if self.fails:
            raise RuntimeError("no decoder")
        position = state.deterministic[:, :1]
        outcome = {"reward": position, "continue": torch.full_like(position, 0.75)}
        images = [torch.as_tensor(paint(float(x))).permute(2, 0, 1) for x in position]
        vector = torch.cat([position, 3 * position], 1)
        if isinstance(self.obs_shape, dict):
            return {**outcome, "obs": {HOSTILE: vector, "camera": torch.stack(images).float()}}
        return {**outcome, "obs": vector if len(self.obs_shape) == 1 else torch.stack(images)}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        rewards = torch.stack([state.deterministic[:, :1] for state in states[1:]])
        return Trajectory(states, rewards, torch.full_like(rewards, 0.75))

    def compute_loss(self, batch):
        return {"loss": self.weight.square().sum()}

    def value(self, state):
        return 10 * state.deterministic[:, :1]

    def discount(self, state):
        return 0.9

    def latent_probs(self, state, action, obs):
        states = self.predict(state, action), self.observe(state, action, obs)
        right = [0.5 + s.deterministic[:, :1] for s in states]
        return tuple(torch.stack([1 - p, p], -1) for p in right)

    def policy(self, state, deterministic=False):
        return torch.where(state.deterministic[:, :1] > 0.2, -1.0, 0.5)


class Silent(Drift):
    """Implements only the protocol, without a policy, and decodes no observation."""

    policy = value = discount = latent_probs = None

    def decode(self, state):
        outcome = super().decode(state)
        return {name: outcome[name] for name in ("reward", "continue")}


class Planned(Drift):
    """Its policy adds to the state, and `observe` drops that."""

    def policy(self, state, deterministic=False):
        action = super().policy(state, deterministic)
        return action, LatentState(state.deterministic, extras={"plan": action})
