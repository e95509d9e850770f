"""Which commands and snippets of the documentation are not executed as they are, and why.

test_snippets.py executes every block of README.md and docs/, in a folder for each page. A command
`worldloom run` is composed and validated with the values that the page gives, and, in the slow
test, executed with few steps and small networks. The tables here list all exceptions. A command
that belongs to no program of worldloom and to no row fails.
"""

# Commands that are not executed: a regular expression of the command -> the reason.
NOT_RUN = {
    r"pip install|git clone|cd worldloom": ".ci/run installs the package, its extras and its wheel",
    r"apt install": "changes the system",
    r"pytest|bash \.ci/run|python docs/build\.py": ".ci/run, and what it runs",
    r"pre-commit install": "changes the git repository",
    r"tensorboard ": "serves until it is stopped; tests/training/test_dashboard.py reads its pages",
    r".* --serve": "serves until it is stopped; tests/view starts it",
    r".*worldloom\.diagnose": "needs a broken update; tests/training/test_nonfinite.py makes one",
    r"worldloom export|python examples/act_onnx\.py": "needs the extra export; tests/export",
    r"eval ": "tests/test_main.py presses the tab key in bash",
    r".*worldloom check env=dmc": "needs a simulator; tests/envs/suites check all of them",
}
# Commands `worldloom run` that are composed and validated, never executed, and why.
COMPOSED = {
    r".*trainer=(gpu|ddp)": "needs GPUs or several processes; tests/app/test_launch.py has those",
    r"torchrun |srun ": "starts processes on several machines",
    r".*hydra/launcher=": "needs a cluster; tests/app/test_clusters.py has one",
    r".*env=(dmc|atari|crafter|minigrid|metaworld|robotics|memory_maze|multitask)": "needs a "
    "simulator; tests/test_run_suites.py and tests/app/test_protocols.py train in all of them",
    r".*experiment=(dreamerv3|r2dreamer|tdmpc2)/": "needs a simulator; tests/app/test_protocols.py",
    r".*(BipedalWalker|HalfCheetah)": "needs a simulator; tests/test_run_suites.py",
    r".*logger=.*(wandb|mlflow)": "needs an account or a server; tests/training/test_loggers.py",
}
# Lines of Python that are left out: a regular expression -> the reason.
LEFT_OUT = {
    r'.*create_world_model\("(params\.npz|dog-run-1\.pt)"': "official files are loaded by "
    "tests/reference/test_reference_loading.py and test_tdmpc2_loading.py",
}
# Numbers that are made smaller where they are executed.
SMALLER = {
    "range(1000)": "range(20)",
    "seed=0,1,2": "seed=0,1",
    "train_ratio=32,128,512": "train_ratio=32,128",
}
# Names that Python blocks use without a definition: page -> code before its first block.
GIVEN = {
    "README.md": """
import torch
from worldloom.random_batches import RandomData
from worldloom import create_world_model
obs = torch.randint(256, (2, 3, 64, 64), dtype=torch.uint8)
action, actions = torch.eye(4)[:2], torch.eye(4)[:2].repeat(3, 1, 1)
batch = RandomData.for_model(torch.nn.Linear(1, 1), (3, 64, 64), 4, True, 2, 3).batch()
""",
    "docs/inspecting.md": "import gymnasium",
    "docs/models.md": """
import torch
obs, is_first = torch.zeros(2, 4), torch.ones(2, dtype=torch.bool)
""",
    "docs/security.md": "import worldloom",
}
# What my_pkg contains on pages that only mention it.
MY_PKG = '''
from pathlib import Path

import gymnasium as gym
import lightning
import numpy as np
from lightning.pytorch.loggers import CSVLogger

from worldloom.models.dreamerv3 import DreamerV3


class MyCallback(lightning.Callback):
    """Counts batches."""

    batches = 0

    def on_train_batch_end(self, *args, **kwargs):
        self.batches += 1


class MyLogger(CSVLogger):
    """A logger with an argument."""

    def __init__(self, color):
        super().__init__("mine")


class MyModel(DreamerV3):
    """A model that a saved file names."""


class Thermostat(gym.Env):
    """Keep a temperature at zero."""

    observation_space = gym.spaces.Box(-9, 9, (1,), np.float32)
    action_space = gym.spaces.Box(-1, 1, (1,), np.float32)

    def __init__(self, level):
        self.level = level

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now, self.age = self.np_random.uniform(-self.level, self.level), 0
        return np.float32([self.now]), {}

    def step(self, action):
        self.now, self.age = float(np.clip(self.now + action[0], -9, 9)), self.age + 1
        return np.float32([self.now]), -abs(self.now), False, self.age >= 50, {}


def make_env(level=1.0):
    return Thermostat(level)
'''
# The runs that pages name, and how they are trained.
CUSTOM_MODEL = ["model=dreamerv3_tiny", "model._target_=my_pkg.MyModel"]
CUSTOM_ENV = ["model=dreamerv3_tiny", "env._target_=my_pkg.make_env"]
RUNS = {
    "runs/cartpole/2026-01-01_00-00-00": [],
    "runs/my-model": CUSTOM_MODEL,
    "runs/my-env": CUSTOM_ENV,
    "runs/mine": [*CUSTOM_MODEL, CUSTOM_ENV[1]],
}
# What makes a run short: values of any run, and sizes by family.
SHORT = [*("threads=1", "env.workers=0", "training.total_steps=100", "training.log_every=2")]
SHORT += ["training.batch_size=4", "training.sequence_length=8", "training.prefill=40"]
SHORT += ["training.train_ratio=4", "evaluation.every=60"]
SHORT += ["evaluation.episodes=1", "evaluation.episodes_during=1", "evaluation.decisions=0"]
SIZES = {
    "DreamerV3": [
        *("model.deter=16", "model.hidden=8", "model.units=8", "model.classes=4", "model.stoch=4"),
        *("model.depth=2", "model.imag_length=3"),
    ],
    "TDMPC2": [
        *("model.num_samples=8", "model.num_elites=2", "model.num_pi_trajs=2", "model.mlp_dim=16"),
        *("model.iterations=1", "training.sequence_length=4"),
        *("training.seed_episodes=0", "training.random_steps=40"),
    ],
}
# The same for other commands.
FEW = {
    "worldloom.eval": ["episodes=1", "num_envs=1", "decisions=0"],
    "worldloom.collect": ["episodes=2"],
    "worldloom.bench": ["repeats=1", "batch=2", "length=4", "matrix=64", "threads=1"],
    "worldloom.view": ["episodes=1", "max_steps=20", "horizon=3"],
}
