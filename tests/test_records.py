"""A model is saved as the class that created it, with all its arguments."""

import copy
import functools
import pickle
import sys

import numpy as np
import pytest
import torch
from torch import nn

from worldloom import create_world_model
from worldloom.factory import build_model
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.tdmpc2 import TDMPC2
from worldloom.presets import load_preset, override_preset
from worldloom.records import find_obstacle, list_parameters
from worldloom.saving import SavableModel
from worldloom.training.module import WorldModelModule

TINY = dict(units=8, depth=1, deter=8, hidden=8, classes=4, stoch=2, blocks=2)
SIZES = {k: v for k, v in override_preset(load_preset("dreamer"), TINY, "x").items() if k[0] != "_"}
SMALL = dict(enc_dim=8, mlp_dim=8, latent_dim=16, num_channels=1, num_bins=11, num_q=2)


class Changed(DreamerV3):
    """Overrides a method and adds no tensors."""

    def policy(self, state, deterministic=False):
        return torch.ones(len(state), 2)


class Aux(DreamerV3):
    """Own hyperparameters, one of them a tuple by default."""

    def __init__(self, *args, aux_scale=0.5, widths=(3, 2), table=None, **kwargs):
        super().__init__(*args, **kwargs)
        self.aux_scale, self.widths, self.table = aux_scale, widths, table
        self.nested = nn.ModuleDict({"a": nn.Sequential(nn.Linear(*widths), nn.LayerNorm(2))})
        self.register_buffer("seen", torch.tensor(3))


class Deeper(Aux):
    """Positional arguments in front, and further ones of its base class behind."""

    def __init__(self, obs_shape, action_dim, *args, more=1, **kwargs):
        super().__init__(obs_shape, action_dim, *args, **kwargs)
        self.more = more
        self.config = {"more": more}  # a name that users take too


class Plain(SavableModel):
    """A custom class that is constructed directly."""

    def __init__(self, obs_shape, action_dim, discrete=False, layers=(4,), act="relu"):
        super().__init__()
        self.layers = nn.Sequential(*(nn.Linear(obs_shape[0], n) for n in layers))
        self.given = (layers, act)


class Planner(TDMPC2):
    def __init__(self, *args, aux_scale=0.5, **kwargs):
        super().__init__(*args, **kwargs)
        self.aux_scale = aux_scale
        self.head = nn.Linear(self.options.latent_dim, 1)


def path_of(cls):
    return f"{__name__}.{cls.__name__}"


def saved_and_loaded(model, folder):
    model.save_pretrained(folder)
    with pytest.raises(ValueError, match=rf"pass allow=\('{path_of(type(model))}',\)"):
        create_world_model(folder)
    with pytest.raises(ValueError, match="which is not part of worldloom"):
        create_world_model(folder, allow=f"{path_of(type(model))}s")  # a longer name
    loaded = create_world_model(folder, allow=path_of(type(model)))
    assert type(loaded) is type(model)
    assert loaded.build_config == model.build_config
    state = loaded.state_dict()
    assert list(state) == list(model.state_dict())
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    return loaded


@pytest.mark.parametrize("how", ["directly", "copied", "unpickled", "with a preset"])
def test_a_subclass_comes_back_as_itself(how, tmp_path):
    if how == "with a preset":
        model = create_world_model("dreamer", (4,), 2, **TINY, _target_=path_of(Changed))
    else:
        model = Changed((4,), 2, **SIZES)
    if how == "copied":
        model = copy.deepcopy(model)
    if how == "unpickled":
        model = pickle.loads(pickle.dumps(model))
    loaded = saved_and_loaded(model, tmp_path / "model")
    assert torch.equal(loaded.policy(loaded.encode(torch.zeros(3, 4))), torch.ones(3, 2))


def test_own_arguments_come_back_with_their_types(tmp_path):
    table = {"sizes": (1, [2, (3,)]), "none": None, "names": ["a"], "rate": np.float32(0.5)}
    model = Aux((4,), 2, aux_scale=0.25, table=table, **SIZES)
    table["sizes"] = "changed later"
    loaded = saved_and_loaded(model, tmp_path / "model")
    wanted = {"sizes": (1, [2, (3,)]), "none": None, "names": ["a"], "rate": 0.5}
    assert loaded.table == wanted and loaded.widths == (3, 2) and loaded.aux_scale == 0.25
    assert loaded.build_config["arguments"]["widths"] == (3, 2)  # a default is recorded, too


def test_positional_arguments_are_recorded_by_name(tmp_path):
    sizes = {name: value for name, value in SIZES.items() if name != "obs_classes"}
    model = Deeper((4,), 2, True, None, more=5, aux_scale=0.1, **sizes)
    arguments = model.build_config["arguments"]
    assert (arguments["discrete"], arguments["obs_classes"]) == (True, None)
    loaded = saved_and_loaded(model, tmp_path / "model")
    assert (loaded.more, loaded.aux_scale, loaded.discrete) == (5, 0.1, True)


