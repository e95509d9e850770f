"""The published protocols: every setting is the official one, and each of them trains."""

import csv
import re
import sys

import pytest
from omegaconf import OmegaConf

from tests.app.official_settings import NO_EFFECT, SOURCES, TABLES, By
from worldloom.app.command_line import explain_error
from worldloom.app.compose import compose_config
from worldloom.app.forecast import FEWEST
from worldloom.app.task import Task
from worldloom.app.unsupported import require_family
from worldloom.envs.suites import atari, crafter, dmc, memory_maze, metaworld
from worldloom.presets import choice_files
from worldloom.trees import flatten_tree

RECIPES = [
    name
    for name in choice_files("experiment")
    if "/" in name and not name.endswith("_base") and name != "tdmpc2/mt30"  # test_multitask.py
]
SECTIONS = ("env", "training", "evaluation", "data", "optimizer", "model")
# Module, and extra, of the simulator that a protocol needs.
NEEDS = {
    **dict.fromkeys(("dmc_proprio", "dmc_vision", "dmc", "dmc_pixels"), ("dm_control", "dmc")),
    **dict.fromkeys(("atari100k", "atari"), ("ale_py", "atari")),
    "crafter": ("crafter", "crafter"),
    "metaworld": ("metaworld", "metaworld"),
    "mujoco": ("mujoco", "mujoco"),
    "memory_maze": ("memory_maze", "memory-maze"),
}


def settings(*words):
    """Return what a command line sets, flat, with the values that environments put for null."""
    cfg = compose_config(*words)
    cfg.folder = ""
    plain = OmegaConf.to_container(cfg, resolve=True)
    env = plain["env"]
    suite = env["_target_"].split(".")[-2]
    limits = {"dmc": dmc.LENGTH, "crafter": crafter.LENGTH, "metaworld": metaworld.LENGTH}
    limits["memory_maze"] = memory_maze.LENGTHS["9x9"]
    if suite == "atari":
        rules = vars(atari.PROTOCOLS[env["protocol"]])
        env |= {key: rules[key] for key in rules if env[key] is None}
    elif suite == "gymnasium":
        gymnasium = pytest.importorskip("gymnasium")
        env["time_limit"] = env["time_limit"] or gymnasium.spec(env["id"]).max_episode_steps
    else:
        env["time_limit"] = env["time_limit"] or limits[suite]
    if suite == "crafter":
        env["image_size"] = env["image_size"] or 64
    chosen = {key: plain[key] for key in ("name", "seed", "init_from", "nonfinite", *SECTIONS)}
    chosen["trainer"] = {"precision": plain["trainer"]["precision"]}
    return flatten_tree(chosen, ".")


def official(recipe):
    """Return the official value of every setting that a protocol has."""
    family, _, name = recipe.partition("/")
    rows = {key: row.value for key, row in TABLES[family].items()}
    values = {k: v.get(name, By) if isinstance(v, By) else v for k, v in rows.items()}
    return {key: value for key, value in values.items() if value is not By} | {
        "name": f"{family}_{name}"  # one folder, runs/NAME
    }


@pytest.mark.parametrize("recipe", RECIPES)
def test_every_setting_is_the_official_one(recipe):
    composed, table = settings(f"experiment={recipe}", "trainer=gpu"), official(recipe)
    assert all(row.source for row in TABLES[recipe.partition("/")[0]].values())
    for key in {**NO_EFFECT, **composed}:
        if key in NO_EFFECT and key not in table:
            composed.pop(key)
    assert composed == table


def test_all_families_have_their_protocols_and_sources():
    expected = {"dreamerv3": 5, "tdmpc2": 4, "r2dreamer": 6}
    assert {*SOURCES} == {*TABLES} == {*expected}
    for family, least in expected.items():
        assert sum(recipe.startswith(f"{family}/") for recipe in RECIPES) >= least


def test_a_setting_can_be_changed_on_top():
    before = settings("experiment=dreamerv3/dmc_proprio")
    words = ["env.task=cartpole-swingup", "model=dreamerv3_size12m", "seed=3", "env.num_envs=2"]
    after = settings("experiment=dreamerv3/dmc_proprio", *words)
    changed = {key for key in before if before[key] != after[key]}
    sizes = {f"model.{key}" for key in ("units", "depth", "deter", "hidden", "classes")}
    assert changed == {"env.task", "seed", "env.num_envs"} | sizes


FAMILIES = [
    ("dreamerv3/crafter", "tdmpc2_1m", True),
    ("dreamerv3/crafter", "tdmpc-large", True),
    ("tdmpc2/dmc", "dreamer", True),
    ("tdmpc2/dmc", "tdmpc", False),
    ("tdmpc2/dmc", "custom", False),  # whose hyperparameters nobody knows
    ("tdmpc2/dmc", None, False),  # a resumed run
    ("pendulum", "tdmpc2_1m", False),
    ("mine/pendulum", "tdmpc2_1m", False),
    (None, "tdmpc2_1m", False),
]


