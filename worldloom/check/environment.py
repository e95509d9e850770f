"""Checks of an environment with random actions, to run before training on it."""

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import gymnasium as gym
import numpy as np

from worldloom.envs.contract import (
    FLOAT32_MAX,
    EnvError,
    describe_value,
    explain_exception,
    raise_failure,
    read_step,
    read_success,
    to_array,
)
from worldloom.envs.reader import KNOWN, shorten_space
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.time_limit import SECONDS, TimeLimit
from worldloom.envs.vector import episode_length, reject_running_statistics
from worldloom.envs.workers import SLOW_STEP
from worldloom.trees import flatten_tree

REUSES = (
    "an observation changes with the next step, because the environment uses its array again; "
    "worldloom copies observations at once, but other programs may not; return a copy"
)
COMPARED_STEPS = 25  # steps of an episode that are repeated with the same seed
MAX_SECONDS = 10.0


class EnvProblems(ValueError):
    """Problems of an environment; `problems` holds one string for each."""

    def __init__(self, report: "EnvReport") -> None:
        self.report, self.problems = report, report.problems
        super().__init__(str(report))


@dataclass
class EnvReport:
    """Properties of an environment; `str(report)` formats them as a table.

    problems: errors that prevent models from learning. remarks: things that may be intended.
    """

    name: str
    rows: list[tuple[str, ...]] = field(default_factory=list)
    facts: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    remarks: list[str] = field(default_factory=list)

    def add(self, problem: str) -> None:
        """Add a problem unless it was added before."""
        if problem not in self.problems:
            self.problems.append(problem)

    def __str__(self) -> str:
        head = ("observation", "space", "values", "the model sees")
        table = [head, *self.rows] if self.rows else []
        widths = [max(map(len, column)) for column in zip(*table, strict=True)]
        lines = [self.name]
        for row in table:
            cells = [cell.ljust(width) for cell, width in zip(row, widths, strict=True)]
            lines.append("  " + "  ".join(cells).rstrip())
        lines += [f"{name:<10}{text}" for name, text in self.facts.items()]
        for title, found in (("remark", self.remarks), ("problem", self.problems)):
            lines += [f"{title} {number}: {text}" for number, text in enumerate(found, 1)]
        lines.append("fix the problems above" if self.problems else "no problems found")
        return "\n".join(lines)


def check_env(
    env: gym.Env | Callable[[], gym.Env],
    *,
    steps: int = 1000,
    seed: int = 0,
    keep: str | None = None,
    image: str | None = None,
    vector: str | None = None,
    timeout: float = SECONDS,
) -> EnvReport:
    """Step an environment with random actions and return a report.

    env: an environment, or a function that makes one.
    steps: number of steps; fewer if they would take more than about ten seconds.
    keep, image, vector: the observations of models, as in `ObsSpec.from_space`.
    timeout: seconds after which a call that has not returned is a problem.

    Raises:
        EnvProblems: a ValueError with the table and every problem: what is wrong, what was expected
            and how to fix it.
    """
    report = EnvReport("the environment")
    limit = TimeLimit(timeout)
    made: Any = env
    try:
        made = env if isinstance(env, gym.Env) else _call(limit, env, "when it was made")
        report.name = describe_value(made)
        if isinstance(made, gym.Env):
            report.name = str(made)
            reject_running_statistics(made)
            _Check(report, made, seed, limit).run(steps, keep=keep, image=image, vector=vector)
        else:
            report.add(
                f"the environment is a {type(made).__module__}.{type(made).__qualname__}; expected "
                "a gymnasium.Env; derive it from gymnasium.Env"
            )
    except ValueError as error:
        report.add(str(error))
    finally:
        if made is not env and hasattr(made, "close"):
            try:
                _call(limit, made.close, "in close")
            except EnvError as error:
                report.add(str(error))
    if report.problems:
        raise EnvProblems(report)
    return report


def _call(
    limit: TimeLimit, function: Callable[..., Any], place: str, *args: Any, **options: Any
) -> Any:
    """Call an environment; exceptions of any type become EnvError."""
    try:
        with limit:
            return function(*args, **options)
    except BaseException as error:
        raise_failure(error, place, limit.seconds)


class _StopCheck(Exception):
    """A problem that makes further steps useless was reported."""


