import os
import pickle
import sys
import types

import numpy as np
import pytest
import torch
import yaml
from lightning import Trainer
from torch import nn

from worldloom import create_world_model, factory, list_models
from worldloom.factory import build_model
from worldloom.presets import aliases
from worldloom.training.module import WorldModelModule

TINY = dict(units=16, depth=4, deter=32, hidden=16, classes=4, stoch=4)
SIZES = ["size1m", "size12m", "size25m", "size50m", "size100m", "size200m", "size400m"]
ALIASES = {
    "dreamer": "dreamerv3:size12m",
    "dreamer-small": "dreamerv3:size12m",
    "dreamer-medium": "dreamerv3:size50m",
    "dreamer-large": "dreamerv3:size200m",
}


def tiny(obs_shape=(4,), action_dim=2, discrete=False, **options):
    torch.manual_seed(0)
    return create_world_model("dreamer", obs_shape, action_dim, discrete, **(TINY | options))


def on_meta(name, **options):
    """Build a model of any size without memory or arithmetic."""
    with torch.device("meta"):
        return create_world_model(name, (4,), 2, device="meta", **options)


def sizes(model):
    return {name: tuple(p.shape) for name, p in model.named_parameters()}


# ---- names ---------------------------------------------------------------------------------------


def test_presets_are_listed_by_size():
    names = list_models()
    for family in ("dreamerv3", "r2dreamer", "infonce", "dreamerpro"):
        listed = [name for name in names if name.startswith(f"{family}:size")]
        assert listed == [f"{family}:{size}" for size in SIZES]
    assert all(":" in name for name in names)


def test_verbose_tells_what_is_known():
    known = list_models(verbose=True)
    assert list(known) == list_models()
    counts = [known[f"dreamerv3:{size}"]["parameters"] for size in SIZES]
    assert counts == sorted(counts)
    for size, count in zip(SIZES, counts, strict=True):
        entry = known[f"dreamerv3:{size}"]
        assert set(entry) == {"description", "parameters", "observations", "actions", "aliases"}
        # The official names count the size of a whole agent on images, roughly.
        assert 0.6 < count / (1e6 * int(size.removeprefix("size").removesuffix("m"))) < 1.1
        assert size.removeprefix("size").upper() in entry["description"]
    assert set(known["dreamerv3:size12m"]["aliases"]) == {"dreamer", "dreamer-small"}


@pytest.mark.parametrize("alias", ALIASES)
def test_aliases_are_presets(alias):
    assert aliases()[alias] == ALIASES[alias]
    assert sizes(on_meta(alias)) == sizes(on_meta(ALIASES[alias]))


@pytest.mark.parametrize("name", ["dreamerv3_size1m", "DreamerV3:Size1M"])
def test_other_spellings_of_a_name(name):
    """The command line's name (model=dreamerv3_size1m) is understood too."""
    assert sizes(on_meta(name)) == sizes(on_meta("dreamerv3:size1m"))


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("dreamerv3:size13m", "dreamerv3:size1m"),
        ("dreamerv3:size20m", "dreamerv3:size200m"),
        ("dreamer-smal", "dreamer-small"),
        ("dreemer", "dreamer"),
        ("dreamerv3-size50m", "dreamerv3:size50m"),
    ],
)
def test_unknown_names_are_answered_with_the_nearest(name, near):
    with pytest.raises(ValueError, match=rf"'{name}' \(did you mean '{near}'\?\); presets"):
        create_world_model(name, (4,), 2)


def test_an_unknown_name_lists_what_there_is():
    with pytest.raises(ValueError, match=r"presets: .*dreamerv3:size1m, .*aliases: .*dreamer ->"):
        create_world_model("transformer", (4,), 2)


def test_a_preset_is_meant_even_where_a_folder_has_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "dreamer").mkdir()
    assert sizes(tiny()) == sizes(tiny())


# ---- spaces --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("obs_shape", "message"),
    [
        (None, r"needs obs_shape and action_dim, for example obs_shape=\(3, 64, 64\)"),
        ((1, 3, 64, 64), "observation 'obs' has shape"),
        ((0,), "observation 'obs' has shape"),
        ((3, 64, 60), r"images of 64x60; both sides must be divisible by 16: resize to 64x64"),
        ((64, 64, 3), r"images of 64x3; .* or give channels first"),
        ({"a": (3, 64, 64), "b": (3, 32, 32)}, r"image observations differ in size: .*resize"),
        ({"a": (4,), "b": (2, 2, 2, 2)}, "observation 'b' has shape"),
        ({}, "obs_shape is empty"),
        (4, "obs_shape of 'obs' is 4; expected a tuple"),
    ],
)
def test_observation_shapes_that_no_encoder_takes(obs_shape, message):
    with pytest.raises(ValueError, match=message):
        create_world_model("dreamer", obs_shape, 2, **TINY)


