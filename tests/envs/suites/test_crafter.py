"""Crafter; a new world takes most of a second, so tests share them."""

import sys

import numpy as np
import pytest
from gymnasium import spaces

from worldloom.envs.suites.crafter import make_env
from worldloom.envs.vector import episode_length

crafter = pytest.importorskip("crafter", reason="needs the extra crafter")

NOOP, RIGHT = 0, 2


@pytest.fixture(scope="module")
def env():
    return make_env()


def kill(env):
    env.unwrapped.simulator._player.health = 0


def test_spaces_and_the_first_steps_are_crafters(env):
    image, _ = env.reset(seed=5)
    assert env.observation_space == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert image in env.observation_space and env.action_space == spaces.Discrete(17)
    by_hand = crafter.Env(seed=env.unwrapped.simulator._seed)
    assert (image == by_hand.reset()).all()
    for action in np.random.default_rng(0).integers(17, size=9):
        image, reward, terminated, truncated, _ = env.step(action)
        expected, expected_reward, done, _ = by_hand.step(action)
        assert (image == expected).all() and reward == expected_reward
        assert not (done or terminated or truncated)
    assert (env.render() == image).all()


def test_death_terminates_and_achievements_are_told(env):
    env.reset()
    assert env.step(NOOP)[4] == {}
    env.unwrapped.simulator._player.achievements["collect_wood"] = 3
    kill(env)
    _, reward, terminated, truncated, info = env.step(NOOP)
    assert terminated and not truncated
    assert reward == pytest.approx(1.0 - 0.9)  # an achievement, and all nine of health
    assert info["achievements"]["collect_wood"] == 3 and len(info["achievements"]) == 22


def test_seeds_fix_all_worlds_of_a_run(env):
    first, second = env.reset(seed=1)[0], env.reset()[0]
    other = make_env()
    assert (other.reset(seed=1)[0] == first).all() and (other.reset()[0] == second).all()
    assert (first != second).any()
    assert (other.reset(seed=2)[0] != first).any()


def test_creatures_are_counted_in_an_order_that_does_not_change(monkeypatch):
    """Crafter draws from a set, so a seed alone would not reproduce a run."""
    asked = []

    def spy(self, chunk, creatures, *how):
        asked.append([tuple(creature.pos) for creature in creatures])

    monkeypatch.setattr(crafter.Env, "_balance_object", spy)
    env = make_env()
    env.reset(seed=0)
    for _ in range(10):
        env.step(NOOP)
    assert max(map(len, asked)) > 1 and all(places == sorted(places) for places in asked)


def test_the_time_limit_truncates_and_rewards_can_be_off():
    assert episode_length(make_env()) == 10000
    env = make_env(reward=False, image_size=32, time_limit=6, action_repeat=2)
    assert env.reset(seed=0)[0].shape == (32, 32, 3) and episode_length(env) == 3
    ends = [env.step(NOOP)[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]
    env.reset()
    kill(env)
    assert env.step(NOOP)[1:3] == (0.0, True)


def test_pictures_cannot_be_switched_off():
    with pytest.raises(ValueError, match=r"Crafter can be observed from images only; leave env.pi"):
        make_env(pixels=False)


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "crafter", None)
    with pytest.raises(ImportError, match=r"crafter needs .* pip install 'worldloom\[crafter\]'"):
        make_env()
