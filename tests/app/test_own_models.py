"""A user's own models, from a package outside the checkout, in every command.

Each model acts by a constant: it pulls the right lever, which pays 1 in each of the 8 steps of an
episode. A model that is loaded as its base class, or as another one, gets another return.
"""

import os
import re
import shlex
import signal
import subprocess

import pytest
import torch
import yaml
from safetensors import safe_open

from worldloom import create_world_model
from worldloom.app.compose import compose_config
from worldloom.app.validation import validate_config
from worldloom.factory import transfer

PACKAGE = '''
import gymnasium
import numpy as np
import torch
from torch import nn
from torch.nn import functional as F

from worldloom import LatentState, Trajectory
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.tdmpc2 import TDMPC2


class Levers(gymnasium.Env):
    observation_space = gymnasium.spaces.Box(-1, 1, (3,), np.float32)
    action_space = gymnasium.spaces.Discrete(3)

    def reset(self, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.np_random.uniform(-1, 1, 3).astype(np.float32), {}

    def step(self, action):
        self.steps += 1
        obs = self.np_random.uniform(-1, 1, 3).astype(np.float32)
        return obs, float(action == 2), False, self.steps == 8, {}


def right(state):
    return F.one_hot(torch.full((len(state),), 2), 3).float()


class Constant(DreamerV3):
    def policy(self, state, deterministic=False):
        return right(state)


class Aux(Constant):
    def __init__(self, *args, aux_scale=0.5, widths=(4, 2), table=None, **kwargs):
        super().__init__(*args, **kwargs)
        assert type(widths) is tuple
        self.aux_scale, self.table = aux_scale, table
        layers = [nn.Linear(self.feature_dim, widths[0]), nn.Linear(*widths)]
        self.probe = nn.ModuleDict({"layers": nn.Sequential(*layers)})
        self.register_buffer("calls", torch.zeros(()))

    def auxiliary_losses(self, batch, features):
        self.calls += 1
        return {"aux": self.aux_scale * self.probe["layers"](features).square().mean(-1)}


class Typed(DreamerV3):
    def __init__(self, *args, depths: int | None = None, horizon=7, **kwargs):
        super().__init__(*args, horizon=horizon, **kwargs)


class Planner(TDMPC2):
    def __init__(self, *args, aux_scale=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.probe = nn.Linear(self.feature_dim, 1)
        self.aux_scale = aux_scale

    def policy(self, state, deterministic=False):
        return right(state), state

    def auxiliary_losses(self, batch, features):
        return {"aux": self.aux_scale * self.probe(features).square().mean()}


class Free(nn.Module):
    """Without a policy: it predicts the reward of the levers and plans."""

    def __init__(self, obs_shape, action_dim, discrete, sizes=(4,), table=None, names=()):
        super().__init__()
        self.config = {"sizes": sizes}  # a name that users take too
        self.given = (sizes, table, names)
        self.encoder = nn.Sequential(*(nn.Linear(obs_shape[0], n) for n in sizes))
        self.parts = nn.ModuleDict({"dynamics": nn.Linear(sizes[0] + action_dim, sizes[0])})
        self.heads = nn.Linear(action_dim, 1)
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))

    def encode(self, obs):
        return LatentState(self.encoder(obs).tanh(), extras={"reward": obs.new_zeros(len(obs), 1)})

    def predict(self, state, action):
        code = self.parts["dynamics"](torch.cat([state.features, action], -1)).tanh()
        return LatentState(code, extras={"reward": action[..., 2:]})

    def observe(self, state, action, obs):
        return self.encode(obs)

    def decode(self, state):
        reward = state.extras["reward"]
        return {"reward": reward, "continue": torch.ones_like(reward)}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        heads = self.decode(LatentState.stack(states[1:]))
        return Trajectory(states, heads["reward"], heads["continue"])

    def compute_loss(self, batch):
        self.calls += 1
        code = self.encoder(batch["obs"])
        loss = code.square().mean() + self.heads(batch["actions"]).square().mean()
        return {"loss": loss, "rows": len(code), "share": np.float32(0.5)}


class Acting(Free):
    def policy(self, state, deterministic=False):
        return right(state)
'''
SHORT = [
    *("env._target_=levers.Levers", "env.num_envs=2", "env.workers=0", "threads=1"),
    *("training.total_steps=48", "training.batch_size=2", "training.sequence_length=4"),
    *("training.prefill=16", "training.random_steps=0", "training.seed_episodes=0"),
    *("training.train_ratio=2", "training.log_every=2", "checkpoint.every=2updates"),
    *("evaluation.episodes=2", "evaluation.every=0", "evaluation.num_envs=2"),
    *("hydra.run.dir=run", "logger.tensorboard=null", "callbacks.open_loop=null"),
]
DREAMER = ["model=dreamerv3_tiny", "model.units=4", "model.deter=8", "model.hidden=4"]
DREAMER += ["model.classes=2", "model.stoch=2", "model.imag_length=2"]
PLANNER = ["model=tdmpc2_tiny", "model.enc_dim=4", "model.mlp_dim=4", "model.latent_dim=16"]
PLANNER += ["model.num_channels=1", "model.num_bins=11"]
AUX = ["+model.aux_scale=0.25", "+model.loss_scales.aux=2"]
CASES = {
    "Constant": DREAMER,
    "Aux": [*DREAMER, *AUX, "+model.widths=[3,2]", "+model.table={a: [1, null], b: {c: x}}"],
    "Planner": [*PLANNER, *AUX],
    "Acting": ["model=custom", "+model.table={a: [1, null]}"],
    "Free": ["model=custom", "+model.sizes=[5]", "+planner.num_samples=64", "+planner.horizon=2"],
}


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    folder = tmp_path_factory.mktemp("somewhere")
    (folder / "levers.py").write_text(PACKAGE)
    return folder


