"""Models on disk; run this file as a program to write tests/fixtures/models again."""

import os
import sys
from pathlib import Path

import pytest
import torch
import yaml
from safetensors import safe_open
from torch import nn

from worldloom import create_world_model
from worldloom.protocol import LatentState
from worldloom.saving import CONFIG, WEIGHTS, get_config, load_tensors, read_saved, save_model

FIXTURES = Path(__file__).parent / "fixtures" / "models"


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        arguments = {"obs_shape": (3, 4), "sizes": {"a": [(1, 2), [None, 0.5]]}}
        self.build_config = {"model": "dreamerv3", "arguments": arguments}
        self.weight = nn.Parameter(torch.randn(5, 4).t())  # not contiguous
        self.register_buffer("halves", torch.randn(6, dtype=torch.bfloat16))
        self.register_buffer("flags", torch.tensor([True, False]))
        self.register_buffer("count", torch.tensor(2**60))
        self.register_buffer("scratch", torch.ones(3), persistent=False)


def test_every_kind_of_tensor_and_config_comes_back(tmp_path):
    model = Model()
    save_model(model, tmp_path)
    config, tensors = read_saved(tmp_path)
    assert config == model.build_config  # tuples are tuples again, and lists are lists
    assert set(tensors) == {"weight", "halves", "flags", "count"}
    for name, value in model.state_dict().items():
        assert tensors[name].dtype == value.dtype and torch.equal(tensors[name], value)


def test_the_format_is_written_down(tmp_path):
    save_model(Model(), tmp_path)
    assert yaml.safe_load((tmp_path / "config.yaml").read_text())["format"] == 3


def test_a_save_that_breaks_off_leaves_the_old_model(tmp_path, monkeypatch):
    old = Model()
    save_model(old, tmp_path)

    def disk_full(*args, **kwargs):
        raise OSError("No space left on device")

    monkeypatch.setattr("worldloom.saving.write_tensors", disk_full)
    with pytest.raises(OSError, match="No space left"):
        save_model(Model(), tmp_path)
    assert torch.equal(read_saved(tmp_path)[1]["weight"], old.weight)
    assert {file.name for file in tmp_path.iterdir()} == {WEIGHTS, CONFIG}


def test_a_crash_between_the_two_files_is_noticed(tmp_path, monkeypatch):
    """Weights with the config of another model are never loaded; with their own they are."""
    model, other = Model(), Model()
    other.build_config["arguments"]["sizes"] = {"a": (2, 2)}
    replace = os.replace

    def crash_before_config(source, target):
        if Path(target).name == CONFIG:
            raise KeyboardInterrupt
        replace(source, target)

    save_model(model, tmp_path)
    for new in (Model(), other):
        with monkeypatch.context() as patched, pytest.raises(KeyboardInterrupt):
            patched.setattr(os, "replace", crash_before_config)
            save_model(new, tmp_path)
        if new is other:
            with pytest.raises(ValueError, match="belong to different models, because saving was"):
                read_saved(tmp_path)
        else:
            assert torch.equal(read_saved(tmp_path)[1]["weight"], new.weight)
    save_model(other, tmp_path)
    assert read_saved(tmp_path)[0]["arguments"]["sizes"] == {"a": (2, 2)}


@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640), (0o077, 0o600)])
def test_permissions_follow_the_umask(umask, mode, tmp_path):
    before = os.umask(umask)
    try:
        save_model(Model(), tmp_path)
    finally:
        os.umask(before)
    assert {f.name: f.stat().st_mode & 0o777 for f in tmp_path.iterdir()} == {
        WEIGHTS: mode,
        CONFIG: mode,
    }


def test_a_link_is_replaced_and_its_target_left_alone(tmp_path):
    mine = tmp_path / "mine"
    mine.write_text("precious")
    folder = tmp_path / "model"
    folder.mkdir()
    for name in (WEIGHTS, CONFIG):
        (folder / name).symlink_to(mine)
    save_model(Model(), folder)
    assert mine.read_text() == "precious"
    assert read_saved(folder)[0]["model"] == "dreamerv3"


def test_safetensors_itself_reads_every_dtype(tmp_path):
    model = nn.Module()
    model.build_config = {"model": "dreamerv3", "arguments": {}}
    floats = (torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex64)
    integers = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)
    for dtype in (*floats, *integers):
        for shape in ((), (3,), (0, 2), (3, 2)):
            name = f"{dtype}_{len(shape)}_{sum(shape)}".removeprefix("torch.")
            model.register_buffer(name, torch.randint(2, shape).to(dtype))
    save_model(model, tmp_path)
    with safe_open(tmp_path / WEIGHTS, "pt") as file:
        assert sorted(file.keys()) == sorted(model.state_dict())
        for name, value in model.state_dict().items():
            found = file.get_tensor(name)
            assert found.dtype == value.dtype and torch.equal(found, value), name
    model.register_buffer("odd", torch.zeros(2, dtype=torch.complex128))
    with pytest.raises(ValueError, match=r"'odd' is torch.complex128, which cannot be saved"):
        save_model(model, tmp_path)


