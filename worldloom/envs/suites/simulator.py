"""Base class of the adapters that put a simulator behind gymnasium's API."""

from typing import Any

import gymnasium as gym


class SimulatorEnv(gym.Env):
    """An environment around `simulator`, which renders RGB images.

    simulator: the suite's own environment; None until an adapter has created it.
    name: suite and task, shown in messages.
    render_fps: steps per second; each adapter sets it.
    """

    render_fps: float = 10
    render_mode = "rgb_array"
    simulator: Any = None
    name: str

    @property
    def metadata(self) -> dict[str, Any]:  # type: ignore[override]
        """Return gymnasium's description of rendering."""
        return {"render_modes": ["rgb_array"], "render_fps": self.render_fps}

    def close(self) -> None:
        """Free the simulator and its renderer."""
        if hasattr(self.simulator, "close"):
            self.simulator.close()

    def __str__(self) -> str:
        return f"<{self.name}>"