def command_line(printed):
    """The last command line that was printed, as its module and its arguments."""
    lines = re.findall(r"python -m (worldloom\.\w+) (.*)", printed)
    return lines[-1][0], shlex.split(lines[-1][1])


@pytest.mark.parametrize(
    "name",
    [
        "Constant",
        "Aux",
        "Free",
        *(pytest.param(n, marks=pytest.mark.slow) for n in ("Planner", "Acting")),
    ],
)
def test_every_command_uses_the_model_of_the_user(name, package, commands, tmp_path, monkeypatch):
    target = f"levers.{name}"
    words = [*CASES[name], f"model._target_={target}", *SHORT]

    # Training is stopped, and continued and evaluated by the printed commands.
    kill = ("run/checkpoints/last.ckpt", signal.SIGINT)
    stopped = commands.run(words, tmp_path, kill=kill, path=package)
    assert stopped["code"] == 130, stopped["out"] + stopped["err"]
    module, args = command_line(stopped["out"])
    assert module == "worldloom.run" and f"model._target_={target}" in args
    done = commands.good(args, tmp_path, path=package)
    assert "final return 8.0 ± 0.0" in done["out"]
    folder = tmp_path / "run"
    assert yaml.safe_load((folder / "scores.yaml").read_text())["final/return"] == 8
    module, args = command_line(done["out"])
    assert module == "worldloom.eval"
    scored = commands.good(args, tmp_path, module=module, path=package)["out"]
    assert scored.startswith("return 8.00 ± 0.00 over 2 episodes")

    trusted = [f"model._target_={target}", "env._target_=levers.Levers"]
    recorded = ["policy=run", "episodes=2", "out=data", *trusted]
    printed = commands.good(recorded, tmp_path, module="worldloom.collect", path=package)["out"]
    assert "return 8.00 ± 0.00 over 2 new episodes" in printed

    # Without the name nothing is imported, and the message gives the override.
    for module, first in (("worldloom.eval", "checkpoint=run"), ("worldloom.run", "resume=run")):
        failed = commands.run([first, trusted[1]], tmp_path, module=module, path=package)
        assert failed["code"] == 1 and f"if you trust it, add: {trusted[0]}" in failed["err"]

    # In Python.
    monkeypatch.syspath_prepend(package)
    saved = yaml.safe_load((folder / "model" / "config.yaml").read_text())
    assert saved["model"] == target
    models = [
        create_world_model(path, allow=(target,))
        for path in (folder, folder / "model", folder / "checkpoints" / "last.ckpt")
    ]
    for model in models:
        assert f"{type(model).__module__}.{type(model).__name__}" == target
        with pytest.raises(ValueError, match=rf"pass allow=\('{target}',\)"):
            create_world_model(folder)
    fresh = type(models[0])(**models[0].build_config["arguments"])
    assert not transfer(fresh, folder).skipped
    for key, value in fresh.state_dict().items():
        assert torch.equal(value, models[0].state_dict()[key]), key
    if name == "Aux":
        assert models[0].table == {"a": [1, None], "b": {"c": "x"}}
        assert models[0].probe["layers"][0].out_features == 3 and models[0].calls > 0
    if name == "Free":
        assert models[0].given == ((5,), None, ())


