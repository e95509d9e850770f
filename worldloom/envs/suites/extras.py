"""Which of our extras installs a package that is missing."""

from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium as gym

# What a missing package calls itself in error messages -> our extra that installs it. Box2D's
# complaint about pygame names both, so pygame comes first; so do all that need MuJoCo too.
EXTRAS = {
    "pygame": "pixels",
    "box2d": "box2d",
    "dm_control": "dmc",
    "metaworld": "metaworld",
    "gymnasium_robotics": "robotics",
    "mujoco": "mujoco",
    "ale_py": "atari",
    "crafter": "crafter",
    "minigrid": "minigrid",
    "memory_maze": "memory-maze",
    "h5py": "offline",
    "minari": "offline",
    "pyarrow": "offline",
}


@contextmanager
def naming_the_extra(name: str) -> Iterator[None]:
    """Turn the error of a missing package into one that says which of our extras has it.

    name: what the user asked for.
    """
    try:
        yield
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        complaint = str(error).lower()
        extra = next((EXTRAS[word] for word in EXTRAS if word in complaint), None)
        remedy = f"pip install 'worldloom[{extra}]'" if extra else "install what the message names"
        raise ImportError(
            f"{name} needs a package that cannot be imported ({error}); {remedy}"
        ) from error
