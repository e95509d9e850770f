"""Add a loss: TD-MPC2 that also predicts which action led from one latent state to the next.

The term is averaged, weighted by model.loss_scales.inverse (1 by default), added to the loss, and
logged as loss/inverse_loss. Run this in a folder in which own_loss can be imported:

    python -m worldloom.run model=tdmpc2_tiny model._target_=own_loss.InversePlanner \
        +model.inverse_units=64 +model.loss_scales.inverse=0.5 \
        env=gymnasium env.id=Pendulum-v1 training.total_steps=5000

`python own_loss.py` does this for 60 steps and prints the curve of the term. DreamerV3 has the same
method.
"""

import csv
import subprocess
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import nn

from worldloom.models.tdmpc2 import TDMPC2


class InversePlanner(TDMPC2):
    """Predicts actions from pairs of latent states."""

    def __init__(self, *args, inverse_units=32, **hyperparameters):
        super().__init__(*args, **hyperparameters)
        first = nn.Linear(2 * self.feature_dim, inverse_units)
        last = nn.Linear(inverse_units, self.act_spaces.width)
        self.inverse = nn.Sequential(first, nn.SiLU(), last)

    def auxiliary_losses(self, batch, features):
        """Return the term for latents [B, T, L] of the last T rows of the batch."""
        rows = slice(-features.shape[1], None)  # all; those of DreamerV3 begin at row 1
        predicted = self.inverse(torch.cat([features[:, :-1], features[:, 1:]], -1))
        error = (predicted - batch["actions"][:, rows][:, :-1]).square().mean(-1)  # [B, T - 1]
        # TD-MPC2 predicts latents from row 0; after the end of its episode they mean nothing.
        inside = (~batch["is_last"][:, rows][:, :-1]).cumprod(1)
        return {"inverse": error * inside}


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        args = ["model=tdmpc2_tiny", "model._target_=own_loss.InversePlanner"]
        args += ["+model.inverse_units=64", "+model.loss_scales.inverse=0.5"]
        args += ["env=gymnasium", "env.id=Pendulum-v1", "env.time_limit=20", "env.num_envs=1"]
        args += ["training.total_steps=60", "training.prefill=40", "training.random_steps=0"]
        args += ["training.seed_episodes=1", "training.log_every=20", "evaluation.episodes=1"]
        args += [f"hydra.run.dir={folder}/run"]
        command = [sys.executable, "-m", "worldloom.run", *args]
        subprocess.run(command, cwd=Path(__file__).parent, check=True)
        with open(f"{folder}/run/metrics.csv") as file:
            for row in csv.DictReader(file):
                if loss := row["loss/inverse_loss"]:
                    print(f"step {row['step']}: inverse_loss {loss}")
