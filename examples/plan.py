"""Plan by hand with the model of a run.

    python plan.py RUN [NAME ...]

RUN, NAME: as for act.py. Instead of the model's policy, CEM searches for the actions with the best
imagined rewards. It works with every world model, because it only calls `imagine`; MPPI takes the
same arguments. Observations are a single array here.
"""

import sys

import torch

import worldloom
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.planning import CEM


@torch.no_grad()
def play(env, model):
    """Return the return of one episode."""
    # The model sees float32 vectors or channels-first images, and acts in [-1, 1] or one-hot.
    obs_spec = ObsSpec.from_space(env.observation_space)
    action_spec = ActionSpec.from_space(env.action_space)
    planner = CEM(
        model,
        action_spec.action_dim,
        action_spec.discrete,
        horizon=8,
        num_samples=64,
        num_elites=8,
        iterations=3,
    )
    obs, _ = env.reset(seed=0)
    state = action = plan = None
    total, ended = 0.0, False
    while not ended:
        batch = torch.as_tensor(obs_spec.encode(obs[None]))  # one environment: [1, *obs_shape]
        state = model.encode(batch) if state is None else model.observe(state, action, batch)
        action, plan = planner(state, plan, deterministic=True)  # [1, A], and for the next step
        obs, reward, terminated, truncated, _ = env.step(action_spec.decode(action.numpy())[0])
        total, ended = total + float(reward), terminated or truncated
    return total


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run = worldloom.load_run(sys.argv[1], allow=sys.argv[2:])
    print(f"return {play(run.make_env(), run.model):.2f}")
