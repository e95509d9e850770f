"""Checks of an environment with random actions, to run before training on it."""

import math
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import gymnasium as gym
import numpy as np

from worldloom.envs.spaces import ActionSpec, ObsSpec, flatten
from worldloom.envs.vector import episode_length
from worldloom.envs.workers import WORTH_SECONDS

COMPARED = 25  # steps of an episode that are repeated with the same seed


class EnvProblems(ValueError):
    """What is wrong with an environment; `problems` holds one string per finding."""

    def __init__(self, report: "EnvReport") -> None:
        self.report, self.problems = report, report.problems
        super().__init__(str(report))


@dataclass
class EnvReport:
    """What was seen of an environment. `str(report)` is the table.

    problems: what keeps models from learning in it. remarks: what may be meant so.
    """

    name: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Note a problem, once."""
        if problem not in self.problems:
            self.problems.append(problem)

    def __str__(self) -> str:
        lines = [self.name]
        head = ("observation", "space", "seen", "the model sees")
        table = [head, *self.rows] if self.rows else []
        widths = [max(len(row[i]) for row in table) for i in range(4)] if table else []
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"{name:<10}{text}" for name, text in self.facts.items()]
        for title, found in (("remark", self.remarks), ("problem", self.problems)):
            lines += [f"{title} {number}: {text}" for number, text in enumerate(found, 1)]
        lines.append("nothing is wrong" if not self.problems else "mend the problems above")
        return "\n".join(lines)


@dataclass
class _Episodes:
    """What random actions brought about."""

    low: dict[str, float] = field(default_factory=dict)
    high: dict[str, float] = field(default_factory=dict)
    rewards: list[float] = field(default_factory=list)
    lengths: list[int] = field(default_factory=list)
    terminated: int = 0
    truncated: int = 0
    success: bool = False
    seconds: float = 0.0


def check_env(
    env: gym.Env | Callable[[], gym.Env],
    *,
    steps: int = 1000,
    seed: int = 0,
    keep: str | None = None,
    image: str | None = None,
    vector: str | None = None,
) -> EnvReport:
    """Act at random in an environment and return what was seen of it.

    env: an environment, or a function that makes one.
    steps: of how many steps, at most; slow environments make fewer, of some ten seconds.
    keep, image, vector: what models see, as in `ObsSpec.from_space`.

    Raises:
        EnvProblems: a ValueError with the table and every problem: what is wrong, what was expected
            and how to mend it.
    """
    made: Any = env if isinstance(env, gym.Env) else env()
    report = EnvReport(str(made))
    try:
        _look(report, made, steps, seed, {"keep": keep, "image": image, "vector": vector})
    finally:
        if made is not env and hasattr(made, "close"):
            made.close()
    if report.problems:
        raise EnvProblems(report)
    return report


def _look(report: EnvReport, env: Any, steps: int, seed: int, choice: dict[str, Any]) -> None:
    if not isinstance(env, gym.Env):
        report.add(
            f"it is a {type(env).__module__}.{type(env).__qualname__}; expected a gymnasium.Env; "
            "derive it from gymnasium.Env"
        )
        return
    try:
        obs_spec = ObsSpec.from_space(env.observation_space, **choice)
        action_spec = ActionSpec.from_space(env.action_space)
    except ValueError as error:
        report.add(str(error))
        return
    episodes = _Episodes()
    try:
        _check_seeds(report, env, action_spec, seed)
        _run(report, env, action_spec, steps, seed, episodes)
    except _Stop:
        pass
    except Exception as error:
        report.add(f"it raised {type(error).__name__}{_place(error)}: {error}; mend that first")
    _describe(report, env, obs_spec, action_spec, episodes)


class _Stop(Exception):
    """Nothing more can be found out."""


def _check_seeds(report: EnvReport, env: gym.Env, actions: ActionSpec, seed: int) -> None:
    """Compare episodes of the same seed, and of another."""
    first, again, other = (_trace(report, env, actions, s) for s in (seed, seed, seed + 1))
    if not _same(first, again):
        report.add(
            f"reset(seed={seed}) twice and the same actions gave different episodes; expected the "
            "same; draw all that is random from self.np_random, after super().reset(seed=seed)"
        )
    text = "the same seed gives the same episode"
    if _same(first, other):
        report.remarks.append(
            "another seed gives the same episode; where starts should differ, draw them from "
            "self.np_random"
        )
    elif not report.problems:
        report.facts["seeds"] = f"{text}, another seed another one"


def _trace(report: EnvReport, env: gym.Env, actions: ActionSpec, seed: int) -> list[Any]:
    """Return all that a few steps from a seed return."""
    rng = np.random.default_rng(0)
    seen: list[Any] = [_arrays(_reset(report, env, seed))]
    for _ in range(COMPARED):
        obs, reward, terminated, truncated, _ = _step(report, env, actions, rng)
        seen += [_arrays({"obs": obs, "reward": reward}), terminated, truncated]
        if terminated or truncated:
            break
    return seen


def _run(
    report: EnvReport, env: gym.Env, actions: ActionSpec, steps: int, seed: int, seen: _Episodes
) -> None:
    rng, length = np.random.default_rng(seed), 0
    start = time.perf_counter()
    obs, lent = _reset(report, env, seed), 0.0
    for _ in range(steps):
        looked = time.perf_counter()
        _check_obs(report, env, obs, seen)
        lent += time.perf_counter() - looked
        obs, reward, terminated, truncated, info = _step(report, env, actions, rng)
        length += 1
        seen.rewards.append(float(reward))
        seen.success |= "success" in info
        if terminated or truncated:
            seen.lengths.append(length)
            seen.terminated += bool(terminated)
            seen.truncated += bool(truncated and not terminated)
            _check_obs(report, env, obs, seen)
            obs, length = _reset(report, env, None), 0
        seen.seconds = time.perf_counter() - start - lent
        if seen.seconds > 10.0:
            break


def _reset(report: EnvReport, env: gym.Env, seed: int | None) -> Any:
    result: Any = env.reset(seed=seed)
    if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
        report.add(
            f"reset returned {_kind(result)}; expected the tuple (obs, info), info a dict; this is "
            "how gymnasium has it since gym 0.26"
        )
        raise _Stop
    return result[0]


def _step(
    report: EnvReport, env: gym.Env, actions: ActionSpec, rng: np.random.Generator
) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
    action = actions.decode(actions.sample(rng, 1))[0]
    result: Any = env.step(action)
    if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)):
        report.add(
            f"step returned {_kind(result)}; expected the tuple (obs, reward, terminated, "
            "truncated, info); a time limit is truncated, an end of the task terminated"
        )
        raise _Stop
    _, reward, terminated, truncated, _ = result
    for name, flag in (("terminated", terminated), ("truncated", truncated)):
        if not isinstance(flag, bool | np.bool_):
            report.add(f"{name} is {flag!r}; expected True or False; return bool({name})")
    if not np.isscalar(reward) and np.size(reward) != 1:
        report.add(f"the reward is {reward!r}; expected one number; return float(reward)")
        raise _Stop
    if not math.isfinite(float(reward)):
        report.add(f"the reward is {reward}; expected a finite number")
    return result


def _check_obs(report: EnvReport, env: gym.Env, obs: Any, seen: _Episodes) -> None:
    """Hold one observation against its space, key by key."""
    spaces, arrays = flatten(env.observation_space), flatten(obs)
    if set(spaces) != set(arrays):
        report.add(
            f"an observation has {sorted(arrays)} but the observation space {sorted(spaces)}; "
            "return every key, and no other"
        )
        raise _Stop
    for key, space in spaces.items():
        what = f"the observation '{key}'" if key else "the observation"
        value = np.asarray(arrays[key])
        if value.dtype.kind == "f" and not np.isfinite(value).all():
            report.add(f"{what} holds NaN or infinity; expected finite numbers")
            continue
        if value.shape != (space.shape or ()):
            report.add(f"{what} has shape {value.shape}; its space says {space.shape}")
            raise _Stop
        if isinstance(space, gym.spaces.Box) and value.dtype != space.dtype:
            report.add(f"{what} is {value.dtype}; its space says {space.dtype}; return that")
        elif not space.contains(arrays[key]):
            got = f"reaches from {value.min()} to {value.max()}"
            report.add(f"{what} {got}, outside its space {space}; widen the space, or clip")
        if value.size and value.dtype.kind in "fiub":
            seen.low[key] = min(seen.low.get(key, math.inf), float(value.min()))
            seen.high[key] = max(seen.high.get(key, -math.inf), float(value.max()))


def _describe(
    report: EnvReport, env: gym.Env, obs_spec: ObsSpec, actions: ActionSpec, seen: _Episodes
) -> None:
    for key, space in flatten(env.observation_space).items():
        ranged = f"{seen.low[key]:.4g} to {seen.high[key]:.4g}" if key in seen.low else "nothing"
        model = obs_spec.describe(key) if key in obs_spec.parts else "nothing: left out"
        report.rows.append((key or "obs", _short(space), ranged, model))
    kind = "one-hot choices" if actions.discrete else "continuous in [-1, 1]"
    report.facts["actions"] = f"{_short(env.action_space)}: {actions.action_dim}, {kind}"
    if not seen.rewards:
        return
    low, mean, high = min(seen.rewards), float(np.mean(seen.rewards)), max(seen.rewards)
    report.facts["rewards"] = f"{low:.4g} to {high:.4g} a step, {mean:.4g} on average"
    limit = episode_length(env)
    limited = f"time limit {limit:,} steps" if limit else "no time limit"
    ends = f"{seen.terminated} terminated, {seen.truncated} truncated"
    if seen.lengths:
        ends += f" after {min(seen.lengths):,} to {max(seen.lengths):,} steps"
    report.facts["episodes"] = f"{len(seen.rewards):,} steps at random: {ends}; {limited}"
    if not seen.lengths and not limit:
        report.remarks.append(
            f"no episode ended in {len(seen.rewards):,} steps and there is no time limit; set one "
            "by env.time_limit, or wrap it in gymnasium.wrappers.TimeLimit"
        )
    if limit and seen.lengths and max(seen.lengths) > limit:
        report.add(f"an episode of {max(seen.lengths):,} steps outlived its {limited}")
    if seen.success:
        report.facts["success"] = 'info["success"] is there: its mean is logged as eval/success'
    per_step = seen.seconds / len(seen.rewards)
    pays = per_step > WORTH_SECONDS
    advice = "processes of their own pay" if pays else "best stepped in one process"
    report.facts["speed"] = f"{1 / max(per_step, 1e-9):,.0f} steps/s, resets included: {advice}"


def _arrays(obs: Any) -> dict[str, np.ndarray]:
    return {key: np.array(value) for key, value in flatten(obs).items()}


def _same(first: list[Any], second: list[Any]) -> bool:
    return len(first) == len(second) and all(
        a.keys() == b.keys() and all(_equal(a[k], b[k]) for k in a)
        if isinstance(a, dict)
        else a == b
        for a, b in zip(first, second, strict=True)
    )


def _equal(a: np.ndarray, b: np.ndarray) -> bool:
    return np.array_equal(a, b, equal_nan=a.dtype.kind == "f" == b.dtype.kind)


def _short(space: gym.Space) -> str:
    """Write a space on one short line; bounds that are arrays as their extremes."""
    if isinstance(space, gym.spaces.MultiDiscrete):
        return f"MultiDiscrete({space.nvec.size} choices of up to {space.nvec.max()})"
    if not isinstance(space, gym.spaces.Box):
        return " ".join(str(space).split())
    return f"Box({space.low.min():.4g}, {space.high.max():.4g}, {space.shape}, {space.dtype})"


def _kind(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"a {type(value).__name__}"
    return f"({', '.join(type(part).__name__ for part in value)})"


def _place(error: Exception) -> str:
    frame = traceback.extract_tb(error.__traceback__)[-1]
    return f" in {Path(frame.filename).name}:{frame.lineno}"
