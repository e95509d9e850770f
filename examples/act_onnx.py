"""Act with a file of `worldloom export RUN policy.onnx`: no PyTorch, and no worldloom.

pip install numpy onnxruntime gymnasium
python act_onnx.py policy.onnx
"""

import json
import sys

import gymnasium as gym
import numpy as np
import onnxruntime


class Policy:
    """Takes what one environment returns, an array or a flat dict, and returns what it accepts."""

    def __init__(self, file, seed=0):
        self.session, self.rng = onnxruntime.InferenceSession(file), np.random.default_rng(seed)
        metadata = self.session.get_modelmeta().custom_metadata_map["worldloom"]
        self.metadata = json.loads(metadata)
        self.outputs = [output["name"] for output in self.metadata["outputs"]]
        self.reset()

    def reset(self):
        self.is_first, self.memory = True, {}  # the graph ignores the memory of an episode's start

    def act(self, obs):
        feed = {entry["name"]: self.make(entry, obs) for entry in self.metadata["inputs"]}
        found = self.session.run(self.outputs, feed)
        self.is_first, self.memory = False, dict(zip(self.outputs, found, strict=True))
        return self.memory["action"][0]

    def make(self, entry, obs):
        shape, dtype = entry["shape"], entry["dtype"]
        if entry["kind"] == "observation":
            return np.asarray(obs[entry["key"]] if entry["key"] else obs, dtype).reshape(shape)
        if entry["kind"] == "is_first":
            return np.array([self.is_first])
        if entry["kind"] == "state":
            return self.memory.get(entry["output"], np.zeros(shape, dtype))
        if entry["distribution"] == "integers":
            return self.rng.integers(entry["high"], size=shape)
        if entry["distribution"] == "permutation":
            return self.rng.permuted(np.tile(np.arange(shape[1]), (shape[0], 1)), axis=1)
        return getattr(self.rng, entry["numpy"])(shape, dtype)


def play(policy, env, seed):
    """Return the sum of rewards of one episode; each action is repeated as in the run."""
    (obs, _), total, ended = env.reset(seed=seed), 0.0, False
    policy.reset()
    while not ended:
        action = policy.act(obs)
        for _ in range(policy.metadata["environment"].get("action_repeat", 1)):
            obs, reward, terminated, truncated, _ = env.step(action)
            total, ended = total + float(reward), terminated or truncated
            if ended:
                break
    return total


if __name__ == "__main__":
    policy = Policy(sys.argv[1])
    env = gym.make(policy.metadata["environment"]["id"])
    for seed in range(3):
        print(f"seed {seed}: return {play(policy, env, seed):.2f}")
