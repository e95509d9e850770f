"""Export presets, and time a decision in PyTorch and in the exported graph.

    OMP_NUM_THREADS=1 python experiments/export/measure.py [NAME ...]

The weights are random in every layer: a new TD-MPC2 predicts the same value for all plans, and the
graph could choose another one of them. Both run in turns, step by step, so that other load slows
down both.
"""

import sys
import tempfile
from pathlib import Path

import torch

from worldloom import create_world_model
from worldloom.app.compose import Overrides
from worldloom.export.__main__ import ExportConfig
from worldloom.export.policy import export_policy, from_model

VECTOR, IMAGE = {"obs_shape": (24,), "action_dim": 6}, {"obs_shape": (3, 64, 64), "action_dim": 6}
CASES = {
    "dreamerv3:size1m": (VECTOR, None),
    "dreamerv3:size1m pixels": (IMAGE, None),
    "dreamerv3:size12m": (VECTOR, None),
    "dreamerv3:size12m pixels": (IMAGE, None),
    "tdmpc2:1m prior": (VECTOR, "prior"),
    "tdmpc2:1m": (VECTOR, None),
    "tdmpc2:5m prior": (VECTOR, "prior"),
    "tdmpc2:5m": (VECTOR, None),
}


def measure(name, file):
    spaces, kind = CASES[name]
    torch.manual_seed(0)
    model = create_world_model(name.split()[0], **spaces, device="cpu")
    with torch.no_grad():
        for weight in model.parameters():
            weight.add_(0.02 * torch.randn_like(weight))
    model.save_pretrained(file.parent / "model")
    settings = ExportConfig(policy=kind, steps=50 if name in ("tdmpc2:1m", "tdmpc2:5m") else 200)
    policy = from_model(file.parent / "model", Overrides(()), settings)
    print(name, *export_policy(policy, file, settings).splitlines()[-3:], sep="\n  ", flush=True)


if __name__ == "__main__":
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        for file in ("policy.onnx", "policy.pt2"):
            for name in sys.argv[1:] or CASES:
                measure(name, Path(folder, file))