class _Check:
    """A check in progress: the environment, and statistics of its steps."""

    def __init__(self, report: EnvReport, env: gym.Env, seed: int, limit: TimeLimit) -> None:
        self.report, self.env, self.seed, self.limit = report, env, seed, limit
        self.low: dict[str, float] = {}
        self.high: dict[str, float] = {}
        self.rewards: list[float] = []
        self.lengths: list[int] = []
        self.terminated = 0
        self.has_success = False
        self.seconds = 0.0
        self._newest: Any = None  # observation

    def run(self, steps: int, **choice: str | None) -> None:
        """Check spaces, seeds and steps, and fill the report."""
        try:
            options: Any = choice
            obs_spec = ObsSpec.from_space(self.env.observation_space, **options)
            self.actions = ActionSpec.from_space(self.env.action_space)
        except ValueError as error:
            self.report.add(str(error))
            return
        try:
            self._check_seeds()
            self._run_episodes(steps)
        except _StopCheck:
            pass
        except Exception as error:
            self.report.add(str(error) if isinstance(error, EnvError) else explain_exception(error))
        self.report.remarks += obs_spec.remarks
        self._describe_spaces(obs_spec)
        if self.rewards:
            self._describe_steps()

    def _check_seeds(self) -> None:
        """Compare two episodes of the same seed, and one of another seed."""
        first, again, other = (self._trace(s) for s in (self.seed, self.seed, self.seed + 1))
        if first != again:
            self.report.add(
                f"two episodes with reset(seed={self.seed}) and the same actions differ; expected "
                "equal ones; draw all random numbers from self.np_random, after "
                "super().reset(seed=seed)"
            )
        if first == other:
            self.report.remarks.append(
                "another seed gives the same episode; if episodes should differ, draw their start "
                "from self.np_random"
            )
        elif not self.report.problems:
            text = "equal seeds give equal episodes, another seed a different one"
            self.report.facts["seeds"] = text

    def _trace(self, seed: int) -> list[Any]:
        """Return everything that the first steps of an episode return, in comparable form."""
        rng = np.random.default_rng(0)
        trace: list[Any] = [_make_comparable(self._reset(seed))]
        for _ in range(COMPARED_STEPS):
            obs, reward, terminated, truncated, _ = self._step(rng)
            trace.append((_make_comparable({"obs": obs, "reward": reward}), terminated, truncated))
            if terminated or truncated:
                break
        return trace

    def _run_episodes(self, steps: int) -> None:
        rng, length = np.random.default_rng(self.seed), 0
        start = time.perf_counter()
        obs, checking = self._reset(self.seed), 0.0
        for _ in range(steps):
            before = time.perf_counter()
            self._check_obs(obs)
            checking += time.perf_counter() - before
            obs, reward, terminated, truncated, _ = self._step(rng)
            length += 1
            self.rewards.append(reward)
            if terminated or truncated:
                self.lengths.append(length)
                self.terminated += bool(terminated)
                self._check_obs(obs)
                obs, length = self._reset(None), 0
            self.seconds = time.perf_counter() - start - checking
            if self.seconds > MAX_SECONDS:
                break

    def _reset(self, seed: int | None) -> Any:
        result = _call(self.limit, self.env.reset, "in reset", seed=seed)
        if not (isinstance(result, tuple) and len(result) == 2 and isinstance(result[1], dict)):
            self.report.add(
                f"reset returned {_describe_type(result)}; expected the tuple (obs, info) with a "
                "dict as info, as in gymnasium and in gym since version 0.26"
            )
            raise _StopCheck
        return result[0]

    def _step(self, rng: np.random.Generator) -> tuple[Any, Any, Any, Any, dict[str, Any]]:
        action = self.actions.decode(self.actions.sample(rng, 1))[0]
        before, copied = self._newest, _make_comparable(self._newest)
        result = _call(self.limit, self.env.step, "in step", action)
        if _make_comparable(before) != copied and REUSES not in self.report.remarks:
            self.report.remarks.append(REUSES)
        if not (isinstance(result, tuple) and len(result) == 5 and isinstance(result[4], dict)):
            self.report.add(
                f"step returned {_describe_type(result)}; expected the tuple (obs, reward, "
                "terminated, truncated, info); a time limit sets truncated, the end of the task "
                "terminated"
            )
            raise _StopCheck
        self._newest, reward, terminated, truncated, info = result
        try:
            _, number, *flags, _ = read_step(result)
        except EnvError as error:
            self.report.add(str(error))
            raise _StopCheck from None
        for name, flag in (("terminated", terminated), ("truncated", truncated)):
            if not isinstance(flag, bool | np.bool_):
                text = describe_value(flag)
                self.report.add(f"{name} is {text}; expected True or False; return bool({name})")
        if not abs(number) <= FLOAT32_MAX:
            self.report.add(f"the reward is {reward}; expected a finite number")
        notes: list[tuple[str, str]] = []
        if any(flags):
            self.has_success |= read_success(info, notes) is not None
        for _, note in notes:
            self.report.add(note)
        return self._newest, number, *flags, info

    def _check_obs(self, obs: Any) -> None:
        """Compare one observation with its space, key by key."""
        spaces, arrays = flatten_tree(self.env.observation_space), flatten_tree(obs)
        if set(spaces) != set(arrays):
            self.report.add(
                f"an observation has the keys {sorted(arrays)}, but the observation space "
                f"{sorted(spaces)}; return exactly the keys of the space"
            )
            raise _StopCheck
        for key, space in spaces.items():
            self._check_array(key, arrays[key], space)

    def _check_array(self, key: str, value: Any, space: gym.Space) -> None:
        what = f"the observation '{key}'" if key else "the observation"
        if not isinstance(space, KNOWN):
            return  # models do not see it
        array = to_array(value)
        if array is None:
            self.report.add(
                f"{what} is {describe_value(value)}, but its space {space}; return an array"
            )
            raise _StopCheck
        if array.dtype.kind == "f" and not (abs(array) <= FLOAT32_MAX).all():
            self.report.add(f"{what} holds NaN or infinity; expected finite numbers")
            return
        if array.shape != (space.shape or ()):
            self.report.add(f"{what} has shape {array.shape}, but its space {space.shape}")
            raise _StopCheck
        if isinstance(space, gym.spaces.Box) and array.dtype != space.dtype:
            self.report.add(
                f"{what} is {array.dtype}, but its space {space.dtype}; return {space.dtype}"
            )
        elif not space.contains(value):
            values = f"has values from {array.min()} to {array.max()}"
            self.report.add(f"{what} {values}, outside its space {space}; widen the space, or clip")
        if array.size and array.dtype.kind in "fiub":
            self.low[key] = min(self.low.get(key, math.inf), float(array.min()))
            self.high[key] = max(self.high.get(key, -math.inf), float(array.max()))

    def _describe_spaces(self, obs_spec: ObsSpec) -> None:
        for key, space in flatten_tree(self.env.observation_space).items():
            values = f"{self.low[key]:.4g} to {self.high[key]:.4g}" if key in self.low else "none"
            model = obs_spec.describe(key) if key in obs_spec.parts else "nothing (left out)"
            self.report.rows.append((key or "obs", shorten_space(space), values, model))
        kind = "one-hot choices" if self.actions.discrete else "continuous in [-1, 1]"
        space = shorten_space(self.env.action_space)
        self.report.facts["actions"] = f"{space}: {self.actions.action_dim}, {kind}"

    def _describe_steps(self) -> None:
        facts, steps = self.report.facts, len(self.rewards)
        low, mean, high = min(self.rewards), float(np.mean(self.rewards)), max(self.rewards)
        facts["rewards"] = f"{low:.4g} to {high:.4g} per step, {mean:.4g} on average"
        limit = episode_length(self.env)
        limit_text = f"time limit {limit:,} steps" if limit else "no time limit is known"
        ends = f"{self.terminated} terminated, {len(self.lengths) - self.terminated} truncated"
        if self.lengths:
            ends += f" after {min(self.lengths):,} to {max(self.lengths):,} steps"
        facts["episodes"] = f"{steps:,} random steps: {ends}; {limit_text}"
        if not self.lengths and not limit:
            self.report.remarks.append(
                f"no episode ended in {steps:,} steps, and there is no time limit; set "
                "env.time_limit, or use gymnasium.wrappers.TimeLimit"
            )
        if limit and self.lengths and max(self.lengths) > limit:
            self.report.add(f"an episode had {max(self.lengths):,} steps despite its {limit_text}")
        if self.has_success:
            facts["success"] = (
                'info["success"] exists; its mean is logged as eval/success and final/success'
            )
        per_step = self.seconds / steps
        advice = "use workers" if per_step > SLOW_STEP else "fastest without workers"
        rate = 1 / max(per_step, 1e-9)
        facts["speed"] = f"{rate:,.0f} steps/s, resets included: {advice}"


def _make_comparable(obs: Any) -> dict[str, Any]:
    """Return the arrays of an observation as bytes, so that NaN equals NaN."""
    arrays = {key: (value, to_array(value)) for key, value in flatten_tree(obs).items()}
    return {
        key: describe_value(value) if x is None else (x.shape, x.dtype, x.tobytes())
        for key, (value, x) in arrays.items()
    }


def _describe_type(value: Any) -> str:
    if not isinstance(value, tuple):
        return f"a {type(value).__name__}"
    return f"({', '.join(type(part).__name__ for part in value)})"
