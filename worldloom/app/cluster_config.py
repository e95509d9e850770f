"""Settings of the launchers of sweeps: hydra.launcher.KEY=VALUE."""

import math
import re
from dataclasses import dataclass
from typing import Any

FOREVER = 60 * 24 * 30  # minutes
TIME = re.compile(r"(?:(\d+)-)?(\d+)(?::(\d+))?(?::(\d+))?")


@dataclass
class ProcessesConfig:
    """Settings of hydra/launcher=processes.

    jobs: how many run at a time.
    """

    jobs: int = 1

    def __post_init__(self) -> None:
        """Raise ValueError for an impossible value."""
        if self.jobs < 1:
            raise ValueError(f"jobs is {self.jobs}; expected at least 1")


@dataclass
class ClusterConfig:
    """Settings of hydra/launcher=slurm and =local; docs/clusters.md describes them."""

    partition: str | None = None
    account: str | None = None
    qos: str | None = None
    constraint: str | None = None
    time: int | str | None = None
    nodes: int = 1
    tasks_per_node: int = 1
    cpus_per_task: int | None = None
    gpus_per_node: int | None = None
    mem: int | str | None = None
    array_parallelism: int | None = None
    signal_delay_s: int = 120
    max_num_timeout: int = 100
    setup: list[str] | None = None
    additional_parameters: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        """Raise ValueError for a value that no cluster accepts."""
        least = {"nodes": 1, "tasks_per_node": 1, "cpus_per_task": 1, "array_parallelism": 1}
        for name, low in {**least, "signal_delay_s": 1, "gpus_per_node": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise ValueError(f"{name} is {value}; expected at least {low}")
        if isinstance(self.mem, str) and not re.fullmatch(r"\d+[KMGT]?", self.mem):
            raise ValueError(f"mem is {self.mem!r}; expected memory of a node such as 16G")
        if self.minutes * 60 <= self.signal_delay_s:
            raise ValueError(
                f"time is {self.time!r}, but runs are stopped {self.signal_delay_s} seconds before "
                "its end (hydra.launcher.signal_delay_s); raise it, or lower the delay"
            )

    @property
    def minutes(self) -> int:
        """Return the time limit in minutes."""
        if self.time is None:
            return FOREVER
        match = TIME.fullmatch(str(self.time))
        if match is None:
            raise ValueError(
                f"time is {self.time!r}; expected minutes, or days-hours:minutes:seconds such as "
                "4:00:00 or 1-12:00:00"
            )
        days, *parts = match.groups()
        numbers = [int(part) for part in parts if part is not None]
        if days is None and len(numbers) < 3:  # minutes, or minutes:seconds
            numbers.insert(0, 0)
        hours, minutes, seconds = [*numbers, 0, 0][:3]
        return math.ceil(((int(days or 0) * 24 + hours) * 60) + minutes + seconds / 60)
