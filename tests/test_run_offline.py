"""Training on recorded episodes alone: real small runs, with and without an environment."""

import csv
import os
import re
import sys
from ast import literal_eval
from contextlib import suppress
from pathlib import Path

import numpy as np
import pytest
import torch
from hydra.core.hydra_config import HydraConfig
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from worldloom import create_world_model, load_run, run
from worldloom import eval as evaluation
from worldloom.app.compose import compose_config
from worldloom.app.saved_config import adopt_dataset_env, env_overrides
from worldloom.app.validation import validate_config
from worldloom.collect import CollectConfig, collect
from worldloom.datasets import open_dataset
from worldloom.replay.block_files import BlockFiles
from worldloom.replay.row_format import row_bytes

DREAMER = ["model=dreamerv3_size1m", "model.deter=32", "model.hidden=8", "model.units=8"]
DREAMER += ["model.classes=4", "model.stoch=4", "model.imag_length=5"]
TDMPC2 = ["model=tdmpc2_tiny", "model.enc_dim=16", "model.mlp_dim=16", "model.latent_dim=16"]
TDMPC2 += ["model.num_samples=16", "model.num_elites=4", "model.num_pi_trajs=4"]
SHORT = ["threads=1", "training.total_steps=6", "training.batch_size=4", "training.log_every=2"]
SHORT += ["evaluation.episodes=2", "evaluation.num_envs=2", "training.sequence_length=4"]


@pytest.fixture(scope="module", autouse=True)
def no_command_before():
    """Forget what another module's commands composed in this process."""
    HydraConfig.instance().cfg = None


def record(out, *env, episodes=6):
    return collect(CollectConfig("random", episodes, str(out)), ["env=gymnasium", *env])


@pytest.fixture(scope="module")
def pendulum(tmp_path_factory):
    """Six episodes of eight steps with continuous actions."""
    out = tmp_path_factory.mktemp("data") / "pendulum"
    record(out, "env.id=Pendulum-v1", "env.time_limit=8", "env.workers=0")
    return out


@pytest.fixture(scope="module")
def cartpole(tmp_path_factory):
    """Six episodes of CartPole with choices."""
    out = tmp_path_factory.mktemp("data") / "cartpole"
    record(out, "env.id=CartPole-v1", "env.workers=0")
    return out


def train(folder, data, *words):
    """Run one training in this process and return its scores."""
    folder.mkdir(exist_ok=True)
    offline = ["data=offline", f"data.path={data}", "~experiment", f"folder={folder}"]
    cfg = compose_config(*offline, *SHORT, *words)
    validate_config(cfg, {})
    return run.train(cfg)


def metrics(folder, name):
    with (folder / "metrics.csv").open(newline="") as file:
        return [(int(row["step"]), float(row[name])) for row in csv.DictReader(file) if row[name]]


