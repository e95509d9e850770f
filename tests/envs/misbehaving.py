"""Environments that misbehave, each in one way, and what worldloom makes of them.

`Odd` counts the steps of its episodes, which end after 5, and its observations tell the count. A
case changes one thing that it returns or does, from the third step of each episode on, unless its
name starts with "always".
"""

import os
import sys
import time
from contextlib import suppress
from pathlib import Path
from types import MappingProxyType

import gymnasium as gym
import numpy as np
from gymnasium import spaces

LENGTH = 5
BOX = spaces.Box(-100, 100, (2,), np.float32)
ROBOT = spaces.Dict({"a": BOX, "in": spaces.Dict({"n": spaces.Discrete(7)})})
SPACES = {
    "box": BOX,
    "double": spaces.Box(-np.inf, np.inf, (2,), np.float64),
    "scalar": spaces.Box(-9, 9, (), np.float32),
    "byte": spaces.Box(0, 255, (2,), np.uint8),
    "image": spaces.Box(0, 255, (16, 16, 3), np.uint8),
    "choice": spaces.Discrete(7, start=-1),
    "choices": spaces.MultiDiscrete([7, 3]),
    "bits": spaces.MultiBinary(3),
    "robot": ROBOT,
}


class NoText(Exception):
    def __str__(self):
        raise RuntimeError("no text")


class NoPickle(Exception):
    def __init__(self, one, other):
        super().__init__(one)
        self.handle = lambda: other


class Weird(BaseException):
    pass


class Unprintable:
    def __repr__(self):
        raise RuntimeError("no repr")


class Tensor:
    """What matters of a tensor that requires gradients."""

    def __init__(self, value):
        self.value = np.asarray(value)

    def detach(self):
        return self

    def cpu(self):
        return self

    def numpy(self):
        return self.value

    def __array__(self, *_, **__):
        raise RuntimeError("Can't call numpy() on Tensor that requires grad.")

    def __float__(self):
        return float(self.value)


SHARED = np.zeros(2, np.float32)  # of all environments in a process


class Odd(gym.Env):
    action_space = spaces.Box(-1, 1, (1,))

    def __init__(self, name="", space="box"):
        self.name, self.space, self.odd = name, space, None
        self.observation_space = SPACES[space]
        self.episode, self.kept = -1, np.zeros(2, np.float32)
        cases = {**CASES, **IN_COMMANDS, **HANGING}
        if name.startswith("init "):
            cases[name][1](self)
        self.change = cases[name][1] if name else {}

    def _get(self, what, value):
        """Return a value, or what the case makes of it."""
        if self.name.startswith("init ") or what not in self.change:
            return value
        if what in ("step", "obs", "reward", "terminated", "truncated", "info") and (
            not self.name.startswith("always") and self.count < 3
        ):
            return value
        change = self.change[what]
        return change(self, value) if callable(change) else change

    def _obs(self):
        count = self.count
        return {
            "box": np.array([count, self.episode], np.float32),
            "double": np.array([count, self.episode], np.float64),
            "scalar": np.array(count, np.float32),
            "byte": np.array([count, 255 - count], np.uint8),
            "image": np.full((16, 16, 3), count, np.uint8),
            "choice": np.int64(count - 1),
            "choices": np.array([count, count % 3]),
            "bits": np.array([count % 2, 1, 0], np.int8),
            "robot": {"a": np.array([count, 0], np.float32), "in": {"n": count}},
        }[self.space]

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.count, self.episode = 0, self.episode + 1
        return self._get("reset", (self._obs(), {}))

    def step(self, action):
        self.count += 1
        ended = self.count == LENGTH
        result = (
            self._get("obs", self._obs()),
            self._get("reward", float(self.count)),
            self._get("terminated", ended and self.episode % 2 == 0),
            self._get("truncated", ended and self.episode % 2 == 1),
            self._get("info", {"success": self.count % 2 == 1} if ended else {}),
        )
        return self._get("step", result)

    def close(self):
        self._get("close", None)


