"""Real runs of each suite through the command's own function: small models, few steps."""

import pytest
import torch
from hydra import compose, initialize_config_dir
from safetensors.torch import load_file

from tests.test_run import SHORT, TINY_MODEL, curve, metrics
from tests.test_run_tdmpc2 import TINY as TDMPC2
from worldloom import create_world_model
from worldloom.presets import config_dir
from worldloom.run import train

DREAMER = ["~experiment", "model=dreamerv3_size1m", *TINY_MODEL, "model.depth=2", *SHORT]
# 200 decisions, and 10 updates of 4 x 8 steps after the first 32.
FEW = ["env.num_envs=2", "env.workers=0", "training.total_steps=200", "training.train_ratio=2"]
FEW += ["training.warmup=0", "callbacks.open_loop.every=0"]
FEW += ["evaluation.episodes=1", "evaluation.every=0"]
PIXELS = (3, 64, 64)
CUP = {"position": (4,), "velocity": (4,)}
SYMBOLS = {"image": (980,), "direction": (4,)}
REACH = {"observation": (10,), "achieved_goal": (3,), "desired_goal": (3,)}

# For each extra: the module that it installs, what is said on the command line, decisions of an
# episode that is cut short, what a model sees, and whether the environment tells of success.
SUITES = {
    "atari": ("ale_py", "env=atari env.time_limit=80", 20, PIXELS, False),
    "box2d": ("Box2D", "env.id=LunarLander-v3 env.time_limit=20", 20, (8,), False),
    "crafter": ("crafter", "env=crafter env.time_limit=80", 80, PIXELS, False),
    "dmc": ("dm_control", "env=dmc env.task=cup-catch env.time_limit=40", 20, CUP, False),
    "metaworld": ("metaworld", "env=metaworld env.time_limit=40", 20, (39,), True),
    "minigrid": ("minigrid", "env=minigrid env.time_limit=20", 20, SYMBOLS, True),
    "mujoco": ("mujoco", "env.id=HalfCheetah-v5 env.time_limit=20", 20, (17,), False),
    "robotics": ("gymnasium_robotics", "env=robotics env.time_limit=20", 20, REACH, True),
}

# Box2D's are errors otherwise, with which its import crashes the interpreter.
pytestmark = pytest.mark.filterwarnings("ignore::DeprecationWarning")


def run(folder, *overrides):
    """Train as `python -m worldloom.run` with these words would; return the final scores."""
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        words = [*overrides, f"folder={folder}"]
        return train(compose("config", words))


def needs(module, extra):
    pytest.importorskip(module, reason=f"needs the extra {extra}")


@pytest.mark.parametrize("suite", SUITES)
def test_a_suite_trains(suite, tmp_path):
    module, words, decisions, shape, success = SUITES[suite]
    needs(module, suite)
    scores = run(tmp_path, *DREAMER, *FEW, *words.split())
    assert {value for _, value in curve(tmp_path, "episode/length")} == {decisions}
    assert metrics(tmp_path)[-1]["updates"] == "10"
    assert scores["final/length"] == decisions and ("final/success" in scores) == success
    assert create_world_model(tmp_path).obs_shape == shape


@pytest.mark.slow
def test_pixels_of_dmc_train(tmp_path, renderer):
    needs("dm_control", "dmc")
    words = ["env=dmc", "env.task=cartpole-swingup", "env.pixels=true", "env.time_limit=20"]
    run(tmp_path, *DREAMER, *FEW, *words, "env.workers=2")
    assert create_world_model(tmp_path).obs_shape == PIXELS


def test_pixels_stay_right_when_an_evaluation_has_ended(tmp_path, renderer):
    words = [
        "env.id=InvertedPendulum-v5",
        "env.pixels=true",
        "env.image_size=32",
        "env.time_limit=20",
    ]
    run(tmp_path, *DREAMER, *FEW, *words, "evaluation.every=60")
    assert len(curve(tmp_path, "eval/return")) > 2
    saved = torch.load(tmp_path / "checkpoints" / "last.ckpt", weights_only=True)
    state = saved["ReplayDataModule"]["buffer"]
    rows = [tail["obs"] for tail in state["tails"] if tail]
    files = [name for name in state["files"] if name.endswith("-rows.safetensors")]
    rows += [load_file(tmp_path / "checkpoints" / "replay" / name)["obs"] for name in files]
    assert sum(map(len, rows)) > 190
    assert (torch.cat(rows).float().std((1, 2, 3)) > 1).all()  # no row is black


@pytest.mark.slow
def test_memory_maze_trains(tmp_path, renderer):
    needs("labmaze", "memory-maze")
    words = ["env=memory_maze", "env.time_limit=30", "env.workers=2", "training.total_steps=120"]
    scores = run(tmp_path, *DREAMER, *FEW, *words)
    assert scores["final/length"] == 30
    assert create_world_model(tmp_path).obs_shape == PIXELS


def test_tdmpc2_trains_on_its_benchmark(tmp_path):
    needs("metaworld", "metaworld")
    words = [*TDMPC2, "env=metaworld", "env.task=mw-reach", "env.num_envs=2"]
    scores = run(tmp_path, *words, "env.time_limit=60", "evaluation.every=0")
    assert scores["final/length"] == 30 and "final/success" in scores
    model = create_world_model(tmp_path)
    assert model.build_config["arguments"]["episode_length"] == 30 and not model.terminates