# ---- the command ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def finished(commands, cartpole, tmp_path_factory):
    """DreamerV3 on CartPole's episodes, as a user would: (the run's folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("cwd")
    words = ["data=offline", f"data.path={os.path.relpath(cartpole, cwd)}", *DREAMER, *SHORT]
    words += ["evaluation.every=4", "evaluation.episodes_during=2", "callbacks.open_loop.every=3"]
    words += ["training.total_steps=10", "hydra.run.dir=r"]
    return cwd / "r", commands.good(words, cwd)["out"]


def test_the_environment_comes_from_the_data(finished, cartpole):
    config = OmegaConf.load(finished[0] / "config.yaml")
    assert config.env == open_dataset(cartpole).env
    assert config.data.path == str(cartpole)  # found again from any folder


def test_the_default_recipe_is_not_taken(finished):
    config = OmegaConf.load(finished[0] / "config.yaml")
    assert config.name == "run" and config.data.capacity is None and config.training.anneal == 0


def test_the_x_axis_is_updates(finished):
    folder, _ = finished
    assert [step for step, _ in metrics(folder, "loss/loss")] == [2, 4, 6, 8, 10]
    assert all(step == count for step, count in metrics(folder, "updates"))
    assert [step for step, _ in metrics(folder, "eval/return")] == [4, 8, 10]
    board = EventAccumulator(str(folder), {"images": 0})
    board.Reload()
    assert [e.step for e in board.Images("imagination/open_loop")] == [3, 6, 9, 10]


def test_the_replay_is_the_data_set(finished, cartpole):
    data = open_dataset(cartpole)
    folder, printed = finished
    assert {size for _, size in metrics(folder, "replay/size")} == {data.steps + len(data)}
    returns = [e.rewards.sum() for e in data]
    told = f"return {np.mean(returns):.1f} ± {np.std(returns):.1f}"
    assert f"data: 6 episodes of {cartpole}, {data.steps + 6} rows, {told}\n" in printed
    assert "environments:" not in printed


def test_it_ends_with_what_came_out(finished):
    folder, printed = finished
    match = re.search(
        r"final return (\S+) ± \S+ \(2 episodes\) of the best model, from update (\d+)\n", printed
    )
    assert match[1] == f"{metrics(folder, 'final/return')[-1][1]:.1f}" and match[2] in "4 8 10"
    assert f"python -m worldloom.eval checkpoint={folder}\n" in printed


def test_what_training_remembers_is_written_back(finished):
    """The latents of the replay start as zeros and become those of the model."""
    checkpoint = torch.load(finished[0] / "checkpoints" / "last.ckpt", weights_only=True)
    state = checkpoint["ReplayDataModule"]["buffer"]
    folder = finished[0] / "checkpoints" / "replay"
    layout = {name: x.partition("(") for name, x in state["layout"].items() if "fields" in name}
    fields = {name: (literal_eval("(" + x[2]), np.dtype(x[0])) for name, x in layout.items()}
    files, size = BlockFiles(folder), sum(row_bytes(*field) for field in fields.values())
    blocks = []
    for name, crc in state["files"].items():
        rows = (folder / name).stat().st_size // size
        blocks.append(torch.tensor(files.read(name, crc, fields, rows)["fields['deter']"]))
    blocks += [tail["fields['deter']"] for tail in state["tails"] if tail]
    written = torch.cat([block.float().abs().sum(1) for block in blocks]) > 0
    assert written.any() and not written.all()


def command(module, monkeypatch, capsys, *words):
    monkeypatch.setattr(sys, "argv", [module.__name__, *map(str, words)])
    with suppress(SystemExit):
        module.main()
    return "".join(capsys.readouterr())


def test_the_run_is_scored_and_collected_with_like_any_other(
    finished, tmp_path, monkeypatch, capsys
):
    folder, _ = finished
    words = [f"checkpoint={folder}", "episodes=2", "num_envs=2"]
    final = metrics(folder, "final/return")[-1][1]
    assert f"return {final:.2f} ± " in command(evaluation, monkeypatch, capsys, *words)
    collect(CollectConfig(str(folder), 2, str(tmp_path / "more")), ["env.time_limit=4"])
    assert open_dataset(tmp_path / "more").lengths == [4, 4]


# ---- both families, whole or in part, with an environment and without ----------------------------


def test_without_an_environment(pendulum, tmp_path, monkeypatch, capsys):
    assert train(tmp_path, pendulum, *DREAMER, "env=none", "evaluation.every=2") == {}
    printed = capsys.readouterr().out
    assert "there was no environment, so nothing was evaluated\n" in printed
    with (tmp_path / "metrics.csv").open() as file:
        assert not re.search("eval/|final/", file.read())
    model = create_world_model(tmp_path)  # the last one: nothing says which was best
    checkpoint = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    assert torch.equal(model.rssm.gru.weight, checkpoint["state_dict"]["model.rssm.gru.weight"])
    words = [f"checkpoint={tmp_path}", "episodes=1"]
    printed = command(evaluation, monkeypatch, capsys, *words)
    assert "error: there is no environment; name one: env=gymnasium" in printed
    other = ["env=gymnasium", "env.id=Pendulum-v1", "env.time_limit=3"]
    assert "mean length 3.0" in command(evaluation, monkeypatch, capsys, *words, *other)


def test_a_world_model_alone_is_planned_with(pendulum, tmp_path):
    planner = ["+planner.num_samples=4", "+planner.num_elites=2", "+planner.horizon=2"]
    scores = train(tmp_path, pendulum, *DREAMER, "model.actor_critic=false", *planner)
    assert scores["final/length"] == 8
    assert metrics(tmp_path, "loss/reconstruction_loss")
    with (tmp_path / "metrics.csv").open() as file:
        assert "policy_loss" not in file.read()


@pytest.mark.parametrize("env", [[], ["env=none"]], ids=["with", "without"])
def test_tdmpc2(pendulum, tmp_path, env, capsys):
    scores = train(tmp_path, pendulum, *TDMPC2, *env)
    assert scores.get("final/length") == (None if env else 8)
    assert metrics(tmp_path, "updates")[-1] == (6, 6)
    # Without an environment the longest episode stands for its time limit.
    assert create_world_model(tmp_path).build_config["arguments"]["episode_length"] == 8
    lines = dict(re.findall(r"^([a-z ]+ it): +(.+)$", capsys.readouterr().out, re.MULTILINE))
    if env:
        assert "score it" not in lines and "act with it" not in lines
        exec(lines["load it"], {})
        with pytest.raises(ValueError, match="trained without an environment, so there is none"):
            load_run(tmp_path)
    else:
        exec(lines["act with it"], {})


def test_a_named_environment_is_used(pendulum, tmp_path):
    env = ["env=gymnasium", "env.id=Pendulum-v1", "env.time_limit=5"]
    assert train(tmp_path, pendulum, *TDMPC2, *env)["final/length"] == 5


def test_minari(tmp_path, pendulum):
    minari = pytest.importorskip("minari", reason="needs the extra offline")
    pytest.importorskip("h5py", reason="needs the extra offline")
    import gymnasium as gym

    env = gym.make("Pendulum-v1")
    buffers = [
        minari.data_collector.EpisodeBuffer(
            observations=episode.obs,
            actions=2 * episode.actions,
            rewards=episode.rewards.tolist(),
            terminations=[False] * 8,
            truncations=[False] * 7 + [True],
        )
        for episode in open_dataset(pendulum)
    ]
    storage = minari.dataset.minari_storage.MinariStorage.new(
        tmp_path / "data", env.observation_space, env.action_space
    )
    storage.update_episodes(buffers)
    about = {"dataset_id": "own/pendulum-v0", "minari_version": minari.__version__}
    storage.update_metadata(about)
    named = ["env=gymnasium", "env.id=Pendulum-v1", "env.time_limit=5"]
    assert train(tmp_path / "r", tmp_path, *TDMPC2, *named)["final/length"] == 5
    assert train(tmp_path / "none", tmp_path, *TDMPC2) == {}


def test_hdf5(tmp_path, pendulum):
    h5py = pytest.importorskip("h5py", reason="needs the extra offline")
    episodes = list(open_dataset(pendulum))
    with h5py.File(tmp_path / "a.hdf5", "w") as file:
        file["observations"] = np.concatenate([e.obs[:-1] for e in episodes])
        file["next_observations"] = np.concatenate([e.obs[1:] for e in episodes])
        file["actions"] = 2 * np.concatenate([e.actions for e in episodes])
        file["rewards"] = np.concatenate([e.rewards for e in episodes])
        file["terminals"] = np.zeros(48, bool)
    named = ["env=gymnasium", "env.id=Pendulum-v1", "env.time_limit=5"]
    assert train(tmp_path / "r", tmp_path, *DREAMER, *named)["final/length"] == 5
    with pytest.raises(ValueError, match=r"a.hdf5, rows 0 to 7: The action .* \(env=…\)"):
        train(tmp_path / "other", tmp_path, *DREAMER)


# ---- what is kept, and what is refused -----------------------------------------------------------


def test_a_smaller_capacity_keeps_the_first_episodes_and_says_so(pendulum, tmp_path, capsys):
    train(tmp_path, pendulum, *TDMPC2, "env=none", "data.capacity=20")
    printed = capsys.readouterr().out
    assert "data: the first 2 of 6 episodes (data.capacity has no room for more) of" in printed
    assert metrics(tmp_path, "replay/size")[-1][1] == 18


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["env=cartpole"],
            r"has observations \(3,\) and 1 continuous actions, but the environment",
        ),
        (["training.sequence_length=60"], r"needs 61 rows, but .* has 54 .* longest episode 9"),
        (["data.capacity=8"], r"first episode of .* has 8 steps, but the replay holds 8; raise"),
        (["data.capacity=1e13"], r"but the machine has .* lower data.capacity"),
        (["data.path=gone"], "no file or folder gone"),
    ],
)
def test_what_cannot_be_trained_on(pendulum, tmp_path, words, message):
    with pytest.raises((ValueError, FileNotFoundError), match=message):
        train(tmp_path, pendulum, *DREAMER, *words)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["env=none"], "there is no environment; name one: env=gymnasium env.id="),
        (["env=from_data"], "there is no environment; name one"),
        (["data.capacity=null"], "data.capacity is null; expected steps or memory"),
    ],
)
def test_a_run_that_collects_needs_more(tmp_path, words, message):
    with pytest.raises(ValueError, match=message):
        run.train(compose_config(*DREAMER, *SHORT, f"folder={tmp_path}", *words))


def test_the_path_must_be_given():
    with pytest.raises(ValueError, match=r"data.path is not set; add data.path=…"):
        validate_config(compose_config("data=offline", "~experiment", "folder=x"), {})


@pytest.mark.parametrize(
    ("words", "added"),
    [
        ("data=offline data.path=x", True),
        ("-m data=offline seed=0,1 sweep=x hydra.run.dir=my_experiment=1", True),
        ("data=offline experiment=pendulum", False),
        ("data=offline ~experiment", False),
        ("data=online", False),
        ("", False),
    ],
)
def test_an_offline_run_leaves_the_default_recipe_out(monkeypatch, words, added):
    monkeypatch.setattr(sys, "argv", ["run.py", *words.split()])
    monkeypatch.setattr(run, "_hydra_main", lambda: None)
    run.main()
    if added:  # side by side, for nothing may stand between overrides and behind an option
        words = words.replace("data=offline", "~experiment data=offline")
    assert sys.argv == ["run.py", *words.split()]


# ---- which environment ---------------------------------------------------------------------------

OURS = {"_target_": "worldloom.envs.suites.gymnasium.make_env", "id": "CartPole-v1", "num_envs": 4}


def settled(path, env, about=None):
    if about is not None:
        OmegaConf.save({"format": 1, "env": about}, Path(path) / "dataset.yaml")
    plain = {"env": dict(env), "data": {"path": str(path)}}
    adopt_dataset_env(plain)
    return plain["env"]


def test_the_environment_is_that_of_the_data_if_it_is_known(tmp_path):
    unnamed = {"_target_": None, "from_data": True}
    assert settled(tmp_path, unnamed) == {"_target_": None}
    assert settled(tmp_path, unnamed, OURS) == OURS
    assert settled(tmp_path, unnamed | {"num_envs": 2}) == OURS | {"num_envs": 2}
    assert settled(tmp_path, {"_target_": "a.b", "level": 1}) == {"_target_": "a.b", "level": 1}
    assert settled(tmp_path, {"_target_": None}) == {"_target_": None}  # env=none


@pytest.mark.parametrize(
    "env",
    [
        {"_target_": "os.system", "command": "true"},
        {"_target_": "worldloom.envs.suites.gymnasium.importlib.import_module", "name": "evil"},
        {"_target_": "worldloom.envs.suites.gymnasium.make_env", "id": "evil:Env-v0"},
    ],
)
def test_data_do_not_choose_which_code_is_run(tmp_path, env):
    with pytest.raises(ValueError, match=r"names an environment whose code is not part of worldl"):
        settled(tmp_path, {"_target_": None, "from_data": True}, env)


def test_what_a_user_says_to_trust_it():
    env = {"_target_": "my.make", "num_envs": 3, "level": 2, "image_size": None}
    env["obs"] = {"keep": "a"}
    assert env_overrides(env) == "env=custom env._target_=my.make ++env.level=2 ++env.obs.keep=a"
    module = OURS | {"id": "evil:Env-v0"}
    assert env_overrides(module) == "env=gymnasium ++env.id=evil:Env-v0"
    assert env_overrides(OURS) == ""
