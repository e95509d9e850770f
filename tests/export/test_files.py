"""Exported files act as the model does: for 1,000 steps without PyTorch, in real environments."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

import worldloom
from tests.export.conftest import CARTPOLE, DREAMER, PENDULUM, TDMPC2
from worldloom.app.compose import Overrides
from worldloom.app.task import open_saved_run
from worldloom.export import policy as policies
from worldloom.export.__main__ import ExportConfig
from worldloom.export.formats import open_file
from worldloom.export.step import supply

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
STEPS = 1000
RUNS = {
    "dreamerv3": ((*DREAMER, *CARTPOLE), None),
    "tdmpc2 prior": ((*TDMPC2, *PENDULUM), "prior"),
    "tdmpc2 plan": ((*TDMPC2, *PENDULUM), None),
}
# Runs the example, records what its policy sees, draws and does, and imports no torch.
PLAY = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("torch", "worldloom"):
            raise ImportError(f"{name} is blocked")

sys.meta_path.insert(0, Blocked())
file, out, steps = sys.argv[1], sys.argv[2], int(sys.argv[3])
import gymnasium as gym
import numpy as np
from act_onnx import Policy

class Recorded(Policy):
    def make(self, entry, obs):
        value = super().make(entry, obs)
        if entry["kind"] == "noise":
            rows.setdefault(entry["name"], []).append(value)
        return value

rows = {"obs": [], "first": [], "action": []}
policy = Recorded(file)
env, ended = gym.make(policy.metadata["environment"]["id"]), True
for step in range(steps):
    if ended:
        (obs, _), ended = env.reset(seed=step), False
        policy.reset()
    rows["obs"].append(obs)
    rows["first"].append(policy.is_first)
    rows["action"].append(policy.act(obs))
    obs, _, terminated, truncated, _ = env.step(rows["action"][-1])
    ended = terminated or truncated
assert not {"torch", "worldloom"} & {*sys.modules}
np.savez(out, **{name: np.stack(values) for name, values in rows.items()})
"""


def open_policy(folder, settings):
    config, section = open_saved_run(folder, Overrides(()))
    return policies.from_run(folder, config, section, settings)


# A plan has some hundred operations, which take long to convert.
CASES = [pytest.param(n, marks=pytest.mark.slow) if n == "tdmpc2 plan" else n for n in RUNS]


@pytest.mark.parametrize("name", CASES)
def test_the_example_takes_the_models_actions_for_1000_steps_without_torch(
    name, make_run, tmp_path
):
    pytest.importorskip("onnxscript", reason="needs the extra export")
    words, kind = RUNS[name]
    folder, file, played = make_run(*words), tmp_path / "policy.onnx", tmp_path / "played.npz"
    settings = ExportConfig(policy=kind)
    policies.export_policy(open_policy(folder, settings), file, settings)
    command = [sys.executable, "-c", PLAY, str(file), str(played), str(STEPS)]
    env = {**os.environ, "PYTHONPATH": str(EXAMPLES)}
    done = subprocess.run(command, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    rows = dict(np.load(played))
    # The agent of the run sees the same observations, and draws the same random numbers.
    run = worldloom.load_run(folder)
    if kind:
        policies.use_prior(run.actor)
    agent, noise = (
        run.agent(deterministic=True),
        policies.make_step(open_policy(folder, settings), settings)[0],
    )
    differences = []
    for t in range(STEPS):
        inputs = {
            key: torch.from_numpy(x[t]) for key, x in rows.items() if key.startswith("noise/")
        }
        if rows["first"][t]:
            agent.reset()
        numbers = noise.order_numbers(noise.noise.unpack(inputs), bool(rows["first"][t]))
        with supply(numbers):
            action = agent.act(rows["obs"][t])
        differences.append(np.abs(action - rows["action"][t]).max())
    assert max(differences) <= 1e-5
    assert rows["first"].sum() > 1
    assert len(np.unique(rows["action"].round(3))) >= (2 if name == "dreamerv3" else 100)


def test_the_example_repeats_each_action_as_the_run_did(monkeypatch):
    pytest.importorskip("onnxruntime", reason="needs the extra export")
    monkeypatch.syspath_prepend(EXAMPLES)
    play = importlib.import_module("act_onnx").play
    seen = []

    class Env:
        def reset(self, seed):
            self.steps = 0
            return 0, {}

        def step(self, action):
            self.steps += 1
            return self.steps, 1.0, self.steps == 7, False, {}

    metadata = {"environment": {"action_repeat": 3}}
    policy = SimpleNamespace(metadata=metadata, reset=seen.clear, act=seen.append)
    assert play(policy, Env(), seed=0) == 7
    assert seen == [0, 3, 6]  # and an episode ends within a repeat


def test_a_pt2_file_acts_as_the_model_and_describes_itself(make_run, tmp_path):
    folder, file = make_run(*DREAMER, *CARTPOLE), tmp_path / "policy.pt2"
    settings = ExportConfig(batch=2, deterministic=False)
    printed = policies.export_policy(open_policy(folder, settings), file, settings)
    assert "actions of 20 of 20 steps equal" in printed and str(file) in printed
    extra = {"worldloom.json": ""}
    program = torch.export.load(file, extra_files=extra)
    metadata = json.loads(extra["worldloom.json"])
    inputs = {
        entry["name"]: torch.zeros(entry["shape"], dtype=getattr(torch, entry["dtype"]))
        for entry in metadata["inputs"]
    }
    outputs = program.module()(inputs)
    assert [*outputs] == [entry["name"] for entry in metadata["outputs"]]
    assert list(outputs["action"].shape) == [2]
    assert metadata["environment"]["id"] == "CartPole-v1"
    assert metadata["environment"]["action_repeat"] == 1
    assert metadata["training"] == {"step": 50}
    assert metadata["policy"] == {"kind": "policy", "deterministic": False, "batch": 2}
    assert metadata["action"] == {"space": "Discrete(2)"}
    assert metadata["worldloom"] == worldloom.__version__
    kinds = {entry["name"]: entry["kind"] for entry in metadata["inputs"]}
    assert kinds["obs"] == "observation" and kinds["is_first"] == "is_first"
    assert kinds["noise/uniform"] == "noise" and kinds["state/action"] == "state"
    # Neither the file nor its graph names the folders of this machine.
    text = file.read_bytes()
    assert str(EXAMPLES.parent).encode() not in text and str(folder).encode() not in text


def test_a_graph_that_acts_differently_is_not_written(make_run, tmp_path, monkeypatch):
    folder, file = make_run(*DREAMER, *CARTPOLE), tmp_path / "policy.pt2"

    def open_wrong(contents, suffix):
        run = open_file(contents, suffix)

        def act(inputs):
            outputs = run(inputs)
            return {**outputs, "next/deterministic": outputs["next/deterministic"] + 1e-2}

        return act

    monkeypatch.setattr(policies, "open_file", open_wrong)
    settings = ExportConfig(steps=6)
    with pytest.raises(ValueError, match=r"does not act as DreamerV3: actions of 0 of 6 steps"):
        policies.export_policy(open_policy(folder, settings), file, settings)
    assert not any(tmp_path.iterdir())
