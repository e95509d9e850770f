"""Vector environments in worker processes, which are replaced when they crash or hang.

Letters used in shapes: N environments.
"""

import logging
import math
import os
import pickle
import time
from collections.abc import Callable
from functools import partial
from multiprocessing.util import Finalize
from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.error import ClosedEnvironmentError
from gymnasium.vector import AutoresetMode, VectorEnv
from gymnasium.vector.utils import CloudpickleWrapper, batch_space

from worldloom.envs.process import Crash, EnvProcess
from worldloom.envs.replayable import StepResult, make_unsaved
from worldloom.envs.time_limit import SECONDS

log = logging.getLogger(__name__)

# Give up after this many consecutive crashes of a worker without a finished episode.
MAX_CRASHES = 3
# Messages to a process cost at least 0.1 ms and wake another core; Pong with 0.5 ms per step gains
# nothing from two processes (experiments/collection).
SLOW_STEP = 1e-3


class WorkerError(ChildProcessError):
    """Environments failed in their process in a way that new ones would not fix.

    The message is one line for the user, then the worker's traceback if there is one.
    """


class WorkerVectorEnv(VectorEnv):
    """N environments in min(workers, N) processes, each with a contiguous share of them.

    Steps return what a SyncVectorEnv in NEXT_STEP mode returns. A worker that dies, raises, or does
    not answer within `timeout` seconds is replaced by one with new environments, which are reset
    with new seeds. Their next rows are their first observations, with reward 0, and
    infos["restarted"] [N] bool, which is present only in such a step, marks them.

    make_envs: function of a range that makes the environments with these numbers, stepped together.
    """

    def __init__(
        self,
        make_envs: Callable[[range], VectorEnv],
        num_envs: int,
        workers: int,
        timeout: float = SECONDS,
    ) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        count = min(workers, num_envs)
        shares = [range(num_envs * k // count, num_envs * (k + 1) // count) for k in range(count)]
        codes = [pickle.dumps(CloudpickleWrapper(partial(make_envs, share))) for share in shares]
        self._workers = [EnvProcess(*x, timeout) for x in zip(codes, shares, strict=True)]
        # Runs before multiprocessing's exit handler, which waits for the processes forever.
        self._stop = Finalize(self, EnvProcess.stop, (self._workers,), exitpriority=10)
        self._seed: int | None = None
        self._was_reset = self._ready = False
        self._logged: set[str] = set()
        try:
            for worker in self._workers:
                worker.start()
                worker.ask("spaces")
            self._set_spaces([self._get_spaces(worker) for worker in self._workers])
        except BaseException:
            self.close()
            raise

    @property
    def restarts(self) -> int:
        """Count the workers that were replaced so far."""
        return sum(worker.restarts for worker in self._workers)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[Any, dict[str, Any]]:
        """Start new episodes; environment i gets seed + i. There are no options."""
        if options:
            raise ValueError(f"options are {options}; expected none; pass them to make_env")
        self._require_open()
        self._seed, self._ready = seed, False
        for worker in self._workers:
            worker.make_ready()
            worker.ask("reset", [None if seed is None else seed + i for i in worker.indices])
        obs, *_, infos = self._collect_rows()
        self._was_reset = True
        return obs, infos

    def step(self, actions: Any) -> StepResult:
        """Step all environments; actions [N, ...] are what a SyncVectorEnv takes."""
        self._require_ready("step")
        self._ready = False
        for worker in self._workers:
            worker.ask("step", actions[worker.indices.start : worker.indices.stop])
        return self._collect_rows()

    def save(self) -> dict[str, Any]:
        """Return the state of all environments, as `LocalVectorEnv.save` does.

        A worker that crashes meanwhile is replaced in the next step; when restored, its
        environments start new episodes.
        """
        self._require_ready("save")
        self._ready = False
        for worker in self._workers:
            worker.ask("save")
        state: dict[str, Any] = {"seed": self._seed, "episodes": [], "restarts": [], "crashes": []}
        for worker in self._workers:
            answer, count = worker.answer(), len(worker.indices)
            if isinstance(answer, Crash):
                log.warning("%s cannot be saved: %s", worker, answer.reason)
                EnvProcess.stop([worker], 0.0)  # a late answer would be taken for the next one
                next_seeds = [self._draw_seed(i, worker.restarts + 1) for i in worker.indices]
                answer = {"episodes": [make_unsaved(seed) for seed in next_seeds]}
            state["episodes"] += answer["episodes"]
            state["restarts"] += [worker.restarts] * count
            state["crashes"] += [worker.crashes] * count
        self._ready = True
        return state

    def restore(self, state: dict[str, Any]) -> StepResult:
        """Bring the environments to their saved state, as `LocalVectorEnv.restore` does.

        The environments of a worker that crashes meanwhile start new episodes;
        infos["restarted"] marks them.
        """
        self._require_open()
        self._seed, self._ready, self._was_reset = state["seed"], False, True
        for worker in self._workers:
            worker.make_ready()
            worker.restarts = max(state["restarts"][i] for i in worker.indices)
            worker.crashes = max(state["crashes"][i] for i in worker.indices)
            episodes = [state["episodes"][i] for i in worker.indices]
            worker.ask("restore", {"seed": state["seed"], "episodes": episodes})
        return self._collect_rows()

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes, and kill those that do not end soon."""
        if hasattr(self, "_stop"):
            self._stop()

    def _get_spaces(self, worker: EnvProcess) -> tuple[gym.Space, gym.Space]:
        answer = worker.answer()
        if isinstance(answer, Crash):
            problem = "environments could not be made in a worker process"
            raise answer.error or _make_error(problem, answer)
        return answer

    def _set_spaces(self, spaces: list[tuple[gym.Space, gym.Space]]) -> None:
        self.single_observation_space, self.single_action_space = spaces[0]
        if others := [pair for pair in spaces if pair != spaces[0]]:
            raise ValueError(
                f"make_env made an environment with the spaces {spaces[0]} and one with "
                f"{others[0]}; expected equal ones; return the same kind of environment each time"
            )
        self.observation_space = batch_space(self.single_observation_space, self.num_envs)
        self.action_space = batch_space(self.single_action_space, self.num_envs)

    def _require_open(self) -> None:
        if self.closed:
            raise ClosedEnvironmentError("the environments are closed; make new ones")

    def _require_ready(self, call: str) -> None:
        self._require_open()
        if not self._ready:
            raise RuntimeError(
                f"{call} was called before reset, or after a step that was interrupted; call reset "
                "first"
            )

    def _collect_rows(self) -> StepResult:
        """Wait for all answers, replace workers without one, and concatenate the rows."""
        answers = [worker.answer() for worker in self._workers]
        restarted = np.zeros(self.num_envs, bool)
        rows: list[Any] = []
        for worker, answer in zip(self._workers, answers, strict=True):
            if isinstance(answer, Crash):
                restarted[worker.indices] = True
                answer = self._restart(worker, answer)
            elif (answer[2] | answer[3]).any():
                worker.crashes = 0
            rows.append(answer)
        *parts, infos_of_workers = zip(*rows, strict=True)
        infos = _merge_infos(infos_of_workers, [len(worker.indices) for worker in self._workers])
        if restarted.any():
            infos["restarted"] = restarted
        obs, rewards, terminated, truncated = map(_concatenate, parts)
        self._ready = True
        return obs, rewards, terminated, truncated, infos

    def _restart(self, worker: EnvProcess, crash: Crash) -> Any:
        """Replace a crashed worker and return the first rows of its new environments."""
        answer: Any = crash
        while isinstance(answer, Crash):
            crash, worker.crashes = answer, worker.crashes + 1
            self._require_recoverable(worker, crash)
            # The traceback is logged once, because the same error may occur often.
            trace = "" if crash.reason in self._logged else f"\n{crash.trace}".rstrip()
            self._logged.add(crash.reason)
            log.warning("restarting %s: %s%s", worker, crash.reason, trace)
            # Only a worker that raised an exception can still close its environments.
            EnvProcess.stop([worker], 1.0 if crash.trace else 0.0)
            worker.start()
            worker.restarts += 1
            worker.ask("reset", [self._draw_seed(i, worker.restarts) for i in worker.indices])
            answer = worker.answer()
        return answer

    def _require_recoverable(self, worker: EnvProcess, crash: Crash) -> None:
        problem = None
        if crash.error is not None:
            self.close()
            raise crash.error
        if not self._was_reset:
            problem = "environments could not be reset in a worker process"
        elif worker.crashes >= MAX_CRASHES:
            problem = f"{worker} failed {MAX_CRASHES} times without a finished episode, at last"
        if problem:
            self.close()
            raise _make_error(problem, crash)

    def _draw_seed(self, index: int, restarts: int) -> int | None:
        """Return the seed of a new environment after a restart."""
        if self._seed is None:
            return None
        state = np.random.SeedSequence([self._seed, index, restarts]).generate_state(1)
        return int(state[0] >> 1)  # 31 bits, which every simulator accepts


def _make_error(problem: str, crash: Crash) -> WorkerError:
    return WorkerError(
        f"{problem}: {crash.reason}; fix the environment; to debug it set env.workers=0, which "
        f"runs it in the main process\n{crash.trace}".rstrip()
    )


def _concatenate(parts: Any) -> Any:
    """Concatenate the arrays, or tuples of objects, of all workers; dicts by key."""
    if isinstance(parts[0], dict):
        return {key: _concatenate([part[key] for part in parts]) for key in parts[0]}
    return sum(parts, ()) if isinstance(parts[0], tuple) else np.concatenate(parts)


def _merge_infos(parts: Any, sizes: list[int]) -> dict[str, Any]:
    """Concatenate infos; workers without a key get zeros."""
    infos: dict[str, Any] = {}
    for name in {name: None for part in parts for name in part}:
        given = [part[name] for part in parts if name in part]
        if name == "notes":
            infos[name] = [note for notes in given for note in notes]
            continue
        blanks = [np.zeros(size, given[0].dtype) for size in sizes]
        pairs = zip(parts, blanks, strict=True)
        infos[name] = np.concatenate([part.get(name, blank) for part, blank in pairs])
    return infos


def count_cores() -> int:
    """Return the number of cores for this process.

    The processes of a run on a machine share its cores, and so do the jobs of a sweep that run at a
    time (WORLDLOOM_JOBS).
    """
    affinity: Any = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    sharers = (int(os.environ.get(name, 1)) for name in ("LOCAL_WORLD_SIZE", "WORLDLOOM_JOBS"))
    return max(1, cores // math.prod(sharers))


def choose_workers(env: gym.Env, num_envs: int) -> int:
    """Choose the number of workers for copies of `env`; 0 means to step them in this process.

    env: a copy that is not used afterwards; it is reset and stepped at random.
    """
    cores = count_cores()
    if num_envs == 1 or cores == 1:
        return 0
    seconds = measure_step(env)
    workers = min(num_envs, cores) if seconds > SLOW_STEP else 0
    log.info("env.workers=auto: %d (a step takes %.2f ms, %d cores)", workers, 1e3 * seconds, cores)
    return workers


def measure_step(env: gym.Env) -> float:
    """Return the mean time of 3 to 200 random steps, resets included, in about 0.15 seconds."""
    env.action_space.seed(0)
    env.reset(seed=0)
    ended = _step_at_random(env)  # not timed: the first step may load or compile something
    times = [time.perf_counter()]
    while len(times) <= 3 or (len(times) <= 200 and times[-1] < times[0] + 0.15):
        if ended:
            env.reset()
        ended = _step_at_random(env)
        times.append(time.perf_counter())
    # The slowest twentieth may include time of other programs.
    steps = np.sort(np.diff(times))
    return float(steps[: len(steps) - len(steps) // 20].mean())


def _step_at_random(env: gym.Env) -> bool:
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    return bool(terminated or truncated)