@pytest.mark.parametrize(
    ("action_dim", "discrete", "message"),
    [
        (None, False, "needs obs_shape and action_dim"),
        (0, False, "action_dim is 0; expected a positive integer number of actions"),
        (-1, True, "action_dim is -1; expected a positive"),
        (1, True, "a discrete action needs at least 2 choices"),
        ("4", False, "action_dim is '4'; expected a positive"),
        (True, False, "action_dim is True; expected a positive"),
        (2.5, False, "action_dim is 2.5; expected a positive"),
        ([3, 2], False, "lists several choices, which needs discrete=True"),
        ([3, 0], True, "action_dim is 0; expected a positive"),
    ],
)
def test_impossible_numbers_of_actions(action_dim, discrete, message):
    with pytest.raises(ValueError, match=message):
        create_world_model("dreamer", (4,), action_dim, discrete, **TINY)


def test_sizes_may_come_from_gymnasium(tmp_path):
    """`space.n` and `space.nvec` are NumPy's, and so are shapes out of arithmetic."""
    model = tiny(np.zeros((4,)).shape, np.int64(3), True)
    assert sizes(model) == sizes(tiny((4,), 3, True)) and type(model.action_dim) is int
    model = tiny((np.int64(4),), np.array([3, 2]), True)
    assert model.action_dim == (3, 2) and model.obs_shape == (4,)
    model.save_pretrained(tmp_path)
    assert sizes(create_world_model(tmp_path)) == sizes(model)


def test_actions_are_continuous_unless_asked_otherwise():
    model = create_world_model("dreamer", (4,), 3, **TINY)
    action = model.policy(model.encode(torch.randn(50, 4)))
    assert not ((action == 0) | (action == 1)).all()


# ---- hyperparameters -----------------------------------------------------------------------------


def test_overrides_change_the_model():
    model = tiny(units=32, stoch=6, decoder={"units": 8}, imag_length=3, free_nats=2.0)
    assert model.reward.mlp.first.linear.out_features == 32
    assert model.encoder.mlp[0].linear.out_features == 32
    assert model.decoder.mlp[0].linear.out_features == 8  # its own units
    assert model.encode(torch.zeros(1, 4)).stochastic.shape == (1, 6 * 4)
    assert model.imag_length == 3 and model.free_nats == 2.0
    arguments = model.build_config["arguments"]
    assert arguments["units"] == 32 and arguments["decoder"]["units"] == 8


def test_an_override_of_part_of_a_group_leaves_the_rest():
    model = tiny(loss_scales={"rep": 0.5})
    assert model.scales["rep"] == 0.5 and model.scales["repval"] == 0.3
    again = tiny()
    assert again.scales["rep"] == 0.1  # nothing leaks into the preset


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"unitss": 32}, r"dreamer has no hyperparameter 'unitss' \(did you mean 'units'\?\)"),
        (
            {"encoder": {"layer": 2}},
            r"dreamer has no .*'encoder.layer' \(did you mean 'encoder.layers'",
        ),
        ({"zzz": 1}, "has no hyperparameter 'zzz'; it takes units, depth"),
        ({"units": "32"}, "hyperparameter 'units' is '32'; expected int such as 256"),
        ({"units": 32.0}, "hyperparameter 'units' is 32.0; expected int"),
        ({"units": True}, "hyperparameter 'units' is True; expected int"),
        ({"units": 0}, "hyperparameter 'units' is 0; expected at least 1"),
        ({"deter": -8}, "hyperparameter 'deter' is -8; expected at least 1"),
        ({"unimix": "no"}, "hyperparameter 'unimix' is 'no'; expected float such as 0.01"),
        ({"contdisc": 1}, "hyperparameter 'contdisc' is 1; expected bool such as True"),
        ({"encoder": 3}, r"'encoder' is 3; expected a dict with some of \['kernel', 'layers'"),
        ({"encoder": {"mults": 3}}, "hyperparameter 'encoder.mults' is 3; expected list"),
        ({"encoder": {"units": "8"}}, "hyperparameter 'encoder.units' is '8'; expected int"),
        ({"encoder": {"kernel": 4}}, "kernel is 4; expected an odd size"),
        ({"blocks": 7}, "blocks must divide both: change blocks or the layer sizes"),
        ({"obs_classes": {"obss": 4}}, r"obs_classes names \['obss'\]; obs_shape has \['obs'\]"),
        ({"retnorm": {"impl": "percentile"}}, "impl is 'percentile'; expected perc"),
    ],
)
def test_bad_hyperparameters_are_refused_by_name(options, message):
    with pytest.raises(ValueError, match=message):
        create_world_model("dreamer", (3, 16, 16), 2, **(TINY | options))


