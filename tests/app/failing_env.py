"""CartPole that fails in one process of a run, at one of its steps.

FAULT="RANK KIND STEP" says where; step 0 is when the environment is made. Steps are counted over
all environments of a process.
"""

import os
import signal
import time

import gymnasium as gym

KINDS = {"kill": signal.SIGKILL, "stop": signal.SIGSTOP, "term": signal.SIGTERM}
steps = 0


def fail(kind):
    if kind == "raise":
        raise ValueError("the lever is stuck")
    if kind == "sleep":
        time.sleep(1000)
    elif kind in KINDS:
        os.kill(os.getpid(), KINDS[kind])


class Failing(gym.Wrapper):
    def step(self, action):
        global steps
        steps += 1
        obs, reward, *rest = self.env.step(action)
        rank, kind, number = os.environ.get("FAULT", "- - 0").split()
        if os.environ.get("RANK", "0") == rank and steps >= int(number):
            if steps == int(number):
                fail(kind)
            reward = float("nan") if kind == "nan" else reward  # from now on
        return obs, reward, *rest


def make_env():
    rank, kind, number = os.environ.get("FAULT", "- - 1").split()
    if number == "0" and os.environ.get("RANK", "0") == rank:
        fail(kind)
    return Failing(gym.make("CartPole-v1", max_episode_steps=30))
