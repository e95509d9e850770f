"""Compare an exported policy with the model, on observations and with the same random numbers."""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from statistics import median

import numpy as np
import torch

from worldloom.acting import Actor, Memory
from worldloom.export.formats import Run
from worldloom.export.step import PolicyStep, flatten_memory, supply, to_output

TOLERANCE = 1e-5  # of actions, relative to the largest action above 1
STATE_TOLERANCE = 1e-4  # of states, which rounding errors of several layers reach
DIFFERENT = 0.1  # share of steps in which a tie may be decided differently


@dataclass
class Comparison:
    """Result of `compare`.

    differences: largest difference of an action in each step.
    same: whether actions and states of each step are equal within the tolerances.
    exported, torch: median milliseconds of a step.
    """

    differences: list[float]
    same: list[bool]
    exported: float
    torch: float

    @property
    def holds(self) -> bool:
        """Whether the exported policy is that of the model.

        Rounding decides ties differently: two plans with the same value, or a random number at the
        limit between two classes. Other numbers follow, so a few steps may differ by more than
        rounding.
        """
        return self.same.count(False) <= DIFFERENT * len(self.same)

    def describe(self) -> str:
        """Return one line with the differences."""
        equal = [d for d, same in zip(self.differences, self.same, strict=True) if same]
        different = len(self.same) - len(equal)
        line = f"actions of {len(equal)} of {len(self.same)} steps equal those of PyTorch within "
        line += f"{max(equal, default=0):.1e}"
        return f"{line}; {different} differ: rounding decided a tie" if different else line


def compare(
    run: Run,
    step: PolicyStep,
    actor: Actor,
    observations: Sequence[Mapping[str, np.ndarray]],
    seed: int = 0,
) -> Comparison:
    """Act on observations with both; episodes start at the first one and at the middle one.

    In every step both start from the memory of the model and receive the same random numbers.

    observations: {input: [N, ...]} of successive steps.
    """
    found, memory = Comparison([], [], 0.0, 0.0), None
    rng, times = np.random.default_rng(seed), []
    for index, obs in enumerate(observations):
        starts = index in (0, len(observations) // 2)
        numbers = step.noise.make(rng)
        before = flatten_memory(step.memory if memory is None else memory)
        tensors = {**before, "is_first": torch.full((step.rows,), starts)}
        tensors |= step.noise.pack(numbers)
        arrays = {**obs, **{name: x.numpy() for name, x in tensors.items()}}
        began = time.perf_counter()
        outputs = run({name: arrays[name] for name in step.example})
        between = time.perf_counter()
        with supply(step.order_numbers(numbers, starts)):
            action, memory = act(step, actor, obs, starts, memory)
        times.append((between - began, time.perf_counter() - between))
        expected = {to_output(name): x.numpy() for name, x in flatten_memory(memory).items()}
        states = {name: expected[name] for name in outputs if name != "action"}
        same = [_differ(outputs["action"], action) <= TOLERANCE]
        same += [_differ(outputs[name], x) <= STATE_TOLERANCE for name, x in states.items()]
        found.differences.append(_differ(outputs["action"], action))
        found.same.append(all(same))
    found.exported, found.torch = (1000 * median(each) for each in zip(*times, strict=True))
    return found


def act(
    step: PolicyStep,
    actor: Actor,
    obs: Mapping[str, np.ndarray],
    starts: bool,
    memory: Memory | None,
) -> tuple[np.ndarray, Memory]:
    """Return the actions [N, ...] of the model and its memory, with worldloom's own conversions.

    obs: {input: [N, ...]}. starts: whether an episode starts in all rows.
    """
    arrays = {name.removeprefix("obs").removeprefix("/"): x for name, x in obs.items()}
    is_first = np.full(step.rows, starts)
    model_obs = step.obs_spec.encode(arrays.get("", arrays))
    chosen, memory = actor(model_obs, is_first, memory, step.deterministic)
    numbers = chosen.numpy()
    return numbers if step.action_spec is None else step.action_spec.decode(numbers), memory


def _differ(found: np.ndarray, expected: np.ndarray) -> float:
    """Return the largest difference, relative to the largest expected number above 1."""
    found, expected = found.astype(np.float64), expected.astype(np.float64)
    return float(np.abs(found - expected).max(initial=0) / np.abs(expected).max(initial=1))
