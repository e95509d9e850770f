"""Atari against the emulator driven by hand."""

import sys

import numpy as np
import pytest
from gymnasium import spaces
from PIL import Image

pytest.importorskip("ale_py", reason="needs the extra atari")

import ale_py
from ale_py import roms

from worldloom.envs.suites.atari import PROTOCOLS, make_env
from worldloom.envs.vector import episode_length

STILL = {"noops": 0, "sticky": 0.0}  # nothing is random


def emulator(rom):
    """A game without sticky actions, driven by the test."""
    ale = ale_py.ALEInterface()
    ale.setFloat("repeat_action_probability", 0.0)
    ale.loadROM(roms.get_rom_path(rom))
    ale.reset_game()
    return ale


def picture(*frames, size=64):
    brightest = np.max(frames, axis=0)
    return np.array(Image.fromarray(brightest).resize((size, size), Image.Resampling.BILINEAR))


def play(env, seed, steps=60):
    """Pictures and rewards of an episode's start with arbitrary but repeatable actions."""
    rng = np.random.default_rng(0)
    pictures, rewards = [env.reset(seed=seed)[0]], []
    for _ in range(steps):
        obs, reward, *_ = env.step(int(rng.integers(env.action_space.n)))
        pictures.append(obs)
        rewards.append(reward)
    return np.stack(pictures), rewards


@pytest.fixture(scope="module")
def pong():
    return make_env("pong", **STILL)


# ---- the published protocols ---------------------------------------------------------------------


def test_the_protocols_are_those_of_the_official_code():
    """danijar/dreamerv3 at e3f0224: dreamerv3/configs.yaml and the defaults of its wrapper."""
    both = dict(action_repeat=4, noops=30, pooling=2, lives="unused", time_limit=108000)
    assert vars(PROTOCOLS["atari"]) == dict(
        image_size=96, gray=True, actions="all", sticky=0.25, **both
    )
    assert vars(PROTOCOLS["atari100k"]) == dict(
        image_size=64, gray=False, actions="needed", sticky=0.0, **both
    )


def test_spaces_of_the_protocols():
    few, many = make_env("pong"), make_env("pong", protocol="atari")
    assert few.observation_space == spaces.Box(0, 255, (64, 64, 3), np.uint8)
    assert many.observation_space == spaces.Box(0, 255, (96, 96, 1), np.uint8)
    assert (few.action_space.n, many.action_space.n) == (6, 18)
    assert few.reset(seed=0)[0] in few.observation_space
    assert many.reset(seed=0)[0] in many.observation_space
    assert episode_length(few) == 27000  # decisions: 108,000 frames by 4


def test_settings_take_the_place_of_the_protocols():
    env = make_env(
        "breakout",
        image_size=32,
        gray=True,
        actions="all",
        action_repeat=6,
        frame_stack=3,
        time_limit=60,
    )
    assert env.observation_space.shape == (32, 32, 3)
    assert (env.action_space.n, episode_length(env)) == (18, 10)


# ---- a game --------------------------------------------------------------------------------------


def test_a_whole_game_is_the_emulators(pong):
    """Four frames a decision, the brighter of the last two seen, rewards summed, ended as it is."""
    ale = emulator("pong")
    actions, rng = ale.getMinimalActionSet(), np.random.default_rng(0)
    assert (pong.reset()[0] == picture(ale.getScreenRGB())).all()
    terminated, total = False, 0.0
    while not terminated:
        action = int(rng.integers(len(actions)))
        frames, expected = [], 0.0
        for _ in range(4):
            expected += ale.act(actions[action])
            frames.append(ale.getScreenRGB())
            if ale.game_over():
                break
        obs, reward, terminated, truncated, _ = pong.step(action)
        assert reward == expected and terminated == ale.game_over() and not truncated
        # A game that ends early in a decision has no new frames to pool.
        assert len(frames) < 4 or (obs == picture(*frames[-2:])).all()
        total += reward
    assert total < -10  # random play loses


def test_gray_weighs_the_colours():
    colour, gray = (make_env("pong", protocol="atari", gray=g, **STILL) for g in (False, True))
    weighed = colour.reset()[0] @ np.array([0.299, 0.587, 0.114])
    # Rounded down; 1e-6 is far above the error of the sum and far below a thousandth.
    assert (gray.reset()[0][..., 0] == np.floor(weighed + 1e-6)).all()


class Spy:
    """The emulator, with a list of the actions that its frames do."""

    def __init__(self, ale):
        self.ale, self.done = ale, []

    def act(self, action):
        self.done.append(action)
        return self.ale.act(action)

    def __getattr__(self, name):
        return getattr(self.ale, name)


