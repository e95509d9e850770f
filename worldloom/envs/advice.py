"""Advice about observation spaces: what models cannot read, and what may be meant otherwise."""

import re
from collections.abc import Mapping
from typing import Any

from gymnasium import Space, spaces

from worldloom.envs.reader import KNOWN


class UnreadableError(ValueError):
    """Models cannot read an observation; the message lacks the advice.

    fix: the advice for environments; "" for the general one.
    """

    def __init__(self, text: str, fix: str = "") -> None:
        super().__init__(text)
        self.fix = fix


def advise(error: UnreadableError, key: str, leaves: Mapping[str, Any], recorded: bool) -> str:
    """Return what to do about an observation that models cannot read.

    leaves: all spaces by key. recorded: whether they are those of a dataset.
    """
    if error.fix and not recorded:
        return error.fix
    good = [re.escape(k) for k, leaf in leaves.items() if isinstance(leaf, KNOWN) and k != key]
    ways = [f"leave it out with env.obs.keep='{'|'.join(good)}'"] if good else []
    if isinstance(leaves[key], spaces.Box):
        ways.append(f"read it as a vector with env.obs.vector='{re.escape(key) or '.*'}'")
    if recorded:
        ways.append("record the dataset without it")
    else:
        ways.append("convert it with gymnasium.wrappers.TransformObservation")
    return ", or ".join(ways)


def remark_vector(key: str, name: str, space: Space) -> list[str]:
    """Return a remark if a vector may be meant as an image."""
    shape = space.shape or ()
    if not isinstance(space, spaces.Box) or len(shape) not in (2, 3):
        return []
    pattern = re.escape(key) or ".*"
    keep = f"env.obs.vector='{pattern}' confirms that it is none"
    if len(shape) == 3:
        return [
            f"{name} is a box of shape {shape} with values up to {space.high.max()}, so it is read "
            f"as a vector; if it is an image, set env.obs.image='{pattern}'; {keep}"
        ]
    if min(shape) < 16:
        return []
    change = f"set env.obs.image='{pattern}'"
    if shape[0] % 16 or shape[1] % 16:
        change = (
            f"make it [{shape[0]}, {shape[1]}, 1] with gymnasium.wrappers.ReshapeObservation, and "
            "set env.image_size=64"
        )
    return [
        f"{name} is a box of shape {shape}, which is read as a vector; if it is a grey image, "
        f"{change}; {keep}"
    ]


def require_distinct(space: Space) -> None:
    """Raise ValueError if two observations have the same name once the space is flattened."""
    names: set[str] = set()

    def visit(part: Space, path: tuple[Any, ...]) -> None:
        if isinstance(part, spaces.Dict):
            for key, inner in part.items():
                visit(inner, (*path, key))
            return
        name = "/".join(map(str, path))
        if name in names or (path and "" in map(str, path)):
            raise ValueError(
                f"The observation space {space} has {'an empty key' if name not in names else ''}"
                f"{f'two observations that are flattened to {name!r}' if name in names else ''}; "
                "expected a different name for each; rename one in the environment"
            )
        names.add(name)

    visit(space, ())
