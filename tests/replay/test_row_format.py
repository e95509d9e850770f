"""What the replay refuses, and that nothing of it is stored."""

import numpy as np
import pytest
import torch

from worldloom.protocol import ReplayField
from worldloom.replay.row_format import RowSchema
from worldloom.training import ReplayBuffer

LATENTS = {"deter": ReplayField((3,), torch.float16), "stoch": ReplayField((2, 2), torch.uint8)}


def episode(steps: int) -> dict:
    actions = np.linspace(-1, 1, 2 * steps).reshape(steps, 2)
    return {"obs": np.zeros((steps + 1, 4)), "actions": actions, "rewards": np.ones(steps)}


def ends(steps: int) -> np.ndarray:
    return np.arange(steps) == steps - 1


def with_value(value: float, where: tuple[int, ...]) -> np.ndarray:
    array = np.zeros((4, 4)[: len(where)])
    array[where] = value
    return array


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"obs": np.zeros((4, 5))}, r"obs has shape \(4, 5\); expected \(4, 4\)"),
        ({"obs": np.zeros((7, 4))}, "obs has 7 rows for 3 actions; give 4, the last one being"),
        ({"obs": {"a": np.zeros((4, 4))}}, r"obs is \['a'\] but obs_shape says a single array"),
        ({"obs": with_value(np.nan, (2, 1))}, r"obs of step 2 .* env 0 holds nan; only finite"),
        ({"obs": with_value(1e300, (1, 1))}, "obs of step 1 .* holds inf"),
        ({"rewards": np.zeros(4)}, r"rewards has shape \(4,\); expected \(3,\)"),
        ({"rewards": np.array([0, 0, -np.inf])}, "rewards of step 2 .* holds -inf"),
        ({"actions": np.zeros((3, 3))}, r"actions has shape \(3, 3\); expected \(3, 2\)"),
        ({"actions": np.array([0, 1, 1])}, r"integers of shape \(3,\) .*give np.eye\(2, "),
        (
            {"actions": np.full((3, 2), -1.5)},
            r"actions contain -1.5 but must be in \[-1, 1\]",
        ),
        ({"actions": np.zeros((0, 2))}, "the episode has no actions"),
        ({"dones": np.zeros(2)}, r"dones has shape \(2,\); expected \(3,\)"),
        ({"dones": [0, 1, 0]}, "dones is true at index 1 of 3 steps.*split them there"),
        ({"truncations": [1, 0, 1]}, "truncations is true at index 0 of 3 steps"),
        ({"dones": ends(3), "truncations": ends(3)}, "give dones or the other two"),
        ({"env": 1}, "env is 1; this replay has envs 0 to 0"),
    ],
)
def test_bad_episodes_are_refused_and_leave_no_trace(change, message):
    buffer = ReplayBuffer(100)
    with pytest.raises(ValueError, match=message):
        buffer.add_episode(**(episode(3) | change))
    assert len(buffer) == 0


@pytest.mark.parametrize(
    ("change", "error", "message"),
    [
        ({"obs": {"image": 0}}, ValueError, r"obs is \['image'\] but .* \['image', 'vector'\]"),
        ({"image": np.zeros((2, 3, 4, 4))}, TypeError, "image.* is float64 .*give pixels as uint8"),
        (
            {"vector": np.zeros(2)},
            ValueError,
            r"\['vector'\] has shape \(2,\); expected \(2, 4\)",
        ),
        ({"vector": [[0] * 4, [0, 0, 0, np.nan]]}, ValueError, r"\['vector'\] of env 1 holds nan"),
        ({"actions": np.array([1, 0])}, ValueError, "one-hot rows are stored"),
        ({"is_first": [True, False]}, ValueError, "env 1 begins without is_first; set it in the"),
        ({"is_terminal": [False, True]}, ValueError, "env 1 is_terminal but not is_last"),
        ({"fields": {}}, ValueError, r"fields are \[\] but .* stores \['deter', 'stoch'\]"),
    ],
)
def test_bad_rows_are_refused_and_leave_no_trace(change, error, message):
    buffer = ReplayBuffer(100, {"image": (3, 4, 4), "vector": (4,)}, num_envs=2, fields=LATENTS)
    obs = {"image": np.zeros((2, 3, 4, 4), np.uint8), "vector": np.zeros((2, 4))}
    obs |= {key: change.pop(key) for key in list(change) if key in obs}
    row = {"obs": obs, "actions": np.full((2, 2), 7.0), "rewards": np.zeros(2)}
    row |= {"is_first": [True, True], "is_last": [False] * 2, "is_terminal": [False] * 2}
    with pytest.raises(error, match=message):
        buffer.add(**(row | change))
    assert len(buffer) == 0


def test_fields_and_dtypes_of_a_row():
    shapes = {"camera": (3, 6, 5), "arm": (4,)}
    fields = RowSchema(shapes, 2, LATENTS, {"arm": np.float64}).fields
    assert {name: (shape, dtype.name) for name, (shape, dtype) in fields.items()} == {
        "obs['camera']": ((3, 6, 5), "uint8"),
        "obs['arm']": ((4,), "float64"),
        "actions": ((2,), "float32"),
        "rewards": ((), "float32"),
        "is_first": ((), "bool"),
        "is_last": ((), "bool"),
        "is_terminal": ((), "bool"),
        "episode": ((), "int64"),
        "fields['deter']": ((3,), "float16"),
        "fields['stoch']": ((2, 2), "uint8"),
    }


def test_bfloat16_latents_are_taken():
    rows = RowSchema((4,), 2, {"deter": ReplayField((3,), torch.float16)}, None)
    given = {"deter": torch.tensor([[1.0, 0.5, -2.0]], dtype=torch.bfloat16)}
    (stored,) = rows.convert_model_fields(given, (1,)).values()
    assert (stored.dtype, stored.tolist()) == (np.float16, [[1, 0.5, -2]])


def test_latents_are_rounded_to_the_nearest_that_can_be_stored():
    rows = RowSchema(
        (4,),
        2,
        {"deter": ReplayField((4,), torch.float16), "stoch": ReplayField((4,), torch.uint8)},
        None,
    )
    # Halves have eleven bits: 2049 lies between 2048 and 2050, and a tie goes to the even one.
    given = {
        "deter": torch.tensor([[2049.0, 2051.0, 1 + 2**-10, 1e-8]]),
        "stoch": torch.tensor([[0.9999999, 1.0000001, 0.0, 0.0]]),
    }
    for latents in (given, {name: x.numpy() for name, x in given.items()}):
        deter, stoch = rows.convert_model_fields(latents, (1,)).values()
        assert (deter.dtype, deter.tolist()) == (np.float16, [[2048, 2052, 1 + 2**-10, 0]])
        assert (stoch.dtype, stoch.tolist()) == (np.uint8, [[1, 1, 0, 0]])