@pytest.mark.slow
def test_a_run_starts_from_the_weights_of_a_subclass(package, commands, tmp_path):
    """One process of its own for each command, as a user pastes them."""
    words = [*CASES["Aux"], "model._target_=levers.Aux", *SHORT]

    def call(line):
        env = {**os.environ, "PYTHONPATH": f"{package}:{os.environ.get('PYTHONPATH', '')}"}
        done = subprocess.run(
            line, shell=True, cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    printed = call(f"python -m worldloom.run {shlex.join(words)}")
    (scored,) = re.findall("python -m worldloom.eval .*", printed)
    assert call(scored).startswith("return 8.00 ± 0.00 over 2 episodes")
    words[words.index("hydra.run.dir=run")] = "hydra.run.dir=second"
    printed = commands.good([*words, "init_from=run"], tmp_path, path=package)["out"]
    with safe_open(tmp_path / "run" / "model" / "model.safetensors", "pt") as file:
        count = len(list(file.keys()))
    assert f"{count} of {count} tensors copied" in printed
    assert "loss/aux_loss" in (tmp_path / "run" / "metrics.csv").read_text().splitlines()[0]


@pytest.mark.parametrize(
    ("args", "message"),
    [
        (["+model.aux_scal=1"], r"no hyperparameter 'aux_scal' \(did you mean 'aux_scale'\?\)"),
        (["+model.unitz=8"], r"no hyperparameter 'unitz' \(did you mean 'units'\?\)"),
        (["+model.aux_scale=high"], "'aux_scale' is 'high'; expected float such as 0.5"),
        (["+model.loss_scales.aux=high"], "'loss_scales.aux' is 'high'; expected float"),
        (["model._target_=levers.Auxx"], "model._target_: cannot import 'levers.Auxx'"),
        (
            ["model._target_=levers.Typed", "+model.depths=2.5"],
            "model.depths is 2.5; expected a whole",
        ),
    ],
)
def test_mistakes_in_own_hyperparameters_are_found_before_training(
    args, message, package, monkeypatch
):
    monkeypatch.syspath_prepend(package)
    cfg = compose_config("~experiment", *DREAMER, "model._target_=levers.Aux", *args)
    cfg.folder = ""
    with pytest.raises(ValueError, match=message):
        validate_config(cfg, {"model": "dreamerv3_tiny"})


def test_a_default_that_the_preset_replaces_is_reported(package, monkeypatch, caplog):
    monkeypatch.syspath_prepend(package)
    cfg = compose_config("~experiment", *DREAMER, "model._target_=levers.Typed")
    cfg.folder = ""
    validate_config(cfg, {"model": "dreamerv3_tiny"})
    assert (
        "Typed has the default horizon=7, but the preset dreamerv3_tiny passes 200" in caplog.text
    )
