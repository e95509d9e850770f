"""Beginning with the weights of another model, whatever they are saved in."""

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from worldloom import create_world_model
from worldloom.factory import transfer
from worldloom.models.tdmpc2.official import official_names

SMALL = dict(enc_dim=8, mlp_dim=8, latent_dim=16, num_channels=1, num_bins=11, num_q=3)


def small(obs_shape=(4,), action_dim=2, seed=0, **options):
    torch.manual_seed(seed)
    return create_world_model("tdmpc2:1m", obs_shape, action_dim, **(SMALL | options))


def as_official(model, file):
    """Write a model as the official code does, with its notes that are no tensors."""
    names = official_names(model)
    state = {names[name]: value for name, value in model.state_dict().items() if name in names}
    state |= {"_Qs.params.__batch_size": torch.Size([3]), "_Qs.params.__device": None}
    torch.save({"model": state}, file)
    return file


def same(a, b):
    return [n for n, v in a.state_dict().items() if torch.equal(v, b.state_dict()[n])]


@pytest.mark.parametrize("kind", ["folder", "official"])
def test_the_same_model_is_taken_over_whole(kind, tmp_path):
    source, model = small(seed=1), small(seed=2)
    if kind == "folder":
        source.save_pretrained(tmp_path / "saved")
        result = transfer(model, tmp_path / "saved")
        assert not result.skipped
    else:
        result = transfer(model, as_official(source, tmp_path / "official.pt"))
        assert set(result.skipped) == {"scale.value"}  # which official files do not hold
    assert not result.unused
    assert same(source, model) == list(source.state_dict())
    assert result.report().startswith(f"{len(result.matched)} of {len(model.state_dict())} tensors")


def test_what_does_not_fit_keeps_its_values_and_is_listed(tmp_path):
    """From several tasks to another, single one: the case that users ask the official code for."""
    source = small((6,), 2, seed=1, action_dims=[2, 1], task_dim=3)
    model = small((4,), 2, seed=2, episodic=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    result = transfer(model, as_official(source, tmp_path / "mt.pt"))
    first = [f"{part}.layers.0.linear.weight" for part in ("dynamics", "reward", "actor")]
    first += ["encoder.vector.layers.0.linear.weight"]
    first += ["critic.layers.0.weight", "target_critic.layers.0.weight"]
    head = {name for name in before if name.startswith("termination.")}
    assert set(result.skipped) == {*first, *head, "terminates", "scale.value"}
    assert result.unused == ["tasks.embedding.weight", "tasks.masks"] or result.unused == [
        "_action_masks",
        "_task_emb.weight",
    ]
    for name, value in model.state_dict().items():
        origin = before[name] if name in result.skipped else source.state_dict()[name]
        assert torch.equal(value, origin), name
    report = result.report()
    assert "  dynamics        9 of 10" in report or "dynamics" in report
    assert (
        "skipped encoder.vector.layers.0.linear.weight: (8, 9) in the file, (8, 4) in the model"
        in report
    )
    assert "skipped terminates: not in the file" in report


class Own(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 2)


def test_nothing_in_common_is_a_mistake(tmp_path):
    small().save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match=r"nothing in .* fits Own \(first 'layer.weight': not in"):
        transfer(Own(), tmp_path / "saved")
    as_official(small(), tmp_path / "td.pt")
    with pytest.raises(
        ValueError, match="contains official weights of tdmpc2, but the model is a Own"
    ):
        transfer(Own(), tmp_path / "td.pt")


def test_paths_that_hold_nothing(tmp_path):
    with pytest.raises(ValueError, match=r"init_from: no file or folder '.*gone.pt'"):
        transfer(small(), tmp_path / "gone.pt")
    with pytest.raises(ValueError, match=r"contains no model\.safetensors"):
        transfer(small(), tmp_path)
    (tmp_path / "model.safetensors").write_bytes(b"")
    save_file({"x": torch.zeros(1)}, tmp_path / "model.safetensors")
    with pytest.raises(ValueError, match=r"contains no config.yaml"):
        transfer(small(), tmp_path)
