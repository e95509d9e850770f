"""One decision of a policy as a function of named tensors.

Letters used in shapes: N environments, A = width of an action in the model.
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn

from worldloom.acting import Actor, Memory
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.export.conversion import decode_action, encode_obs
from worldloom.export.dependencies import Dependencies
from worldloom.export.noise import Draw, Noise, NoiseInputs, Numbers
from worldloom.nn.products import as_traced
from worldloom.protocol import LatentState, Obs
from worldloom.trees import flatten_tree

Tensors = dict[str, Tensor]


class PolicyStep(nn.Module):
    """Choose actions for N environments as an `Actor` does, with memory and noise as inputs.

    `forward` maps {name: tensor} to {name: tensor}. Inputs:

    - obs, or obs/KEY for each key of a dict: as the environments return it, [N, ...].
    - is_first [N] bool: an episode starts; the row's memory is ignored.
    - state/NAME: the memory, which the previous call returned as next/NAME.
    - noise/NAME: all random numbers of a distribution; see `Draw`.

    Outputs: action [N, ...], as the environments accept it, and next/NAME. Inputs on which neither
    this action nor a later one depends are left out, and so are weights.

    actor: the model or the planner that chooses actions, always in the precision of its weights.
    obs_spec, action_spec: the spaces of a single environment. Without an action_spec, actions are
        those of the model, [N, A] float32.
    deterministic: choose the policy's mode instead of samples.
    examples: observations {input: [N, ...]} of at least two time steps.

    Raises:
        ValueError: the policy draws random numbers that cannot become inputs.
    """

    def __init__(
        self,
        actor: Actor,
        obs_spec: ObsSpec,
        action_spec: ActionSpec | None,
        deterministic: bool,
        examples: Sequence[Tensors],
    ) -> None:
        super().__init__()
        original: Any = actor.model
        weights: dict[int, Any] = {id(x): x for x in _list_weights(original).values()}
        model, planner = copy.deepcopy((actor.model, actor.planner), weights)  # shares the weights
        self.actor, self.model = Actor(model, planner), cast(Any, model)
        self.obs_spec, self.action_spec = obs_spec, action_spec
        _settle_embeddings(self.model)
        self.deterministic, self.examples = deterministic, examples
        self.rows = len(next(iter(examples[0].values())))
        self.no_first = torch.zeros(self.rows, dtype=torch.bool)
        self.blank: Memory | None = None
        self.memory = self._act(self._act(None))  # before anything is recorded: fills caches
        self.noise = NoiseInputs(self._record())
        self.used: set[str] = set()
        self._find_used()
        self.blank = self._find_blank()
        if self.blank is not None:
            self._find_used()
        _empty_weights(self.model, self.used)

    def forward(self, inputs: Tensors) -> Tensors:
        """Return {"action": ..., "next/NAME": ...}; see the class."""
        known = flatten_memory(self.memory)
        memory = {name: inputs.get(name, tensor) for name, tensor in known.items()}
        is_first = inputs.get("is_first", self.no_first)
        numbers = self.noise.unpack(inputs)
        action, kept = self._decide(
            inputs, is_first, unflatten_memory(memory, self.memory), numbers
        )
        new = flatten_memory(kept)
        return {"action": action, **{to_output(name): new[name] for name in self.states}}

    @property
    def states(self) -> list[str]:
        """Names of the inputs with the memory."""
        return [name for name in flatten_memory(self.memory) if name in self.used]

    @property
    def example(self) -> Tensors:
        """Inputs of a first step."""
        known = {**self.examples[0], "is_first": ~self.no_first, **flatten_memory(self.memory)}
        noise = self.noise.pack(self.noise.make(np.random.default_rng(0)))
        return {name: x for name, x in known.items() if name in self.used} | noise

    def encode_obs(self, inputs: Mapping[str, Tensor]) -> Obs:
        """Return the observations of the inputs as the model sees them."""
        spaces, inputs = flatten_tree(self.obs_spec.space), {**self.examples[0], **inputs}
        found = {
            key: encode_obs(spaces[key], part.shape, part.dtype, inputs[name_obs(key)])
            for key, part in self.obs_spec.parts.items()
        }
        return found.get("", found)

    def order_numbers(self, numbers: Numbers, is_first: bool) -> list[Tensor]:
        """Return the numbers in the order in which an `Actor` draws them."""
        start = "encode" if is_first and "encode" in numbers else "observe"
        return [*numbers[start], *numbers["choose"]]

    # A decision -------------------------------------------------------------------------------

    def _decide(
        self, obs: Mapping[str, Tensor], is_first: Tensor, memory: Memory, numbers: Numbers
    ) -> tuple[Tensor, Memory]:
        """Return the actions [N, ...] of the environments, and the memory for the next call."""
        state = self._observe(obs, is_first, memory, numbers)
        return self._choose(state, is_first, memory.plan, numbers)

    def _observe(
        self, obs: Mapping[str, Tensor], is_first: Tensor, memory: Memory, numbers: Numbers
    ) -> LatentState:
        """Return the states [N] after observations; rows of is_first start an episode."""
        model_obs, state, action = self.encode_obs(obs), memory.state, memory.action
        if self.blank is not None:
            state = LatentState.where(is_first, self.blank.state, state)
            action = torch.where(is_first[:, None], self.blank.action, action)
        with supply(numbers["observe"]):
            state = self.model.observe(state, action, model_obs)
        if self.blank is not None:
            return state
        with supply(numbers.get("encode", numbers["observe"])):
            return LatentState.where(is_first, self.model.encode(model_obs), state)

    def _choose(
        self, state: LatentState, is_first: Tensor, plan: Tensor | None, numbers: Numbers
    ) -> tuple[Tensor, Memory]:
        """Return the actions [N, ...] in states [N], and the memory for the next call."""
        with supply(numbers["choose"]):
            action, state, plan = self.actor.choose(state, plan, is_first, self.deterministic)
        memory = Memory(state, action, plan)
        return action if self.action_spec is None else decode_action(
            self.action_spec, action
        ), memory

    def _act(self, memory: Memory | None) -> Memory:
        """Act once, on the first or the second example, and return the memory."""
        obs = self.encode_obs(self.examples[0 if memory is None else 1])
        is_first = ~self.no_first if memory is None else self.no_first
        return self.actor(obs, is_first, memory, self.deterministic)[1]

    # What a decision depends on -----------------------------------------------------------------

    @torch.no_grad()
    def _record(self) -> dict[str, list[Draw]]:
        """Return the draws of each part of a decision; "encode" only where it differs."""
        obs, rng = self.encode_obs(self.examples[1]), np.random.default_rng(0)
        found: dict[str, list[Draw]] = {"encode": [], "observe": [], "choose": []}

        def record(part: str) -> Noise:
            def take(draw: Draw) -> Tensor:
                found[part].append(draw)
                return draw.make(rng)

            return Noise(take)

        with record("encode"):
            self.model.encode(obs)
        with record("observe"):
            state = self.model.observe(self.memory.state, self.memory.action, obs)
        with record("choose"):
            self.actor.choose(state, self.memory.plan, self.no_first, self.deterministic)
        if found["encode"] == found["observe"]:
            del found["encode"]
        return found

    @torch.no_grad()
    def _find_used(self) -> None:
        """Find the inputs and the weights on which this action or a later one depends.

        `used` contains their names, and "now NAME" for parts of the state that choose actions.
        """
        numbers = self.noise.make(np.random.default_rng(0))
        memory, is_first = self.memory.map(torch.clone), self.no_first.clone()
        sources = {**self.examples[0], **flatten_memory(memory), "is_first": is_first}
        sources |= {f"{part} {i}": x for part, xs in numbers.items() for i, x in enumerate(xs)}
        sources |= {f"weight {name}": x for name, x in _list_weights(self.model).items()}
        with as_traced(), Dependencies(sources) as dependencies:
            state = self._observe(self.examples[0], is_first, memory, numbers).map(torch.clone)
            now = flatten_memory(Memory(state, memory.action))
            dependencies.add({f"now {name}": x for name, x in now.items() if "action" not in name})
            action, kept = self._choose(state, is_first, memory.plan, numbers)
        if dependencies.random:
            raise ValueError(
                f"{type(self.model).__name__} draws random numbers with "
                f"{', '.join(sorted(dependencies.random))}, which cannot become inputs of a graph; "
                "use torch.rand_like, randn_like, randint, randperm or multinomial in encode, "
                "observe and policy"
            )
        used, new = dependencies.find(action), flatten_memory(kept)
        before: set[str] = set()
        while used != before:
            before = used
            used = used.union(*(dependencies.find(new[name]) for name in new if name in used))
        self.used = used
        slots = [(part, i) for part, xs in numbers.items() for i in range(len(xs))]
        self.noise.unused = {slot for slot in slots if f"{slot[0]} {slot[1]}" not in used}

    @torch.no_grad()
    def _find_blank(self) -> Memory | None:
        """Return a memory from which `observe` starts an episode as `encode` does, or None.

        With it a graph computes one of the two instead of both. Its tensors are zeros, and what
        `encode` puts into the extras. Whether it fits is found out on all examples.
        """
        if "encode" in self.noise.draws:
            return None
        started = self.model.encode(self.encode_obs(self.examples[0]))
        blank = started.map(torch.zeros_like)
        blank.extras.update(started.extras)
        action = torch.zeros_like(self.memory.action)
        compared = {name for name in flatten_memory(self.memory) if f"now {name}" in self.used}
        for seed, inputs in enumerate(self.examples):
            obs, states = self.encode_obs(inputs), []
            numbers = self.noise.make(np.random.default_rng(seed))["observe"]
            with supply(numbers):
                states.append(self.model.encode(obs))
            with supply(numbers):
                states.append(self.model.observe(blank, action, obs))
            expected, found = (flatten_memory(Memory(state, action)) for state in states)
            if not all(torch.equal(expected[name], found[name]) for name in compared):
                return None
        return Memory(blank, action)


def supply(numbers: Sequence[Tensor]) -> Noise:
    """Return a context in which random functions return the given numbers, in this order."""
    left = iter(numbers)

    def take(draw: Draw) -> Tensor:
        found = next(left, None)
        if found is None or tuple(found.shape) != draw.shape:
            raise ValueError(
                f"the policy draws {draw} in one step, and other random numbers in another; "
                "expected the same draws in every step"
            )
        return found

    return Noise(take)


def name_obs(key: str) -> str:
    """Return the name of the input with an observation; the key of a single array is ""."""
    return f"obs/{key}" if key else "obs"


def to_output(state: str) -> str:
    """Return the name of the output that contains the next value of a state input."""
    return state.replace("state/", "next/", 1)


def flatten_memory(memory: Memory) -> Tensors:
    """Return the tensors of a memory by the names of their inputs."""
    state = memory.state
    found = {"deterministic": state.deterministic, "stochastic": state.stochastic}
    found |= {"features": state.features, "action": memory.action, "plan": memory.plan}
    found |= {f"extras/{key}": value for key, value in state.extras.items()}
    return {f"state/{name}": value for name, value in found.items() if value is not None}


def unflatten_memory(tensors: Mapping[str, Tensor], like: Memory) -> Memory:
    """Return the memory with the tensors that `flatten_memory` names; like: one of its form."""

    def get(name: str) -> Any:
        return tensors.get(f"state/{name}")

    extras = {key: get(f"extras/{key}") for key in like.state.extras}
    state = LatentState(get("deterministic"), get("stochastic"), get("features"), extras)
    return Memory(state, get("action"), get("plan"))


def _list_weights(model: nn.Module) -> Tensors:
    return {**dict(model.named_parameters()), **dict(model.named_buffers())}


def _settle_embeddings(model: nn.Module) -> None:
    """Limit the norms of all embeddings now: a look-up does so in place, which a graph cannot."""
    for module in model.modules():
        if isinstance(module, nn.Embedding) and module.max_norm is not None:
            with torch.no_grad():
                module(torch.arange(module.num_embeddings))
            module.max_norm = None


def _empty_weights(model: nn.Module, used: set[str]) -> None:
    """Replace the weights that are not used by one repeated zero, which takes no space in files."""
    for name, weight in _list_weights(model).items():
        if f"weight {name}" not in used:
            path, _, leaf = name.rpartition(".")
            module, zeros = model.get_submodule(path), weight.detach().new_zeros(())
            zeros = zeros.expand(weight.shape)
            is_buffer = leaf in module._buffers
            setattr(module, leaf, zeros if is_buffer else nn.Parameter(zeros, requires_grad=False))