def test_saving_makes_no_second_copy(tmp_path):
    """The process's memory grows by less than a model of 200 MB while it is saved."""
    resource = pytest.importorskip("resource")
    model = nn.Module()
    model.build_config = {"model": "dreamerv3", "arguments": {}}
    model.weight = nn.Parameter(torch.ones(50_000_000))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    save_model(model, tmp_path)
    unit = 1 if sys.platform == "darwin" else 1024
    assert (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) * unit < 100e6


@pytest.mark.parametrize("found", [None, 2, 4, "3"])
def test_models_of_other_formats_are_rejected(found, tmp_path):
    save_model(Model(), tmp_path)
    config = yaml.safe_load((tmp_path / CONFIG).read_text())
    config = {k: v for k, v in {**config, "format": found}.items() if v is not None}
    (tmp_path / CONFIG).write_text(yaml.safe_dump(config))
    who = {None: "worldloom 0.1.0 before", 4: "a newer worldloom"}.get(
        found, "an earlier worldloom"
    )
    with pytest.raises(ValueError, match=rf"was written by {who} .*, but this version reads form"):
        read_saved(tmp_path)


@pytest.mark.parametrize("line", ["extra: ${oc.env:HOME}", "deep: [{a: 'x ${b}'}]", "${x}: 1"])
def test_interpolations_are_rejected(line, tmp_path):
    save_model(Model(), tmp_path)
    with (tmp_path / CONFIG).open("a") as file:
        file.write(f"{line}\n")
    with pytest.raises(ValueError, match=r"interpolations are not allowed"):
        read_saved(tmp_path)
    model = Model()
    model.build_config["arguments"]["extra"] = "${oc.env:HOME}"
    with pytest.raises(ValueError, match="interpolations are not allowed"):
        save_model(model, tmp_path)


# ---- models saved by earlier commits -------------------------------------------------------------

SIZES = {
    "dreamerv3": dict(units=8, depth=1, deter=8, hidden=8, classes=4, stoch=2, blocks=2)
    | dict(reward_head={"bins": 11}, critic={"bins": 11}),
    "tdmpc2": dict(enc_dim=8, mlp_dim=8, latent_dim=16, num_channels=1, num_bins=11, num_q=2),
}


def outputs_of(model):
    """What a model computes without random numbers, by name."""
    obs = torch.linspace(-1, 1, 6).reshape(2, 3)
    state = model.encode(obs)
    if state.stochastic is not None:  # it was drawn at random
        zeros = torch.zeros_like(state.stochastic)
        features = torch.cat([state.deterministic, zeros], -1)
        state = LatentState(state.deterministic, zeros, features, state.extras)
    later = model.predict(state, torch.linspace(1, -1, 4).reshape(2, 2))
    found = {"deterministic": state.deterministic, "later": later.deterministic}
    return {k: v.tolist() for k, v in (found | model.decode(state)).items()}


@pytest.mark.parametrize("family", SIZES)
def test_a_model_saved_by_an_earlier_commit_still_computes_the_same(family):
    """Raise `saving.FORMAT` and write the fixtures again if this can no longer hold."""
    folder = FIXTURES / family
    model = create_world_model(folder)
    expected = yaml.safe_load((folder / "outputs.yaml").read_text())
    found = outputs_of(model)
    assert set(found) == set(expected)
    for name, values in expected.items():
        torch.testing.assert_close(
            torch.tensor(found[name]), torch.tensor(values), rtol=1e-4, atol=1e-5
        )


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
    del model.build_config
    model.config = config
    assert get_config(model) is None
    model.build_config = {"model": "my_pkg.Model", "arguments": {"width": 3}}
    assert get_config(model) == model.build_config


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


if __name__ == "__main__":
    for family, sizes in SIZES.items():
        torch.manual_seed(0)
        name = {"dreamerv3": "dreamerv3:size1m", "tdmpc2": "tdmpc2:1m"}[family]
        model = create_world_model(name, (3,), 2, **sizes)
        with torch.no_grad():  # heads start with zeros
            for parameter in model.parameters():
                parameter += 0.3 * torch.randn_like(parameter)
        model.save_pretrained(FIXTURES / family)
        text = yaml.safe_dump(outputs_of(create_world_model(FIXTURES / family)))
        (FIXTURES / family / "outputs.yaml").write_text(text)
