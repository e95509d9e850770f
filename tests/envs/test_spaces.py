import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces
from gymnasium.vector.utils import batch_space, create_empty_array

import worldloom.envs.vector
from worldloom.envs.spaces import ActionSpec, ObsSpec, is_channels_last


def image(*shape):
    return spaces.Box(0, 255, shape, np.uint8)


def test_envs_import_no_torch():
    # Torch would cost every worker process two seconds. The package around envs is left out here:
    # what it imports is its own affair.
    code = f"""
import sys, types
package = sys.modules["worldloom"] = types.ModuleType("worldloom")
package.__path__ = [{str(Path(worldloom.envs.vector.__file__).parents[1])!r}]
import worldloom.envs.suites.gymnasium, worldloom.envs.vector
assert "torch" not in sys.modules
"""
    subprocess.run([sys.executable, "-c", code], check=True)


# ---- observations --------------------------------------------------------------------------------


def test_channels_last_images_become_channels_first():
    spec = ObsSpec.from_space(image(32, 48, 3))
    obs = np.random.default_rng(0).integers(0, 256, (2, 32, 48, 3), np.uint8)
    encoded = spec.encode(obs)
    assert spec.shape == (3, 32, 48) and spec.parts[""].dtype == "uint8"
    assert encoded.shape == (2, 3, 32, 48) and encoded.dtype == np.uint8
    assert (encoded[1, 2] == obs[1, :, :, 2]).all()
    assert encoded.flags.c_contiguous


def test_channels_first_images_stay():
    spec = ObsSpec.from_space(image(4, 64, 64))
    obs = np.random.default_rng(0).integers(0, 256, (2, 4, 64, 64), np.uint8)
    assert spec.shape == (4, 64, 64)
    assert (spec.encode(obs) == obs).all()


@pytest.mark.parametrize(
    ("shape", "last"),
    [
        ((64, 64, 1), True),
        ((64, 64, 12), True),
        ((3, 64, 64), False),
        ((16, 64, 16), False),
        ((1, 16, 16), False),
        ((64, 64, 13), False),
    ],
)
def test_which_images_are_channels_last(shape, last):
    assert is_channels_last(shape) is last


@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_boxes_become_float_vectors(shape):
    spec = ObsSpec.from_space(spaces.Box(-1, 1, shape, np.float64))
    obs = np.arange(2 * np.prod(shape, dtype=int), dtype=np.float64).reshape(2, *shape) / 3
    encoded = spec.encode(obs)
    assert spec.shape == (np.prod(shape, dtype=int),) and spec.parts[""].dtype == "float32"
    assert encoded.dtype == np.float32
    assert (encoded == obs.reshape(2, -1).astype(np.float32)).all()


def test_uint8_vectors_become_floats_of_the_same_value():
    spec = ObsSpec.from_space(image(128))  # Atari's memory
    assert spec.parts[""].dtype == "float32"
    assert (spec.encode(np.full((2, 128), 200, np.uint8)) == 200.0).all()


def test_discrete_is_one_hot_from_its_start():
    spec = ObsSpec.from_space(spaces.Discrete(3, start=-1))
    assert spec.shape == (3,)
    assert (spec.encode(np.array([-1, 1])) == [[1, 0, 0], [0, 0, 1]]).all()


def test_multi_discrete_is_one_hot_per_entry():
    space = spaces.MultiDiscrete(np.array([[2, 3], [1, 2]]), start=np.array([[0, 5], [0, 0]]))
    spec = ObsSpec.from_space(space)
    encoded = spec.encode(np.array([[[1, 5], [0, 1]], [[0, 7], [0, 0]]]))
    assert spec.shape == (8,) and encoded.dtype == np.float32
    assert (encoded == [[0, 1, 1, 0, 0, 1, 0, 1], [1, 0, 0, 0, 1, 1, 1, 0]]).all()


def test_multi_binary_is_a_vector():
    spec = ObsSpec.from_space(spaces.MultiBinary((2, 2)))
    encoded = spec.encode(np.array([[[1, 0], [1, 1]]], np.int8))
    assert spec.shape == (4,) and encoded.dtype == np.float32
    assert (encoded == [[1, 0, 1, 1]]).all()


def test_dicts_become_flat_dicts():
    arm = spaces.Dict({"joints": spaces.Box(-1, 1, (2,)), "mode": spaces.Discrete(2)})
    space = spaces.Dict({"camera": image(16, 16, 3), "arm": arm})
    spec = ObsSpec.from_space(space)
    assert spec.shape == {"arm/joints": (2,), "arm/mode": (2,), "camera": (3, 16, 16)}
    dtypes = {key: part.dtype for key, part in spec.parts.items()}
    assert dtypes == {"arm/joints": "float32", "arm/mode": "float32", "camera": "uint8"}
    encoded = spec.encode(create_empty_array(space, n=5))
    assert {key: value.shape for key, value in encoded.items()} == {
        "arm/joints": (5, 2),
        "arm/mode": (5, 2),
        "camera": (5, 3, 16, 16),
    }


