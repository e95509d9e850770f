"""Atari games under the published protocols.

The emulator shows 60 frames per second; a step of the environment is `action_repeat` frames.
"""

import math
import re
from collections import deque
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from PIL import Image

from worldloom.envs.extras import suggest_extra
from worldloom.envs.suites.settings import find_task, require_pixels
from worldloom.envs.suites.simulator import SimulatorEnv
from worldloom.envs.wrappers import wrap
from worldloom.errors import require

NOOP = 0
STICKY = 0.25  # the published probability of sticky actions
BRIGHTNESS = np.array((299, 587, 114), np.int32)  # thousandths of red, green and blue


@dataclass(frozen=True)
class Protocol:
    """Rules of a game; the names are those of the settings in the configuration.

    image_size: side of the square image, resized from 160x210 by Pillow's bilinear filter.
    gray: combine the colours into one channel, after resizing.
    actions: "all" 18 of the joystick, or the "needed" ones, which differ from game to game.
    sticky: probability that a frame repeats the action of the previous frame.
    action_repeat: frames for which an action is held; their rewards are summed.
    pooling: number of newest frames of a step whose maximum is observed, for flickering sprites.
    noops: upper bound of the random number of frames without action at the start of an episode.
    lives: "unused", or "reset": losing a life terminates the episode, and the next one is a new
        game.
    time_limit: frames after which an episode is truncated, rounded up to whole steps; the frames
        without action at the start do not count.
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
        require(self.actions in ("all", "needed"), "env.actions", self.actions, "'all' or 'needed'")
        require(0 <= self.sticky <= 1, "env.sticky", self.sticky, "a probability, such as 0.25")
        require(self.noops >= 0, "env.noops", self.noops, "0 or more")
        for name in ("action_repeat", "pooling", "time_limit", "image_size"):
            require(getattr(self, name) >= 1, f"env.{name}", getattr(self, name), "at least 1")
        # The official code has a third choice, "discount": a lost life ends the return but not the
        # episode. Gymnasium has no signal for that, and the official code overwrites it.
        choices = "'unused' or 'reset' (a return that ends before its episode is not supported)"
        require(self.lives in ("unused", "reset"), "env.lives", self.lives, choices)


# From the official DreamerV3 code (commit e3f0224), with two differences: the official code also
# reports the time limit as a termination, and its grey is one lower for 1 colour in 20,000.
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

    protocol: a name of `PROTOCOLS`; None for the prefix of the game, or atari100k without a prefix.
    image_size ... time_limit: as in `Protocol`; None for the protocol's value. sticky=True means
        the published probability.
    frame_stack: as in `worldloom.envs.wrappers.wrap`.
    pixels: must be true, because there are no other observations.
    """
    require_pixels(pixels, "Atari")
    with suggest_extra(f"atari game {game}"):
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
    rules = replace(_get_protocol(game, protocol, prefix), **chosen)
    steps = math.ceil(rules.time_limit / rules.action_repeat)
    return wrap(AtariGame(rom, rules), steps, frame_stack=frame_stack)


class AtariGame(SimulatorEnv):
    """A game of the Arcade Learning Environment; a step is `action_repeat` frames.

    Observations are [size, size, 1 or 3] uint8; `render` returns the whole screen in colour.
    Every episode starts from the state in which the console was switched on: in some games
    (assault, beam_rider) the memory left by a game changes the next, and an episode must depend
    on its seed and actions only.
    """

    render_fps = 60

    def __init__(self, rom: str, rules: Protocol) -> None:
        import ale_py
        from ale_py import roms

        ale_py.ALEInterface.setLoggerMode(ale_py.LoggerMode.Error)  # hides the welcome message
        self.ale: Any = ale_py.ALEInterface()
        # `step` implements sticky actions: the emulator reads a seed only when it loads a game,
        # which takes as long as a hundred steps.
        self.ale.setFloat("repeat_action_probability", 0.0)
        self.ale.setInt("random_seed", 1)  # has no effect, but 0 would mean the time of day
        path: Any = roms.get_rom_path(rom)
        self.ale.loadROM(path)
        self._switched_on = self.ale.cloneSystemState()
        self.frames_per_step = rules.action_repeat
        self.rom, self.rules, self.name = rom, rules, f"atari {rom}"
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
        """Start a game and skip a random number of frames."""
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
        """Hold an action for some frames; terminated means that the game is over."""
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

    def _obs(self) -> np.ndarray:
        size = (self.rules.image_size, self.rules.image_size)
        pooled = Image.fromarray(reduce(np.maximum, self._screens))
        image = np.array(pooled.resize(size, Image.Resampling.BILINEAR))
        if not self.rules.gray:
            return image
        return (image @ BRIGHTNESS // 1000).astype(np.uint8)[:, :, None]


def _find(game: str, known: list[str]) -> tuple[str, str | None]:
    """Return the emulator's name of a game, and the protocol in the prefix of the game."""
    games = {name.replace("_", ""): name for name in known}
    first, _, rest = game.lower().replace("-", "_").partition("_")
    prefix = first if first in PROTOCOLS else None
    plain = re.sub(r"^ale/|-v\d$", "", rest if prefix else game.lower())
    wanted = re.sub(r"[^a-z0-9]", "", plain)
    examples = ("pong", "breakout")
    found = find_task(games, wanted, given=game, suite="Atari", setting="game", examples=examples)
    return found, prefix


def _get_protocol(game: str, name: str | None, prefix: str | None) -> Protocol:
    """Return the protocol with this name, or named by the prefix of the game."""
    name = name or prefix or "atari100k"
    require(name in PROTOCOLS, "env.protocol", name, f"one of {', '.join(PROTOCOLS)}")
    expected = f"{prefix} as in env.game={game}, or a game without prefix"
    require(prefix in (None, name), "env.protocol", name, expected)
    return PROTOCOLS[name]
