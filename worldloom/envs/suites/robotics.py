"""Tasks of gymnasium-robotics, which say whether their goal is reached, by their ids."""

from typing import Any

import gymnasium as gym

from worldloom.envs.suites import gymnasium


def make_env(
    id: str,
    *,
    image_size: int | None = None,
    pixels: bool = False,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
    **kwargs: Any,
) -> gym.Env:
    """Make a task, such as FetchReach-v4, PointMaze_UMaze-v3 or AdroitHandDoor-v1.

    Observations pass through whole; most are {"observation", "achieved_goal", "desired_goal"}.
    All settings are those of `worldloom.envs.suites.gymnasium.make_env`.
    """
    settings: dict[str, Any] = dict(
        image_size=image_size, pixels=pixels, action_repeat=action_repeat, frame_stack=frame_stack
    )
    return Success(gymnasium.make_env(id, time_limit=time_limit, **settings, **kwargs))


class Success(gym.Wrapper):
    """Say in the info whether the goal is reached now, in all families by the name "success".

    Nothing else stays in the info: Kitchen's lists of words would not fit into arrays.
    """

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode, from the simulator's own start."""
        inner: Any = self.unwrapped
        if hasattr(inner, "_mujoco"):
            # HandManipulate… leaves the last episode's forces and warm start of the solver in it.
            inner._mujoco.mj_resetData(inner.model, inner.data)
        return self.env.reset(seed=seed, options=options)[0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act once."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        reached = info.get("is_success", info.get("success"))
        told = {} if reached is None else {"success": bool(reached)}
        return obs, float(reward), terminated, truncated, told
