"""Collection of experience: act in the environments and add every row to the replay.

Letters used in shapes: N environments, A = width of an action.
"""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from worldloom.acting import Actor, Memory
from worldloom.envs.contract import EnvError
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import RowStream
from worldloom.protocol import LatentState
from worldloom.ranks import RankError, Ranks
from worldloom.trees import map_tree

if TYPE_CHECKING:
    from worldloom.replay.buffer import ReplayBuffer


class Collector:
    """Step N environments with an actor; each step adds one row per environment to a buffer.

    random_steps: number of environment steps with random actions at the start.
    frames_per_step: simulator frames per environment step (action repeat), or those of each
        environment.
    names: of the task of each environment, if there are several tasks. The summaries of episodes
        then have "TASK/return" and so on, too.
    masks: [N, A], 1 for the actions that exist in each environment; random actions are 0 elsewhere.

    The following are those of all ranks together, and the same in each of them.

    env_steps: steps of all environments together; resets do not count. frames: of the simulators.
    episodes: number of finished episodes. returns: those of the last 20.
    finished: {"return", "length", "success" if the environment's info has it} and the counters of
        the episodes that are not logged yet; the logging callback empties the list.
    ranks: the other processes, which step at the same time.
    """

    def __init__(
        self,
        env: VectorEnv,
        actor: Actor,
        buffer: "ReplayBuffer",
        *,
        obs_spec: ObsSpec,
        action_spec: ActionSpec,
        seed: int = 0,
        random_steps: int = 0,
        frames_per_step: int | Sequence[int] = 1,
        names: Sequence[str] = (),
        masks: np.ndarray | None = None,
    ) -> None:
        self.rows = RowStream(env, obs_spec, action_spec)
        self.actor, self.buffer = actor, buffer
        self.random_steps, self.names, self.masks = random_steps, list(names), masks
        self.num_envs = self.rows.num_envs
        self.frames_per_step = np.broadcast_to(frames_per_step, self.num_envs)
        self.env_steps = self.frames = 0
        self.episodes = 0
        self.returns: list[float] = []
        self.finished: list[dict[str, float]] = []
        self.ranks = Ranks()
        self._restarts_elsewhere = 0  # of environment processes, in the other ranks
        self._rng = np.random.default_rng(seed)
        self._memory: Memory | None = None
        self._running = False

    def step(self, stop: bool = False) -> bool:
        """Add the current rows to the buffer, then step all environments once.

        If an environment fails in one rank, all stop: that rank raises the error.

        stop: whether this rank asks to stop. Returns whether any rank does.

        Raises:
            RankError: another rank failed.
        """
        steps, frames, failed = 0, 0, None
        ended: list[dict[str, float]] = []
        try:
            steps, frames, ended = self._step()
        except Exception as error:
            if self.ranks.size == 1:
                raise
            failed = error
        counts = (steps, frames, len(ended), self.rows.restarts, stop, failed is not None)
        shared = self.ranks.share(*counts)
        steps, frames, new, restarts, stops, failures = shared.sum(0).tolist()
        self.env_steps += steps
        self.frames += frames
        self._restarts_elsewhere = restarts - self.rows.restarts
        if new:
            ended = [episode for episodes in self.ranks.gather(ended) for episode in episodes]
        for episode in ended:
            self.episodes += 1
            # A new list, because the thread that shows the progress may be reading this one.
            self.returns = [*self.returns, episode["return"]][-20:]
            self.finished.append({**episode, **self.counters()})
        if failures:
            self.ranks.stopping = True
            first = int(shared[:, -1].argmax())
            known = isinstance(failed, EnvError)
            text = str(failed) if known else f"{type(failed).__name__}: {failed}"
            text = self.ranks.gather(text)[first]
            raise failed or RankError(f"rank {first} failed: {text}")
        return bool(stops)

    def _step(self) -> tuple[int, int, list[dict[str, float]]]:
        """Step this rank's environments; return steps, frames and the episodes that ended."""
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
        self._memory = memory  # only now: if `add` fails, a resumed run adds the row again
        self._running = False  # if the step is interrupted, new episodes start
        ended = rows.step(actions)
        self._running = True
        # A first row results from a reset, which is not a step.
        moved = ~rows.is_first
        frames = int(self.frames_per_step[moved].sum())
        return int(np.count_nonzero(moved)), frames, [self._label(*episode) for episode in ended]

    def _label(self, index: int, episode: dict[str, float]) -> dict[str, float]:
        """Add the values under the name of the task to the summary of an episode."""
        name = self.names[index] if self.names else None
        return episode | ({f"{name}/{k}": v for k, v in episode.items()} if name else {})

    @property
    def restarts(self) -> int:
        """Return how many environment processes were replaced so far."""
        return self.rows.restarts + self._restarts_elsewhere

    def counters(self) -> dict[str, int]:
        """Return env_steps, frames (simulator steps), episodes and restarts so far."""
        counts = {"env_steps": self.env_steps, "frames": self.frames, "episodes": self.episodes}
        return {**counts, "restarts": self.restarts}

    def close(self) -> None:
        """Close the environments."""
        self.rows.env.close()

    def state_dict(self) -> dict[str, Any]:
        """Return counters and the state of the current episodes as tensors and plain data.

        "rows" and "memory" are None before the first step and after an interrupted step. Then
        `load_state_dict` starts new episodes; the previous ones stay in the replay without a last
        row.
        """
        running = self._running and self._memory is not None
        rows = self.rows.state_dict() if running else None
        return {
            "env_steps": self.env_steps,
            "frames": self.frames,
            "episodes": self.episodes,
            "returns": list(self.returns),
            "finished": [dict(episode) for episode in self.finished],
            "rng": self._rng.bit_generator.state,
            "rows": map_tree(lambda x: torch.tensor(x) if isinstance(x, np.ndarray) else x, rows),
            "memory": self._memory.state_dict() if rows and self._memory else None,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what `state_dict` returned; the model may be on another device.

        Each environment's episode is replayed up to the saved step. If it develops differently, a
        warning is logged and a new episode starts in that environment.
        """
        self._running, self._memory = False, None
        if (rows := state.get("rows")) is not None:
            arrays = map_tree(lambda x: x.numpy() if isinstance(x, Tensor) else x, rows)
            self.rows.load_state_dict(arrays)
            self._memory, self._running = Memory.from_state_dict(state["memory"]), True
        self.env_steps = state["env_steps"]
        # The first runs lack it.
        self.frames = state.get("frames", self.env_steps * int(self.frames_per_step[0]))
        self.episodes = state["episodes"]
        self.returns = list(state["returns"])
        self.finished = [dict(episode) for episode in state["finished"]]
        self._rng.bit_generator.state = state["rng"]

    def _act(self) -> Memory:
        rows, device = self.rows, self.actor.device
        if self._memory is not None and self._memory.action.device != device:
            # The state was loaded before the trainer moved the model.
            self._memory = self._memory.map(lambda x: x.to(device))
        if self.env_steps >= self.random_steps:
            return self.actor(rows.obs, rows.is_first, self._memory)[1]
        # Keep the latent state up to date: the actor may take over in the middle of an episode.
        state = self.actor.observe(rows.obs, rows.is_first, self._memory)
        actions = rows.action_spec.sample(self._rng, self.num_envs)
        if self.masks is not None:
            actions *= self.masks
        return Memory(state, torch.as_tensor(actions, device=device))

    @torch.no_grad()
    def _replay_values(self, state: LatentState) -> dict[str, Tensor] | None:
        model: Any = self.actor.model
        return model.replay_values(state) if getattr(model, "replay_fields", None) else None
