"""Atari games under the published protocols, behind gymnasium's API.

A frame is one of the emulator's, 60 to a second; a decision is `action_repeat` of them.
"""

import difflib
import math
import re
from collections import deque
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit
from PIL import Image

from worldloom.envs.suites.extras import naming_the_extra
from worldloom.envs.wrappers import wrap

NOOP = 0
STICKY = 0.25  # the published probability, wherever actions are sticky
BRIGHTNESS = np.array((299, 587, 114), np.int32)  # thousandths of red, green and blue


def _check(name: str, value: Any, right: bool, expected: str) -> None:
    """Raise a readable error if a setting is not right."""
    if not right:
        raise ValueError(f"env.{name} is {value!r}; expected {expected}; set env.{name} to that")


@dataclass(frozen=True)
class Protocol:
    """How a game is played; the names are those of the settings in the configuration.

    image_size: side of the square picture, reached from 160x210 by Pillow's bilinear filter.
    gray: weigh the colours into one channel, after resizing.
    actions: "all" 18 of the joystick, or the "needed" ones, which differ from game to game.
    sticky: probability with which a frame does the action of the frame before instead.
    action_repeat: frames for which an action is held; their rewards are summed.
    pooling: newest frames of a decision whose brightest values are seen, for sprites that flicker.
    noops: greatest number of frames to wait at the start; the number is random.
    lives: "unused", or "reset": losing a life ends the episode, as terminated, and the next one
        is a new game.
    time_limit: frames after which an episode is truncated, rounded up to whole decisions; those
        waited at the start do not count.
    """

    image_size: int
    gray: bool
    actions: str
    sticky: float
    action_repeat: int = 4
    pooling: int = 2
    noops: int = 30
    lives: str = "unused"
    time_limit: int = 108_000

    def __post_init__(self) -> None:
        _check("actions", self.actions, self.actions in ("all", "needed"), "'all' or 'needed'")
        _check("sticky", self.sticky, 0 <= self.sticky <= 1, "a probability, such as 0.25")
        _check("noops", self.noops, self.noops >= 0, "0 or more")
        for name in ("action_repeat", "pooling", "time_limit", "image_size"):
            _check(name, getattr(self, name), getattr(self, name) >= 1, "at least 1")
        # A life could also end the value but not the episode ("discount"). An environment of
        # gymnasium cannot say so; the official code reads it and then overwrites it.
        known = "'unused' or 'reset' (no environment can say that a value ends but play goes on)"
        _check("lives", self.lives, self.lives in ("unused", "reset"), known)


# As the official DreamerV3 code has them (commit e3f0224), but for two things: it also reports the
# time limit as a termination, and its grey comes out one lower for 1 colour in 20,000.
PROTOCOLS = {
    "atari": Protocol(image_size=96, gray=True, actions="all", sticky=STICKY),
    "atari100k": Protocol(image_size=64, gray=False, actions="needed", sticky=0.0),
}


def make_env(
    game: str,
    *,
    protocol: str | None = None,
    image_size: int | None = None,
    gray: bool | None = None,
    actions: str | None = None,
    sticky: float | bool | None = None,
    action_repeat: int | None = None,
    pooling: int | None = None,
    noops: int | None = None,
    lives: str | None = None,
    time_limit: int | None = None,
    frame_stack: int = 1,
    pixels: bool = True,
) -> gym.Env:
    """Make a game, such as pong (Pong, atari100k_pong, ALE/Pong-v5).

    protocol: a name of `PROTOCOLS`; None for the one that the game begins with, else atari100k.
    image_size ... time_limit: as in `Protocol`; None leaves what the protocol says. sticky may be
        true, for the published probability.
    frame_stack: as in `worldloom.envs.wrappers.wrap`.
    pixels: must be true, for nothing else is observed.
    """
    _check("pixels", pixels, bool(pixels), "true, as Atari is observed from pictures only")
    with naming_the_extra(f"atari game {game}"):
        from ale_py import roms
    rom, prefix = _find(game, roms.get_all_rom_ids())
    if isinstance(sticky, bool):
        sticky = STICKY if sticky else 0.0
    given: dict[str, Any] = dict(image_size=image_size, gray=gray, actions=actions, sticky=sticky)
    given |= dict(
        action_repeat=action_repeat,
        pooling=pooling,
        noops=noops,
        lives=lives,
        time_limit=time_limit,
    )
    chosen = {name: value for name, value in given.items() if value is not None}
    rules = replace(_protocol(game, protocol, prefix), **chosen)
    env: gym.Env = AtariGame(rom, rules)
    env = TimeLimit(env, math.ceil(rules.time_limit / rules.action_repeat))
    return wrap(env, frame_stack=frame_stack)