# ---- saved models --------------------------------------------------------------------------------

SAVED = {
    "vector": ((4,), 2, False),
    "image": ((3, 16, 16), 3, True),
    "dict": ({"a.b": (3,), "view": (1, 16, 32)}, (3, 2), True),
    "named": ((4,), {"move": 2, "jump": 3}, {"move": False, "jump": True}),
}


def assert_equal(model, other):
    """Every parameter and buffer has the same bits, and is trained or not as before."""
    state, loaded = model.state_dict(), other.state_dict()
    assert list(state) == list(loaded)
    for name, value in state.items():
        assert value.dtype == loaded[name].dtype and torch.equal(value, loaded[name]), name
    wanted = [p.requires_grad for p in model.parameters()]
    assert [p.requires_grad for p in other.parameters()] == wanted


def outputs(model):
    """What a model does with one input and one seed."""
    torch.manual_seed(5)
    shapes = {k: s.shape for k, s in model.obs_spaces.items()}
    obs = {
        k: torch.randint(256, (3, *s), dtype=torch.uint8) if len(s) == 3 else torch.randn(3, *s)
        for k, s in shapes.items()
    }
    state = model.encode(model.obs_spaces.join(obs))
    action = model.policy(state)
    preds = model.decode(model.predict(state, action))
    return torch.cat([state.features, action, preds["reward"], preds["continue"]], -1)


def unlike_its_start(model):
    with torch.no_grad():
        for tensor in [*model.parameters(), *model.retnorm.buffers()]:
            tensor.add_(torch.randn_like(tensor))
        model.slow_count += 7
    return model


@pytest.mark.parametrize("spaces", SAVED)
def test_a_saved_folder_comes_back_bit_for_bit(spaces, tmp_path):
    model = unlike_its_start(tiny(*SAVED[spaces], imag_length=4, retnorm={"rate": 0.02}))
    folder = tmp_path / "deep" / "folder"
    model.save_pretrained(folder)
    assert {f.name for f in folder.iterdir()} == {"model.safetensors", "config.yaml"}
    for path in (folder, str(folder), folder / "model.safetensors", folder / "config.yaml"):
        other = create_world_model(path)
        assert_equal(model, other)
    assert torch.equal(outputs(model), outputs(other))
    assert (other.obs_shape, other.action_dim, other.discrete) == SAVED[spaces]
    assert other.imag_length == 4 and other.retnorm.rate == 0.02
    # The spaces may be given again.
    assert_equal(model, create_world_model(folder, *SAVED[spaces]))


def test_another_precision_comes_back_too(tmp_path):
    model = unlike_its_start(tiny()).double()
    model.save_pretrained(tmp_path)
    assert_equal(model, create_world_model(tmp_path))


def test_saving_over_a_model_replaces_it(tmp_path):
    tiny().save_pretrained(tmp_path)
    model = unlike_its_start(tiny((3,), 4))
    model.save_pretrained(tmp_path)
    assert_equal(model, create_world_model(tmp_path))


def checkpoint_of(model, file):
    """Write a checkpoint as a run does."""
    module = WorldModelModule(model, torch.optim.SGD, config={"seed": 0})
    module.optimizer = lambda params: torch.optim.SGD(params, lr=0.1)
    trainer = Trainer(
        accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False
    )
    trainer.strategy.connect(module)
    trainer.save_checkpoint(file, weights_only=True)
    return file


@pytest.mark.parametrize("spaces", SAVED)
def test_a_checkpoint_gives_its_model(spaces, tmp_path):
    model = unlike_its_start(tiny(*SAVED[spaces]))
    file = checkpoint_of(model, tmp_path / "last.ckpt")
    for path in (file, str(file)):
        assert_equal(model, create_world_model(path))


