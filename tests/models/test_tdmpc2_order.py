"""The order of vectors in TD-MPC2: official weights, saved models and resumed runs."""

import re

import numpy as np
import pytest
import torch
import torch.nn.functional as F

from tests.test_factory_transfer import SMALL, as_official, small
from worldloom import create_world_model
from worldloom.app.task import Task
from worldloom.factory import transfer
from worldloom.models.tdmpc2.vector_order import FIRST, find_official_order
from worldloom.presets import load_preset

ABC = {"a": (1,), "b": (2,), "c": (3,)}
FINGER = {"position": (4,), "touch": (2,), "velocity": (3,)}  # sorted, as in gymnasium


def official_file(folder, width, action_dim=2):
    """Write official weights that read a flat vector, with values that are not small."""
    model = small((width,), action_dim, mpc=False)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return as_official(model, folder / "official.pt")


def official_outputs(file, vectors):
    """Return latents and actions of flat vectors [N, width], computed from the official tensors."""
    state = torch.load(file, weights_only=False)["model"]

    def layer(name, x):
        return F.linear(x, state[f"{name}.weight"], state[f"{name}.bias"])

    def normed(name, x):
        weight, bias = state[f"{name}.ln.weight"], state[f"{name}.ln.bias"]
        return F.layer_norm(layer(name, x), weight.shape, weight, bias)

    x = torch.from_numpy(vectors)
    z = normed("_encoder.state.1", F.mish(normed("_encoder.state.0", x)))
    z = z.unflatten(-1, (-1, 8)).softmax(-1).flatten(-2)
    hidden = F.mish(normed("_pi.1", F.mish(normed("_pi.0", z))))
    return z, layer("_pi.2", hidden).chunk(2, -1)[0].tanh()


def outputs(model, obs):
    """Return latents and actions of dict observations, whatever the order of their keys."""
    state = model.eval().encode({key: torch.from_numpy(value) for key, value in obs.items()})
    return state.deterministic, model.policy(state, deterministic=True)[0]


def build(task, **options):
    """Build a model as runs do."""
    return task.build_model({**load_preset("tdmpc2:1m"), **SMALL, **options})


@pytest.mark.parametrize("name", ["walker-walk", "dog-run"])
def test_official_weights_act_as_officially_in_official_environments(name, tmp_path):
    pytest.importorskip("dm_control", reason="needs the extra dmc")
    from dm_control import suite

    task = Task.from_config({"_target_": "worldloom.envs.suites.dmc.make_env", "task": name})
    official = suite.load(*name.split("-"), task_kwargs={"random": 3})
    steps = [official.reset()]
    steps += [official.step(np.full(official.action_spec().shape, 0.3)) for _ in range(3)]
    parts = [{k: np.atleast_1d(x) for k, x in step.observation.items()} for step in steps]
    flat = np.stack([np.concatenate([*part.values()]) for part in parts]).astype(np.float32)
    obs = {key: np.float32([part[key] for part in parts]) for key in sorted(parts[0])}
    file = official_file(tmp_path, flat.shape[1], task.actions.action_dim)
    first = torch.load(file, weights_only=False)["model"]["_encoder.state.0.weight"]
    latents, actions = official_outputs(file, flat)
    assert latents.std(0).max() > 1e-3 and actions.std(0).max() > 1e-3  # they depend on the vectors
    assert sorted(parts[0]) != list(parts[0])

    trained = build(task, mpc=False, episodic=False)
    assert not transfer(trained, file).skipped.keys() - {"scale.value"}
    trained.save_pretrained(tmp_path / "saved")
    declared = {key: value.shape[1:] for key, value in parts[0].items() for value in [obs[key]]}
    options = {"action_dim": task.actions.action_dim, "mpc": False}
    models = {
        "init_from": trained,
        "init_from, saved": create_world_model(tmp_path / "saved"),
        "sorted keys": create_world_model(file, task.obs.shape, **options),
        "dm_control's keys": create_world_model(file, declared, **options),
    }
    for how, model in models.items():
        found = outputs(model, obs)
        torch.testing.assert_close(found[0], latents, msg=how)
        torch.testing.assert_close(found[1], actions, msg=how)
        assert torch.equal(model.state_dict()[FIRST], first), how


