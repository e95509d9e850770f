import pytest
import torch
import yaml
from torch import nn

from worldloom.saving import config_of, load_tensors, read_saved, save_model


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.config = {"model": "my_pkg.Model", "obs_shape": (3, 4), "sizes": {"a": (1, 2)}}
        self.weight = nn.Parameter(torch.randn(5, 4).t())  # not contiguous
        self.register_buffer("halves", torch.randn(6, dtype=torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(2**60))
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def test_every_kind_of_tensor_and_config_comes_back(tmp_path):
    model = Model()
    save_model(model, tmp_path)
    config, tensors = read_saved(tmp_path)
    assert config == {"model": "my_pkg.Model", "obs_shape": [3, 4], "sizes": {"a": [1, 2]}}
    assert set(tensors) == {"weight", "halves", "flags", "count"}
    for name, value in model.state_dict().items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)


def test_the_format_is_written_down(tmp_path):
    save_model(Model(), tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["format"] == 1


def test_a_save_that_breaks_off_leaves_the_old_model(tmp_path, monkeypatch):
    old = Model()
    save_model(old, tmp_path)

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("worldloom.saving.save_file", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_model(Model(), tmp_path)
    assert torch.equal(read_saved(tmp_path)[1]["weight"], old.weight)


def test_tensors_that_share_memory_are_saved_each(tmp_path):
    model = Model()
    model.register_buffer("view", model.state_dict()["halves"][2:])
    model.tied = model.weight
    save_model(model, tmp_path)
    tensors = read_saved(tmp_path)[1]
    assert torch.equal(tensors["view"], model.halves[2:])
    assert torch.equal(tensors["tied"], model.weight)


@pytest.mark.parametrize("config", [None, {}, {"hidden": 3}, "text"])
def test_a_config_that_does_not_name_its_model_does_not_count(config):
    model = Model()
    model.config = config
    assert config_of(model) is None
    model.build_config = {"model": "my_pkg.Model"}
    assert config_of(model) == {"model": "my_pkg.Model"}


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.pop("count"), r"FILE lacks 1 tensors of the model, first 'count'"),
        (lambda t: t.update(more=torch.ones(2)), "FILE has 1 unknown tensors, first 'more'"),
        (
            lambda t: t.update(halves=torch.ones(7)),
            r"tensor 'halves' in FILE has shape \(7,\), expected \(6,\)",
        ),
    ],
)
def test_tensors_that_do_not_fit_are_named_and_nothing_is_loaded(change, message):
    model, tensors = Model(), dict(Model().state_dict())
    change(tensors)
    before = model.weight.clone()
    with pytest.raises(ValueError, match=message):
        load_tensors(model, tensors, "FILE")
    assert torch.equal(model.weight, before)