def test_a_run_folder_gives_its_final_model_or_else_its_last_checkpoint(tmp_path):
    early, final = unlike_its_start(tiny()), unlike_its_start(tiny((3,)))
    (tmp_path / "checkpoints").mkdir()
    (tmp_path / "config.yaml").write_text("seed: 0\n")  # the run's, not a model's
    checkpoint_of(early, tmp_path / "checkpoints" / "last.ckpt")
    assert_equal(early, create_world_model(tmp_path))
    final.save_pretrained(tmp_path / "model")
    assert_equal(final, create_world_model(tmp_path))
    assert_equal(early, create_world_model(tmp_path / "checkpoints" / "last.ckpt"))


@pytest.mark.parametrize("path", ["./nothing", "nothing/here", "nothing.ckpt", "nothing.npz"])
def test_a_missing_path(path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    name = path.removeprefix("./")
    with pytest.raises(ValueError, match=f"no file or folder '{name}'; check the path, or name a"):
        create_world_model(path, (4,), 2)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"obs_shape": (5,)}, r"was saved with obs_shape=\(4,\), not \(5,\)"),
        ({"action_dim": 3}, "was saved with action_dim=2, not 3"),
        ({"discrete": True}, "was saved with discrete=False, not True"),
        ({"units": 8}, r"is a saved model; \['units'\] cannot be changed in it"),
    ],
)
def test_a_saved_model_is_what_it_is(given, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_world_model(tmp_path, **given)


def rewrite(folder, **changes):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    config = {k: v for k, v in (config | changes).items() if v != "DELETE"}
    (folder / "config.yaml").write_text(yaml.safe_dump(config))


def change(folder, **arguments):
    config = yaml.safe_load((folder / "config.yaml").read_text())
    rewrite(folder, arguments=config["arguments"] | arguments)


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (
            lambda f: (f / "config.yaml").unlink(),
            "contains no config.yaml; expected a folder",
        ),
        (lambda f: (f / "model.safetensors").unlink(), "contains no model.safetensors"),
        (lambda f: (f / "model.safetensors").write_bytes(b"x" * 99), "cannot be read"),
        (lambda f: os.truncate(f / "model.safetensors", 5000), "cannot be read"),
        (lambda f: (f / "config.yaml").write_text("a: [1"), "is not valid YAML"),
        (lambda f: (f / "config.yaml").write_text("- 1"), "is not the config of a saved model"),
        (
            lambda f: rewrite(f, format=4),
            r"was written by a newer worldloom \(format 4\)",
        ),
        (lambda f: rewrite(f, model="DELETE"), "does not record how to build its model"),
        (lambda f: rewrite(f, arguments="DELETE"), "does not record how to build its model"),
        (lambda f: change(f, unitss=3), r"no hyperparameter 'unitss' \(did you mean 'units'\?\)"),
        (lambda f: change(f, units=24), r"tensor '.*' in .* has shape .*, expected"),
        (
            lambda f: change(f, actor_critic=False),
            "unknown tensors, first 'actor.mlp.0.linear",
        ),
    ],
)
def test_damaged_folders_are_named(damage, message, tmp_path):
    tiny().save_pretrained(tmp_path)
    damage(tmp_path)
    with pytest.raises(ValueError, match=message):
        create_world_model(tmp_path)


def test_what_is_no_checkpoint_is_named(tmp_path):
    (tmp_path / "text.ckpt").write_text("hello")
    torch.save({"state_dict": {}}, tmp_path / "other.ckpt")
    torch.save({"state_dict": {}, "hyper_parameters": {"model": None}}, tmp_path / "none.ckpt")
    for name in ("text", "other"):
        with pytest.raises(ValueError, match=f"{name}.ckpt is not a readable worldloom checkpoint"):
            create_world_model(tmp_path / f"{name}.ckpt")
    with pytest.raises(ValueError, match=r"none.ckpt does not record how to build its model"):
        create_world_model(tmp_path / "none.ckpt")


# ---- what is loaded runs no code -----------------------------------------------------------------


class Bomb:
    """Runs code when it is unpickled."""

    def __init__(self, flag):
        self.flag = str(flag)

    def __reduce__(self):
        return os.system, (f"touch {self.flag}",)


def test_a_hostile_checkpoint_runs_no_code(tmp_path):
    flag = tmp_path / "ran"
    good = {"hyper_parameters": {"model": tiny().build_config}, "state_dict": {}}
    for bad in ({"extra": Bomb(flag)}, {"state_dict": {"model.x": Bomb(flag)}}):
        torch.save(good | bad, tmp_path / "bad.ckpt")
        with pytest.raises(ValueError, match="not a readable worldloom checkpoint"):
            create_world_model(tmp_path / "bad.ckpt")
    (tmp_path / "plain.ckpt").write_bytes(pickle.dumps(Bomb(flag)))
    with pytest.raises(ValueError, match="not a readable worldloom checkpoint"):
        create_world_model(tmp_path / "plain.ckpt")
    assert not flag.exists()


