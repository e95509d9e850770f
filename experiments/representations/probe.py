"""Measure how well a linear map finds ball and paddle of Catch in the latent states of runs.

usage: python experiments/representations/probe.py RUN...

The states are observed over 150 episodes with random actions. A softmax regression learns on the
first three quarters of them and is scored on the others. A constant answer finds a fifth of the
balls.
"""

import sys
from pathlib import Path

import numpy as np
import torch
from torch import nn

import worldloom

EPISODES, ITERATIONS = 150, 300


def main() -> None:
    torch.set_num_threads(1)
    print("| run | ball | paddle |\n|---|---:|---:|")
    for folder in map(Path, sys.argv[1:]):
        run = worldloom.load_run(folder)
        features, columns = collect(run)
        ball, paddle = (score(features, target) for target in columns.T)
        print(f"| {folder.name} | {ball:.0%} | {paddle:.0%} |")


@torch.no_grad()
def collect(run) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the features [N, F] of all states, and the columns [N, 2] of ball and paddle."""
    env, rng = run.make_env(), np.random.default_rng(0)
    features, columns = [], []
    for seed in range(EPISODES):
        obs, _ = env.reset(seed=seed)
        state, action, done = None, None, False
        while not done:
            image = torch.as_tensor(np.asarray(obs)).movedim(-1, 0)[None]
            state = run.model.observe(state, action, image) if state else run.model.encode(image)
            features.append(state.features[0])
            columns.append((env.unwrapped.column, env.unwrapped.paddle))
            chosen = rng.integers(3)
            action = nn.functional.one_hot(torch.tensor([chosen]), 3).float()
            obs, _, terminated, truncated, _ = env.step(chosen)
            done = terminated or truncated
    return torch.stack(features), torch.tensor(columns)


def score(features: torch.Tensor, target: torch.Tensor) -> float:
    """Return the share of correct answers on the last quarter of the rows."""
    known = len(features) * 3 // 4
    x = (features - features[:known].mean(0)) / (features[:known].std(0) + 1e-6)
    linear = nn.Linear(x.shape[1], int(target.max()) + 1)
    optimizer = torch.optim.Adam(linear.parameters(), 1e-2, weight_decay=1e-3)
    for _ in range(ITERATIONS):
        optimizer.zero_grad()
        nn.functional.cross_entropy(linear(x[:known]), target[:known]).backward()
        optimizer.step()
    return float((linear(x[known:]).argmax(-1) == target[known:]).float().mean())


if __name__ == "__main__":
    main()
