"""Collecting experience: act in the environments and add every row to the replay.

Letters used in shapes: N environments, A = width of an action.
"""

from collections.abc import Callable
from typing import Any, Protocol

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from worldloom.acting import Actor, Memory
from worldloom.envs.spaces import ActionSpec, Obs, ObsSpec
from worldloom.envs.vector import Rows
from worldloom.protocol import LatentState


class Buffer(Protocol):
    """What a collector needs of a replay."""

    def add(
        self,
        obs: Obs,
        actions: np.ndarray,
        rewards: np.ndarray,
        is_first: np.ndarray,
        is_last: np.ndarray,
        is_terminal: np.ndarray,
        fields: dict[str, Tensor] | None = None,
    ) -> Any:
        """Add one row per environment; every array is [N, ...]."""
        ...


class Collector:
    """Step N environments with an actor and add one row per environment and tick to a buffer.

    random_steps: act at random until so many environment steps are done.
    frames_per_step: of the simulator, where actions are repeated; published curves count frames.
    env_steps: steps that the environments have made, all of them together; resets do not count.
    episodes: episodes that have ended; last_return: the return of the newest, None before it.
    finished: their {"return", "length", "env_steps", "success" if the environment's info has it};
        whoever logs them empties the list.
    """

    def __init__(
        self,
        env: VectorEnv,
        actor: Actor,
        buffer: Buffer,
        *,
        obs_spec: ObsSpec,
        action_spec: ActionSpec,
        seed: int = 0,
        random_steps: int = 0,
        frames_per_step: int = 1,
    ) -> None:
        self.rows = Rows(env, obs_spec, action_spec)
        self.actor, self.buffer = actor, buffer
        self.random_steps, self.frames_per_step = random_steps, frames_per_step
        self.num_envs = self.rows.num_envs
        self.env_steps = 0
        self.episodes = 0
        self.last_return: float | None = None
        self.finished: list[dict[str, float]] = []
        self._rng = np.random.default_rng(seed)
        self._memory: Memory | None = None
        self._running = False

    def step(self) -> None:
        """Add the present rows to the buffer and step all environments once."""
        if not self._running:
            self.rows.reset(seed=int(self._rng.integers(2**31)))
            self._memory, self._running = None, True
        rows = self.rows
        memory = self._act()
        actions = memory.action.cpu().numpy()
        actions = np.where(rows.is_last[:, None], np.float32(0.0), actions)
        self.buffer.add(
            rows.obs,
            actions,
            rows.rewards,
            rows.is_first,
            rows.is_last,
            rows.is_terminal,
            fields=self._replay_values(memory.state),
        )
        self._memory = memory  # not before: a state saved after a failing `add` adds the row again
        self._running = False  # interrupted in a step, the environments start anew
        ended = rows.step(actions)
        self._running = True
        # What leads to a first row is no step but a reset.
        self.env_steps += int(np.count_nonzero(~rows.is_first))
        for _, episode in ended:
            self.episodes += 1
            self.last_return = episode["return"]
            self.finished.append({**episode, "env_steps": self.env_steps})

    @property
    def restarts(self) -> int:
        """Count the environment processes that were replaced so far."""
        return self.rows.restarts

    def metrics(self) -> dict[str, float]:
        """Return env/frames, env/episodes and env/restarts for the loggers."""
        frames = self.env_steps * self.frames_per_step
        counts = {"frames": frames, "episodes": self.episodes, "restarts": self.restarts}
        return {f"env/{name}": count for name, count in counts.items()}

    def close(self) -> None:
        """Close the environments."""
        self.rows.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Return where the collector is, in the middle of its episodes, as tensors and plain data.

        "rows" and "memory" are None before the first step, and after a step that was interrupted:
        then `load_state_dict` begins new episodes, and those under way stay in the replay without
        a last row.
        """
        running = self._running and self._memory is not None
        rows = self.rows.state_dict() if running else None
        return {
            "env_steps": self.env_steps,
            "episodes": self.episodes,
            "last_return": self.last_return,
            "finished": [dict(episode) for episode in self.finished],
            "rng": self._rng.bit_generator.state,
            "rows": _converted(rows, np.ndarray, torch.tensor),
            "memory": self._memory.state_dict() if rows and self._memory else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Go on where `state_dict` was called, also where the model is on another device.

        The episodes are played again up to there. Where one comes out differently, a warning says
        so and a new one begins; in all environments if the state is of before worldloom saved them.
        """
        self._running, self._memory = False, None
        if (rows := state.get("rows")) is not None:
            self.rows.load_state_dict(_converted(rows, Tensor, Tensor.numpy))
            self._memory, self._running = Memory.from_state_dict(state["memory"]), True
        self.env_steps = state["env_steps"]
        self.episodes = state["episodes"]
        self.last_return = state.get("last_return")
        self.finished = [dict(episode) for episode in state["finished"]]
        self._rng.bit_generator.state = state["rng"]

    def _act(self) -> Memory:
        rows, device = self.rows, self.actor.device
        if self._memory is not None and self._memory.action.device != device:
            # It was loaded before the trainer moved the model.
            self._memory = self._memory.map(lambda x: x.to(device))
        if self.env_steps >= self.random_steps:
            return self.actor(rows.obs, rows.is_first, self._memory)[1]
        # The latent state follows random actions too: the actor takes over in mid-episode.
        state = self.actor.observe(rows.obs, rows.is_first, self._memory)
        actions = rows.action_spec.sample(self._rng, self.num_envs)
        return Memory(state, torch.as_tensor(actions, device=device))

    @torch.no_grad()
    def _replay_values(self, state: LatentState) -> dict[str, Tensor] | None:
        model: Any = self.actor.model
        return model.replay_values(state) if getattr(model, "replay_fields", None) else None


def _converted(tree: Any, kind: type, convert: Callable[[Any], Any]) -> Any:
    """Convert everything of a kind in nested dicts and lists."""
    if isinstance(tree, dict):
        return {key: _converted(value, kind, convert) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_converted(value, kind, convert) for value in tree]
    return convert(tree) if isinstance(tree, kind) else tree
