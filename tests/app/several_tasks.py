"""What the tests of several tasks share: cheap tasks, settings, and files in mt30's layout."""

import sys
import types
from pathlib import Path

import torch

EPISODES, ROWS = 3, 6  # of each file
SHORT = [
    *("threads=1", "model=tdmpc2_tiny", "model.num_samples=16", "model.num_elites=4"),
    *("model.num_pi_trajs=2", "model.iterations=2", "training.batch_size=8"),
    *("training.train_ratio=8", "training.seed_episodes=0", "training.prefill=40"),
    *("training.random_steps=20", "evaluation.episodes=2", "evaluation.every=0"),
]


# A user's module: `width` numbers are observed, and the reward is the mean sign of the actions.
MODULE = """
import gymnasium as gym
import numpy as np


class Signs(gym.Env):
    def __init__(self, width, actions):
        self.observation_space = gym.spaces.Box(-9, 9, (width,), np.float32)
        self.action_space = gym.spaces.Box(-2, 2, (actions,), np.float32)
        self.width = width

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        return self.np_random.normal(size=self.width).astype(np.float32), {}

    def step(self, action):
        assert self.action_space.contains(action)
        obs = self.np_random.normal(size=self.width).astype(np.float32)
        info = {"success": bool(action[0] > 0)}
        return obs, float(np.sign(action).mean()), False, False, info


def make(width, actions, limit):
    return gym.wrappers.TimeLimit(Signs(width, actions), limit)
"""
TARGET = "_target_: signs_of_tasks.make"
ONE = f"{{{TARGET}, width: 2, actions: 1, limit: 5, name: one, score: [0, 5]}}"
THREE = (
    f"{{{TARGET}, width: 4, actions: 3, limit: 9, action_repeat: 2, name: three, score: success}}"
)
TASKS = ["env=multitask", f"env.tasks=[{ONE},{THREE}]", "env.workers=0"]
TRUST = [f"env.tasks.{number}._target_=signs_of_tasks.make" for number in (0, 1)]


def write_module(folder: Path) -> Path:
    """Write the module of the tasks; return the folder."""
    (folder / "signs_of_tasks.py").write_text(MODULE)
    return folder


def write_mt(file: Path, first: int, **changes: object) -> tuple[torch.Tensor, ...]:
    """Write a file with EPISODES episodes of two tasks, of 1 and 3 actions; return its tensors.

    changes: other values; None leaves one out.
    """
    torch.manual_seed(first)
    task = (torch.arange(EPISODES) + first).remainder(2)[:, None].expand(EPISODES, ROWS)
    obs, reward = torch.randn(EPISODES, ROWS, 4), torch.randn(EPISODES, ROWS)
    action = torch.rand(EPISODES, ROWS, 3) * 2 - 1
    obs[task == 0, 2:] = 0  # padding
    action[task == 0, 1:] = 0
    reward[:, 0], action[:, 0] = torch.nan, torch.nan
    items = {"obs": obs, "action": action, "reward": reward, "task": task.contiguous()}
    items = {k: v for k, v in {**items, **changes}.items() if v is not None}
    package, utils = types.ModuleType("tensordict.tensordict"), types.ModuleType("tensordict.utils")
    package.TensorDict = type("TensorDict", (), {"__module__": package.__name__})
    utils._StringOnlyDict = type("_StringOnlyDict", (dict,), {"__module__": utils.__name__})
    fakes = {"tensordict": types.ModuleType("tensordict"), package.__name__: package}
    fakes[utils.__name__] = utils
    before = {name: sys.modules.get(name) for name in fakes}
    sys.modules.update(fakes)
    try:
        data = package.TensorDict()
        data.__dict__ |= {"_tensordict": utils._StringOnlyDict(items), "_device": None}
        data.__dict__ |= {"_batch_size": torch.Size([EPISODES, ROWS]), "_is_locked": False}
        data.__dict__ |= {"_td_dim_names": None, "_lock_id": set(), "_locked_tensordicts": []}
        torch.save(data, file)
    finally:
        for name, module in before.items():
            sys.modules.pop(name)
            sys.modules.update({} if module is None else {name: module})
    return obs, action, reward, task