def test_sticky_actions_have_the_published_probability():
    for protocol, probability in (("atari", 0.25), ("atari100k", 0.0)):
        env = make_env("pong", protocol=protocol, noops=0).unwrapped
        env.ale = Spy(env.ale)
        env.reset(seed=0)
        for step in range(400):
            env.step(1 + step % 2)
        done = np.array(env.ale.done).reshape(400, 4)
        wanted = np.array([env.actions[1 + step % 2] for step in range(400)])
        stale = done != wanted[:, None]
        # Once a frame does the new action, the rest of the decision does too.
        assert (np.diff(stale.astype(int), axis=1) <= 0).all()
        assert (
            done[0][stale[0]].tolist() == [0] * stale[0].sum()
        )  # at first there is none to repeat
        assert (done[1:][stale[1:]] == np.repeat(wanted[:-1, None], 4, 1)[stale[1:]]).all()
        # Four standard deviations of the mean of 400 draws.
        assert stale[:, 0].mean() == pytest.approx(probability, abs=4 * (0.25 * 0.75 / 400) ** 0.5)
        assert stale.any() == (probability > 0)
    assert make_env("pong", sticky=True).unwrapped.rules.sticky == 0.25
    assert make_env("pong", protocol="atari", sticky=False).unwrapped.rules.sticky == 0.0


def test_every_game_is_the_first_after_switching_on():
    """In assault a game changes the next, unless the console is switched off in between."""
    env, ale = make_env("assault", **STILL), emulator("assault")
    first = play(env, 0)[0]
    assert (play(env, None)[0] == first).all()
    by_hand = [ale.getRAM()]
    for _ in range(2):
        ale.reset_game()
        for _ in range(200):
            ale.act(1)
        by_hand.append(ale.getRAM())
    assert (by_hand[1] != by_hand[2]).any()  # so the above says something


def test_seeds_reach_the_sticky_actions():
    sure, sticky = make_env("pong", noops=0), make_env("pong", noops=0, sticky=True)
    assert (play(sure, 0)[0] == play(sure, 1)[0]).all()
    assert (play(sticky, 0)[0] != play(sticky, 1)[0]).any()


def test_frames_waited_at_the_start_are_random_and_follow_the_seed():
    env = make_env("pong", noops=2)
    waited = []
    for seed in [*range(12), *range(12)]:
        env.reset(seed=seed)
        waited.append(env.unwrapped.ale.getEpisodeFrameNumber())
    assert waited[:12] == waited[12:] and set(waited) == {0, 1, 2}


def test_seeds_reproduce_and_differ():
    one, other = make_env("pong", protocol="atari"), make_env("pong", protocol="atari")
    assert (play(one, 3)[0] == play(other, 3)[0]).all()
    assert (play(one, 3)[0] != play(other, 4)[0]).any()


# ---- ends ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(("frames", "decisions"), [(40, 10), (42, 11)])
def test_the_time_limit_truncates(frames, decisions):
    env = make_env("pong", time_limit=frames)
    env.reset(seed=0)
    ends = [env.step(0)[2:4] for _ in range(decisions)]
    assert ends == [(False, False)] * (decisions - 1) + [(False, True)]


def lose_a_life(lives):
    """Play until a ball is lost; return whether that terminated, and the game."""
    env = make_env("breakout", lives=lives, **STILL)
    env.reset(seed=0)
    ale, terminated = env.unwrapped.ale, False
    while ale.lives() == 5:
        _, _, terminated, truncated, _ = env.step(1)  # serve, and never move
        assert not truncated
    assert not ale.game_over()
    return terminated, env


def test_a_lost_life_is_nothing_or_an_end():
    assert not lose_a_life("unused")[0]
    terminated, env = lose_a_life("reset")
    assert terminated
    env.reset()
    assert env.unwrapped.ale.lives() == 5


# ---- names and errors ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("game", "rom", "size"),
    [
        ("Pong", "pong", 64),
        ("atari_pong", "pong", 96),
        ("atari100k_pong", "pong", 64),
        ("ALE/Pong-v5", "pong", 64),
        ("ms_pacman", "ms_pacman", 64),
        ("MsPacman", "ms_pacman", 64),
        ("atari_james_bond", "jamesbond", 96),
    ],
)
def test_spellings(game, rom, size):
    env = make_env(game)
    assert (env.unwrapped.rom, env.observation_space.shape[0]) == (rom, size)


def test_near_misses_are_suggested():
    with pytest.raises(ValueError, match=r"env.game is 'ponk', .* such as pong, .* set env.game"):
        make_env("ponk")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (dict(lives="discount"), r"env.lives is 'discount'; expected 'unused' or 'reset' \(a "),
        (dict(protocol="atari200m"), r"expected one of atari, atari100k"),
        (dict(actions="few"), r"expected 'all' or 'needed'"),
        (dict(pixels=False), r"Atari can be observed from images only"),
        (dict(action_repeat=0), r"env.action_repeat is 0; expected at least 1"),
        (dict(sticky=25), r"env.sticky is 25; expected a probability"),
    ],
)
def test_errors_say_what_is_possible(settings, message):
    with pytest.raises(ValueError, match=message):
        make_env("pong", **settings)


def test_two_protocols_at_once_are_refused():
    with pytest.raises(ValueError, match=r"env.protocol is 'atari'; expected atari100k as in "):
        make_env("atari100k_pong", protocol="atari")


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "ale_py", None)
    with pytest.raises(ImportError, match=r"atari game pong .* pip install 'worldloom\[atari\]'"):
        make_env("pong")
