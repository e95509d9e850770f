"""Acting with a world model in several environments at once, and scoring how well it does.

Letters used in shapes: N environments, A = width of an action.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium.vector import VectorEnv
from torch import Tensor

from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.spaces import Obs as NumpyObs
from worldloom.envs.vector import RowStream
from worldloom.protocol import LatentState, Obs, WorldModel

Planner = Callable[[LatentState, Tensor | None, Tensor, bool], tuple[Tensor, Tensor | None]]


@dataclass
class Memory:
    """What an actor carries from one step to the next.

    state: the latent states [N, ...] after the latest observations.
    action: [N, A], the actions that followed.
    plan: what the planner wants to see again, if it acts.
    """

    state: LatentState
    action: Tensor
    plan: Tensor | None = None

    def map(self, fn: Callable[[Tensor], Tensor]) -> "Memory":
        """Apply a function to every tensor."""
        plan = None if self.plan is None else fn(self.plan)
        return Memory(self.state.map(fn), fn(self.action), plan)

    def state_dict(self) -> dict[str, Any]:
        """Return copies of all tensors, on the CPU, wherever the model is."""
        saved = self.map(lambda x: x.detach().cpu().clone())
        return {"state": vars(saved.state), "action": saved.action, "plan": saved.plan}

    @classmethod
    def from_state_dict(cls, state: dict[str, Any]) -> "Memory":
        """Make a memory of what `state_dict` returned; it is on the CPU."""
        return cls(LatentState(**state["state"]), state["action"], state["plan"])


class Actor:
    """Choose actions with a world model, for N environments in one call.

    model: acts with its own `policy(state, deterministic=...)` if it has one, which returns the
        action, or the action and the state with what the next call wants to know (such as a plan).
    planner: acts for a model that has no policy, as
        `planner(state, plan, is_first, deterministic) -> (action, plan)`. It gets back the plan
        that it returned for the step before (None if there was none) and is_first [N] bool, the
        rows whose plan belongs to an episode that is over.
    """

    def __init__(self, model: WorldModel, planner: Planner | None = None) -> None:
        if planner is None and not callable(getattr(model, "policy", None)):
            raise ValueError(
                f"{type(model).__name__} has no policy and no planner was given, so nothing can "
                "choose actions; give the model a method policy(state, deterministic=False), or "
                "plan with it: Actor(model, planner=planning.CEM(...))"
            )
        self.model = model
        self.planner = planner

    @property
    def device(self) -> torch.device:
        """Where the model's first parameter lives; asked each time, for trainers move models."""
        parameters = getattr(self.model, "parameters", lambda: ())()
        first = next(iter(parameters), None)
        return torch.device("cpu") if first is None else first.device

    @torch.no_grad()
    def __call__(
        self,
        obs: Obs | NumpyObs,
        is_first: Tensor | np.ndarray,
        memory: Memory | None = None,
        deterministic: bool = False,
    ) -> tuple[Tensor, Memory]:
        """Look at obs [N, *obs_shape] and choose actions [N, A] float32.

        is_first [N] bool marks the rows where an episode starts; they forget what was before.
        Pass the returned memory to the next call. The model's training mode stays as it is.
        """
        state = self.observe(obs, is_first, memory)
        policy = getattr(self.model, "policy", None)
        plan = None
        if callable(policy):
            chosen = policy(state, deterministic=deterministic)
            action, state = chosen if isinstance(chosen, tuple) else (chosen, state)
        else:
            assert self.planner is not None
            old = None if memory is None else memory.plan
            first = torch.as_tensor(is_first, dtype=torch.bool, device=self.device)
            action, plan = self.planner(state, old, first, deterministic)
        action = action.float()
        return action, Memory(state, action, plan)

    @torch.no_grad()
    def observe(
        self, obs: Obs | NumpyObs, is_first: Tensor | np.ndarray, memory: Memory | None = None
    ) -> LatentState:
        """Update the latent states with obs [N, *obs_shape], without choosing an action."""
        seen = self._to_device(obs)
        first = torch.as_tensor(is_first, dtype=torch.bool)
        if memory is None or bool(first.all()):
            return self.model.encode(seen)
        state = self.model.observe(memory.state, memory.action, seen)
        return LatentState.where(first, self.model.encode(seen), state) if first.any() else state

    def _to_device(self, obs: Obs | NumpyObs) -> Obs:
        if isinstance(obs, dict):
            return {key: torch.as_tensor(obs[key], device=self.device) for key in obs}
        return torch.as_tensor(obs, device=self.device)


# Chooses the actions [N, A] for the present rows of N environments.
Act = Callable[[RowStream], np.ndarray]


def acting(actor: Actor, deterministic: bool) -> Act:
    """Return a function that acts with the actor and remembers what it needs for the next call."""
    memory: Memory | None = None

    def act(rows: RowStream) -> np.ndarray:
        nonlocal memory
        action, memory = actor(rows.obs, rows.is_first, memory, deterministic)
        return action.cpu().numpy()

    return act


def play(
    act: Act, rows: RowStream, episodes: int
) -> Iterator[tuple[np.ndarray, list[tuple[int, dict[str, float]]]]]:
    """Step the environments until they have run `episodes` episodes; `rows` must be reset.

    Each environment runs a number of episodes that is fixed beforehand: taking the first ones to
    end would favour short episodes. After every step this yields the actions [N, A] and (number
    of the environment, summary) for each of those episodes that ended; `rows` then shows where
    the step led.
    """
    left = [len(range(i, episodes, rows.num_envs)) for i in range(rows.num_envs)]
    while any(left):
        actions = act(rows)
        ended = [(i, episode) for i, episode in rows.step(actions) if left[i]]
        for index, _ in ended:
            left[index] -= 1
        yield actions, ended


def evaluate(
    actor: Actor,
    env: VectorEnv,
    obs_spec: ObsSpec,
    action_spec: ActionSpec,
    episodes: int,
    seed: int,
    deterministic: bool = True,
) -> list[dict[str, float]]:
    """Run exactly `episodes` episodes and return {"return", "length", "success"} of each.

    "success" is there where the environment's info has it in an episode's last step. The same
    seed gives the same episodes, and the random numbers of whatever runs around an evaluation are
    left as they were.
    """
    if episodes < 1:
        raise ValueError(f"episodes is {episodes}; expected at least 1; evaluate more episodes")
    rows = RowStream(env, obs_spec, action_spec)
    done: list[list[dict[str, float]]] = [[] for _ in range(rows.num_envs)]
    with seeded(seed, actor.device):
        rows.reset(seed)
        for _, ended in play(acting(actor, deterministic), rows, episodes):
            for index, episode in ended:
                done[index].append(episode)
    return [episode for mine in done for episode in mine]


@contextmanager
def seeded(seed: int, device: torch.device) -> Iterator[None]:
    """Seed torch inside, and continue its old random numbers afterwards."""
    with torch.random.fork_rng([device] if device.type == "cuda" else []):
        torch.manual_seed(seed)
        yield
