"""A session inside a model: an episode's state, and the states to which imagined actions lead.

Letters used in shapes: A = width of an action.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from worldloom.acting import Actor, use_seed
from worldloom.envs.spaces import ActionSpec
from worldloom.errors import require
from worldloom.protocol import LatentState
from worldloom.view.episodes import Recording

MOST_NODES = 5_000  # states that are kept; those of large models have 100 kB each


@dataclass(frozen=True)
class Node:
    """A state in the tree of a session.

    parent: number of the state before; None at the start. depth: actions since the start.
    action: [A] that led here, in model units.
    obs: {key: array} decoded observations; empty if the model decodes none.
    reward, proceeds, value: predicted for arriving here: the reward, the probability that the
        episode continues, and the return of the policy from here; None if the model has none.
    total: predicted rewards since the start, each times the probability that it is reached.
    reach: probability that the episode has not ended before.
    row: of the recorded episode with the same actions; None once they differ from it.
    plan: of a planner, for the next action.
    """

    number: int
    parent: int | None
    depth: int
    action: np.ndarray | None
    state: LatentState
    obs: dict[str, np.ndarray]
    reward: float | None
    proceeds: float | None
    value: float | None
    total: float
    reach: float
    row: int | None
    plan: Tensor | None = None


class Session:
    """Imagination from the steps of recorded episodes, as a tree of states.

    A model that samples its states draws the same random numbers at the same number of actions
    after the start, so sequences of actions that are compared differ by their actions alone.
    The process's random state is never changed.

    actor: acts with the model. spec: the actions. recordings: episodes to start from.
    notes: what the model cannot do, one line each.
    """

    def __init__(self, actor: Actor, spec: ActionSpec, recordings: Sequence[Recording]) -> None:
        self.actor, self.spec, self.recordings = actor, spec, recordings
        self.model: Any = actor.model
        self.notes: list[str] = []
        self.nodes: dict[int, Node] = {}
        self.recording, self.first, self.sample = recordings[0], 0, 0

    def start(self, episode: int, step: int, sample: int = 0) -> Node:
        """Forget all states and begin at the state after a step's observation.

        sample: number of the random numbers of a model that samples its states.

        Raises:
            ValueError: there is no such episode or step, or the number is negative.
        """
        last = len(self.recordings) - 1
        require(0 <= episode <= last, "episode", episode, f"from 0 to {last}")
        recording = self.recordings[episode]
        require(0 <= step <= recording.length, "step", step, f"from 0 to {recording.length}")
        require(0 <= sample < 2**32, "sample", sample, f"from 0 to {2**32 - 1}")
        self.recording, self.first, self.sample = recording, step, sample
        self.nodes = {}
        return self._add(None, None, recording.states[step], None)

    def step(self, number: int, action: np.ndarray | None = None) -> Node:
        """Imagine an action [A] in model units, or that of the policy, in a state of the tree.

        Raises:
            ValueError: there is no such state, the tree is full, the action does not fit, or the
                model cannot act.
        """
        if number not in self.nodes:
            raise ValueError(f"there is no state {number}; expected one since the last start")
        if len(self.nodes) >= MOST_NODES:
            raise ValueError(f"{MOST_NODES:,} states are kept at most; start again")
        node = self.nodes[number]
        state, plan, device = node.state, node.plan, self.actor.device
        if action is None:
            with use_seed(self._find_seed(node.depth), device):
                first = torch.tensor([plan is None], device=device)
                chosen, state, plan = self.actor.choose(state, plan, first, deterministic=True)
            action = self._clip(chosen[0].cpu().numpy())
        action = self.read_action(action)
        with torch.no_grad(), use_seed(self._find_seed(node.depth), device):
            state = self.model.predict(state, torch.as_tensor(action, device=device)[None])
        return self._add(node, action, state, plan)

    def read_action(self, action: Any) -> np.ndarray:
        """Return an action [A] float32.

        Raises:
            ValueError: it has another length, or a number outside the range of the actions.
        """
        array = np.asarray(action, np.float32)
        width = self.spec.width
        if array.shape != (width,) or not np.isfinite(array).all():
            raise ValueError(f"the action has shape {array.shape}; expected {width} finite numbers")
        if self.spec.discrete:
            groups = np.split(array, np.cumsum(self.groups)[:-1])
            fits = all(g.sum() == 1 and ((g == 0) | (g == 1)).all() for g in groups)
            require(fits, "the action", array.tolist(), "a single 1 in each group of choices")
        require(bool((abs(array) <= 1 + 1e-6).all()), "the action", array.tolist(), "-1 to 1")
        return array

    @property
    def groups(self) -> tuple[int, ...]:
        """Numbers of choices of the discrete actions; the width of continuous ones."""
        dims = self.spec.action_dim
        return dims if isinstance(dims, tuple) else (self.spec.width,)

    def _clip(self, action: np.ndarray) -> np.ndarray:
        """Return an action of a model as the environment receives it."""
        return self.spec.encode(self.spec.decode(action[None]))[0]

    def _find_seed(self, depth: int) -> int:
        sequence = np.random.SeedSequence([self.sample, depth])
        return int(sequence.generate_state(1)[0])

    @torch.no_grad()
    def _add(
        self,
        parent: Node | None,
        action: np.ndarray | None,
        state: LatentState,
        plan: Tensor | None,
    ) -> Node:
        """Decode a state and add it to the tree."""
        depth = 0 if parent is None else parent.depth + 1
        with use_seed(self._find_seed(depth), self.actor.device):
            decoded: Mapping[str, Any] = self._try("decode", state) or {}
            value = read_number(self._try("value", state))
        obs = decoded.get("obs")
        named = obs if isinstance(obs, Mapping) else {} if obs is None else {"": obs}
        reward, proceeds = (read_number(decoded.get(name)) for name in ("reward", "continue"))
        total, reach = 0.0, 1.0
        if parent is not None:
            total, reach = parent.total + parent.reach * (reward or 0.0), parent.reach
            reach *= 1.0 if proceeds is None else proceeds
        node = Node(
            len(self.nodes),
            None if parent is None else parent.number,
            depth,
            action,
            state,
            {key: part[0].float().cpu().numpy() for key, part in named.items()},
            reward,
            proceeds,
            value,
            total,
            reach,
            self._find_row(parent, action),
            plan,
        )
        self.nodes[node.number] = node
        return node

    def _find_row(self, parent: Node | None, action: np.ndarray | None) -> int | None:
        """Return the row of the recorded episode that a state imagines, if it imagines one."""
        if parent is None or action is None:
            return self.first
        if parent.row is None or parent.row >= self.recording.length:
            return None
        same = np.allclose(action, self.recording.actions[parent.row], atol=1e-6)
        return parent.row + 1 if same else None

    def _try(self, method: str, state: LatentState) -> Any:
        """Call a method that the model may not have; note its error instead of raising it."""
        call = getattr(self.model, method, None)
        if not callable(call):
            return None
        try:
            return call(state)
        except Exception as error:
            note = " ".join(f"the model raised {type(error).__name__} in {method}: {error}".split())
            if note not in self.notes:
                self.notes.append(note)
            return None


def read_number(prediction: Tensor | None) -> float | None:
    """Return the number of a prediction [1] or [1, 1], or None."""
    return None if prediction is None else float(torch.as_tensor(prediction).reshape(-1)[0])
