"""Write the files that tests/test_input.py gives to the commands.

usage: python tests/input_files.py FOLDER

The run in FOLDER/run must be there; copies of it are spoilt. Whatever is hostile here would create
FOLDER/marker if it were run.
"""

import json
import os
import pickle
import shutil
import sys
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from worldloom.app.run_dir import FORMAT
from worldloom.saving import FORMAT as MODEL_FORMAT

CODE = '''
import gymnasium as gym, numpy as np
from gymnasium import spaces
from torch import nn

class Env(gym.Env):
    """Two steps of what `obs` and `action` name, as zeros."""
    SPACES = dict(
        vector=spaces.Box(-1, 1, (3,)), odd=spaces.Box(0, 255, (20, 30, 3), np.uint8),
        image=spaces.Box(0, 255, (3, 16, 16), np.uint8), text=spaces.Text(5),
        volume=spaces.Box(-1, 1, (2, 3, 4)), several=spaces.MultiDiscrete([3, 2]),
        unbounded=spaces.Box(-np.inf, np.inf, (2,)), integers=spaces.Box(0, 9, (2,), np.int64),
        two=spaces.Discrete(2), tuple=spaces.Tuple([spaces.Discrete(2)]),
        words=spaces.Dict(note=spaces.Text(5), pose=spaces.Box(-1, 1, (3,))),
        dict=spaces.Dict(camera=spaces.Box(0, 255, (3, 16, 16), np.uint8),
                         pose=spaces.Box(-1, 1, (3,))))
    def __init__(self, obs="vector", action="two"):
        self.observation_space, self.action_space = self.SPACES[obs], self.SPACES[action]
        self.steps = 0
    def reset(self, seed=None, options=None):
        self.steps = 0
        return self.observation_space.sample(), {}
    def step(self, action):
        self.steps += 1
        return self.observation_space.sample(), 0.0, self.steps > 1, False, {}

def make_odd(): return Env("odd")
def make_image(): return Env("image")
def make_text(): return Env("text")
def make_words(): return Env("words")
def make_volume(): return Env("volume")
def make_dict(): return Env("dict")
def nothing(): return None
def raises(): raise RuntimeError("the simulator is not licensed")
class Old:
    """An environment as gym had them before gymnasium."""
    observation_space, action_space = Env.SPACES["vector"], Env.SPACES["two"]
    def reset(self): return np.zeros(3)
    def step(self, action): return np.zeros(3), 0.0, True, {}

class Plain: pass
class NoModule:
    def __init__(self, obs_shape, action_dim, discrete): pass
class NoMethods(nn.Module):
    def __init__(self, obs_shape, action_dim, discrete):
        super().__init__()
        self.layer = nn.Linear(2, 2)
class Strange(nn.Module):
    def __init__(self): super().__init__()
number = 3
'''


class Touch:
    """A pickle that runs a command when it is loaded."""

    def __init__(self, marker: Path) -> None:
        self.command = f"touch {marker}"

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return os.system, (self.command,)


def cut(source: Path, target: Path, part: float = 0.5) -> None:
    """Copy the first part of a file."""
    target.parent.mkdir(parents=True, exist_ok=True)
    data = source.read_bytes()
    target.write_bytes(data[: int(len(data) * part)])


def episode(file: Path, **changes: object) -> None:
    """Write an episode of five steps of two joints; a change to None leaves an array out."""
    arrays = {
        "obs": np.zeros((6, 3), np.float32),
        "actions": np.zeros((5, 2), np.float32),
        "rewards": np.zeros(5, np.float32),
        "terminated": np.array(True),
    }
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("wb") as opened:
        np.savez(opened, **{k: v for k, v in (arrays | changes).items() if v is not None})