@pytest.mark.parametrize(("recipe", "model", "rejected"), FAMILIES)
def test_a_protocol_takes_models_of_its_family(recipe, model, rejected):
    if not rejected:
        return require_family(recipe, model)
    family = recipe.partition("/")[0]
    with pytest.raises(ValueError, match=f"{model}, but .*={recipe} .* expected a {family} model"):
        require_family(recipe, model)


ONE_OF_EACH = ("tdmpc2/dmc", "dreamerv3/atari", "dreamerv3/crafter", "tdmpc2/metaworld")


@pytest.mark.parametrize("recipe", [*ONE_OF_EACH, "tdmpc2/mujoco"])
def test_a_missing_simulator_is_one_line(recipe, monkeypatch, tmp_path):
    module, extra = NEEDS[recipe.partition("/")[2]]
    names = [name for name in sys.modules if name.partition(".")[0] == module]
    for name in {module, *names}:
        monkeypatch.setitem(sys.modules, name, None)
    for name in [name for name in sys.modules if name.startswith("gymnasium.envs.mujoco")]:
        monkeypatch.delitem(sys.modules, name)  # it may hold the module
    cfg = compose_config(f"experiment={recipe}", f"folder={tmp_path}")
    with pytest.raises(
        (ValueError, ImportError), match=rf"pip install '?worldloom\[{extra}\]"
    ) as raised:
        Task.from_config(OmegaConf.to_container(cfg.env))
    assert len(explain_error(raised.value).splitlines()) == 1


TINY = [
    *("model.deter=16", "model.units=8", "model.hidden=8"),
    *("model.classes=4", "model.stoch=4", "model.depth=2"),
]
SHORT = {
    "dreamerv3": ["model=dreamerv3_size1m", *TINY],
    "r2dreamer": ["model=r2dreamer_size1m", *TINY],
    "tdmpc2": [
        *("model=tdmpc2_1m", "model.enc_dim=8", "model.mlp_dim=8", "model.latent_dim=16"),
        *("model.num_channels=1", "model.num_samples=12", "model.num_elites=3"),
        *("model.num_pi_trajs=3", "training.seed_episodes=0", "training.prefill=100"),
        *("training.random_steps=100", "training.total_steps=300", "env.time_limit=100"),
    ],
}
# Decisions by the number of environments: a few after the start of training.
STEPS = {1: "training.total_steps=1100", 16: "training.total_steps=2080"}


# Minutes each in a software renderer, whose environments other recipes and tests step.
RENDERED = ("r2dreamer/dmc_vision", "r2dreamer/metaworld", "r2dreamer/memory_maze")


@pytest.mark.slow
@pytest.mark.parametrize("recipe", [name for name in RECIPES if name not in RENDERED])
def test_a_protocol_trains_and_resumes(commands, tmp_path, recipe, request):
    """A few hundred steps of a tiny model, interrupted once."""
    family, _, name = recipe.partition("/")
    pytest.importorskip(NEEDS[name][0], reason=f"needs the extra {NEEDS[name][1]}")
    if "pixels" in name or official(recipe).get("env.pixels"):
        request.getfixturevalue("renderer")
    words = [f"experiment={recipe}", *SHORT[family], "threads=1", "evaluation.episodes=1"]
    if family != "tdmpc2":
        words += [STEPS[official(recipe)["env.num_envs"]], "env.time_limit=400"]
    paused = commands.good([*words, "+trainer.max_steps=1"], tmp_path)
    (line,) = re.findall(r"^[\d,]+ updates to come.*$", paused["out"], re.MULTILINE)
    few = int(line.partition(" ")[0].replace(",", "")) < FEWEST  # too few to measure the time
    assert few or re.search(r", about [\d.]+ \w+ \(.* in \d+ environments\)$", line)
    found = commands.run([*words, "+trainer.max_steps=1", "resume=auto"], tmp_path)
    assert "already has 1 updates" in found["err"]
    (run,) = (tmp_path / "runs").glob("*/*")
    assert run.parent.name == f"{family}_{name}"
    assert f"continuing runs/{run.parent.name}/{run.name}" in found["out"]
    commands.good([f"resume={run}", "trainer.max_steps=-1"], tmp_path)
    with (run / "metrics.csv").open(newline="") as file:
        updates = [int(row["updates"]) for row in csv.DictReader(file)]
    assert (run / "scores.yaml").exists() and updates[-1] > 1
