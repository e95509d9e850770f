"""Observations and actions of environments as tensors, for exported graphs.

`ObsSpec` and `ActionSpec` do the same with NumPy. Letters used in shapes: N environments,
A = `ActionSpec.width`.
"""

import torch
from gymnasium import Space, spaces
from torch import Tensor
from torch.nn import functional as F

from worldloom.envs.spaces import ActionSpec, get_groups


def encode_obs(space: Space, shape: tuple[int, ...], dtype: str, obs: Tensor) -> Tensor:
    """Return an environment's observations [N, ...] as a model sees them, [N, *shape].

    space: of one observation of a single environment. dtype: "uint8" for images, or "float32".
    """
    if isinstance(space, spaces.Discrete | spaces.MultiDiscrete):
        sizes, start = get_groups(space)
        choices = obs.reshape(len(obs), -1) - torch.as_tensor(start)
        groups = [F.one_hot(c.long(), n) for c, n in zip(choices.unbind(1), sizes, strict=True)]
        return torch.cat(groups, -1).float()
    if dtype != "uint8":
        return obs.float().reshape(len(obs), *shape)
    assert isinstance(space, spaces.Box)
    obs = obs.unsqueeze(1) if len(space.shape) == 2 else obs  # grey
    low, high = float(space.low.min()), float(space.high.max())
    if not (space.dtype == "uint8" and high == 255):
        unit = (obs.clamp(low, high) - low) / (high - low)
        obs = (255.0 * unit).round().to(torch.uint8)
    return obs if tuple(obs.shape[1:]) == shape else obs.permute(0, 3, 1, 2)


def decode_action(spec: ActionSpec, action: Tensor) -> Tensor:
    """Return a model's actions [N, A] as `step` of a vector environment accepts them, [N, ...]."""
    space, shape = spec.space, (len(action), *(spec.space.shape or ()))
    dtype = getattr(torch, str(space.dtype))
    if spec.discrete:
        sizes, start = get_groups(space)
        choices = torch.stack([group.argmax(1) for group in action.split(sizes, 1)], 1)
        return (choices + torch.as_tensor(start)).reshape(shape).to(dtype)
    assert isinstance(space, spaces.Box)
    # In float64, so that a space of [-1, 1] returns a model's float32 actions unchanged.
    low, high = (torch.as_tensor(x).double() for x in (space.low, space.high))
    unit = (action.double().clamp(-1.0, 1.0) + 1.0) / 2.0
    values = low + unit.reshape(shape) * (high - low)
    return values.clamp(low, high).to(dtype)
