"""Recorded evaluation episodes: observations, actions, rewards, latent states and plans.

Letters used in shapes: N actions of an episode, A = width of an action, C channels.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch
from PIL import Image

from worldloom.acting import Actor, Memory, play, use_seed
from worldloom.app.task import Task
from worldloom.envs.renderer import render_rgb
from worldloom.envs.vector import RowStream
from worldloom.protocol import LatentState
from worldloom.view.names import Names, find_names
from worldloom.view.plans import PlannedStep, watch_plans

FILM_HEIGHT = 200  # pixels of a rendered picture, at most


@dataclass
class Recording:
    """An episode of N actions, N + 1 rows.

    name: its number, with the name of its task if there are several.
    names: those of the dimensions of observations and actions.
    obs: {key: [N + 1, *obs_shape]} as the model sees them; "" is the key of a single array.
    actions: [N, A] in model units. rewards: [N + 1], 0 in row 0.
    states: the model's states [N + 1] after each observation.
    film: rendered pictures [H, W, 3] of all rows; empty if nothing was rendered.
    plans: N of them; empty for a model that does not plan.
    ended: "terminated", "truncated", or "cut off" where the recording stops earlier.
    """

    name: str
    names: Names
    obs: dict[str, np.ndarray]
    actions: np.ndarray
    rewards: np.ndarray
    states: LatentState
    film: list[np.ndarray] = field(default_factory=list)
    plans: list[PlannedStep] = field(default_factory=list)
    ended: str = "truncated"

    @property
    def length(self) -> int:
        """Number of actions N."""
        return len(self.actions)


class Recorder:
    """Plays episodes of a task, one environment at a time, as an evaluation with one does.

    seed, deterministic: as in the evaluation section; num_envs=1 gives the same episodes there.
    max_steps: actions after which an episode is cut off.
    renders: whether the environment is rendered.
    notes: lines about what could not be recorded.
    """

    def __init__(
        self,
        task: Task,
        actor: Actor,
        seed: int,
        deterministic: bool,
        max_steps: int,
        renders: bool,
    ) -> None:
        self.task, self.actor, self.seed, self.deterministic = task, actor, seed, deterministic
        self.max_steps, self.renders = max_steps, renders
        self.notes: list[str] = []

    def record(self, episodes: int) -> list[Recording]:
        """Return `episodes` episodes, of each task if there are several."""
        names = [""] if self.task.tasks is None else self._name_tasks()
        return [
            recording
            for number, name in enumerate(names)
            for recording in self._record_task(number, name, episodes)
        ]

    def _name_tasks(self) -> list[str]:
        assert self.task.tasks is not None
        return [f"{self.task.tasks.names[i]}, " for i in self.task.tasks.playable]

    def _record_task(self, number: int, name: str, episodes: int) -> list[Recording]:
        env = self.task.vector_env(self.max_steps, number, num_envs=1)
        rows = RowStream(env, self.task.obs, self.task.actions)
        seed = self.seed + number
        found: list[Recording] = []
        try:
            with use_seed(seed, self.actor.device), watch_plans(self.actor) as plans:
                rows.reset(seed)
                current = _Open(self, rows, plans)
                for _, ended in play(current.act, rows, [episodes]):
                    if ended:
                        title = f"{name}episode {len(found) + 1}"
                        names = find_names(env.envs[0], self.task.obs, self.task.actions)
                        found.append(current.finish(title, names))
        finally:
            env.close()
        return found

    def render(self, env: Any) -> list[np.ndarray]:
        """Return a list of one rendered picture, empty if the environment cannot render."""
        if not self.renders or env.render_mode != "rgb_array":
            return []
        try:
            image = render_rgb(env)
        except Exception as error:
            self.renders = False
            self.notes.append(f"no pictures of the environment, which cannot render: {error}")
            return []
        small = Image.fromarray(image).reduce(max(1, -(-image.shape[0] // FILM_HEIGHT)))
        return [np.asarray(small)]


class _Open:
    """An episode that has not ended.

    plans: list to which the actor's planner adds a plan at each decision.
    """

    def __init__(self, recorder: Recorder, rows: RowStream, plans: list[PlannedStep]) -> None:
        self.recorder, self.rows, self.plans = recorder, rows, plans
        self.memory: Memory | None = None
        self._clear()

    def _clear(self) -> None:
        self.obs: list[dict[str, np.ndarray]] = []
        self.rewards: list[float] = []
        self.states: list[LatentState] = []
        self.actions: list[np.ndarray] = []
        self.film: list[np.ndarray] = []
        self.plans.clear()

    def act(self, rows: RowStream) -> np.ndarray:
        """Choose actions [1, A] for the current row, and record it."""
        if rows.is_first[0]:
            self._clear()  # also an episode that ended without a last row, after a fault
        actor, deterministic = self.recorder.actor, self.recorder.deterministic
        actions, self.memory = actor(rows.obs, rows.is_first, self.memory, deterministic)
        self._add_row(self.memory.state)
        spec, chosen = rows.action_spec, actions.cpu().numpy()
        self.actions.append(spec.encode(spec.decode(chosen))[0])  # as the environment clips it
        return chosen

    def _add_row(self, state: LatentState) -> None:
        obs = self.rows.obs if isinstance(self.rows.obs, dict) else {"": self.rows.obs}
        self.obs.append({key: value[0].copy() for key, value in obs.items()})
        self.rewards.append(float(self.rows.rewards[0]))
        self.states.append(state)
        env: Any = self.rows.env
        self.film += self.recorder.render(env.envs[0])

    def finish(self, name: str, names: Names) -> Recording:
        """Return the episode; the current row is its last one."""
        rows, actor = self.rows, self.recorder.actor
        devices = [actor.device] if actor.device.type == "cuda" else []
        with torch.random.fork_rng(devices):  # an evaluation does not observe the last row
            self._add_row(actor.observe(rows.obs, rows.is_first, self.memory))
        length, limit = len(self.actions), self.recorder.task.episode_length
        ended = "terminated" if rows.is_terminal[0] else "truncated"
        if ended == "truncated" and length >= self.recorder.max_steps and length != limit:
            ended = "cut off"
        recording = Recording(
            name,
            names,
            {key: np.stack([row[key] for row in self.obs]) for key in self.obs[0]},
            np.stack(self.actions),
            np.array(self.rewards, np.float32),
            _join_states(self.states),
            self.film if len(self.film) == len(self.obs) else [],
            list(self.plans) if len(self.plans) == length else [],
            ended,
        )
        self._clear()
        return recording


def _join_states(states: Sequence[LatentState]) -> LatentState:
    """Return all states as one batch, with the extras that every one of them has."""
    common = set.intersection(*(set(state.extras) for state in states))
    extras = [{key: state.extras[key] for key in sorted(common)} for state in states]
    pairs = zip(states, extras, strict=True)
    return LatentState.cat([replace(state, extras=held) for state, held in pairs])


def to_rgb(images: np.ndarray) -> np.ndarray:
    """Return images [N, C, H, W] of any channels as [N, H, W, 3] uint8: the newest of a stack."""
    images = np.clip(np.nan_to_num(images), 0, 255).astype(np.uint8)
    images = images[:, -3:] if images.shape[1] % 3 == 0 else images[:, -1:].repeat(3, 1)
    return np.ascontiguousarray(np.moveaxis(images, 1, -1))
