"""Environments in worker processes, which are replaced where they crash or hang.

Letters used in shapes: N environments.
"""

import logging
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

from worldloom.envs.process import INFOS, Crash, EnvProcess
from worldloom.envs.replayable import Stepped, unsaved

log = logging.getLogger(__name__)

# So many crashes of one worker, with no episode finished in between, are no accident.
MAX_CRASHES = 3
# Talking to a process costs 0.1 ms and more and wakes another core; Pong's steps of 0.5 ms gain
# nothing from two processes (experiments/collection).
WORTH_SECONDS = 1e-3


class WorkerError(ChildProcessError):
    """Environments failed in their process in a way that new ones would not mend.

    The message is one line for the user, then the worker's own traceback if it left one.
    """


class WorkerVectorEnv(VectorEnv):
    """N environments in min(workers, N) processes, each with a contiguous share of them.

    Rows are those of a SyncVectorEnv in NEXT_STEP mode. A worker that dies, raises, or does not
    answer within `timeout` seconds is replaced by one with new environments. These are reset with
    seeds of their own, and their first observations are their next rows, with reward 0;
    infos["restarted"] [N] bool, which only such a step has, marks them.

    make_envs: function of a number n that makes n environments stepped together.
    """

    def __init__(
        self,
        make_envs: Callable[[int], VectorEnv],
        num_envs: int,
        workers: int,
        timeout: float = 120.0,
    ) -> None:
        self.num_envs = num_envs
        self.metadata = {"autoreset_mode": AutoresetMode.NEXT_STEP}
        count = min(workers, num_envs)
        shares = [range(num_envs * k // count, num_envs * (k + 1) // count) for k in range(count)]
        codes = [pickle.dumps(CloudpickleWrapper(partial(make_envs, len(s)))) for s in shares]
        self._workers = [EnvProcess(*x, timeout) for x in zip(codes, shares, strict=True)]
        # Has to come before multiprocessing's own exit handler, which waits for them without end.
        self._stop = Finalize(self, EnvProcess.stop, (self._workers,), exitpriority=10)
        self._seed: int | None = None
        self._was_reset = self._ready = False
        self._told: set[str] = set()
        try:
            for worker in self._workers:
                worker.start()
                worker.ask("spaces")
            self._take_spaces([worker.answer() for worker in self._workers])
        except Crash as crash:
            self.close()
            raise _error("environments could not be made in a worker process", crash) from None
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
            raise ValueError(f"options are {options}; expected none; give them to make_env")
        self._require_open()
        self._seed, self._ready = seed, False
        for worker in self._workers:
            _make_ready(worker)
            worker.ask("reset", [None if seed is None else seed + i for i in worker.indices])
        obs, *_, infos = self._rows()
        self._was_reset = True
        return obs, infos

    def step(self, actions: Any) -> Stepped:
        """Step all environments; actions [N, ...] are what a SyncVectorEnv takes."""
        self._require_ready("step")
        self._ready = False
        for worker in self._workers:
            worker.ask("step", actions[worker.indices.start : worker.indices.stop])
        return self._rows()

    def save(self) -> dict[str, Any]:
        """Return where all environments are, as `LocalVectorEnv.save` does.

        A worker that crashes meanwhile is replaced in the next step; restored, its environments
        begin new episodes.
        """
        self._require_ready("save")
        self._ready = False
        for worker in self._workers:
            worker.ask("save")
        state: dict[str, Any] = {"seed": self._seed, "episodes": [], "restarts": [], "crashes": []}
        for worker in self._workers:
            answer, count = _answer_or_crash(worker), len(worker.indices)
            if isinstance(answer, Crash):
                log.warning("%s cannot be saved: %s", _named(worker), answer.reason)
                EnvProcess.stop([worker], 0.0)  # else its late answer would be taken for a step's
                next_seeds = [self._fresh_seed(i, worker.restarts + 1) for i in worker.indices]
                answer = {"episodes": [unsaved(seed) for seed in next_seeds]}
            state["episodes"] += answer["episodes"]
            state["restarts"] += [worker.restarts] * count
            state["crashes"] += [worker.crashes] * count
        self._ready = True
        return state

    def restore(self, state: dict[str, Any]) -> Stepped:
        """Bring the environments to where they were saved, as `LocalVectorEnv.restore` does.

        Those of a worker that crashes meanwhile begin new episodes; infos["restarted"] marks them.
        """
        self._require_open()
        self._seed, self._ready, self._was_reset = state["seed"], False, True
        for worker in self._workers:
            _make_ready(worker)
            worker.restarts = max(state["restarts"][i] for i in worker.indices)
            worker.crashes = max(state["crashes"][i] for i in worker.indices)
            episodes = [state["episodes"][i] for i in worker.indices]
            worker.ask("restore", {"seed": state["seed"], "episodes": episodes})
        return self._rows()

    def close_extras(self, **kwargs: Any) -> None:
        """End the processes: they are asked to, and soon killed."""
        if hasattr(self, "_stop"):
            self._stop()

    def _take_spaces(self, spaces: list[tuple[gym.Space, gym.Space]]) -> None:
        self.single_observation_space, self.single_action_space = spaces[0]
        if others := [pair for pair in spaces if pair != spaces[0]]:
            raise ValueError(
                f"make_env made an environment with the spaces {spaces[0]} and one with "
                f"{others[0]}; expected equal ones; let it return the same kind each time"
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
                f"{call} was called before reset, or after a step that was interrupted; expected "
                "environments with a present observation; call reset first"
            )

    def _rows(self) -> Stepped:
        """Wait for all answers, then replace workers that gave none, and join the rows."""
        answers = [_answer_or_crash(worker) for worker in self._workers]
        restarted = np.zeros(self.num_envs, bool)
        rows: list[Any] = []
        for worker, answer in zip(self._workers, answers, strict=True):
            if isinstance(answer, Crash):
                restarted[worker.indices] = True
                answer = self._restart(worker, answer)
            elif (answer[2] | answer[3]).any():
                worker.crashes = 0
            rows.append(answer)
        *parts, told = zip(*rows, strict=True)
        infos = _joined_infos(told, [len(worker.indices) for worker in self._workers])
        if restarted.any():
            infos["restarted"] = restarted
        obs, rewards, terminated, truncated = map(_joined, parts)
        self._ready = True
        return obs, rewards, terminated, truncated, infos

    def _restart(self, worker: EnvProcess, crash: Crash) -> Any:
        """Replace a crashed worker and return the first rows of its new environments."""
        while True:
            worker.crashes += 1
            if not self._was_reset:
                self.close()
                raise _error("environments could not be reset in a worker process", crash)
            if worker.crashes >= MAX_CRASHES:
                self.close()
                raise _error(
                    f"{_named(worker)} failed {MAX_CRASHES} times with no episode "
                    "finished in between, the last time",
                    crash,
                )
            # The traceback comes along once, for the same mistake may come often.
            trace = "" if crash.reason in self._told else f"\n{crash.trace}".rstrip()
            self._told.add(crash.reason)
            log.warning("restarting %s: %s%s", _named(worker), crash.reason, trace)
            # Only one that raised is still able to close its environments.
            EnvProcess.stop([worker], 1.0 if crash.trace else 0.0)
            worker.start()
            worker.restarts += 1
            worker.ask("reset", [self._fresh_seed(i, worker.restarts) for i in worker.indices])
            answer = _answer_or_crash(worker)
            if not isinstance(answer, Crash):
                return answer
            crash = answer

    def _fresh_seed(self, index: int, restarts: int) -> int | None:
        if self._seed is None:
            return None
        state = np.random.SeedSequence([self._seed, index, restarts]).generate_state(1)
        return int(state[0] >> 1)  # 31 bits, which every simulator takes


def _make_ready(worker: EnvProcess) -> None:
    """Replace a worker that owes the answer to an interrupted request.

    It might still come, and be taken for that to the next one.
    """
    if worker.waiting:
        EnvProcess.stop([worker], 0.0)
        worker.start()


def _answer_or_crash(worker: EnvProcess) -> Any:
    try:
        return worker.answer()
    except Crash as crash:
        return crash


def _error(what: str, crash: Crash) -> WorkerError:
    return WorkerError(
        f"{what}: {crash.reason}; mend the environment; to debug it set env.workers=0, which runs "
        f"it in the main process\n{crash.trace}".rstrip()
    )


def _named(worker: EnvProcess) -> str:
    numbers = ", ".join(map(str, worker.indices))
    return f"environment{'s' * (len(worker.indices) > 1)} {numbers}"


def _joined(parts: Any) -> Any:
    """Join the arrays of all workers; dicts by key."""
    if isinstance(parts[0], dict):
        return {key: _joined([part[key] for part in parts]) for key in parts[0]}
    return np.concatenate(parts)


def _joined_infos(parts: Any, sizes: list[int]) -> dict[str, Any]:
    """Join infos; a worker has a key only where one of its environments told it."""
    infos = {}
    for name in INFOS:
        if told := [part[name] for part in parts if name in part]:
            blanks = [np.zeros(size, told[0].dtype) for size in sizes]
            pairs = zip(parts, blanks, strict=True)
            infos[name] = np.concatenate([part.get(name, blank) for part, blank in pairs])
    return infos


def measured_workers(env: gym.Env, num_envs: int) -> int:
    """Choose how many workers copies of `env` should have; 0 for stepping them in this process.

    env: a copy that is not used any more afterwards; it is reset and stepped at random.
    """
    affinity: Any = getattr(os, "sched_getaffinity", None)
    cores = len(affinity(0)) if affinity else os.cpu_count() or 1
    if num_envs == 1 or cores == 1:
        return 0
    seconds = step_seconds(env)
    workers = min(num_envs, cores) if seconds > WORTH_SECONDS else 0
    log.info("env.workers=auto: %d (a step takes %.2f ms, %d cores)", workers, 1e3 * seconds, cores)
    return workers


def step_seconds(env: gym.Env) -> float:
    """Time random steps, and resets where episodes end: 3 to 200 of them, for 0.15 seconds."""
    env.action_space.seed(0)
    env.reset(seed=0)
    ended = _random_step(env)  # not timed: the first one may still load or compile something
    times = [time.perf_counter()]
    while len(times) <= 3 or (len(times) <= 200 and times[-1] < times[0] + 0.15):
        if ended:
            env.reset()
        ended = _random_step(env)
        times.append(time.perf_counter())
    # In the slowest twentieth another program may have had the core.
    steps = np.sort(np.diff(times))
    return float(steps[: len(steps) - len(steps) // 20].mean())


def _random_step(env: gym.Env) -> bool:
    _, _, terminated, truncated, _ = env.step(env.action_space.sample())
    return bool(terminated or truncated)
