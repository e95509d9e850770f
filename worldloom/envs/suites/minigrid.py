"""MiniGrid and BabyAI tasks, from their symbols or from pixels, behind gymnasium's API."""

import difflib
import io
import re
from contextlib import redirect_stdout
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium import spaces
from gymnasium.wrappers import TimeLimit

from worldloom.envs.suites.extras import naming_the_extra
from worldloom.envs.wrappers import resize_image, wrap

# All words in the missions of the package's own tasks; commas are words.
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

    pixels: observe a picture [size, size, 3] instead of the symbols; its size is 64 by default.
    view: what the picture shows: what the "agent" sees, or the "full" grid.
    words: how many words of a mission are observed, where missions differ between episodes.
    action_repeat, frame_stack: as in `worldloom.envs.wrappers.wrap`.
    time_limit: steps after which an episode is truncated, instead of the task's own limit; the
        reward of a success falls linearly to 0.1 at that step.
    """
    if view not in ("agent", "full"):
        raise ValueError(
            f"env.view is '{view}'; expected 'agent' or 'full'; set env.view to one of them"
        )
    if image_size is not None and not pixels:
        raise ValueError(
            f"env.image_size is {image_size}, but symbols are observed, which are no picture; set "
            "env.pixels=true, or leave env.image_size out"
        )
    with naming_the_extra(f"minigrid task {task}"):
        import minigrid  # noqa: F401  (registers the tasks)
    limit = {} if time_limit is None else {"max_steps": time_limit}
    env = gym.make(_find(task), disable_env_checker=True, **limit)
    fixed: Any = env.unwrapped
    # BabyAI draws a limit with each mission, and has 0 until then: no length is known of these.
    if fixed.max_steps:
        env = TimeLimit(env, fixed.max_steps)
    env = GridObservation(Success(env), view if pixels else None, image_size or 64, words)
    return wrap(env, action_repeat=action_repeat, frame_stack=frame_stack)


class Success(gym.Wrapper):
    """Say in the info of an episode's last step whether the task was solved."""

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Act once; only a solved task ends with a reward."""
        obs, reward, terminated, truncated, info = self.env.step(action)
        if terminated or truncated:
            info["success"] = bool(terminated and float(reward) > 0)
        return obs, float(reward), terminated, truncated, info


class GridObservation(gym.ObservationWrapper):
    """Observe symbols as choices rather than as the colours of a picture, or a real picture.

    Symbols are {"image": object, colour and state of each cell in view, "direction"}, which models
    see as one-hot vectors. A picture stands alone. In both cases "mission" comes along, as the
    words in their order, if it may differ between episodes (0 for no word); the mission of a task
    that has but one is dropped, for it says nothing.

    view: "agent" or "full" for a picture, None for symbols.
    """

    def __init__(self, env: gym.Env, view: str | None, size: int, words: int) -> None:
        super().__init__(env)
        from minigrid.core import constants

        self.grid: Any = env.unwrapped
        seen: Any = self.grid.observation_space
        self.view, self.size, self.words = view, size, words
        self.told = _varies(seen["mission"])
        # One number more for all words that are not of the package.
        mission = {"mission": spaces.MultiDiscrete([len(WORDS) + 2] * words)} if self.told else {}
        if view is not None:
            image: Any = spaces.Box(0, 255, (size, size, 3), np.uint8)
            self.observation_space = spaces.Dict({"image": image, **mission}) if mission else image
            return
        kinds = (constants.OBJECT_TO_IDX, constants.COLOR_TO_IDX, constants.STATE_TO_IDX)
        cells = seen["image"].shape[:2]
        sizes = np.broadcast_to([len(kind) for kind in kinds], (*cells, len(kinds)))
        image = spaces.MultiDiscrete(sizes.copy())
        direction = seen["direction"]
        parts = {"image": image, "direction": direction, **mission}
        self.observation_space = spaces.Dict(parts)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start an episode, without a line on the console for every level that BabyAI rejects."""
        with redirect_stdout(io.StringIO()):
            return super().reset(seed=seed, options=options)

    def observation(self, observation: Any) -> Any:
        """Return the picture, or the symbols with their direction, and the mission if it varies."""
        mission = {"mission": self._read(observation["mission"])} if self.told else {}
        if self.view is None:
            image = observation["image"].astype(np.int64)
            return {"image": image, "direction": observation["direction"], **mission}
        picture = resize_image(self._draw(), self.size)
        return {"image": picture, **mission} if mission else picture

    def _draw(self) -> np.ndarray:
        """Draw the grid or the agent's part of it, with few more pixels than are needed.

        Standard tiles of 32 pixels take two to three times as long.
        """
        pov, cells = self.view == "agent", min(self.grid.width, self.grid.height)
        cells = self.grid.agent_view_size if pov else cells
        return self.grid.get_frame(tile_size=-(-self.size // cells), agent_pov=pov)

    def _read(self, mission: str) -> np.ndarray:
        """Return the numbers of a mission's words."""
        read = re.findall(r"\w+|,", mission.lower())
        if len(read) > self.words:
            raise ValueError(
                f"The mission '{mission}' has {len(read)} words, but {self.words} are observed; "
                f"set env.words={len(read)} or more"
            )
        numbers = np.zeros(self.words, np.int64)
        known = len(WORDS) + 1
        numbers[: len(read)] = [WORDS.index(w) + 1 if w in WORDS else known for w in read]
        return numbers


def _varies(space: Any) -> bool:
    """Tell whether a mission may differ between episodes; BabyAI's spaces do not say."""
    choices = space.ordered_placeholders or []
    return type(space).__name__ == "BabyAIMissionSpace" or any(len(c) > 1 for c in choices)


def _find(task: str) -> str:
    """Return the id of a task in any of its spellings; the newest version if none is given."""
    if task in gym.registry:
        return task
    names: dict[str, str] = {}
    # In this order MiniGrid wins over BabyAI where both have a name, and the newest version.
    for id in sorted(id for id in gym.registry if id.startswith(("BabyAI-", "MiniGrid-"))):
        for name in (id, re.sub(r"-v\d+$", "", id)):
            names |= {_plain(name): id, _plain(name.partition("-")[2]): id}
    wanted = _plain(task)
    if wanted in names:
        return names[wanted]
    near = difflib.get_close_matches(wanted, names, n=3, cutoff=0.4)
    examples = ", ".join(sorted({names[name] for name in near})) or "MiniGrid-DoorKey-5x5-v0"
    raise ValueError(
        f"env.task is '{task}', which is no MiniGrid task; expected one such as {examples}; set "
        "env.task to one of them"
    )


def _plain(name: str) -> str:
    return re.sub(r"[^a-z0-9]", "", name.lower())
