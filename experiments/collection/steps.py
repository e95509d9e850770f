"""Environment steps per second against a plain loop: python experiments/collection/steps.py [TASK…]

A task is the command line's env setting and its options, such as "gymnasium env.id=CartPole-v1".
The plain loop steps one gymnasium environment with precomputed random actions, and resets it at the
end of each episode. It is compared with worldloom's RowStream for 1, 4 and 16 environments, in this
process, in two processes, and with a replay buffer. All variants are timed in turn for five rounds;
the table has medians, so that other load on the machine affects all of them.
"""

import sys
import time
from statistics import median

import numpy as np

from worldloom.app.compose import Overrides, compose_env
from worldloom.app.task import env_maker
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import RowStream, make_vector_env
from worldloom.training import ReplayBuffer

TASKS = (
    "gymnasium env.id=CartPole-v1",
    "gymnasium env.id=HalfCheetah-v5",
    "dmc env.task=walker-walk env.action_repeat=1",
    "atari env.game=pong",
)
SECONDS, ROUNDS = 0.5, 5


def plain_loop(make_env):
    env = make_env()
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(100)]
    env.reset(seed=0)

    def tick(count):
        *_, terminated, truncated, _ = env.step(actions[count % 100])
        if terminated or truncated:
            env.reset()
        return 1

    return tick


def our_rows(make_env, num_envs, workers, stored):
    env = make_vector_env(make_env, num_envs, workers)
    obs, act = (
        ObsSpec.from_space(env.single_observation_space),
        ActionSpec.from_space(env.single_action_space),
    )
    rows, rng = RowStream(env, obs, act), np.random.default_rng(0)
    actions = [act.sample(rng, num_envs) for _ in range(100)]
    replay = ReplayBuffer(100_000 if "" not in obs.parts else 20_000, obs.shape, act.width,
                          num_envs=num_envs)  # fmt: skip
    rows.reset(0)

    def tick(count):
        if stored:
            action = np.where(rows.is_last[:, None], np.float32(0), actions[count % 100])
            replay.add(
                rows.obs, action, rows.rewards, rows.is_first, rows.is_last, rows.is_terminal
            )
        rows.step(actions[count % 100])
        return num_envs

    return tick


def rate(tick):
    start, steps, count = time.perf_counter(), 0, 0
    while time.perf_counter() < start + SECONDS:
        steps += tick(count)
        count += 1
    return steps / (time.perf_counter() - start)


def main():
    print("| task | plain loop, steps/s | environments | rows | rows, 2 processes | with replay |")
    print("|---|---|---|---|---|---|")
    for task in sys.argv[1:] or TASKS:
        make_env = env_maker(compose_env(Overrides((f"env={task.split()[0]}", *task.split()[1:]))))
        for num_envs in (1, 4, 16):
            ticks = [
                plain_loop(make_env),
                our_rows(make_env, num_envs, 0, False),
                our_rows(make_env, num_envs, 2, False),
                our_rows(make_env, num_envs, 0, True),
            ]
            rates = np.array([[rate(tick) for tick in ticks] for _ in range(ROUNDS)])
            ratios = [median(rates[:, i] / rates[:, 0]) for i in (1, 2, 3)]
            cells = " | ".join(f"{ratio:.2f}" for ratio in ratios)
            print(f"| {task} | {median(rates[:, 0]):,.0f} | {num_envs} | {cells} |", flush=True)


if __name__ == "__main__":
    main()
