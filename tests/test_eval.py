"""Mistakes of `python -m worldloom.eval`; tests/test_run.py scores real runs with it."""

import sys

import pytest
import torch

from worldloom import create_world_model
from worldloom import eval as evaluation
from worldloom.app.run_dir import CONFIG, FORMAT, find_run, read_config
from worldloom.app.saved_config import require_trusted, resolve_saved


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            evaluation.main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def run(tmp_path):
    """A folder that looks like a run without a model."""
    (tmp_path / "config.yaml").write_text(
        f"format: {FORMAT}\n"
        "seed: 0\nthreads: 1\nplanner: {_target_: worldloom.planning.CEM}\n"
        "model: {_target_: worldloom.models.dreamerv3.DreamerV3}\n"
        "env: {_target_: worldloom.envs.suites.gymnasium.make_env, id: CartPole-v1, num_envs: 2,"
        " workers: 0, image_size: null, pixels: false, action_repeat: 1, time_limit: null}\n"
    )
    return tmp_path


def test_without_arguments_it_tells_how_to_use_it(command):
    code, out, _ = command()
    assert code == 2 and "usage: worldloom eval checkpoint=<run folder>" in out
    assert command("--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["episodes=3"], "no run was named; add checkpoint=<run folder>"),
        (["checkpoint=no/such/run"], "no/such/run contains no config.yaml; expected a folder"),
        (["checkpoint=RUN", "video="], "video is empty; expected the name of a file"),
        (["checkpoint=RUN", "device=gpu"], "device is 'gpu' (did you mean 'cuda'?); expected one"),
        (["checkpoint=RUN", "episode=3"], "unknown key 'episode' (did you mean 'episodes'?)"),
        (["checkpoint=RUN", "zzz"], "cannot read 'zzz'; expected arguments such as"),
        (["checkpoint=RUN", "episodes=0"], "episodes is 0; expected at least 1"),
        (["checkpoint=RUN", "episodes=few"], "episodes is 'few'; expected a whole number"),
        (["checkpoint=RUN", "num_envs=-1"], "num_envs is -1; expected at least 1"),
        (["checkpoint=RUN", "env.idd=Pendulum-v1"], "key 'env.idd' (did you mean 'env.id'?)"),
        (["checkpoint=RUN", "env=Pendulum-v1"], "; write env=gymnasium env.id=Pendulum-v1"),
        (["checkpoint=RUN", "env=none", "video=x.gif"], "there is no environment; name one: env="),
        (["checkpoint=RUN", "env.id=Nothing-v0"], "There is no environment 'Nothing-v0'"),
        (["checkpoint=RUN"], "RUN contains no model.safetensors; expected a folder written by"),
        (["checkpoint=RUN/model"], "no file or folder 'RUN/model'"),
        (["checkpoint=RUN/checkpoints/last.ckpt"], "no file or folder 'RUN/checkpoints/last.ckpt'"),
    ],
)
def test_a_mistake_ends_in_one_line(command, run, arguments, message):
    code, out, err = command(*[a.replace("RUN", str(run)) for a in arguments])
    assert code == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message.replace("RUN", str(run)) in line


@pytest.mark.parametrize("name", ["saved", "model"])
def test_a_saved_model_is_no_run(command, tmp_path, name):
    model = create_world_model("tdmpc2:1m", obs_shape=(4,), action_dim=2, discrete=True)
    model.save_pretrained(tmp_path / name)
    code, _, err = command(f"checkpoint={tmp_path / name}")
    assert code == 1 and f"{tmp_path / name} is a saved model without a run; expected" in err
    assert f"create_world_model('{tmp_path / name}')" in err
    assert "such as runs/cartpole/" in command(f"checkpoint={tmp_path / 'other'}")[2]


def test_the_device_of_the_model_is_chosen(command, run, monkeypatch):
    monkeypatch.setattr("worldloom.devices.require_device", torch.device)
    made = []
    monkeypatch.setattr(
        "worldloom.app.saved_run.load_actor", lambda *args: made.append(args[3]) or 1 / 0
    )
    with pytest.raises(ZeroDivisionError):
        command(f"checkpoint={run}", "device=cuda:1")
    assert made == [torch.device("cuda:1")]


# ---- what a file may name ------------------------------------------------------------------------

SHIPPED = {
    "model": {"_target_": "worldloom.models.tdmpc2.TDMPC2"},
    "env": {"_target_": "worldloom.envs.suites.dmc.make_env", "task": "walker-walk"},
    "callbacks": {"open_loop": {"_target_": "worldloom.training.callbacks.OpenLoop"}, "no": None},
    "trainer": {"_target_": "lightning.Trainer", "gradient_clip_val": "${training.grad_clip}"},
    "training": {"grad_clip": 1.0},
}


def trusted(saved, overrides):
    require_trusted(resolve_saved(saved, "config.yaml"), overrides)


def read_run(path):
    run = find_run(path)
    return resolve_saved(read_config(run), run / CONFIG)


def test_what_worldloom_ships_needs_no_word():
    trusted(SHIPPED, [])


@pytest.mark.parametrize(
    ("section", "key"),
    [
        ({"trainer": {"plugins": [{"_target_": "os.system"}]}}, "trainer.plugins.0._target_"),
        ({"logger": {"a": {"b": {"_target_": "os.system"}}}}, "logger.a.b._target_"),
        # Hydra would walk from our module to what it imports.
        ({"model": {"_target_": "worldloom.app.compose.os.system"}}, "model._target_"),
        ({"optimizer": {"_target_": "worldloom.training.optimizers"}}, "optimizer._target_"),
        ({"env": {"id": "evil:Env-v0"}}, "env.id"),
        ({"env": {"task": "evil:Env-v0"}}, "env.task"),
    ],
)
def test_code_from_elsewhere_needs_the_users_word(section, key):
    with pytest.raises(ValueError, match=f"if you trust it, add: {key}=") as refused:
        trusted({**SHIPPED, **section}, ["model._target_=my_pkg.Other", "seed=1"])
    word = str(refused.value).rpartition(": ")[2]
    trusted({**SHIPPED, **section}, [word])
    trusted({**SHIPPED, **section}, [f"++{word}"])


@pytest.mark.parametrize(
    ("section", "message"),
    [
        ({"name": "${oc.env:HOME}"}, r"name in .* is '\$\{oc.env:HOME\}'; expected a value"),
        (
            {"name": r"\${oc.env:HOME}"},
            "expected a value, or a reference",
        ),  # escaped until it is read again
        ({"name": "${training.${oc.env:HOME}}"}, "expected a value, or a reference"),
        (
            {"name": "os.system", "model": {"_target_": "${name}"}},
            "model._target_ in .* expected a value",
        ),
        ({"defaults": ["evil"]}, "has 'defaults', which is no setting of a run"),
        (
            {"hydra": {"searchpath": ["file:///evil"]}},
            "has 'hydra', which is no setting of a run",
        ),
        ({"name": "${no.such.key}"}, "cannot be resolved"),
    ],
)
def test_a_saved_configuration_looks_at_nothing_but_itself(section, message):
    with pytest.raises(ValueError, match=message):
        trusted({**SHIPPED, **section}, [])


def test_a_saved_configuration_is_resolved_where_it_lies(run):
    with (run / "config.yaml").open("a") as file:
        file.write("folder: /elsewhere\nlog: ${folder}/log\n")
    config = read_run(run)
    assert config["folder"] == str(run) and config["log"] == f"{run}/log"
    assert read_run(run / "config.yaml") == read_run(run / "model") == config
