"""Conversions in graphs equal those of the agent, bit for bit."""

import numpy as np
import pytest
import torch
from gymnasium import spaces

from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.export.conversion import decode_action, encode_obs

OBSERVATIONS = {
    "vector": (spaces.Box(-np.inf, np.inf, (3,), np.float64), {}),
    "matrix": (spaces.Box(-1, 1, (2, 3), np.float32), {}),
    "bytes": (spaces.Box(0, 9, (4, 4), np.uint8), {}),
    "channels last": (spaces.Box(0, 255, (16, 32, 3), np.uint8), {}),
    "channels first": (spaces.Box(0, 255, (3, 16, 32), np.uint8), {}),
    "grey": (spaces.Box(0, 255, (16, 16), np.uint8), {"image": ""}),
    "floats": (spaces.Box(-0.5, 1, (16, 16, 2), np.float32), {"image": ""}),
    "choice": (spaces.Discrete(4, start=-1), {}),
    "choices": (spaces.MultiDiscrete([2, 5, 3]), {}),
    "flags": (spaces.MultiBinary(5), {}),
}


@pytest.mark.parametrize("name", OBSERVATIONS)
def test_observations(name):
    space, options = OBSERVATIONS[name]
    space.seed(0)
    spec = ObsSpec.from_space(space, **options)
    obs = np.stack([space.sample() for _ in range(5)])
    part = spec.parts[""]
    found = encode_obs(space, part.shape, part.dtype, torch.from_numpy(obs)).numpy()
    expected = spec.encode(obs)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)


@pytest.mark.parametrize(
    "space",
    [
        spaces.Box(-1, 1, (3,), np.float32),
        spaces.Box(np.array([-2.0, 0.0]), np.array([0.5, 1e3]), dtype=np.float64),
        spaces.Box(-3, 1, (2, 2), np.float32),
        spaces.Discrete(4, start=2),
        spaces.MultiDiscrete([[2, 3], [4, 2]]),
        spaces.MultiBinary(3),
    ],
    ids=str,
)
def test_actions(space):
    spec = ActionSpec.from_space(space)
    actions = 2 * np.random.default_rng(0).standard_normal((50, spec.width), np.float32)
    found, expected = decode_action(spec, torch.from_numpy(actions)).numpy(), spec.decode(actions)
    assert found.dtype == expected.dtype
    np.testing.assert_array_equal(found, expected)
