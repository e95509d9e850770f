"""A world whose next observation is the last one plus the action, and models of it.

Observations are points [2]. The reward for arriving at a point is its first number, and episodes
terminate where the second one is above a limit.
"""

import torch
from torch import nn

from worldloom.protocol import LatentState, Trajectory

LIMIT = 2.0


class Walk(nn.Module):
    """A perfect model of the world; subclasses predict something else."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def encode(self, obs):
        return LatentState(obs)

    def predict(self, state, action):
        return LatentState(state.features + action)

    def observe(self, state, action, obs):
        return LatentState(obs)

    def decode(self, state):
        point = state.features[..., :2]
        ends = point[..., 1:] > LIMIT
        return {"obs": point, "reward": point[..., :1], "continue": 1 - ends.float()}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        heads = Walk.decode(self, LatentState.stack(states[1:]))
        return Trajectory(states, heads["reward"], heads["continue"])


class Still(Walk):
    """Predicts that nothing changes."""

    def predict(self, state, action):
        return state


class Constant(Walk):
    """Predicts the same point always."""

    def __init__(self, point):
        super().__init__()
        self.point = torch.as_tensor(point)

    def predict(self, state, action):
        return LatentState(self.point.expand_as(state.features))


class Delayed(Walk):
    """Predicts each point a step late; its state has the last two."""

    def encode(self, obs):
        return LatentState(torch.cat([obs, obs], -1))

    def predict(self, state, action):
        now = state.features[..., 2:]
        return LatentState(torch.cat([now, now + action], -1))

    def observe(self, state, action, obs):
        return LatentState(torch.cat([state.features[..., 2:], obs], -1))


def make_window(streams=3, rows=64, length=None, seed=0, size=0.3):
    """Rows of the world; length: of each episode that does not terminate, endless by default."""
    generator = torch.Generator().manual_seed(seed)
    obs, actions = torch.zeros(2, streams, rows, 2)
    first, last, terminal = torch.zeros(3, streams, rows, dtype=torch.bool)
    rewards = torch.zeros(streams, rows)
    for e in range(streams):
        age = 0
        for t in range(rows):
            if t == 0 or last[e, t - 1]:
                first[e, t], age = True, 0
                obs[e, t] = torch.randn(2, generator=generator)
            else:
                obs[e, t] = obs[e, t - 1] + actions[e, t - 1]
                rewards[e, t], age = obs[e, t, 0], age + 1
                terminal[e, t] = obs[e, t, 1] > LIMIT
                last[e, t] = terminal[e, t] | (age == length)
            if not last[e, t]:
                actions[e, t] = size * torch.randn(2, generator=generator)
    flags = {"is_first": first, "is_last": last, "is_terminal": terminal}
    return {"obs": obs, "actions": actions, "rewards": rewards, **flags}