@pytest.mark.parametrize(
    "line",
    [
        "evil: !!python/object/apply:os.system ['touch {flag}']",
        "evil: !!python/object/new:os.system ['touch {flag}']",
        "encoder: {{_target_: os.system, command: 'touch {flag}'}}",
        "_target_: os.system",
        "units: ${{oc.env:HOME}}",
    ],
)
def test_a_hostile_config_runs_no_code(line, tmp_path):
    flag = tmp_path / "ran"
    tiny().save_pretrained(tmp_path)
    config = yaml.safe_load((tmp_path / "config.yaml").read_text())
    line = line.format(flag=flag)
    arguments = config.pop("arguments")
    arguments.pop(line.split(":")[0], None)
    rest = yaml.safe_dump(arguments, default_flow_style=True, width=1e9).strip()[1:-1]
    text = f"arguments: {{{rest}, \n  {line}}}\n"
    (tmp_path / "config.yaml").write_text(yaml.safe_dump(config) + text)
    with pytest.raises((ValueError, TypeError)):
        create_world_model(tmp_path)
    assert not flag.exists()


# ---- models of one's own -------------------------------------------------------------------------


class Own(nn.Module):
    """A user's model; `config` is a name that users take too."""

    def __init__(self, obs_shape, action_dim, discrete, hidden=8):
        super().__init__()
        self.config = {"hidden": hidden}
        self.obs_shape, self.action_dim = obs_shape, action_dim
        self.layer = nn.Linear(obs_shape[0], hidden)
        self.tied = nn.Linear(obs_shape[0], hidden)
        self.tied.weight = self.layer.weight
        self.register_buffer("count", torch.tensor(3))


@pytest.fixture
def own(monkeypatch):
    module = types.ModuleType("somebodys_models")
    module.Own = Own
    monkeypatch.setitem(sys.modules, "somebodys_models", module)
    return build_model({"_target_": "somebodys_models.Own", "hidden": 16}, (4,), 2)


def test_models_outside_worldloom_load_only_where_they_are_allowed(own, tmp_path):
    from worldloom.saving import save_model

    save_model(own, tmp_path / "model")
    file = checkpoint_of(own, tmp_path / "last.ckpt")
    for path in (tmp_path / "model", file):
        message = r"names the model 'somebodys_models.Own', which is not part of worldloom; if you"
        with pytest.raises(ValueError, match=message):
            create_world_model(path)
        with pytest.raises(ValueError, match=message):
            create_world_model(path, allow=("somebodys_models",))
        loaded = create_world_model(path, allow=("somebodys_models.Own",))
        assert type(loaded) is Own and loaded.config == {"hidden": 16}
        assert_equal(own, loaded)


def test_a_model_that_nobody_can_build_again_is_not_saved(tmp_path):
    from worldloom.saving import save_model

    with pytest.raises(ValueError, match="Own cannot be saved: the arguments of Own were not"):
        save_model(Own((4,), 2, False), tmp_path / "model")
    assert not (tmp_path / "model").exists()


@pytest.mark.parametrize(
    ("target", "message"),
    [
        ("somebodys_models.Owm", "cannot import 'somebodys_models.Owm': .*no attribute 'Owm'"),
        ("no_such_package.Own", "cannot import 'no_such_package.Own': No module named"),
        ("Own", "cannot import 'Own': .*give the full path, such as my_pkg.MyModel"),
    ],
)
def test_targets_that_cannot_be_imported(target, message, own):
    with pytest.raises(ValueError, match=message):
        build_model({"_target_": target}, (4,), 2)


def test_options_that_a_model_does_not_take(own):
    message = r"Own has no hyperparameter 'hiden' \(did you mean 'hidden'\?\); it takes obs_shape"
    with pytest.raises(ValueError, match=message):
        build_model({"_target_": "somebodys_models.Own", "hiden": 16}, (4,), 2)


def test_a_family_may_have_no_official_weights(tmp_path, monkeypatch):
    package = types.ModuleType("worldloom.models.plain")
    package.__path__ = [str(tmp_path)]
    monkeypatch.setitem(sys.modules, "worldloom.models.plain", package)
    monkeypatch.setattr(factory, "REGISTERED", {"plain": "of.no.interest", **factory.REGISTERED})
    tiny().save_pretrained(tmp_path / "model")
    assert type(create_world_model(tmp_path / "model")).__name__ == "DreamerV3"