def throw(error):
    def change(*_):
        raise error() if callable(error) else error

    return change


def call(function, *args):
    return lambda *_: function(*args)


def reuse(env, value):
    env.kept[:] = value
    return env.kept


def share(env, value):
    SHARED[:] = value
    return SHARED


def slow(env, value):
    """Return False, after a file tells that an episode is longer than those of training."""
    if env.count > 60:
        Path("long").touch()
        time.sleep(0.01)
    return False


def hang(env, value):
    """Never return, whatever happens."""
    while True:
        with suppress(Exception):
            time.sleep(100)


def with_obs(**parts):
    return {"obs": lambda env, value: {**value, **parts}}


def only_a(env, value):
    return {"a": value["a"]}


def growing(env, value):
    return {**value, "path": np.zeros(env.count), "n": {"deep": [1] * env.count}}


def once(bad):
    """Return a bad value in the second episode only."""
    return lambda env, value: bad if env.episode == 1 else value


# What becomes of a case: "same" as from the environment without it, "same" with a note, a "fault"
# that ends the episode, or an "error" that ends everything.
SAME = "same"


def note(words):
    return ("note", words)


def fault(words):
    return ("fault", words)


def error(words):
    return ("error", words)


# name: (space, changes, outcome)
_CASES = {
    # ---- rewards
    "always reward [1]": ("box", {"reward": lambda e, x: np.array([x])}, SAME),
    "always reward [[1]]": ("box", {"reward": lambda e, x: [[x]]}, SAME),
    "always reward 0-d": ("box", {"reward": lambda e, x: np.array(x)}, SAME),
    "always reward int": ("box", {"reward": lambda e, x: int(x)}, SAME),
    "always reward int64": ("box", {"reward": lambda e, x: np.int64(x)}, SAME),
    "always reward float32": ("box", {"reward": lambda e, x: np.float32(x)}, SAME),
    "always reward tensor": ("box", {"reward": lambda e, x: Tensor(x)}, SAME),
    "reward None": ("box", {"reward": None}, error("None as the reward; expected a number")),
    "reward text": ("box", {"reward": "1.0"}, error("'1.0' as the reward; expected a number")),
    "reward two": ("box", {"reward": np.zeros(2)}, error(".* as the reward; expected a number")),
    "reward empty": ("box", {"reward": []}, error(r"\[\] as the reward; expected a number")),
    "reward complex": ("box", {"reward": 1j}, error("1j as the reward; expected a number")),
    "reward dict": (
        "box",
        {"reward": {"a": 1}},
        error("{'a': 1} as the reward; expected a number"),
    ),
    "reward unprintable": (
        "box",
        {"reward": Unprintable()},
        error("Unprintable as the reward; expected a number"),
    ),
    "reward nan": ("box", {"reward": float("nan")}, fault("nan as the reward")),
    "reward [nan]": ("box", {"reward": np.array([np.nan])}, fault("nan as the reward")),
    "reward inf": ("box", {"reward": np.float32(np.inf)}, fault("inf as the reward")),
    "reward 1e300": ("box", {"reward": 1e300}, fault(r"1e\+300 as the reward")),
    "reward nan once": ("box", {"reward": once(np.nan)}, ("once", "nan as the reward")),
    # ---- flags
    "always flag numpy": ("box", {"terminated": lambda e, x: np.bool_(x)}, SAME),
    "always flag int": ("box", {"truncated": lambda e, x: int(x)}, SAME),
    "always flag float": ("box", {"truncated": lambda e, x: float(x)}, SAME),
    "always flag [1]": ("box", {"terminated": lambda e, x: np.array([x])}, SAME),
    "always flag tensor": ("box", {"terminated": lambda e, x: Tensor(x)}, SAME),
    "flag None": ("box", {"truncated": None}, error("None as truncated; expected True or False")),
    "flag text": ("box", {"terminated": "False"}, error("'False' as terminated; expected True or")),
    "flag 2": ("box", {"terminated": 2}, error("2 as terminated; expected True or False")),
    "flag nan": ("box", {"terminated": np.nan}, error("nan as terminated; expected True or False")),
    "flag array": (
        "box",
        {"terminated": np.zeros(2, bool)},
        error(".* as terminated; expected True"),
    ),
    "flag dict": ("box", {"truncated": {}}, error("{} as truncated; expected True or False")),
    # ---- info
    "always info growing": ("box", {"info": growing}, SAME),
    "always info None": ("box", {"info": None}, ("same without success",)),
    "always info list": ("box", {"info": [1, 2]}, ("same without success",)),
    "always info numbers as keys": (
        "box",
        {"info": lambda e, x: {**x, 3: 4, None: 5, ("a", 1): 6}},
        SAME,
    ),
    "always info unsendable": ("box", {"info": lambda e, x: {**x, "f": lambda: 0}}, SAME),
    "always info mapping": ("box", {"info": lambda e, x: MappingProxyType(x)}, SAME),
    "always info final": (
        "box",
        {"info": lambda e, x: {**x, "final_info": [None, {}], "_success": 3, "final_obs": e}},
        SAME,
    ),
    "always info lost": (
        "box",
        {"info": lambda e, x: {**x, "lost": 1, "restarted": True, "notes": 3, "faulty": [True]}},
        SAME,
    ),
    "always info success early": ("box", {"info": lambda e, x: {"success": "no", **x}}, SAME),
    "always success [1]": (
        "box",
        {"info": lambda e, x: {k: np.array([v]) for k, v in x.items()}},
        SAME,
    ),
    "always success tensor": (
        "box",
        {"info": lambda e, x: {k: Tensor(v) for k, v in x.items()}},
        SAME,
    ),
    "always success None": ("box", {"info": {"success": None}}, ("same without success",)),
    "always success yes": (
        "box",
        {"info": {"success": "yes"}},
        ("same without success", r"info\['success'\] is 'yes'; expected"),
    ),
    "always success nan": (
        "box",
        {"info": {"success": np.nan}},
        ("same without success", r"info\['success'\] is nan; expected"),
    ),
    "always success two": (
        "box",
        {"info": {"success": [True, False]}},
        ("same without success", r"info\['success'\] is \[True, False\]; expected"),
    ),
    "always success unprintable": (
        "box",
        {"info": {"success": Unprintable()}},
        ("same without success", r"info\['success'\] is .*Unprintable"),
    ),
    # ---- observations
    "always obs list": ("box", {"obs": lambda e, x: x.tolist()}, SAME),
    "always obs tuple": ("box", {"obs": lambda e, x: tuple(x)}, SAME),
    "always obs float64": ("box", {"obs": lambda e, x: x.astype(np.float64)}, SAME),
    "always obs int": ("box", {"obs": lambda e, x: x.astype(int)}, SAME),
    "always obs [1, 2]": ("box", {"obs": lambda e, x: x[None]}, SAME),
    "always obs tensor": ("box", {"obs": lambda e, x: Tensor(x)}, SAME),
    "always obs reused": ("box", {"obs": reuse}, SAME),
    "always obs shared": ("box", {"obs": share, "reset": lambda e, x: (share(e, x[0]), {})}, SAME),
    "always obs float for scalar": ("scalar", {"obs": lambda e, x: float(x)}, SAME),
    "always obs [1] for scalar": ("scalar", {"obs": lambda e, x: x[None]}, SAME),
    "always obs int for bytes": ("byte", {"obs": lambda e, x: x.astype(int)}, SAME),
    "always obs whole floats for bytes": ("byte", {"obs": lambda e, x: x.astype(float)}, SAME),
    "always obs int for choice": ("choice", {"obs": lambda e, x: int(x)}, SAME),
    "always obs array for choice": ("choice", {"obs": lambda e, x: np.array([x])}, SAME),
    "always obs float for choice": ("choice", {"obs": lambda e, x: float(x)}, SAME),
    "always obs list for choices": ("choices", {"obs": lambda e, x: x.tolist()}, SAME),
    "always obs bool for bits": ("bits", {"obs": lambda e, x: x.astype(bool)}, SAME),
    "always obs more keys": ("robot", with_obs(extra=np.zeros(9), more="text"), SAME),
    "always obs other mapping": ("robot", {"obs": lambda e, x: MappingProxyType(x)}, SAME),
    "obs None": ("box", {"obs": None}, error("None as the observation; expected an array of")),
    "obs text": ("box", {"obs": "here"}, error("'here' as the observation; expected an array of")),
    "obs ragged": (
        "box",
        {"obs": [[1], [1, 2]]},
        error("as the observation; expected an array of"),
    ),
    "obs objects": (
        "box",
        {"obs": np.array([None, {}])},
        error("as the observation; expected an array of"),
    ),
    "obs complex": (
        "box",
        {"obs": np.zeros(2, complex)},
        error("as the observation; expected an array"),
    ),
    "obs shape": ("box", {"obs": np.zeros(3)}, error(r"shape \(3,\) as the .* shape \(2,\)")),
    "obs transposed": (
        "image",
        {"obs": lambda e, x: x.transpose(2, 0, 1)},
        error(r"shape \(3, 16, 16\) as the .* shape \(16, 16, 3\)"),
    ),
    "obs unit image": ("image", {"obs": np.full((16, 16, 3), 0.5)}, error("0.5.*cannot be uint8")),
    "obs too large": ("byte", {"obs": np.array([0, 256])}, error("256.*cannot be uint8")),
    "obs negative": ("byte", {"obs": np.array([-1, 0])}, error("-1.*cannot be uint8")),
    "obs half": ("choice", {"obs": 0.5}, error("0.5.*cannot be int64")),
    "obs choice too high": ("choice", {"obs": 6}, error("6.*outside.*Discrete")),
    "obs choice too low": ("choice", {"obs": -2}, error("-2.*outside.*Discrete")),
    "obs choices too high": ("choices", {"obs": [0, 3]}, error("outside.*MultiDiscrete")),
    "obs choices too low": ("choices", {"obs": [-1, 0]}, error("outside.*MultiDiscrete")),
    "obs bits 2": ("bits", {"obs": [2, 0, 0]}, error("outside.*MultiBinary")),
    "obs missing key": ("robot", {"obs": only_a}, error("no observation 'in/n'")),
    "obs array for dict": ("robot", {"obs": np.zeros(2)}, error("no observation 'a'")),
    "obs dict for array": (
        "box",
        {"obs": {"a": 1}},
        error("as the observation; expected an array"),
    ),
    "obs wrong in a key": (
        "robot",
        with_obs(a=np.zeros(5)),
        error(r"array of float64 of shape \(5,\) as the observation 'a'; expected"),
    ),
    "always obs outside": ("box", {"obs": lambda e, x: x + 1000}, note("outside its space")),
    "obs nan": (
        "box",
        {"obs": np.full(2, np.nan, np.float32)},
        fault("nan in the observation at index"),
    ),
    "obs inf": (
        "box",
        {"obs": np.array([0, np.inf], np.float32)},
        fault("inf in the observation at index"),
    ),
    "obs inf and -inf": (
        "box",
        {"obs": [np.inf, -np.inf]},
        fault("inf in the observation at index"),
    ),
    "obs 1e39": (
        "double",
        {"obs": np.array([1e39, -1e39])},
        fault(r"1e\+39 in the observation at index"),
    ),
    "obs nan in a key": (
        "robot",
        with_obs(a=np.full(2, np.nan, np.float32)),
        fault("nan in the observation 'a'"),
    ),
    "obs nan for bytes": (
        "byte",
        {"obs": np.full(2, np.nan)},
        fault("nan in the observation at index"),
    ),
    "obs nan once": (
        "box",
        {"obs": once(np.full(2, np.nan))},
        ("once", "nan in the observation at index"),
    ),
    # ---- what reset returns
    "reset without info": ("box", {"reset": lambda e, x: x[0]}, error("from reset; expected")),
    "reset info None": ("box", {"reset": lambda e, x: (x[0], None)}, SAME),
    "reset None": ("box", {"reset": None}, error("returned None from reset; expected")),
    "reset nan": ("box", {"reset": ([np.nan, 0], {})}, fault("nan in the observation at index")),
    "reset three": ("box", {"reset": (0, 0, {})}, error("from reset; expected")),
    # ---- what step returns
    "step four": (
        "box",
        {"step": lambda e, x: x[:4]},
        error("4 values from step; expected .*terminated"),
    ),
    "step None": ("box", {"step": None}, error("None from step; expected")),
    "step dict": ("box", {"step": lambda e, x: dict(enumerate(x))}, error("from step; expected")),
    "step list": ("box", {"step": lambda e, x: list(x)}, SAME),
    # ---- exceptions
    **{
        f"{where} {name}": ("box", {where: throw(what)}, error(words))
        for where in ("reset", "step")
        for name, what, words in (
            ("ValueError", ValueError("hot"), "ValueError.*hot"),
            ("KeyError", KeyError("hot"), "KeyError.*hot"),
            ("AssertionError", AssertionError(), "AssertionError"),
            ("StopIteration", StopIteration(), "StopIteration"),
            ("MemoryError", MemoryError("hot"), "MemoryError.*hot"),
            ("OSError", BrokenPipeError(32, "hot"), "BrokenPipeError.*hot"),
            ("lines", RuntimeError("one\ntwo"), "RuntimeError.*one two"),
            ("no text", NoText, "NoText"),
            ("no pickle", lambda: NoPickle(1, 2), "NoPickle"),
            ("own base", Weird("hot"), "Weird.*hot"),
            ("GeneratorExit", GeneratorExit(), "GeneratorExit"),
        )
    },
    "step sys.exit(0)": ("box", {"step": call(sys.exit, 0)}, error(r"SystemExit.*0")),
    "step sys.exit text": ("box", {"step": call(sys.exit, "bye")}, error("SystemExit.*bye")),
    "reset sys.exit": ("box", {"reset": call(sys.exit)}, error("SystemExit")),
    "init ValueError": ("box", throw(ValueError("hot")), error("ValueError.*hot")),
    "init sys.exit": ("box", call(sys.exit, 0), error("SystemExit")),
    "init no text": ("box", throw(NoText), error("NoText")),
    "close ValueError": ("box", {"close": throw(ValueError("hot"))}, SAME),
    "close KeyError": ("box", {"close": throw(KeyError("hot"))}, SAME),
    "close no text": ("box", {"close": throw(NoText)}, SAME),
}
# Each case by name; `Odd` reads the changes, the tests the outcome.
CASES = {name: (space, changes, outcome) for name, (space, changes, outcome) in _CASES.items()}
# What can be tried only in a command: it ends the process, or takes long.
IN_COMMANDS = {
    "step os._exit": ("box", {"step": call(os._exit, 0)}, error("SystemExit: os._exit\\(0\\)")),
    "step KeyboardInterrupt": ("box", {"step": throw(KeyboardInterrupt)}, error("KeyboardInter")),
    "close sys.exit": ("box", {"close": call(sys.exit, 0)}, error("SystemExit: 0 in close")),
    "init os._exit": ("box", call(os._exit, 0), error("SystemExit: os._exit\\(0\\) when")),
    "always endless": ("box", {"terminated": False, "truncated": False}, SAME),
    "always slow": ("box", {"terminated": False, "truncated": slow}, SAME),
}
# Cases that never return.
HANGING = {
    "step sleeps": ("box", {"step": call(time.sleep, 100)}, error("in step")),
    "step hangs": ("box", {"step": hang}, error("in step")),
    "reset hangs": ("box", {"reset": hang}, error("in reset")),
    "always reset hangs later": (
        "box",
        {"reset": lambda env, value: hang(env, value) if env.episode > 2 else value},
        error("in reset"),
    ),
}