def test_orders_of_dm_control_are_known():
    pytest.importorskip("dm_control", reason="needs the extra dmc")
    from dm_control import suite

    # One task of each kind of observation that is not in alphabetical order.
    for name in ("hopper-hop", "finger-turn_easy", "fish-swim", "swimmer-swimmer6", "reacher-easy"):
        order = list(suite.load(*name.split("-")).observation_spec())
        assert find_official_order(sorted(order)) == order, name


@pytest.mark.slow
def test_orders_of_all_tasks_of_dm_control_are_known(monkeypatch):
    pytest.importorskip("dm_control", reason="needs the extra dmc")
    from dm_control import suite

    monkeypatch.setattr(np, "in1d", np.isin, raising=False)  # for the quadrupeds
    for domain, name in suite.ALL_TASKS:
        order = list(suite.load(domain, name).observation_spec())
        assert find_official_order(sorted(order)) == order, (domain, name)


def test_an_order_that_is_not_known_is_asked_for(tmp_path):
    file = official_file(tmp_path, 6)
    with pytest.raises(ValueError, match=r"in which order the vectors a, b, c .*\[a,b,c\]"):
        create_world_model(file, ABC, 2)
    with pytest.raises(ValueError, match=r"do not record theirs; set model\.obs_order=\[a,b,c\],"):
        transfer(small(ABC), file)
    flat = np.random.default_rng(0).normal(size=(2, 6)).astype(np.float32)
    expected = official_outputs(file, flat)
    obs = {"a": flat[:, 5:], "b": flat[:, :2], "c": flat[:, 2:5]}
    given = create_world_model(file, ABC, 2, obs_order=["b", "c", "a"], mpc=False)
    moved = small(ABC, obs_order=("b", "c", "a"), mpc=False)
    transfer(moved, file)
    for model in (given, moved):
        for found, wanted in zip(outputs(model, obs), expected, strict=True):
            torch.testing.assert_close(found, wanted)


def test_an_order_that_is_wrong_is_refused(tmp_path):
    """A custom environment has the observations of dm_control, but gymnasium sorts them."""
    file = official_file(tmp_path, 9)
    with pytest.raises(
        ValueError, match=r"expect position, velocity, touch.*position,velocity,touch\]$"
    ):
        transfer(small(FINGER), file)
    two = {"position": (4,), "velocity": (5,)}  # sorted in dm_control as well
    transfer(small(two), file)
    assert create_world_model(file, two, 2).encoder.vector_keys == ["position", "velocity"]


def test_a_single_vector_needs_no_order(tmp_path):
    file = official_file(tmp_path, 6)
    for shape in ((6,), {"any": (6,)}, {"any": (6,), "camera": (3, 64, 64)}):
        transfer(small(shape), file)
    assert create_world_model(file, {"any": (6,)}, 2).encoder.vector_keys == ["any"]
    # A first layer that is not copied has no order either.
    assert FIRST in transfer(small({"a": (1,), "b": (2,)}), file).skipped


def test_the_order_is_saved_and_another_one_is_refused(tmp_path):
    source = small(ABC, seed=1, obs_order=["c", "a", "b"])
    source.save_pretrained(tmp_path / "saved")
    assert create_world_model(tmp_path / "saved").encoder.vector_keys == ["c", "a", "b"]
    transfer(small(ABC, obs_order=["c", "a", "b"]), tmp_path / "saved")
    for order in (None, ["a", "c", "b"]):
        with pytest.raises(ValueError, match=r"order c, a, b, but this one.*=\[c,a,b\]$"):
            transfer(small(ABC, obs_order=order), tmp_path / "saved")
    # Flat vectors that were saved may be in any order.
    small((6,)).save_pretrained(tmp_path / "flat")
    with pytest.raises(ValueError, match=r"set model\.obs_order=\[a,b,c\]"):
        transfer(small(ABC), tmp_path / "flat")
    transfer(small(ABC, obs_order=["c", "a", "b"]), tmp_path / "flat")


