"""Tasks of gymnasium-robotics by their ids, with success in the info."""

import functools
from typing import Any

import gymnasium as gym

from worldloom.envs.suites import gymnasium


@functools.wraps(gymnasium.make_env, assigned=())  # the same parameters for inspect.signature
def make_env(id: str, **settings: Any) -> gym.Env:
    """Make a task, such as FetchReach-v4, PointMaze_UMaze-v3 or AdroitHandDoor-v1.

    Observations are not changed; most are {"observation", "achieved_goal", "desired_goal"}.
    settings: as in `worldloom.envs.suites.gymnasium.make_env`.
    """
    return Success(gymnasium.make_env(id, **settings))


class Success(gym.Wrapper):
    """Reduce the info to "success": whether the goal is reached now, in all families of tasks.

    Kitchen's lists of words in the info would not fit into arrays.
    """

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode from the simulator's initial state."""
        inner: Any = self.unwrapped
        if hasattr(inner, "_mujoco"):
            # HandManipulate… keeps the last episode's forces and the solver's warm start in it.
            inner._mujoco.mj_resetData(inner.model, inner.data)
        return self.env.reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act once."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        success = info.get("is_success", info.get("success"))
        info = {} if success is None else {"success": bool(success)}
        return obs, float(reward), terminated, truncated, info
