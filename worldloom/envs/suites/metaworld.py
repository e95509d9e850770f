"""Meta-World manipulation tasks (v3), from the state or from pixels, behind gymnasium's API."""

import difflib
import re
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.extras import naming_the_extra
from worldloom.envs.wrappers import wrap

LENGTH = 200  # steps of an episode: 100 decisions of 2, as in TD-MPC2's benchmark


def make_env(
    task: str,
    *,
    pixels: bool = False,
    image_size: int | None = None,
    camera: str = "corner4",
    fixed_goal: int | Literal[False] = False,
    action_repeat: int = 2,
    time_limit: int | None = None,
    frame_stack: int = 1,
) -> gym.Env:
    """Make a task, such as reach (reach-v3, mw-reach, push-back).

    pixels, image_size, action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`. Without
        pixels no renderer is touched.
    camera: corner4 stands where TD-MPC2's benchmark moves corner2; others are corner, corner2,
        corner3, topview, behindGripper and gripperPOV.
    fixed_goal: a seed that decides the goal and the objects' places of all episodes, the same in
        every copy of the environment; False for others in each episode.
    time_limit: steps (not of `action_repeat`) after which an episode is truncated.
    """
    if fixed_goal is True or not isinstance(fixed_goal, int) or fixed_goal < 0:
        raise ValueError(
            f"env.fixed_goal is {fixed_goal!r}; expected a number from 0 on, the seed of the goal, "
            "or false for a new goal in each episode; set env.fixed_goal=0"
        )
    with naming_the_extra(f"metaworld task {task}"):
        if pixels:
            use_renderer("metaworld")
        from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as known
    make: Any = known[_find(task, known)]
    limit = LENGTH if time_limit is None else time_limit
    env: gym.Env = Manipulation(make, limit, image_size or 64, camera, fixed_goal)
    return wrap(
        TimeLimit(env, limit),
        action_repeat=action_repeat,
        pixels=pixels,
        image_size=image_size,
        frame_stack=frame_stack,
    )


class Manipulation(gym.Env):
    """A task of Meta-World that shows its goal; observations are vectors of 39 numbers.

    Each episode draws its goal and the places of the objects; they follow from the seed. An
    episode never terminates. "success" in the info tells whether the goal was reached at any time
    of the episode so far, as Meta-World counts it.

    make: one of Meta-World's classes.
    limit: steps that an episode may have; Meta-World's own limit of 500 gives way to it.
    fixed_goal: seed of the goal in all episodes, or False.
    """

    metadata = {"render_modes": ["rgb_array"]}  # noqa: RUF012 (as in gym.Env)
    render_mode = "rgb_array"

    def __init__(
        self, make: Any, limit: int, size: int, camera: str, fixed_goal: int | Literal[False]
    ) -> None:
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        self.env = make(seed=0, render_mode="rgb_array")  # with None it draws numpy's own numbers
        self.env.max_path_length = limit
        self.env.seeded_rand_vec = True  # else goals come from numpy's own numbers too
        cameras = [self.env.model.camera(index).name for index in range(self.env.model.ncam)]
        if camera not in cameras:
            raise ValueError(
                f"env.camera is '{camera}'; expected one of {', '.join(cameras)}; set env.camera "
                "to one of them"
            )
        self.camera = cameras.index(camera)
        self.env.mujoco_renderer = MujocoRenderer(
            self.env.model, self.env.data, width=size, height=size, camera_id=self.camera
        )
        self.fixed_goal, self.succeeded = fixed_goal, False
        self.observation_space = spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = self.env.action_space
        self._seed()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with a goal of its own."""
        super().reset(seed=seed)
        if seed is not None or self.fixed_goal is not False:
            self._seed()
        obs, _ = self.env.reset()
        self.succeeded = False
        return obs.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        obs, reward, _, _, info = self.env.step(np.asarray(action, np.float32))
        self.succeeded |= info["success"] > 0
        return obs.astype(np.float32), float(reward), False, False, {"success": self.succeeded}

    def render(self) -> np.ndarray:
        """Return the camera's picture, [size, size, 3] uint8."""
        picture = self.env.render()
        up = self.env.data.cam_xmat[self.camera].reshape(3, 3)[:, 1]
        # The cameras in the corners hang upside down.
        return picture[::-1, ::-1] if up[2] < -0.1 else picture

    def close(self) -> None:
        """Free the simulator and its renderer."""
        self.env.close()

    def __str__(self) -> str:
        return f"<metaworld {self.env.task_name}>"

    def _seed(self) -> None:
        """Seed the draws of goals, and let the next episode draw; Meta-World freezes its first."""
        drawn = int(self.np_random.integers(2**31))
        self.env.seed(drawn if self.fixed_goal is False else self.fixed_goal)
        self.env._freeze_rand_vec = False


def _find(task: str, known: Any) -> str:
    """Return the key of a task in any of its spellings."""
    names = {key.removesuffix("-v3-goal-observable"): key for key in known}
    wanted = task.lower().replace("_", "-").removesuffix("-goal-observable")
    wanted = re.sub(r"^(mw|metaworld)-|-v3$", "", wanted)
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4) or ["reach", "push"]
    raise ValueError(
        f"env.task is '{task}', which is no Meta-World task of version 3; expected one such as "
        f"{', '.join(near)}; set env.task to one of them"
    )
