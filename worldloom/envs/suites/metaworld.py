"""Meta-World manipulation tasks (v3), from the state or from pixels."""

import re
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.extras import suggest_extra
from worldloom.envs.renderer import use_renderer
from worldloom.envs.suites.settings import find_task
from worldloom.envs.suites.simulator import SimulatorEnv
from worldloom.envs.wrappers import wrap
from worldloom.errors import require

LENGTH = 200  # steps of an episode: 100 actions, each repeated twice, as in TD-MPC2's benchmark
SUFFIX = "-v3-goal-observable"


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
    render_mode: str | None = None,
) -> gym.Env:
    """Make a task, such as reach (reach-v3, mw-reach, push-back).

    pixels, image_size, action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`. No
        renderer is loaded without pixels or render_mode="rgb_array".
    camera: corner4 is where TD-MPC2's benchmark moves corner2 to; others are corner, corner2,
        corner3, topview, behindGripper and gripperPOV.
    fixed_goal: a seed for the goal and the positions of the objects in all episodes, the same in
        every copy of the environment; False for new ones in each episode.
    time_limit: simulator steps after which an episode is truncated, 200 by default.
    """
    valid = fixed_goal is not True and isinstance(fixed_goal, int) and fixed_goal >= 0
    require(valid, "env.fixed_goal", fixed_goal, "false, or a seed of at least 0 such as 0")
    with suggest_extra(f"metaworld task {task}"):
        if pixels or render_mode is not None:
            use_renderer("metaworld")
        from metaworld import ALL_V3_ENVIRONMENTS_GOAL_OBSERVABLE as known
    make: Any = known[_find(task, known)]
    limit = LENGTH if time_limit is None else time_limit
    size = image_size or (64 if pixels else 240)
    env = Manipulation(make, limit, size, camera, fixed_goal)
    return wrap(env, limit, action_repeat, frame_stack, pixels, image_size)


class Manipulation(SimulatorEnv):
    """A task of Meta-World with its goal in the observations, which are vectors of 39 numbers.

    Each episode draws its goal and the positions of the objects from the seed, and never
    terminates. "success" in the info is true once the goal was reached in the episode, as
    Meta-World counts it.

    make: one of Meta-World's classes.
    limit: steps that an episode may have, instead of Meta-World's 500.
    fixed_goal: seed of the goal in all episodes, or False.
    """

    render_fps = 80

    def __init__(
        self, make: Any, limit: int, size: int, camera: str, fixed_goal: int | Literal[False]
    ) -> None:
        from gymnasium.envs.mujoco.mujoco_rendering import MujocoRenderer

        # Without a seed, and without seeded_rand_vec, it uses numpy's global random numbers.
        simulator = self.simulator = make(seed=0, render_mode="rgb_array")
        simulator.seeded_rand_vec = True
        simulator.max_path_length = limit
        self.name = f"metaworld {simulator.task_name}"
        model = simulator.model
        cameras = [model.camera(index).name for index in range(model.ncam)]
        require(camera in cameras, "env.camera", camera, f"one of {', '.join(cameras)}")
        self.camera = cameras.index(camera)
        simulator.mujoco_renderer = MujocoRenderer(
            model, simulator.data, width=size, height=size, camera_id=self.camera
        )
        self.fixed_goal, self.succeeded = fixed_goal, False
        self.observation_space = spaces.Box(-np.inf, np.inf, (39,), np.float32)
        self.action_space = simulator.action_space
        self._seed()

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[np.ndarray, dict[str, Any]]:
        """Start an episode with a new goal."""
        super().reset(seed=seed)
        if seed is not None or self.fixed_goal is not False:
            self._seed()
        obs, _ = self.simulator.reset()
        self.succeeded = False
        return obs.astype(np.float32), {}

    def step(self, action: np.ndarray) -> tuple[np.ndarray, float, bool, bool, dict[str, Any]]:
        """Act for one step."""
        obs, reward, _, _, info = self.simulator.step(np.asarray(action, np.float32))
        self.succeeded |= info["success"] > 0
        return obs.astype(np.float32), float(reward), False, False, {"success": self.succeeded}

    def render(self) -> np.ndarray:
        """Return the camera's image, [size, size, 3] uint8."""
        image = self.simulator.render()
        up = self.simulator.data.cam_xmat[self.camera].reshape(3, 3)[:, 1]
        # The cameras in the corners are mounted upside down.
        return image[::-1, ::-1] if up[2] < -0.1 else image

    def _seed(self) -> None:
        """Seed the draws of goals, and unfreeze the first one, which Meta-World keeps."""
        drawn = int(self.np_random.integers(2**31))
        self.simulator.seed(drawn if self.fixed_goal is False else self.fixed_goal)
        self.simulator._freeze_rand_vec = False


def _find(task: str, known: Any) -> str:
    """Return the key of a task in any of its spellings."""
    tasks = {name: name for name in (key.removesuffix(SUFFIX) for key in known)}
    wanted = task.lower().replace("_", "-").removesuffix("-goal-observable")
    wanted = re.sub(r"^(mw|metaworld)-|-v3$", "", wanted)
    examples = ("reach", "push")
    return find_task(tasks, wanted, given=task, suite="Meta-World v3", examples=examples) + SUFFIX