def test_a_dict_of_one_stays_a_dict():
    spec = ObsSpec.from_space(spaces.Dict({"x": spaces.Box(-1, 1, (2,))}))
    assert spec.shape == {"x": (2,)}
    assert set(spec.encode({"x": np.zeros((3, 2))})) == {"x"}


@pytest.mark.parametrize("space", [spaces.Text(5), spaces.Sequence(spaces.Discrete(2)), "CartPole"])
def test_unreadable_spaces_are_refused(space):
    with pytest.raises(ValueError, match=r"The observation has the space .*expected Box, Discrete"):
        ObsSpec.from_space(space)
    with pytest.raises(ValueError, match="'arm/note' has the space"):
        ObsSpec.from_space({"arm": {"note": space}})


def test_tuples_are_refused():
    with pytest.raises(ValueError, match=r"has the space Tuple"):
        ObsSpec.from_space(spaces.Tuple([spaces.Discrete(2)]))


def test_empty_dicts_are_refused():
    with pytest.raises(ValueError, match="is empty"):
        ObsSpec.from_space(spaces.Dict({}))


def test_float_images_are_refused():
    with pytest.raises(ValueError, match=r"\(64, 64, 3\) and dtype float32.*three axes of uint8"):
        ObsSpec.from_space(spaces.Box(0, 1, (64, 64, 3)))


def test_stacked_images_are_refused():
    with pytest.raises(ValueError, match="stack frames along their channels"):
        ObsSpec.from_space(image(4, 64, 64, 3))


def test_images_need_sides_divisible_by_16():
    with pytest.raises(
        ValueError, match=r"'camera' is an image of 96x100 pixels.*env\.image_size=64"
    ):
        ObsSpec.from_space(spaces.Dict({"camera": image(96, 100, 3)}))


def test_images_without_recognisable_channels_are_refused():
    with pytest.raises(ValueError, match="without an axis that can be its channels"):
        ObsSpec.from_space(image(64, 64, 32))


# ---- which key is what ---------------------------------------------------------------------------

ROBOT = spaces.Dict(
    {
        "camera": image(64, 64, 3),
        "depth": spaces.Box(0.5, 2.5, (32, 48), np.float32),
        "map": image(16, 16, 2),
        "arm": spaces.Dict({"joints": spaces.Box(-1, 1, (7,)), "id": spaces.Discrete(3)}),
    }
)


def test_keys_that_are_not_kept_are_not_seen():
    spec = ObsSpec.from_space(ROBOT["arm"], keep="joints")
    assert spec.shape == {"joints": (7,)} and spec.dropped == ("id",)
    obs = {"joints": np.ones((2, 7), np.float32), "id": np.zeros(2, np.int64)}
    assert list(spec.encode(obs)) == ["joints"]


def test_patterns_match_whole_keys_nested_ones_too():
    assert set(ObsSpec.from_space(ROBOT, keep="arm/.*").shape) == {"arm/joints", "arm/id"}
    with pytest.raises(ValueError, match=r"env\.obs\.keep is 'arm', which matches no .*arm/joints"):
        ObsSpec.from_space(ROBOT, keep="arm")


def test_a_pattern_that_takes_forever_is_rejected(monkeypatch):
    monkeypatch.setattr("worldloom.envs.spaces.MATCH_SECONDS", 0.1)
    box = spaces.Box(-1, 1, (2,))
    with pytest.raises(ValueError, match="which takes too long to match; write a simpler one"):
        ObsSpec.from_space(spaces.Dict({"a" * 60: box}), keep="(a+)+b")


def test_what_looks_like_an_image_may_be_a_vector():
    spec = ObsSpec.from_space(ROBOT, image="depth", vector="map")
    assert spec.shape["map"] == (512,) and spec.parts["map"].dtype == "float32"
    assert spec.shape["camera"] == (3, 64, 64)
    rng = np.random.default_rng(0)
    obs = {
        "camera": rng.integers(0, 256, (2, 64, 64, 3), np.uint8),
        "depth": np.full((2, 32, 48), 1.0, np.float32),
        "map": rng.integers(0, 9, (2, 16, 16, 2), np.uint8),
        "arm": {"joints": np.ones((2, 7), np.float32), "id": np.zeros(2, np.int64)},
    }
    assert (spec.encode(obs)["map"] == obs["map"].reshape(2, -1)).all()


