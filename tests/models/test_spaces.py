import numpy as np
import pytest
import torch

from worldloom.models.spaces import ActSpaces, ObsSpaces

DICT = {"view": (3, 32, 48), "speed": (2,), "grid": (2, 3), "word": ()}


# ---- observations --------------------------------------------------------------------------------


def test_three_axes_make_an_image_and_fewer_a_vector():
    spaces = ObsSpaces(DICT, {"word": 16})
    assert not spaces.single and list(spaces) == list(DICT)
    assert list(spaces.images()) == ["view"] and list(spaces.vectors()) == ["speed", "grid", "word"]
    assert [s.width for s in spaces.vectors().values()] == [2, 6, 16]
    assert ObsSpaces((4,)).single and list(ObsSpaces((4,))) == ["obs"]


def test_numpys_integers_are_sizes_too():
    assert ObsSpaces(tuple(np.array([3, 64, 64])))["obs"].shape == (3, 64, 64)


@pytest.mark.parametrize(
    ("shape", "message"),
    [
        ((1, 3, 64, 64), r"observation 'obs' has shape \(1, 3, 64, 64\); expected a vector"),
        ((0,), r"observation 'obs' has shape \(0,\).*all positive"),
        ((3, -64, 64), "all positive"),
        (4, r"obs_shape of 'obs' is 4; expected a tuple such as \(4,\)"),
        ((4.5,), r"obs_shape of 'obs' is \(4.5,\); expected a tuple"),
        ("abc", r"obs_shape of 'obs' is 'abc'; expected a tuple"),
        ({}, "obs_shape is empty; give a shape or a dict with at least one key"),
        ({"a": (2,), "b": None}, "obs_shape of 'b' is None; expected a tuple"),
    ],
)
def test_impossible_shapes(shape, message):
    with pytest.raises(ValueError, match=message):
        ObsSpaces(shape)


@pytest.mark.parametrize(
    ("classes", "message"),
    [
        ({"words": 16}, r"obs_classes names \['words'\]; obs_shape has \['view', 'speed'"),
        (16, r"obs_classes is 16; expected \{key: number of classes\}"),
    ],
)
def test_impossible_classes(classes, message):
    with pytest.raises(ValueError, match=message):
        ObsSpaces(DICT, classes)


def test_observations_are_checked_and_come_back_as_they_were_given():
    spaces = ObsSpaces(DICT)
    obs = {key: torch.zeros(5, 2, *shape) for key, shape in DICT.items()}
    obs["view"] = obs["view"].to(torch.uint8)
    tensors = spaces.split(obs, lead=2)
    assert spaces.join(tensors) == obs
    single = ObsSpaces((4,))
    x = torch.zeros(5, 4)
    assert single.split(x, lead=1) == {"obs": x} and single.join({"obs": x}) is x


@pytest.mark.parametrize(
    ("shape", "obs", "message"),
    [
        ((4,), {"obs": torch.zeros(2, 4)}, "obs is a dict; this model expects a tensor"),
        ({"a": (4,)}, torch.zeros(2, 4), r"obs is a Tensor; .* a dict with the keys \['a'\]"),
        ({"a": (4,)}, {"b": torch.zeros(2, 4)}, r"obs has the keys \['b'\]; expected \['a'\]"),
        ((4,), torch.zeros(2, 3), r"obs has shape \(2, 3\); expected \[B, 4\]"),
        ((4,), torch.zeros(4), r"obs has shape \(4,\); expected \[B, 4\]"),
        ((4,), torch.zeros(2, 7, 4), r"obs has shape \(2, 7, 4\); expected \[B, 4\]"),
        ({"a": (1, 16, 16)}, {"a": torch.zeros(2, 1, 16, 16)}, r"obs\['a'\] is an image of dtype"),
    ],
)
def test_observations_of_another_form(shape, obs, message):
    with pytest.raises(ValueError, match=message):
        ObsSpaces(shape).split(obs, lead=1)


# ---- actions -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("action_dim", "discrete", "width", "widths"),
    [
        (3, False, 3, [3]),
        (3, True, 3, [3]),
        ((3, 2, 4), True, 9, [3, 2, 4]),
        ({"turn": 2, "jump": 3}, {"jump": True}, 5, [3, 2]),  # sorted by name
        (tuple(range(2, 14)), True, sum(range(2, 14)), list(range(2, 14))),  # not "10" before "2"
    ],
)
def test_widths_and_order(action_dim, discrete, width, widths):
    spaces = ActSpaces(action_dim, discrete)
    assert spaces.width == width and [s.width for s in spaces.values()] == widths
    parts = dict(spaces.split(torch.arange(float(width))))
    assert torch.cat([part.flatten() for part in parts.values()]).tolist() == list(range(width))


@pytest.mark.parametrize(
    ("action_dim", "discrete", "message"),
    [
        (0, False, "action_dim is 0; expected a positive integer"),
        (-1, False, "action_dim is -1; expected a positive integer"),
        (True, False, "action_dim is True; expected a positive integer"),
        ("4", False, "action_dim is '4'; expected a positive integer"),
        (2.0, False, "action_dim is 2.0; expected a positive integer"),
        (None, False, "action_dim is None; expected a positive integer"),
        (1, True, "action_dim is 1; a discrete action needs at least 2 choices"),
        ((3, 1), True, "action_dim is 1; a discrete action needs at least 2 choices"),
        ((3, 2), False, r"action_dim=\(3, 2\) lists several choices, which needs discrete=True"),
        ((), True, "action_dim is empty; give at least one action"),
        ({}, True, "action_dim is empty"),
        ({"turn": 0}, False, "turn is 0; expected a positive integer"),
    ],
)
def test_impossible_actions(action_dim, discrete, message):
    with pytest.raises(ValueError, match=message):
        ActSpaces(action_dim, discrete)


def test_action_vectors_are_checked():
    spaces = ActSpaces(3, True)
    spaces.check(torch.zeros(5, 3), ("B",))
    message = r"action has shape \(5,\); expected \[B, 3\], discrete actions one-hot"
    with pytest.raises(ValueError, match=message):
        spaces.check(torch.zeros(5), ("B",))
    with pytest.raises(ValueError, match=r"expected \[T, B, 3\]"):
        spaces.check(torch.zeros(4, 5, 2), ("T", "B"))
