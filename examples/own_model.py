"""Change a built-in model: DreamerV3 with another exploration and a hyperparameter for it.

The class is used like a built-in one, in a folder in which own_model can be imported:

    python -m worldloom.run model=dreamerv3_tiny model._target_=own_model.EpsilonDreamer \
        +model.epsilon=0.2 env=gymnasium env.id=CartPole-v1 training.total_steps=8000
    python -m worldloom.eval checkpoint=RUN model._target_=own_model.EpsilonDreamer

`python own_model.py` runs both commands for 280 steps, and loads the model.
"""

import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch.nn.functional import one_hot

from worldloom import create_world_model
from worldloom.models.dreamerv3 import DreamerV3

NAME = "own_model.EpsilonDreamer"


class EpsilonDreamer(DreamerV3):
    """Explores with a random action in a share `epsilon` of the steps."""

    def __init__(self, *args, epsilon=0.1, **hyperparameters):
        super().__init__(*args, **hyperparameters)
        self.epsilon = epsilon

    def policy(self, state, deterministic=False):
        """Return one-hot actions [B, A]; evaluation is deterministic."""
        action = super().policy(state, deterministic)
        if deterministic:
            return action
        random = one_hot(torch.rand_like(action).argmax(-1), action.shape[-1]).to(action)
        explores = torch.rand_like(action[:, :1]) < self.epsilon
        return torch.where(explores, random, action)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        run = f"{folder}/run"
        train = ["model=dreamerv3_tiny", f"model._target_={NAME}", "+model.epsilon=0.2"]
        train += ["env=gymnasium", "env.id=CartPole-v1", f"hydra.run.dir={run}"]
        train += ["training.total_steps=280", "training.prefill=260", "evaluation.episodes=2"]
        score = [f"checkpoint={run}", f"model._target_={NAME}"]
        for command in (["worldloom.run", *train], ["worldloom.eval", *score]):
            here = Path(__file__).parent
            subprocess.run([sys.executable, "-m", *command], cwd=here, check=True)
        model = create_world_model(run, allow=(NAME,))
        print(f"loaded a {type(model).__name__} with epsilon={model.epsilon}")