def test_models_saved_before_the_order_was_recorded_sort_the_keys(tmp_path):
    source = small({"c": (3,), "a": (1,), "b": (2,)}, seed=1)
    source.build_config["arguments"].pop("obs_order", None)
    source.save_pretrained(tmp_path / "saved")
    loaded = create_world_model(tmp_path / "saved")
    assert loaded.encoder.vector_keys == ["a", "b", "c"]
    with pytest.raises(ValueError, match=r"order a, b, c, but this one c, a, b"):
        transfer(small(ABC, obs_order=["c", "a", "b"]), tmp_path / "saved")


@pytest.mark.parametrize(
    ("shape", "order"),
    [(ABC, ["a", "b"]), (ABC, ["a", "b", "b"]), (ABC, "abc"), (ABC, 3), ((4,), ["obs"])],
)
def test_an_invalid_order_is_named(shape, order):
    with pytest.raises(ValueError, match=re.escape(f"obs_order is {order!r}; expected ")):
        small(shape, obs_order=order)


ENV = """
import gymnasium as gym
import numpy as np
from gymnasium import spaces


class Env(gym.Env):
    action_space = spaces.Box(-1, 1, (1,), np.float32)
    observation_space = spaces.Dict({k: spaces.Box(-9, 9, (1,), np.float32) for k in "abc"})
    obs_order = ORDER

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.age = 0
        return self.observe(), {}

    def step(self, action):
        self.age += 1
        return self.observe(), float(action[0]), False, self.age >= 10, {}

    def observe(self):
        return {key: self.np_random.normal(size=1).astype(np.float32) for key in "bca"}
"""
RUN = [
    *("~experiment", "model=tdmpc2_1m", "env._target_=ordered.Env", "threads=1"),
    *(f"model.{name}={value}" for name, value in SMALL.items()),
    *("model.num_samples=12", "model.num_elites=3", "model.num_pi_trajs=3", "model.iterations=1"),
    *("training.batch_size=4", "training.prefill=20", "training.random_steps=20"),
    *("training.seed_episodes=0", "training.total_steps=30"),
    *("evaluation.episodes=1", "evaluation.every=0", "callbacks.open_loop.every=0"),
]


def test_runs_use_the_order_of_the_environment_and_keep_it(commands, tmp_path):
    def run(order, *words):
        (tmp_path / "ordered.py").write_text(ENV.replace("ORDER", repr(order)))
        return commands.run([*words], tmp_path, path=tmp_path)

    def resume(order, folder, *words):
        more = ["env._target_=ordered.Env", "training.total_steps=40"]
        return run(order, f"resume={folder}", *more, *words)

    def keys(folder):
        return "".join(create_world_model(tmp_path / folder).encoder.vector_keys)

    done = run(["b", "c", "a"], *RUN, "hydra.run.dir=new")
    assert done["code"] == 0 and keys("new") == "bca", done["err"]
    # The environment changes its order, as another version may.
    done = resume(["a", "b", "c"], "new")
    assert done["code"] == 1 and "set model.obs_order=[b,c,a]" in done["err"]
    done = resume(["a", "b", "c"], "new", "model.obs_order=[b,c,a]")
    assert done["code"] == 0 and keys("new") == "bca", done["err"]

    # A run from before the setting existed: its keys were sorted.
    done = run(None, *RUN, "hydra.run.dir=old")
    assert done["code"] == 0 and keys("old") == "abc", done["err"]
    config = tmp_path / "old" / "config.yaml"
    config.write_text(config.read_text().replace("  obs_order: null\n", ""))
    done = resume(["b", "c", "a"], "old")
    assert done["code"] == 0 and keys("old") == "abc", done["err"]
