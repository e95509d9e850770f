"""Decision fidelity: the return that is lost by choosing actions with the model.

From the same state of an environment, K action sequences are ranked by the model and then executed.
Simulators cannot be copied, so each sequence is executed after replaying the episode up to there.

Letters used in shapes: N environments, K action sequences of H steps, A = width of an action.
"""

from collections.abc import Generator, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from worldloom.acting import Actor
from worldloom.envs.vector import RowStream
from worldloom.planning import SamplingPlanner
from worldloom.protocol import LatentState
from worldloom.trees import flatten_tree

HELD = 5  # steps for which a random action is held; single random steps hardly change a return
STEPS = 3 * HELD  # H
DEEPEST = 10  # steps of the policy after which the sequences start, at most


@dataclass
class Decision:
    """Returns of K action sequences from one state.

    predicted: [K], by the model; actual: [K], by the environment.
    """

    predicted: np.ndarray
    actual: np.ndarray

    def score(self) -> dict[str, float]:
        """Return {"decision_loss", "decision_loss_random"}.

        They are the return of the best sequence minus that of the one that the model ranks first
        (the mean of those that share the first rank), and minus the mean of all.
        """
        best, first = self.actual.max(), self.predicted == self.predicted.max()
        return {
            "decision_loss": float(best - self.actual[first].mean()),
            "decision_loss_random": float(best - self.actual.mean()),
        }


class DecisionTest:
    """Steps N environments through their decisions; `run` yields True after every step.

    candidates: number K of sequences.
    seed: of the episodes and of the sequences.
    masks: [N, A], 1 for the actions that exist in each environment; others are 0.

    decisions: after `run`, one of each environment whose episode could be replayed.
    error: why there are none, if it was an error.
    """

    def __init__(
        self,
        actor: Actor,
        rows: RowStream,
        candidates: int,
        seed: int,
        deterministic: bool = True,
        masks: np.ndarray | None = None,
    ) -> None:
        self.actor, self.rows, self.candidates, self.seed = actor, rows, candidates, seed
        self.deterministic, self.masks = deterministic, masks
        self.decisions: list[Decision] = []
        self.error: Exception | None = None
        # Rows that the policy has reached, and its actions there, [N, ...] each.
        self._seen: list[dict[str, np.ndarray]] = []
        self._actions: list[np.ndarray] = []

    def run(self) -> Iterator[bool]:
        """Make the decisions; an error of the environment or of a custom model ends it early."""
        try:
            yield from self._decide()
        except Exception as error:
            self.error = error

    def _decide(self) -> Iterator[bool]:
        """Play the policy, then every sequence from one of the rows that it has reached."""
        states, depths = yield from self._play_policy()
        # Those of an environment are the same, however many others there are.
        rngs = [np.random.default_rng(self.seed + i) for i in range(self.rows.num_envs)]
        starts = np.array([rng.integers(max(n, 1)) for rng, n in zip(rngs, depths, strict=True)])
        sequences = np.stack([self._draw(rng) for rng in rngs])  # [N, K, H, A]
        if self.masks is not None:
            sequences *= self.masks[:, None, None]
        actual, same = np.zeros(sequences.shape[:2]), depths > 0
        for k in range(self.candidates):
            actual[:, k], again = yield from self._execute(starts, sequences[:, k])
            same &= again
        predicted = self._rank(states, starts, sequences)
        self.decisions = [Decision(predicted[i], actual[i]) for i in np.flatnonzero(same)]

    def _play_policy(self) -> Generator[bool, None, tuple[list[LatentState], np.ndarray]]:
        """Return the states in DEEPEST rows, and how many of them are in the first episode, [N]."""
        rows, memory, states = self.rows, None, []
        inside, depths = np.ones(rows.num_envs, bool), np.zeros(rows.num_envs, np.int64)
        rows.reset(self.seed)
        for t in range(DEEPEST):
            inside &= ~rows.is_last & ((t == 0) | ~rows.is_first)
            depths += inside
            action, memory = self.actor(rows.obs, rows.is_first, memory, self.deterministic)
            states.append(memory.state)
            self._seen.append(flatten_tree(rows.obs))
            self._actions.append(action.cpu().numpy())
            rows.step(self._actions[-1])
            yield True
        return states, depths

    def _execute(
        self, starts: np.ndarray, sequence: np.ndarray
    ) -> Generator[bool, None, tuple[np.ndarray, np.ndarray]]:
        """Replay the episodes up to `starts` [N], then execute a sequence [N, H, A].

        Returns the rewards of the sequence until the episode ends, [N], and whether the row at
        `starts` was the same as before.
        """
        rows, envs = self.rows, np.arange(self.rows.num_envs)
        total, same = np.zeros(len(envs)), np.zeros(len(envs), bool)
        over = np.zeros(len(envs), bool)
        rows.reset(self.seed)
        for t in range(int(starts.max()) + STEPS):
            before = min(t, DEEPEST - 1)
            same |= (starts == t) & ~over & _find_equal(flatten_tree(rows.obs), self._seen[before])
            steps = np.clip(t - starts, 0, STEPS - 1)
            replays = (t < starts)[:, None]
            over |= rows.is_last
            rows.step(np.where(replays, self._actions[before], sequence[envs, steps]))
            over |= rows.is_first
            total += np.where(~over & (t >= starts) & (t < starts + STEPS), rows.rewards, 0.0)
            yield True
        return total, same

    def _draw(self, rng: np.random.Generator) -> np.ndarray:
        """Return random action sequences [K, H, A], in which each action is held."""
        draws = self.rows.action_spec.sample(rng, self.candidates * STEPS // HELD)
        return draws.reshape(self.candidates, STEPS // HELD, -1).repeat(HELD, 1)

    @torch.no_grad()
    def _rank(
        self, states: Sequence[LatentState], starts: np.ndarray, candidates: np.ndarray
    ) -> np.ndarray:
        """Return the predicted returns [N, K]; minus infinity for NaN and infinity."""
        state = LatentState.cat([states[t][i] for i, t in enumerate(starts.tolist())])
        actions = torch.as_tensor(candidates, device=self.actor.device)
        model: Any = self.actor.model
        planner = SamplingPlanner(model, candidates.shape[-1], discount=1.0)
        return planner.compute_returns(state, actions).cpu().numpy()


def _find_equal(left: dict[str, np.ndarray], right: dict[str, np.ndarray]) -> np.ndarray:
    """Return for each environment whether all its observations are equal, [N]."""
    pairs = [(left[key], right[key]) for key in left]
    return np.all([(a == b).reshape(len(a), -1).all(1) for a, b in pairs], axis=0)