def episodes(folder: Path) -> None:
    """Write folders of episodes, each wrong in its own way."""
    nan = np.zeros((6, 3), np.float32)
    nan[2, 1] = np.nan
    wrong = {
        "good": {},
        "nan": {"obs": nan},
        "inf_rewards": {"rewards": np.full(5, np.inf)},
        "objects": {"obs": np.array([Touch(folder.parent / "marker")] * 6, object)},
        "strings": {"obs": np.array([["a"]] * 6)},
        "lengths": {"rewards": np.zeros(4)},
        "long_obs": {"obs": np.zeros((9, 3))},
        "outside": {"actions": np.full((5, 2), 7.0)},
        "negative": {"actions": np.array([0, 1, -1, 0, 1])},
        "no_rewards": {"rewards": None},
        "no_flag": {"terminated": None},
        "flags": {"terminated": np.zeros(5, bool)},
        "no_steps": {"obs": np.zeros((1, 3)), "actions": np.zeros((0, 2)), "rewards": np.zeros(0)},
        "volume": {"obs": np.zeros((6, 2, 3, 4))},
    }
    for name, changes in wrong.items():
        episode(folder / name / "0.npz", **changes)
    episode(folder / "unlike" / "0.npz")
    episode(folder / "unlike" / "1.npz", obs=np.zeros((6, 4)))
    cut(folder / "good" / "0.npz", folder / "cut" / "0.npz")
    (folder / "empty").mkdir()
    for name, text in (("text", "these are no arrays"), ("blank", "")):
        (folder / name).mkdir()
        (folder / name / "0.npz").write_text(text)
    for name, text in (
        ("about", "format: 1\naction_dim: [oops"),
        ("about_kind", "format: 1\nenv: 3"),
        ("about_old", "action_dim: 2"),
    ):
        episode(folder / name / "0.npz")
        (folder / name / "dataset.yaml").write_text(text)
    ours = "_target_: worldloom.envs.suites.gymnasium.make_env"
    for name, env in {
        "hostile_env": "{_target_: hostile.make_env}",
        "hostile_id": f"{{{ours}, id: 'hostile:Env-v0'}}",
        "hostile_deep": f"{{{ours}, id: CartPole-v1, more: [{{id: 'hostile:Env-v0'}}]}}",
        "hostile_hidden": f"{{{ours}, id: '${{env._x.m}}', _x: {{m: 'hostile:CartPole-v1'}}}}",
        "hostile_relative": f"{{{ours}, id: '${{._x}}', _x: 'hostile:CartPole-v1'}}",
        "hostile_key": f"{{{ours}, id: CartPole-v1, '${{oc.env:HOME}}': 1}}",
        "hostile_resolver": f"{{{ours}, id: CartPole-v1, more: {{a: ['${{oc.env:HOME}}']}}}}",
        "hostile_tag": f"!!python/object/apply:os.system ['touch {folder.parent}/marker']",
        "hostile_nested": f"{{{ours}, id: CartPole-v1, more: {{_target_: hostile.Thing}}}}",
    }.items():
        episode(folder / name / "0.npz")
        (folder / name / "dataset.yaml").write_text(f"format: 1\nenv: {env}\n")


def hdf5(folder: Path) -> None:
    """Write HDF5 files, each wrong in its own way."""
    import h5py

    folder.mkdir()
    rows = {
        "observations": np.zeros((6, 3), np.float32),
        "actions": np.zeros((6, 2), np.float32),
        "rewards": np.zeros(6, np.float32),
        "terminals": np.arange(6) == 5,
    }
    wrong = {
        "good": {},
        "no_terminals": {"terminals": None},
        "lengths": {"rewards": np.zeros(3)},
        "nan": {"rewards": np.full(6, np.nan)},
        "strings": {"observations": np.array([b"a"] * 6)},
    }
    for name, changes in wrong.items():
        with h5py.File(folder / f"{name}.hdf5", "w") as file:
            for key, value in (rows | changes).items():
                if value is not None:
                    file[key] = value
    cut(folder / "good.hdf5", folder / "cut.hdf5")
    (folder / "text.hdf5").write_text("this is no HDF5")
    (folder / "dataset").mkdir()
    (folder / "dataset" / "metadata.json").write_text("{")
    (folder / "no_spaces").mkdir()
    (folder / "no_spaces" / "metadata.json").write_text(json.dumps({"env_spec": "hostile:Env-v0"}))


def weights(folder: Path, run: Path, marker: Path) -> None:
    """Write models and checkpoints, each damaged in its own way."""
    folder.mkdir()
    checkpoint = next((run / "checkpoints").glob("last*.ckpt"))
    cut(checkpoint, folder / "cut.ckpt")
    (folder / "text.ckpt").write_text("this is no checkpoint")
    (folder / "empty.ckpt").write_bytes(b"")
    (folder / "hostile.ckpt").write_bytes(pickle.dumps({"state_dict": Touch(marker)}))
    torch.save({"state_dict": {}, "hyper_parameters": Touch(marker)}, folder / "hostile_zip.ckpt")
    torch.save({"weights": torch.zeros(3)}, folder / "other.ckpt")
    torch.save({"model": Touch(marker)}, folder / "hostile.pt")
    torch.save({"model": {"layer": torch.zeros(3)}}, folder / "other.pt")
    cut(folder / "other.pt", folder / "cut.pt")
    np.savez(folder / "other.npz", weights=np.zeros(3))
    cut(folder / "other.npz", folder / "cut.npz")
    np.savez(folder / "hostile.npz", weights=np.array([Touch(marker)], object))
    (folder / "agent.pkl").write_bytes(pickle.dumps({"params": Touch(marker)}))
    (folder / "text.pkl").write_text("this is no pickle")
    for name in ("cut", "lacking", "format", "foreign", "yaml", "bare"):
        shutil.copytree(run / "model", folder / name)
    cut(run / "model" / "model.safetensors", folder / "cut" / "model.safetensors")
    tensors = load_file(run / "model" / "model.safetensors")
    tensors.pop(sorted(tensors)[0])
    save_file(tensors, folder / "lacking" / "model.safetensors")
    config = (run / "model" / "config.yaml").read_text()
    newer = config.replace(f"format: {MODEL_FORMAT}", "format: 99")
    (folder / "format" / "config.yaml").write_text(newer)
    (folder / "foreign" / "config.yaml").write_text(config.replace("dreamerv3", "hostile.Model"))
    (folder / "yaml" / "config.yaml").write_text("model: [oops")
    (folder / "bare" / "config.yaml").write_text(f"format: {MODEL_FORMAT}\n")


