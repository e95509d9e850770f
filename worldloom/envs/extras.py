"""Error messages for missing packages that an extra of worldloom installs."""

from collections.abc import Iterator
from contextlib import contextmanager

import gymnasium as gym

# Word in an error message -> the extra that installs the package. The first match counts: Box2D's
# message also names pygame, and the message of a suite that needs MuJoCo may name mujoco.
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
    "'av'": "video",
}


@contextmanager
def suggest_extra(name: str) -> Iterator[None]:
    """Turn the error of a missing package into an ImportError that names worldloom's extra.

    name: the task or file that needs the package, for the message.
    """
    try:
        yield
    except (gym.error.DependencyNotInstalled, ImportError) as error:
        message = str(error).lower()
        extra = next((EXTRAS[word] for word in EXTRAS if word in message), None)
        fix = f"pip install 'worldloom[{extra}]'" if extra else "install the package named above"
        raise ImportError(
            f"{name} needs a package that cannot be imported ({error}); {fix}"
        ) from error
