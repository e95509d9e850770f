"""The share of one process in what the processes of a run divide."""

import re
from collections.abc import Mapping
from typing import Any


def require_divisible(plain: Mapping[str, Any], size: int) -> None:
    """Raise ValueError for a setting that the processes of a run cannot divide equally."""
    divided = {"training.batch_size": plain["training"]["batch_size"]}
    if "path" not in plain["data"]:
        divided["env.num_envs"] = plain["env"].get("num_envs", 1)
    for key, value in divided.items():
        if value % size:
            valid = [n for n in (value - value % size, value + size - value % size) if n]
            raise ValueError(
                f"{key} is {value}, which {size} processes cannot divide equally; set it to "
                f"{' or '.join(map(str, valid))}, or change trainer.devices"
            )


def take_share(plain: Mapping[str, Any], size: int) -> dict[str, Any]:
    """Return a configuration with the environments and the replay of one of `size` processes.

    The batch size, numbers of steps and intervals remain those of the whole run, and offline the
    capacity, since all processes read the whole dataset.
    """
    if size == 1 or "path" in plain["data"]:
        return dict(plain)
    count, capacity = plain["env"].get("num_envs", 1), plain["data"]["capacity"]
    if isinstance(capacity, str):
        capacity = re.sub(r"\d+\.?\d*", lambda found: f"{float(found[0]) / size:.9f}", capacity)
    elif capacity is not None:
        capacity = int(capacity) // count * (count // size)
    env = {**plain["env"], "num_envs": count // size}
    return {**plain, "env": env, "data": {**plain["data"], "capacity": capacity}}
