"""Base class of the adapters that put a simulator behind gymnasium's API."""

from typing import Any

import gymnasium as gym


class SimulatorEnv(gym.Env):
    """An environment around `simulator`, which renders RGB images.

    simulator: the suite's own environment; None until an adapter has created it.
    name: suite and task, shown in messages.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as in gym.Env)
    render_mode = "rgb_array"
    simulator: Any = None
    name: str

    def close(self) -> None:
        """Free the simulator and its renderer."""
        if hasattr(self.simulator, "close"):
            self.simulator.close()

    def __str__(self) -> str:
        return f"<{self.name}>"