def test_boxes_of_floats_and_of_two_axes_may_be_images():
    spec = ObsSpec.from_space(ROBOT, image="depth")
    assert spec.shape["depth"] == (1, 32, 48) and spec.parts["depth"].dtype == "uint8"
    depth = np.array([0.5, 1.5, 2.5, 9.0], np.float32)[:, None, None] * np.ones((1, 32, 48))
    encoded = spec.parts["depth"].encode(depth)
    assert encoded.shape == (4, 1, 32, 48) and encoded.dtype == np.uint8
    assert encoded[:, 0, 0, 0].tolist() == [0, 128, 255, 255]
    three = spaces.Dict({"rgb": spaces.Box(-1.0, 1.0, (32, 32, 3), np.float32)})
    picture = ObsSpec.from_space(three, image="rgb").encode({"rgb": -np.ones((1, 32, 32, 3))})
    assert picture["rgb"].shape == (1, 3, 32, 32) and not picture["rgb"].any()


@pytest.mark.parametrize(
    ("choice", "message"),
    [
        ({"image": "cam.*", "vector": "c.*"}, r"both match 'camera'"),
        ({"image": "arm/joints"}, r"'arm/joints' has the space .* cannot be an image"),
        ({"vector": "("}, r"env\.obs\.vector is '\('; expected a regular expression"),
        (
            {"image": "lidar"},
            r"matches no observation; expected arm/id, arm/joints, camera, depth, map",
        ),
    ],
)
def test_choices_that_make_no_sense_are_refused(choice, message):
    with pytest.raises(ValueError, match=message):
        ObsSpec.from_space(ROBOT, **choice)


def test_a_single_array_has_no_key_to_choose():
    with pytest.raises(ValueError, match="expected a single array, which has no key"):
        ObsSpec.from_space(spaces.Box(-1, 1, (3,)), keep="obs")


def test_images_need_finite_bounds():
    space = spaces.Dict({"heat": spaces.Box(-np.inf, np.inf, (32, 32))})
    with pytest.raises(
        ValueError, match=r"'heat' has the bounds \[-inf, inf\]; expected finite ones"
    ):
        ObsSpec.from_space(space, image="heat")


# ---- actions -------------------------------------------------------------------------------------


def test_discrete_actions_respect_the_start():
    spec = ActionSpec.from_space(spaces.Discrete(3, start=5))
    assert (spec.action_dim, spec.discrete, spec.width) == (3, True, 3)
    assert (spec.decode(np.array([[0, 0, 1], [0.4, 0.3, 0.3]], np.float32)) == [7, 5]).all()


def test_multi_discrete_actions_choose_in_each_group():
    spec = ActionSpec.from_space(spaces.MultiDiscrete([2, 3], start=[0, 10]))
    assert (spec.action_dim, spec.discrete, spec.width) == ((2, 3), True, 5)
    decoded = spec.decode(np.array([[0, 1, 0, 1, 0], [1, 0, 0, 0, 1]], np.float32))
    assert (decoded == [[1, 11], [0, 12]]).all()


def test_multi_binary_actions_are_pairs():
    spec = ActionSpec.from_space(spaces.MultiBinary(2))
    assert (spec.action_dim, spec.width) == ((2, 2), 4)
    assert (spec.decode(np.array([[0, 1, 1, 0]], np.float32)) == [[1, 0]]).all()


def test_continuous_actions_are_clipped_and_stretched():
    spec = ActionSpec.from_space(spaces.Box(np.array([0, -4]), np.array([2, 4]), dtype=np.float32))
    assert (spec.action_dim, spec.discrete, spec.width) == (2, False, 2)
    decoded = spec.decode(np.array([[-1, 0.5], [3, -2]], np.float32))
    assert decoded.dtype == np.float32
    assert (decoded == [[0, 2], [2, -4]]).all()


def test_actions_in_the_unit_box_come_out_unchanged():
    spec = ActionSpec.from_space(spaces.Box(-1, 1, (1000,)))
    actions = np.random.default_rng(0).uniform(-1, 1, (1, 1000)).astype(np.float32)
    assert (spec.decode(actions) == actions).all()


SPACES = [
    spaces.Discrete(4, start=2),
    spaces.MultiDiscrete(np.array([[2, 3], [4, 1]])),
    spaces.MultiBinary((2, 3)),
    spaces.Box(np.float32([[-3], [0.1]]), np.float32([[7], [0.3]])),
]


@pytest.mark.parametrize("space", SPACES, ids=str)
def test_random_actions_decode_into_the_space(space):
    spec = ActionSpec.from_space(space)
    actions = spec.sample(np.random.default_rng(0), 50)
    decoded = spec.decode(actions)
    assert actions.shape == (50, spec.width) and actions.dtype == np.float32
    assert decoded in batch_space(space, 50)
    assert all(one in space for one in decoded)
    assert (actions == spec.sample(np.random.default_rng(0), 50)).all()
    assert (actions != spec.sample(np.random.default_rng(1), 50)).any()


