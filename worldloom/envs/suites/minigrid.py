"""MiniGrid and BabyAI tasks, from their symbols or from pixels."""

import io
import re
from contextlib import redirect_stdout
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces

from worldloom.envs.extras import suggest_extra
from worldloom.envs.suites.settings import find_task
from worldloom.envs.wrappers import resize_image, wrap
from worldloom.errors import require

# All words in the missions of the package's tasks; commas are words.
WORDS = (  # noqa: SIM905 (a list of them is hard to read)
    ", a after and at avoid ball behind blue box door end fetch find from front get go goal green "
    "grey hallway in key lava left matching must near next object of on open opening pick purple "
    "put reach red right room rooms square the then to traverse unlock up use yellow you your"
).split()


def make_env(
    task: str,
    *,
    pixels: bool = False,
    view: str = "agent",
    image_size: int | None = None,
    words: int = 20,
    action_repeat: int = 1,
    time_limit: int | None = None,
    frame_stack: int = 1,
) -> gym.Env:
    """Make a task, such as DoorKey-5x5 (MiniGrid-DoorKey-5x5-v0, BabyAI-GoToObj).

    pixels: observe an image [size, size, 3] instead of the symbols; its size is 64 by default.
    view: what the image shows: what the "agent" sees, or the "full" grid.
    words: number of words of a mission that are observed, if missions differ between episodes.
    action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`.
    time_limit: steps after which an episode is truncated, instead of the task's limit; the reward
        of a success decreases linearly to 0.1 at that step.
    """
    require(view in ("agent", "full"), "env.view", view, "'agent' or 'full'")
    if image_size is not None and not pixels:
        raise ValueError(
            f"env.image_size is {image_size}, but symbols are observed, which are not an image; "
            "set env.pixels=true, or leave env.image_size out"
        )
    with suggest_extra(f"minigrid task {task}"):
        import minigrid  # noqa: F401  (registers the tasks)
    limit = {} if time_limit is None else {"max_steps": time_limit}
    env = gym.make(_find(task), render_mode="rgb_array", disable_env_checker=True, **limit)
    inner: Any = env.unwrapped
    env = GridObservation(Success(env), view if pixels else None, image_size or 64, words)
    # BabyAI draws a limit with each mission and has 0 before: these tasks have no known length.
    return wrap(env, inner.max_steps or None, action_repeat, frame_stack)


class Success(gym.Wrapper):
    """Add "success" to the info of an episode's last step."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act once; an episode ends with a reward only if the task was solved."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info["success"] = bool(terminated and float(reward) > 0)
        return obs, float(reward), terminated, truncated, info


class GridObservation(gym.ObservationWrapper):
    """Observe symbols as choices rather than as the colours of an image, or a rendered image.

    Symbols are {"image": object, colour and state of each cell in view, "direction"}, which models
    see as one-hot vectors. If missions differ between episodes, "mission" is observed, too: the
    numbers of its words, 0 for no word.

    view: "agent" or "full" for an image, None for symbols.
    """

    def __init__(self, env: gym.Env, view: str | None, size: int, words: int) -> None:
        super().__init__(env)
        from minigrid.core import constants

        self.grid: Any = env.unwrapped
        space: Any = self.grid.observation_space
        self.view, self.size, self.words = view, size, words
        self.reads = _varies(space["mission"])
        # One more number for all other words.
        mission = {"mission": spaces.MultiDiscrete([len(WORDS) + 2] * words)} if self.reads else {}
        if view is not None:
            image: Any = spaces.Box(0, 255, (size, size, 3), np.uint8)
            self.observation_space = spaces.Dict({"image": image, **mission}) if mission else image
            return
        kinds = (constants.OBJECT_TO_IDX, constants.COLOR_TO_IDX, constants.STATE_TO_IDX)
        cells = space["image"].shape[:2]
        sizes = np.broadcast_to([len(kind) for kind in kinds], (*cells, len(kinds)))
        image = spaces.MultiDiscrete(sizes.copy())
        parts = {"image": image, "direction": space["direction"], **mission}
        self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode; hide the line that BabyAI prints for every level that it rejects."""
        with redirect_stdout(io.StringIO()):
            return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> Any:
        """Return the image, or the symbols and the direction, with the mission if it varies."""
        mission = {"mission": self._read(observation["mission"])} if self.reads else {}
        if self.view is None:
            image = observation["image"].astype(np.int64)
            return {"image": image, "direction": observation["direction"], **mission}
        image = resize_image(self._draw(), self.size)
        return {"image": image, **mission} if mission else image

    def _draw(self) -> np.ndarray:
        """Draw the grid or the agent's part of it in tiles of the smallest sufficient size.

        MiniGrid's default tiles of 32 pixels take two to three times as long.
        """
        pov, cells = self.view == "agent", min(self.grid.width, self.grid.height)
        cells = self.grid.agent_view_size if pov else cells
        return self.grid.get_frame(tile_size=-(-self.size // cells), agent_pov=pov)

    def _read(self, mission: str) -> np.ndarray:
        """Return the numbers of a mission's words."""
        words = re.findall(r"\w+|,", mission.lower())
        if len(words) > self.words:
            raise ValueError(
                f"The mission '{mission}' has {len(words)} words, but {self.words} are observed; "
                f"set env.words={len(words)} or more"
            )
        numbers, other = np.zeros(self.words, np.int64), len(WORDS) + 1
        numbers[: len(words)] = [WORDS.index(w) + 1 if w in WORDS else other for w in words]
        return numbers


def _varies(space: Any) -> bool:
    """Return whether missions may differ between episodes; always true for BabyAI."""
    choices = space.ordered_placeholders or []
    return type(space).__name__ == "BabyAIMissionSpace" or any(len(c) > 1 for c in choices)


def _find(task: str) -> str:
    """Return the id of a task in any of its spellings; the newest version by default."""
    if task in gym.registry:
        return task
    tasks: dict[str, str] = {}
    # Later ids replace earlier ones: MiniGrid's those of BabyAI, and newer versions older ones.
    for id in sorted(id for id in gym.registry if id.startswith(("BabyAI-", "MiniGrid-"))):
        for name in (id, re.sub(r"-v\d+$", "", id)):
            tasks |= {_normalize(name): id, _normalize(name.partition("-")[2]): id}
    examples = ("doorkey5x5", "babyaigotoobj")
    return find_task(tasks, _normalize(task), given=task, suite="MiniGrid", examples=examples)


def _normalize(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