def runs(folder: Path, run: Path, marker: Path) -> None:
    """Write copies of a run, each with something else in its config.yaml."""
    text = (run / "config.yaml").read_text()
    touch = f"{{_target_: os.system, command: 'touch {marker}'}}"
    model = "worldloom.models.dreamerv3.DreamerV3"
    env = "worldloom.envs.suites.gymnasium.make_env"
    changed = {
        "empty": "",
        "yaml": "model: [oops",
        "list": "- 1\n- 2\n",
        "no_model": text.replace("\nmodel:", "\nmodell:"),
        "number": text.replace("\nthreads: 1", "\nthreads: many"),
        "hostile_model": text.replace(model, "os.system"),
        "hostile_path": text.replace(model, "worldloom.app.compose.os.system"),
        "hostile_import": text.replace(model, "hostile.Model"),
        "hostile_env": text.replace(env, "hostile.make_env"),
        "hostile_id": text.replace("id: CartPole-v1", "id: hostile:Env-v0"),
        "hostile_planner": text.replace("worldloom.planning.CEM", "os.system"),
        "hostile_callback": text.replace("\ncallbacks:", f"\ncallbacks:\n  mine: {touch}"),
        "hostile_logger": text.replace("\nlogger:", f"\nlogger:\n  mine: {touch}"),
        "hostile_nested": text.replace("\nplanner:", f"\nplanner:\n  model: {touch}"),
        "hostile_args": text.replace("\nplanner:", "\nplanner:\n  _args_: [[{_target_: a.b}]]"),
        "hostile_partial": text.replace("\nplanner:", "\nplanner:\n  _partial_: true"),
        "hostile_deep_id": text.replace("\nenv:", "\nenv:\n  more: [{id: 'hostile:Env-v0'}]"),
        "hostile_reference": text.replace("id: CartPole-v1", "id: ${name}").replace(
            "\nname: cartpole", "\nname: hostile:Env-v0"
        ),
        "hostile_target": text.replace(model, "${name}"),
        "hostile_defaults": f"defaults: [hostile]\n{text}",
        "hostile_hydra": f"hydra: {{searchpath: [file:///]}}\n{text}",
        "hostile_tag": text.replace("cartpole", f"!!python/object/apply:os.system [{touch!r}]"),
        "old": text.replace(f"format: {FORMAT}\n", ""),
        "newer": text.replace(f"format: {FORMAT}\n", "format: 99\n"),
        "joined": text.replace("\nname: cartpole", '\nname: ${a}${b}\na: $\nb: "{oc.env:HOME}"'),
        "relative": text.replace("\nname: cartpole", "\nname: ${.seed}"),
        "escaped": text.replace("\nname: cartpole", "\nname: \\${oc.env:HOME}"),
        "inner": text.replace("\nname: cartpole", "\nname: ${training[${folder}]}"),
        "resolver": text.replace("\nname: cartpole", "\nname: ${oc.env:SECRET}"),
        "dangling": text.replace("\nname: cartpole", "\nname: ${no.such.key}"),
    }
    for name, changed_text in changed.items():
        assert changed_text != text, name
        (folder / name).mkdir(parents=True)
        (folder / name / "config.yaml").write_text(changed_text)
        for part in ("model", "checkpoints"):
            shutil.copytree(run / part, folder / name / part)
    (folder / "nothing").mkdir()
    (folder / "no_model_file").mkdir()
    (folder / "no_model_file" / "config.yaml").write_text(text)


if __name__ == "__main__":
    here = Path(sys.argv[1]).resolve()
    (here / "my_code.py").write_text(CODE)
    (here / "hostile.py").write_text(f"open({str(here / 'marker')!r}, 'w').close()\n")
    episodes(here / "data")
    hdf5(here / "hdf5")
    weights(here / "weights", here / "run", here / "marker")
    runs(here / "runs", here / "run", here / "marker")