def test_random_actions_are_uniform():
    # 3000 draws of probability 1/3: standard deviation 0.0086, so 0.05 is almost six of them.
    groups = ActionSpec.from_space(spaces.MultiDiscrete([3, 3], start=[1, 0]))
    means = groups.sample(np.random.default_rng(0), 3000).mean(0)
    np.testing.assert_allclose(means, 1 / 3, atol=0.05)
    # The mean of 3000 draws from [-1, 1] has standard deviation 0.0105.
    box = ActionSpec.from_space(spaces.Box(5, 9, (2,))).sample(np.random.default_rng(0), 3000)
    np.testing.assert_allclose(box.mean(0), 0, atol=0.06)
    assert box.min() < -0.99 and box.max() > 0.99


@pytest.mark.parametrize(
    "space",
    [
        spaces.Dict({"a": spaces.Discrete(2)}),
        spaces.Tuple([spaces.Discrete(2)]),
        spaces.Box(0, 9, (2,), np.int64),
    ],
    ids=str,
)
def test_unsupported_actions_are_refused(space):
    with pytest.raises(ValueError, match=r"is not supported; expected Discrete, MultiDiscrete"):
        ActionSpec.from_space(space)


def test_unbounded_actions_are_refused():
    with pytest.raises(ValueError, match=r"infinite bounds.*finite low and high"):
        ActionSpec.from_space(spaces.Box(-np.inf, 1, (2,)))


def test_actions_of_a_wrong_shape_are_refused():
    spec = ActionSpec.from_space(spaces.Discrete(3))
    with pytest.raises(ValueError, match=r"shape \(4,\); expected \[N, 3\]"):
        spec.decode(np.zeros(4, np.float32))
    with pytest.raises(ValueError, match=r"shape \(4, 1\); expected \[N, 3\]"):
        spec.decode(np.zeros((4, 1), np.float32))


def test_actions_that_are_no_numbers_are_refused():
    spec = ActionSpec.from_space(spaces.Box(-1, 1, (1,)))
    with pytest.raises(ValueError, match=r"contain NaN or infinity.*diverged"):
        spec.decode(np.array([[np.nan]], np.float32))


@pytest.mark.parametrize("high", [1, 9, 254])
def test_boards_and_masks_are_vectors_of_the_same_values(high):
    space = spaces.Box(0, high, (16, 16, 3), np.uint8)
    spec = ObsSpec.from_space(space)
    assert spec.shape == (768,) and spec.parts[""].dtype == "float32"
    board = np.random.default_rng(0).integers(0, high + 1, (2, 16, 16, 3), np.uint8)
    assert (spec.encode(board).reshape(board.shape) == board).all()
    (remark,) = spec.remarks
    assert f"values up to {high}" in remark and "env.obs.image='.*'" in remark
    picture = ObsSpec.from_space(space, image=".*")
    assert picture.shape == (3, 16, 16) and picture.encode(board).max() == 255
    assert not picture.remarks and not ObsSpec.from_space(space, vector=".*").remarks


@pytest.mark.parametrize(
    ("side", "words"), [(32, "env.obs.image='camera'"), (84, "ReshapeObservation.*image_size=64")]
)
def test_grey_boxes_are_vectors_and_the_remark_says_how_to_change_it(side, words):
    space = spaces.Dict(camera=spaces.Box(0, 255, (side, side), np.uint8), arm=spaces.Box(-1, 1))
    spec = ObsSpec.from_space(space)
    assert spec.shape["camera"] == (side * side,)
    (remark,) = spec.remarks
    assert re.search(words, remark) and "env.obs.vector='camera'" in remark
    assert not ObsSpec.from_space(space, keep="arm").remarks


def test_names_that_are_equal_when_flattened_are_refused():
    box = spaces.Box(-1, 1, (2,))
    for inner in ({"a/b": box, "a": spaces.Dict(b=box)}, {"1": box, 1: box}):
        with pytest.raises(ValueError, match=r"two observations that are flattened to '(a/b|1)'"):
            ObsSpec.from_space(SimpleDict(inner))
    with pytest.raises(ValueError, match=r"has an empty key"):
        ObsSpec.from_space(spaces.Dict({"": box}))


class SimpleDict(spaces.Dict):
    """A Dict of keys of any type, which gymnasium would sort."""

    def __init__(self, inner):
        super().__init__(list(inner.items()))


def test_what_models_cannot_read_can_be_left_out():
    space = spaces.Dict(mission=spaces.Text(9), view=spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match=r"'mission'.*env.obs.keep='view', or convert it with"):
        ObsSpec.from_space(space)
    with pytest.raises(ValueError, match=r"env.obs.keep='view', or record the dataset without it"):
        ObsSpec.from_space(space, recorded=True)
    assert ObsSpec.from_space(space, keep="view").dropped == ("mission",)
