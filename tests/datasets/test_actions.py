"""`ActionSpec.encode`: an environment's actions as models give them, the inverse of `decode`."""

import numpy as np
import pytest
from gymnasium import spaces
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from worldloom.envs.spaces import ActionSpec

BOUND = st.floats(-100, 100, width=32)


@st.composite
def boxes(draw):
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=2, max_side=3))
    low = draw(hnp.arrays(np.float32, shape, elements=BOUND))
    span = draw(hnp.arrays(np.float32, shape, elements=st.floats(0.125, 100, width=32)))
    return spaces.Box(low, low + span, dtype=np.float32)


@settings(max_examples=100, deadline=None)
@given(boxes(), st.integers(0, 2**32 - 1))
def test_continuous_actions_come_back(space, seed):
    spec = ActionSpec.from_space(space)
    model = np.random.default_rng(seed).uniform(-1, 1, (5, spec.width)).astype(np.float32)
    native = spec.decode(model)
    # Rounding to float32 moves an action by half an ulp of at most 2**-24 times its size, up to
    # 200 here; in a model's units that is divided by half the range, at least 1/16. The rest is
    # the float32 of the result: 2**-24.
    largest = max(abs(space.low).max(), abs(space.high).max())
    half = (space.high.astype(float) - space.low).min() / 2
    error = 2.0**-24 * (largest / half + 1)
    assert np.abs(spec.encode(native) - model).max() <= error
    # And what an environment was given is given to it again, but for one such rounding.
    assert np.abs(spec.decode(spec.encode(native)) - native).max() <= 2.0**-23 * 3 * largest


def test_a_space_from_minus_one_to_one_changes_no_bit():
    spec = ActionSpec.from_space(spaces.Box(-1, 1, (3,)))
    tiny = np.float32([[1e-30, -1e-9, 0.1], [1, -1, 1 / 3]])
    assert spec.encode(tiny).tobytes() == tiny.tobytes()


CHOICES = {
    "one": spaces.Discrete(4),
    "from-another-number": spaces.Discrete(4, start=-2),
    "several": spaces.MultiDiscrete([2, 3, 1]),
    "grid": spaces.MultiDiscrete([[2, 3], [4, 1]], start=[[1, 0], [0, 5]]),
    "binary": spaces.MultiBinary(3),
    "binary-grid": spaces.MultiBinary((2, 2)),
}


@pytest.mark.parametrize("space", CHOICES.values(), ids=CHOICES)
def test_choices_come_back(space):
    spec = ActionSpec.from_space(space)
    space.seed(0)
    native = np.stack([space.sample() for _ in range(20)])
    model = spec.encode(native)
    assert model.shape == (20, spec.width) and model.dtype == np.float32
    assert (spec.decode(model) == native).all()
    groups = spec.action_dim if isinstance(spec.action_dim, tuple) else (spec.action_dim,)
    for part in np.split(model, np.cumsum(groups)[:-1], axis=1):
        assert (part.sum(1) == 1).all() and set(np.unique(part)) <= {0, 1}


def test_a_joint_that_cannot_move_is_at_zero():
    spec = ActionSpec.from_space(spaces.Box(np.float32([1, 0]), np.float32([1, 2])))
    assert spec.encode(np.float32([[1, 2], [1, 0.5]])).tolist() == [[0, 1], [0, -0.5]]


MISTAKES = [
    (spaces.Box(0, 2, (1,)), [[1.0], [2.1]], r"action \[2\.\d+\] at index 1 is outside"),
    (spaces.Box(0, 2, (1,)), [[np.nan]], r"action \[nan\] at index 0 is outside"),
    (spaces.Box(0, 2, (1,)), [1.0, 2.0], r"shape \(2,\); expected \[N, \*\(1,\)\]"),
    (spaces.Discrete(3), [0, 3], r"action 3 at index 1 is outside.*Discrete\(3\)"),
    (spaces.Discrete(3), [0, -1], r"action -1 at index 1 is outside"),
    (spaces.Discrete(3), [0.0, 1.0], r"are float64; expected integers for Discrete\(3\)"),
    (spaces.MultiDiscrete([2, 3]), [[1, 2], [2, 0]], r"action \[2, 0\] at index 1"),
]


@pytest.mark.parametrize(("space", "actions", "message"), MISTAKES)
def test_what_is_no_action_is_refused(space, actions, message):
    with pytest.raises(ValueError, match=message):
        ActionSpec.from_space(space).encode(np.array(actions))