def test_a_subclass_of_tdmpc2_has_own_hyperparameters_next_to_a_preset(tmp_path):
    options = SMALL | {"_target_": path_of(Planner), "aux_scale": 0.25}
    model = create_world_model("tdmpc2:1m", (4,), 2, **options)
    assert model.aux_scale == 0.25 and "head.weight" in model.state_dict()
    assert saved_and_loaded(model, tmp_path / "model").aux_scale == 0.25


def test_a_custom_class_can_be_constructed_directly(tmp_path):
    model = Plain((4,), 2, layers=(4, 3), act="tanh")
    assert saved_and_loaded(model, tmp_path / "model").given == ((4, 3), "tanh")


def test_arguments_may_have_the_names_that_files_use(tmp_path, monkeypatch):
    class Named(SavableModel):
        def __init__(self, obs_shape, action_dim, discrete, model, format, id, tuples):
            super().__init__()
            self.given = (model, format, id, tuples)
            self.layer = nn.Linear(2, 2)

    Named.__qualname__ = "Named"
    monkeypatch.setattr(sys.modules[__name__], "Named", Named, raising=False)
    given = {"model": "resnet", "format": 7, "id": "x", "tuples": [[1]]}
    model = build_model({"_target_": path_of(Named), **given}, (4,), 2)
    assert saved_and_loaded(model, tmp_path / "model").given == tuple(given.values())


def test_a_copy_of_a_class_of_worldloom_is_not_taken_for_it():
    """Whoever copies model.py to change it has another class of the same name."""
    copied = type("DreamerV3", (DreamerV3,), {"__module__": "my_pkg.models.dreamerv3.model"})
    assert (
        copied((4,), 2, **SIZES).build_config["model"] == "my_pkg.models.dreamerv3.model.DreamerV3"
    )
    assert DreamerV3((4,), 2, **SIZES).build_config["model"] == "dreamerv3"


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"aux_scal": 1.0}, r"no hyperparameter 'aux_scal' \(did you mean 'aux_scale'\?\)"),
        ({"unitss": 8}, r"no hyperparameter 'unitss' \(did you mean 'units'\?\)"),
        ({"aux_scale": "high"}, "'aux_scale' is 'high'; expected float such as 0.5"),
        ({"widths": 3}, "'widths' is 3; expected tuple such as"),
        ({"encoder": {"aux": 1}}, "no hyperparameter 'encoder.aux'"),
        ({"units": 0}, "'units' is 0; expected at least 1"),
    ],
)
def test_mistakes_in_own_hyperparameters_are_named(overrides, message):
    with pytest.raises(ValueError, match=message):
        create_world_model("dreamer", (4,), 2, **(TINY | overrides), _target_=path_of(Aux))


def test_own_hyperparameters_are_known_from_the_whole_line_of_classes():
    names, takes_any = list_parameters(Deeper)
    assert not takes_any and {"more", "aux_scale", "units", "obs_classes"} <= set(names)

    class Open(nn.Module):
        def __init__(self, obs_shape, **options):
            super().__init__()

    assert list_parameters(Open)[1]


def test_a_class_that_other_programs_cannot_import_is_saved_with_a_warning(tmp_path):
    class Local(DreamerV3):
        pass

    model = Local((4,), 2, **SIZES)
    assert "which other programs cannot import; define the class at the top" in find_obstacle(model)
    with pytest.warns(UserWarning, match=r"Local is saved as .*<locals>\.Local, which other"):
        model.save_pretrained(tmp_path / "local")
    with pytest.raises(ValueError, match=r"cannot import '.*<locals>.Local'"):
        create_world_model(tmp_path / "local", allow=(model.build_config["model"],))
    Local.__module__, Local.__qualname__ = "__main__", "Local"
    assert "Local is saved as __main__.Local" in find_obstacle(Local((4,), 2, **SIZES))
    assert find_obstacle(Changed((4,), 2, **SIZES)) == ""


def test_a_function_and_a_partial_function_may_build_the_model(tmp_path, monkeypatch):
    def make(obs_shape, action_dim, discrete, width=4):
        return Plain(obs_shape, action_dim, discrete, layers=(width,))

    for name, function in (("make", make), ("part", functools.partial(make, width=3))):
        monkeypatch.setattr(sys.modules[__name__], name, function, raising=False)
        model = build_model({"_target_": f"{__name__}.{name}"}, (4,), 2)
        model.save_pretrained(tmp_path)
        loaded = create_world_model(tmp_path, allow=f"{__name__}.{name}")
        assert loaded.given == model.given


def test_a_training_whose_model_cannot_be_loaded_is_reported_when_it_starts(caplog):
    class Local(DreamerV3):
        pass

    WorldModelModule(Changed((4,), 2, **SIZES), torch.optim.SGD)
    assert not caplog.text
    WorldModelModule(Local((4,), 2, **SIZES), torch.optim.SGD)
    assert "the trained model cannot be loaded by name: Local is saved as" in caplog.text


def test_an_argument_that_cannot_be_saved_is_named(tmp_path):
    model = Plain((4,), 2, act=nn.ReLU())
    with pytest.raises(
        ValueError, match="Plain cannot be saved: the argument act of Plain is a Re"
    ):
        model.save_pretrained(tmp_path)
    assert not list(tmp_path.iterdir())
