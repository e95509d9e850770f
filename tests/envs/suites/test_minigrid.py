import re
import sys

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces

pytest.importorskip("minigrid", reason="needs the extra minigrid")

from minigrid.core.world_object import Lava

from worldloom.envs.spaces import ObsSpec
from worldloom.envs.suites.minigrid import WORDS, make_env
from worldloom.envs.vector import episode_length
from worldloom.envs.wrappers import resize_image

LEFT, RIGHT, FORWARD = 0, 1, 2


def text(numbers):
    return " ".join(WORDS[number - 1] for number in numbers if number)


# ---- symbols -------------------------------------------------------------------------------------


def test_one_hot_vectors_decode_to_the_symbols():
    env = make_env("DoorKey-8x8")
    spec = ObsSpec.from_space(env.observation_space)
    assert spec.shape == {"image": (7 * 7 * (11 + 6 + 3),), "direction": (4,)}
    obs, _ = env.reset(seed=0)
    for action in (LEFT, FORWARD, RIGHT, RIGHT, FORWARD):
        truth = env.unwrapped.gen_obs()
        assert obs in env.observation_space
        seen = spec.encode({key: value[None] for key, value in obs.items()})
        cells = np.split(seen["image"].reshape(7, 7, 20), [11, 17], axis=-1)
        assert (np.stack([cell.argmax(-1) for cell in cells], -1) == truth["image"]).all()
        assert all((cell.sum(-1) == 1).all() for cell in cells)
        assert seen["direction"].argmax() == truth["direction"]
        obs, *_ = env.step(action)


@pytest.mark.filterwarnings("ignore:.*out of date")
def test_every_task_fits_the_spaces_and_the_words():
    ids = [id for id in gym.registry if id.startswith(("MiniGrid-", "BabyAI-"))]
    ids = [id for id in ids if "WFC" not in id]  # their patterns are not in the package
    assert len(ids) > 100
    for id in ids:
        env = make_env(id, words=72)
        obs, _ = env.reset(seed=0)
        assert obs in env.observation_space, id
        if "mission" in obs:
            told = re.findall(r"\w+|,", env.unwrapped.mission.lower())
            assert text(obs["mission"]) == " ".join(told), id


def test_missions_are_observed_where_they_differ():
    assert set(make_env("DoorKey-5x5").observation_space) == {"image", "direction"}
    env = make_env("GoToDoor-5x5")
    missions = {text(env.reset(seed=seed)[0]["mission"]) for seed in range(6)}
    assert len(missions) > 1 and all(m.startswith("go to the ") for m in missions)


def test_too_long_missions_say_what_to_set():
    env = make_env("GoToDoor-5x5", words=3)
    with pytest.raises(ValueError, match=r"has 5 words, but 3 are observed; set env.words=5 or mo"):
        env.reset(seed=0)


def test_levels_that_babyai_rejects_are_not_printed(capsys):
    env = make_env("BabyAI-GoToLocal")
    for seed in range(30):
        env.reset(seed=seed)
    assert capsys.readouterr().out == ""


# ---- pixels --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("view", "tile"), [("agent", 10), ("full", 13)])  # 64 / 7 and 64 / 5
def test_pixels_are_the_drawing(view, tile):
    env = make_env("Empty-5x5", pixels=True, view=view)
    assert env.observation_space == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    image, _ = env.reset(seed=0)
    drawn = env.unwrapped.get_frame(tile_size=tile, agent_pov=view == "agent")
    assert (image == resize_image(drawn, 64)).all() and image in env.observation_space


def test_pixels_come_with_the_mission_if_it_varies():
    env = make_env("Fetch-5x5-N2", pixels=True, image_size=32, frame_stack=2)
    obs, _ = env.reset(seed=0)
    assert obs in env.observation_space and set(obs) == {"image", "mission"}
    assert obs["image"].shape == (32, 32, 6)


# ---- ends ----------------------------------------------------------------------------------------


def test_the_goal_is_success():
    env = make_env("Empty-5x5")
    env.reset(seed=0)
    for action in (FORWARD, FORWARD, RIGHT, FORWARD):
        assert env.step(action)[1:] == (0.0, False, False, {})
    reward = 1 - 0.9 * 5 / 100  # the fifth step of at most 100
    assert env.step(FORWARD)[1:] == (pytest.approx(reward), True, False, {"success": True})


def test_lava_is_no_success():
    env = make_env("Empty-5x5")
    env.reset(seed=0)
    env.unwrapped.grid.set(2, 1, Lava())
    assert env.step(FORWARD)[1:] == (0.0, True, False, {"success": False})


def test_the_time_limit_truncates():
    env = make_env("Empty-5x5", time_limit=3)
    env.reset(seed=0)
    ends = [env.step(LEFT)[2:] for _ in range(3)]
    assert ends == [(False, False, {})] * 2 + [(False, True, {"success": False})]


def test_time_limits_are_known_but_for_babyai():
    assert episode_length(make_env("DoorKey-5x5")) == 250
    assert episode_length(make_env("BabyAI-GoTo")) is None
    assert episode_length(make_env("BabyAI-GoTo", time_limit=100, action_repeat=2)) == 50


def test_seeds_reproduce_and_differ():
    env = make_env("DoorKey-8x8", pixels=True, view="full")
    grids = [env.reset(seed=seed)[0] for seed in (0, 1, 0)]
    assert (grids[0] == grids[2]).all() and (grids[0] != grids[1]).any()


# ---- names and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("task", "id"),
    [
        ("DoorKey-5x5", "MiniGrid-DoorKey-5x5-v0"),
        ("MiniGrid-DoorKey-5x5-v0", "MiniGrid-DoorKey-5x5-v0"),
        ("doorkey_5x5", "MiniGrid-DoorKey-5x5-v0"),
        ("MultiRoom-N4-S5", "MiniGrid-MultiRoom-N4-S5-v1"),  # the newest version
        ("GoToObj", "BabyAI-GoToObj-v0"),
        ("BabyAI-GoToObj", "BabyAI-GoToObj-v0"),
        ("UnlockPickup", "MiniGrid-UnlockPickup-v0"),  # both have one
        ("BabyAI-UnlockPickup", "BabyAI-UnlockPickup-v0"),
    ],
)
def test_spellings(task, id):
    assert make_env(task).spec.id == id


def test_near_misses_are_suggested():
    with pytest.raises(ValueError, match=r"'DoorKee-5x5', which .* MiniGrid-DoorKey-5x5-v0"):
        make_env("DoorKee-5x5")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(view="top"), r"env.view is 'top'; expected 'agent' or 'full'"),
        (dict(image_size=64), r"env.image_size is 64, but symbols are observed"),
    ],
)
def test_errors_say_what_is_possible(settings, message):
    with pytest.raises(ValueError, match=message):
        make_env("DoorKey-5x5", **settings)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "minigrid", None)
    with pytest.raises(ImportError, match=r"DoorKey-5x5 .* pip install 'worldloom\[minigrid\]'"):
        make_env("DoorKey-5x5")
