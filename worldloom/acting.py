"""Acting with a world model in several environments at once, and evaluating it.

Axes in shapes: N environments, A = width of an action.
"""

from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from worldloom.cuda_graphs import CapturedFunction, Recorder
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.spaces import Obs as NumpyObs
from worldloom.envs.vector import RowStream
from worldloom.errors import require_positive
from worldloom.protocol import LatentState, Obs, WorldModel
from worldloom.ranks import Ranks

Planner = Callable[[LatentState, Tensor | None, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass
class Memory:
    """State of an actor between two steps.

    state: the latent states [N, ...] after the latest observations.
    action: [N, A], the actions chosen in these states.
    plan: the planner's plan; None if the model has a policy.
    """

    state: LatentState
    action: Tensor
    plan: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Memory":
        """Apply a function to every tensor."""
        plan = None if self.plan is None else fn(self.plan)
        return Memory(self.state.map(fn), fn(self.action), plan)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all tensors on the CPU."""
        saved = self.map(lambda x: x.detach().cpu().clone())
        return {"state": vars(saved.state), "action": saved.action, "plan": saved.plan}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Memory":
        """Return the memory, on the CPU, that `state_dict` was called on."""
        return cls(LatentState(**state["state"]), state["action"], state["plan"])


class Actor:
    """Choose actions with a world model, for N environments in one call.

    model: its `policy(state, deterministic=...)` chooses actions if it has one; it returns the
        action, or the action and the state with additions for the next call (such as a plan).
    planner: chooses actions for a model without a policy, as
        `planner(state, plan, is_first, deterministic) -> (action, plan)`. It receives the plan that
        it returned for the previous step (None in the first step) and is_first [N] bool, the rows
        whose plan belongs to a finished episode.
    precision: `trainer.precision` of the run. With bf16-mixed, actions are chosen in mixed bfloat16
        by a model on a CPU that has `plans_in_bfloat16` (TD-MPC2 when it plans, because a plan
        multiplies hundreds of rows); all others act in the precision of their weights.
    record: on a GPU, record what follows from an observation, and the choice of an action, as CUDA
        graphs with this function; None to compute them one kernel at a time.
    """

    def __init__(
        self,
        model: WorldModel,
        planner: Planner | None = None,
        precision: str = "32-true",
        record: Recorder | None = None,
    ) -> None:
        if planner is None and not callable(getattr(model, "policy", None)):
            raise ValueError(
                f"{type(model).__name__} has no policy and no planner was given; add a method "
                "policy(state, deterministic=False) to the model, or pass a planner: "
                "Actor(model, planner=planning.CEM(...))"
            )
        self.model = model
        self.planner = planner
        self.precision = precision
        self._observe: Callable[..., Any] = self._observe_eagerly
        self._choose: Callable[..., Any] = self._choose_eagerly
        if record is not None:
            self._observe = CapturedFunction(model, "observe", self._observe, record)
            self._choose = CapturedFunction(model, "the policy", self._choose, record)

    @property
    def device(self) -> torch.device:
        """Device of the model's parameters, looked up each time because trainers move models."""
        return find_device(self.model)

    @torch.no_grad()
    def __call__(
        self,
        obs: Obs | NumpyObs,
        is_first: Tensor | np.ndarray,
        memory: Memory | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Memory]:
        """Choose actions [N, A] float32 for obs [N, *obs_shape].

        is_first [N] bool marks rows in which an episode starts; their memory is discarded. Pass the
        returned memory to the next call. The model's training mode is not changed.
        """
        state = self.observe(obs, is_first, memory)
        first = torch.as_tensor(is_first, dtype=torch.bool, device=self.device)
        plan = None if memory is None else memory.plan
        action, state, plan = self.choose(state, plan, first, deterministic)
        return action, Memory(state, action, plan)

    @torch.no_grad()
    def choose(
        self, state: LatentState, plan: Tensor | None, is_first: Tensor, deterministic: bool
    ) -> tuple[Tensor, LatentState, Tensor | None]:
        """Choose actions [N, A] float32 in states [N]; return them, the states and the plan.

        plan: that of the previous step, of a planner; it is discarded in rows is_first [N] bool.
        The returned states include what a policy adds for the next call.
        """
        return self._choose(state, plan, is_first, deterministic)

    def _choose_eagerly(
        self, state: LatentState, plan: Tensor | None, is_first: Tensor, deterministic: bool
    ) -> tuple[Tensor, LatentState, Tensor | None]:
        policy = getattr(self.model, "policy", None)
        if not callable(policy):
            assert self.planner is not None
            action, plan = self.planner(state, plan, is_first, deterministic)
            return action.float(), state, plan
        with self._use_precision():
            chosen = policy(state, deterministic=deterministic)
        action, state = chosen if isinstance(chosen, tuple) else (chosen, state)
        return action.float(), state, None

    @torch.no_grad()
    def observe(
        self, obs: Obs | NumpyObs, is_first: Tensor | np.ndarray, memory: Memory | None = None
    ) -> LatentState:
        """Update the latent states with obs [N, *obs_shape], without choosing an action."""
        tensors = self._to_device(obs)
        first = torch.as_tensor(is_first, dtype=torch.bool)
        if memory is None or bool(first.all()):
            return self.model.encode(tensors)
        state = self._observe(memory.state, memory.action, tensors)
        return LatentState.where(first, self.model.encode(tensors), state) if first.any() else state

    def _observe_eagerly(self, state: LatentState, action: Tensor, obs: Obs) -> LatentState:
        return self.model.observe(state, action, obs)

    def _use_precision(self) -> AbstractContextManager[Any]:
        """Return the context in which the model's policy is called."""
        mixed = self.precision == "bf16-mixed" and getattr(self.model, "plans_in_bfloat16", False)
        if mixed and self.device.type == "cpu":
            return torch.autocast("cpu", torch.bfloat16)
        return nullcontext()

    def _to_device(self, obs: Obs | NumpyObs) -> Obs:
        """Return observations as tensors on the model's device."""
        if isinstance(obs, dict):
            return {key: torch.as_tensor(obs[key], device=self.device) for key in obs}
        return torch.as_tensor(obs, device=self.device)


# Chooses actions [N, A] for the current rows of N environments.
Act = Callable[[RowStream], np.ndarray]
# Receives the current rows of N environments and the actions [N, A] chosen in them.
Record = Callable[[RowStream, np.ndarray], None]


def make_act(actor: Actor, deterministic: bool) -> Act:
    """Return a function that acts with the actor and keeps its memory between calls."""
    memory: Memory | None = None

    def act(rows: RowStream) -> np.ndarray:
        nonlocal memory
        action, memory = actor(rows.obs, rows.is_first, memory, deterministic)
        return action.cpu().numpy()

    return act


def play(
    act: Act, rows: RowStream, episodes: Sequence[int], record: Record | None = None
) -> Iterator[tuple[np.ndarray, list[tuple[int, dict[str, float]]]]]:
    """Step the environments until each has run its number of episodes; `rows` must be reset.

    The numbers are fixed in advance, because counting the first episodes to end would favour short
    ones; `share_episodes` returns them. After every step this yields the actions [N, A] and (index
    of the environment, summary) of each of those episodes that ended; `rows` then contains the
    result of the step. Where all episodes have ended, the actions, which are then ignored, are
    zeros, and `act` is not called: in a single environment it is called once per step.

    record: called with every row before it is stepped, and with the last one and zeros.
    """
    ignored = np.zeros((rows.num_envs, rows.action_spec.width), np.float32)
    left = list(episodes)
    while any(left):
        actions = ignored if rows.is_last.all() else act(rows)
        if record is not None:
            record(rows, actions)
        ended = [(i, episode) for i, episode in rows.step(actions) if left[i]]
        for index, _ in ended:
            left[index] -= 1
        yield actions, ended
    if record is not None:
        record(rows, ignored)


def share_episodes(episodes: int, num_envs: int) -> list[int]:
    """Return how many of `episodes` each environment runs."""
    return [len(range(i, episodes, num_envs)) for i in range(num_envs)]


class EvaluationStopped(Exception):
    """An evaluation was stopped before its end, in all ranks."""


# Called after every step of an evaluation with the number of episodes that have ended and of steps,
# both of this rank; returns whether to stop.
Watch = Callable[[int, int], bool]


def evaluate(
    actor: Actor,
    env: VectorEnv | None,
    obs_spec: ObsSpec,
    action_spec: ActionSpec,
    episodes: int | Sequence[int],
    seed: int,
    deterministic: bool = True,
    ranks: Ranks | None = None,
    watch: Watch = lambda ended, steps: False,
    record: Record | None = None,
) -> list[dict[str, float]]:
    """Run exactly `episodes` episodes and return {"return", "length", "success"} of each.

    "success" is included if the environment's info contains it in the last step of an episode. The
    same seed gives the same episodes; torch's random state is restored afterwards.

    env: None if this rank runs no episodes.
    episodes: of all environments together, or of each one.
    ranks: the others, which evaluate at the same time and step by step; all return the episodes of
        all.
    record: as for `play`.

    Raises:
        EvaluationStopped: `watch` returned True in one of the ranks.
    """
    ranks = ranks or Ranks()
    if isinstance(episodes, int):
        require_positive(episodes=episodes)
        episodes = share_episodes(episodes, 0 if env is None else env.num_envs)
    done: list[list[dict[str, float]]] = [[] for _ in episodes]
    with use_seed(seed, actor.device):
        steps: Iterator[Any] = iter(())
        if env is not None:
            rows = RowStream(env, obs_spec, action_spec)
            rows.reset(seed)
            steps = play(make_act(actor, deterministic), rows, episodes, record)
        taken = 0
        for _, ended in in_step(steps, ranks, lambda: watch(sum(map(len, done)), taken)):  # noqa: B023
            taken += len(episodes)
            for index, episode in ended:
                done[index].append(episode)
    everywhere = ranks.gather([episode for episodes_of_env in done for episode in episodes_of_env])
    return [episode for found in everywhere for episode in found]


def in_step(items: Iterator[Any], ranks: Ranks, stops: Callable[[], bool]) -> Iterator[Any]:
    """Iterate, one item at a time, while any rank has items left.

    No rank then waits for long, so one that does not answer is noticed.

    Raises:
        EvaluationStopped: `stops` returned True in one of the ranks.
    """
    item = next(items, None)
    while (states := ranks.share(item is not None, stops()))[:, 0].any():
        if states[:, 1].any():
            raise EvaluationStopped
        if item is not None:
            yield item
            item = next(items, None)


def find_device(model: Any) -> torch.device:
    """Return the device of a model's parameters; the CPU if it has none."""
    parameters = getattr(model, "parameters", lambda: ())()
    first = next(iter(parameters), None)
    return torch.device("cpu") if first is None else first.device


@contextmanager
def evaluation_mode(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode in a block, and restore the modes of its modules."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def use_seed(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch in a block, and restore its random state afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
