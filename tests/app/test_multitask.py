"""Runs of several tasks, of a user's own module: online, offline, resumed, scored and loaded."""

import csv
import os
import shlex
import sys

import numpy as np
import pytest
import torch
import yaml
from omegaconf import OmegaConf

import worldloom
from tests.app.official_settings import NO_EFFECT, TDMPC2, By
from tests.app.several_tasks import ONE, SHORT, TASKS, THREE, TRUST, write_module, write_mt
from worldloom.app.compose import compose_config
from worldloom.app.saved_config import env_overrides
from worldloom.trees import flatten_tree

SECTIONS = ("env", "training", "evaluation", "data", "optimizer", "model")
ONLINE = [*SHORT, *TASKS, "training.total_steps=120", "training.log_every=10"]


@pytest.fixture(scope="module")
def module(tmp_path_factory):
    """The folder of the module of the tasks, importable in this process too."""
    folder = write_module(tmp_path_factory.mktemp("module"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def run(module, commands, tmp_path_factory):
    """The folder of a run of four environments, whose printed lines are in `printed`."""
    cwd = tmp_path_factory.mktemp("several")
    words = [*ONLINE, "env.num_envs=4", "evaluation.every=60", "evaluation.episodes_during=2"]
    done = commands.good([*words, f"hydra.run.dir={cwd}/run"], cwd, path=module)
    (cwd / "run" / "printed").write_text(done["out"])
    return cwd / "run"


def test_a_run_trains_on_all_tasks_and_scores_each(run):
    printed = (run / "printed").read_text()
    assert "tasks: 2" in printed and "  one              2 numbers, 1 actions, 5 steps" in printed
    assert "episodes of each task" in printed and "normalized score" in printed
    scores = yaml.safe_load((run / "scores.yaml").read_text())
    one, three = scores["final/one/return"], scores["final/three/return"]
    # Two episodes of each task: of 5 steps, and of 9 frames in 5 steps of 2.
    assert scores["final/one/length"] == scores["final/three/length"] == 5
    assert scores["final/return"] == pytest.approx((one + three) / 2)
    assert scores["final/one/score"] == pytest.approx(100 * one / 5)
    assert scores["final/three/score"] == pytest.approx(100 * scores["final/three/success"])
    mean = (scores["final/one/score"] + scores["final/three/score"]) / 2
    assert scores["final/normalized_score"] == pytest.approx(mean)
    with (run / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    for name in ("eval/one/return", "eval/normalized_score", "episode/three/return", "loss/loss"):
        assert any(row[name] for row in rows), name
    # Frames: 1 and 2 of each step of the two tasks, which are stepped together; an episode of the
    # second one has 9 frames in 5 steps, which are counted as 10.
    last = [row for row in rows if row["env_steps"]][-1]
    assert float(last["frames"]) == 1.5 * float(last["env_steps"]) == 180


def test_the_model_has_the_tasks_and_their_discounts(run, module):
    model = worldloom.create_world_model(run / "model")
    assert list(model.options.action_dims) == [1, 3] and model.options.task_dim == 96
    assert model.obs_shape == {"obs": (4,), "task": (2,)} and model.action_dim == 3
    assert list(model.options.episode_lengths) == [5, 5]
    assert model.tasks.masks.tolist() == [[1, 0, 0], [1, 1, 1]]


def test_a_loaded_run_makes_each_task_and_acts_with_its_mask(run, module):
    saved = worldloom.load_run(run, allow="signs_of_tasks.make")
    agent = saved.agent()
    for name, number, used in (("one", 0, 1), ("three", 1, 3)):
        env = saved.make_env(task=name)
        obs, _ = env.reset(seed=1)
        agent.reset(seed=1)
        assert obs["task"] == number and not obs["obs"][2 * number + 2 :].any()
        action = agent.act(obs)
        assert (action != 0).tolist() == [i < used for i in range(3)]
        assert len(env.step(action)) == 5
    assert saved.make_env().reset(seed=0)[0]["task"] == 0
    with pytest.raises(ValueError, match=r"there is no task 'thre' among env.tasks .*'three'"):
        saved.make_env(task="thre")


def test_eval_prints_every_task_and_the_scores_of_the_run(run, module, commands, tmp_path):
    def score(*words):
        words = [f"checkpoint={run}", *TRUST, *words]
        return commands.run(words, tmp_path, module="worldloom.eval", path=module)

    done, scores = score(), yaml.safe_load((run / "scores.yaml").read_text())
    assert f"  one                      return {scores['final/one/return']:.2f} ±" in done["out"]
    assert f"normalized score {scores['final/normalized_score']:.2f}" in done["out"]
    assert "over 4 episodes" in done["out"]
    done = score(f"env.tasks=[{THREE},{ONE}]")
    assert "was trained on the tasks one, three, but env.tasks has three, one" in done["err"]
    assert done["code"] and len(done["err"].strip().splitlines()) == 1


def test_data_of_mt30s_layout_trains_without_and_with_the_tasks(module, commands, tmp_path):
    (tmp_path / "data").mkdir()
    write_mt(tmp_path / "data" / "a.pt", first=0)
    write_mt(tmp_path / "data" / "b.pt", first=1)
    offline = [*SHORT, "data=offline", f"data.path={tmp_path}/data", "training.total_steps=6"]
    offline += ["data.across_episodes=false"]
    done = commands.good([*offline, f"hydra.run.dir={tmp_path}/none"], tmp_path, path=module)
    assert "6 episodes" in done["out"]
    model = worldloom.create_world_model(tmp_path / "none" / "model")
    assert list(model.options.action_dims) == [1, 3]
    commands.good([*offline, *TASKS, f"hydra.run.dir={tmp_path}/with"], tmp_path, path=module)
    scores = yaml.safe_load((tmp_path / "with" / "scores.yaml").read_text())
    assert {"final/one/return", "final/three/success", "final/normalized_score"} <= {*scores}
    words = [*offline, "env=multitask", f"env.tasks=[{THREE},{ONE}]"]
    done = commands.run(words, tmp_path, path=module)
    assert "one has 1 actions, but its episodes in" in done["err"]
    assert done["code"] and len(done["err"].strip().splitlines()) == 1


@pytest.mark.slow
def test_any_model_that_takes_dicts_can_use_the_tasks(module, commands, tmp_path):
    tiny = ["model=dreamerv3_tiny", "model.deter=16", "model.hidden=8", "model.units=8"]
    words = [*tiny, *TASKS, "training.total_steps=60", "training.batch_size=2", "threads=1"]
    words += ["training.sequence_length=6", "evaluation.every=0", "evaluation.episodes=1"]
    commands.good([*words, f"hydra.run.dir={tmp_path}/run"], tmp_path, path=module)
    scores = yaml.safe_load((tmp_path / "run" / "scores.yaml").read_text())
    assert "final/three/return" in scores


@pytest.mark.slow
def test_a_resumed_run_is_bit_for_bit_the_same(module, commands, tmp_path):
    words = [*ONLINE, "env.workers=2", "checkpoint.every=30updates"]

    def train(name, *more, **kwargs):
        folder = tmp_path / name
        return commands.run([*words, f"hydra.run.dir={folder}", *more], tmp_path, **kwargs)

    whole = train("whole", path=module)
    assert whole["code"] == 0, whole
    train("cut", path=module, kill=("cut/checkpoints/last.ckpt", 9))
    done = commands.run([f"resume={tmp_path}/cut", *TRUST], tmp_path, path=module)
    assert done["code"] == 0, done
    one, two = (worldloom.create_world_model(tmp_path / x / "model") for x in ("whole", "cut"))
    for name, tensor in one.state_dict().items():
        assert torch.equal(tensor, two.state_dict()[name]), name
    scores = [yaml.safe_load((tmp_path / x / "scores.yaml").read_text()) for x in ("whole", "cut")]
    assert scores[0] == scores[1] and np.isfinite(list(scores[0].values())).all()


@pytest.mark.slow
def test_several_processes_divide_the_tasks(module, commands, tmp_path):
    words = [*ONLINE, "env.num_envs=2", "trainer=ddp", "trainer.accelerator=cpu"]
    env = {"PYTHONPATH": os.pathsep.join([str(module), *sys.path])}  # of the second process
    more = {"path": module, "env": env}
    devices = ["trainer.devices=2", f"folder={tmp_path}/run"]
    done = commands.run([*words, *devices], tmp_path, **more)
    assert done["code"] == 0, done
    scores = yaml.safe_load((tmp_path / "run" / "scores.yaml").read_text())
    assert {"final/one/return", "final/three/return", "final/normalized_score"} <= {*scores}
    with (tmp_path / "run" / "metrics.csv").open() as file:
        rows = list(csv.DictReader(file))
    lengths = {row["episode/one/length"] for row in rows} | {
        row["episode/three/length"] for row in rows
    }
    assert {float(x) for x in lengths if x} == {5.0}
    done = commands.run([*words, "trainer.devices=4"], tmp_path, **more)
    assert done["code"] and "env.num_envs is 2, which 4 processes cannot divide" in done["err"]


# What the protocol mt30 sets instead of the settings of experiment=tdmpc2/dmc, with the sources in
# nicklashansen/tdmpc2, commit e9f5932.
MT30 = {
    "env._target_": "worldloom.envs.suites.multitask.make_env",
    "env.tasks": "mt30",  # common/__init__.py: TASK_SET
    "env.num_envs": 30,  # which has no effect offline
    # Those of the suite: 500 decisions of 2 steps (envs/dmcontrol.py).
    **dict.fromkeys(("env.action_repeat", "env.time_limit", "env.frame_stack", "env.pixels")),
    "model.task_dim": 64,  # common/parser.py, for model_size=5
    "data.capacity": None,  # trainer/offline_trainer.py: buffer_size is that of the data
    "data.path": "data",
    "data.episode_length": None,
}
ONLINE_ONLY = ("env.task", "env.camera", "data.online_queue", "data.overlap")


def test_the_mt30_protocol_has_the_official_settings():
    cfg = compose_config("experiment=tdmpc2/mt30", "data.path=data", "trainer=gpu")
    cfg.folder = ""
    plain = OmegaConf.to_container(cfg, resolve=True)
    sections = ("seed", "init_from", "nonfinite", *SECTIONS)
    chosen = {key: plain[key] for key in sections}
    chosen["trainer"] = {"precision": plain["trainer"]["precision"]}
    composed = flatten_tree(chosen, ".")
    rows = {key: row.value for key, row in TDMPC2.items()}
    wanted = {k: v.get("dmc", By) if isinstance(v, By) else v for k, v in rows.items()} | MT30
    wanted = {k: v for k, v in wanted.items() if v is not By and k not in ONLINE_ONLY}
    assert {k: v for k, v in composed.items() if k in wanted or k not in NO_EFFECT} == wanted
    assert plain["name"] == "tdmpc2_mt30" and plain["training"]["total_steps"] == 10_000_000


def test_the_tasks_of_a_dataset_are_printed_as_hydra_reads_them():
    env = OmegaConf.to_container(compose_config(*TASKS).env, resolve=True)
    words = shlex.split(env_overrides(env))
    assert words[0] == "env=multitask"
    assert OmegaConf.to_container(compose_config(*words).env.tasks) == env["tasks"]