class AtariGame(gym.Env):
    """A game of the Arcade Learning Environment; a step is a decision, of `action_repeat` frames.

    Observations are [size, size, 1 or 3] uint8; `render` returns the whole screen in colour.
    Every game is the first one after the console was switched on: in some (assault, beam_rider)
    the memory that a game leaves behind changes the next, and an episode should follow from its
    seed and actions alone.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as in gym.Env)
    render_mode = "rgb_array"

    def __init__(self, rom: str, rules: Protocol) -> None:
        import ale_py
        from ale_py import roms

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # first: a new one says hello
        self.ale: Any = ale_py.ALEInterface()
        # Actions stick in `step`: the emulator reads a seed for it only where it loads a game,
        # which takes as long as a hundred decisions.
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("random_seed", 1)  # decides nothing any more, but 0 is the time of day
        path: Any = roms.get_rom_path(rom)
        self.ale.loadROM(path)
        self._switched_on = self.ale.cloneSystemState()
        self.frames_per_step = rules.action_repeat
        self.rom, self.rules = rom, rules
        self._held: Any = NOOP  # the action that a sticky frame repeats
        every = rules.actions == "all"
        self.actions = self.ale.getLegalActionSet() if every else self.ale.getMinimalActionSet()
        self.action_space = spaces.Discrete(len(self.actions))
        shape = (rules.image_size, rules.image_size, 1 if rules.gray else 3)
        self.observation_space = spaces.Box(0, 255, shape, np.uint8)
        self._screens: deque[np.ndarray] = deque(maxlen=rules.pooling)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start a game and let a random number of frames pass."""
        super().reset(seed=seed)
        self.ale.restoreSystemState(self._switched_on)
        self.ale.reset_game()
        self._held = NOOP
        for _ in range(self.np_random.integers(self.rules.noops + 1)):
            self.ale.act(NOOP)
            if self.ale.game_over():
                self.ale.reset_game()
        self._screens.extend([self.render()] * self.rules.pooling)
        return self._obs(), {}

    def step(self, action: int) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Hold an action for some frames; terminated is the game's end."""
        reward, lives, sticky = 0.0, self.ale.lives(), self.rules.sticky
        for left in reversed(range(self.rules.action_repeat)):
            if not sticky or self.np_random.random() >= sticky:
                self._held = self.actions[action]
            reward += self.ale.act(self._held)
            if left < self.rules.pooling:
                self._screens.append(self.render())
            lost = 0 < self.ale.lives() < lives
            lives = self.ale.lives()
            ended = self.ale.game_over() or (lost and self.rules.lives == "reset")
            if ended:
                break
        return self._obs(), reward, ended, False, {}

    def render(self) -> np.ndarray:
        """Return the newest frame, [210, 160, 3] uint8."""
        return self.ale.getScreenRGB()

    def __str__(self) -> str:
        return f"<atari {self.rom}>"

    def _obs(self) -> np.ndarray:
        size = (self.rules.image_size, self.rules.image_size)
        pooled = Image.fromarray(reduce(np.maximum, self._screens))
        image = np.array(pooled.resize(size, Image.Resampling.BILINEAR))
        if not self.rules.gray:
            return image
        return (image @ BRIGHTNESS // 1000).astype(np.uint8)[:, :, None]


def _find(game: str, known: list[str]) -> tuple[str, str | None]:
    """Return the emulator's name of a game, and the protocol that the game's prefix names."""
    names = {name.replace("_", ""): name for name in known}
    first, _, rest = game.lower().replace("-", "_").partition("_")
    prefix = first if first in PROTOCOLS else None
    plain = re.sub(r"^ale/|-v\d$", "", rest if prefix else game.lower())
    wanted = re.sub(r"[^a-z0-9]", "", plain)
    if wanted in names:
        return names[wanted], prefix
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or ["pong", "breakout"]
    examples = ", ".join(names[name] for name in near)
    raise ValueError(
        f"env.game is '{game}', which is no Atari game; expected one such as {examples}; set "
        "env.game to one of them"
    )


def _protocol(game: str, name: str | None, prefix: str | None) -> Protocol:
    """Return the protocol that was asked for, by its name or before the game's."""
    name = name or prefix or "atari100k"
    _check("protocol", name, name in PROTOCOLS, f"one of {', '.join(PROTOCOLS)}")
    agree = prefix in (None, name)
    _check("protocol", name, agree, f"{prefix}, as env.game={game} says, or the game without it")
    return PROTOCOLS[name]
