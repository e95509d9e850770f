"""Play episodes with a trained run.

    python act.py RUN [NAME ...]

RUN: the folder of a run, its model folder or one of its checkpoints.
NAME: of custom code that the run uses, such as own_env.Tank; the last line of the run has it.
"""

import sys

import worldloom


def play(env, agent, seed):
    """Return the sum of rewards and the number of steps of one episode."""
    obs, _ = env.reset(seed=seed)
    agent.reset()  # forget the episode before
    total, steps, ended = 0.0, 0, False
    while not ended:
        action = agent.act(obs)  # in the units of the environment
        obs, reward, terminated, truncated, _ = env.step(action)
        total, steps, ended = total + reward, steps + 1, terminated or truncated
    return total, steps


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    run = worldloom.load_run(sys.argv[1], allow=sys.argv[2:])
    env = run.make_env()  # render_mode="human" opens a window, if the environment has one
    agent = run.agent(deterministic=True)
    for seed in range(3):
        total, steps = play(env, agent, seed)
        print(f"seed {seed}: return {total:.2f} in {steps} steps")
    env.close()
