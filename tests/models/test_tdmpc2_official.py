"""Official .pt files that fit and those that do not; tests/reference compares the numbers."""

import os

import pytest
import torch

from tests.test_factory_transfer import as_official, same, small
from worldloom import create_world_model


def read(file, obs_shape=(4,), action_dim=2, **options):
    return create_world_model(file, obs_shape=obs_shape, action_dim=action_dim, **options)


CASES = {
    "vector": ((4,), 2, {}),
    "terminations": ((4,), 2, {"episodic": True}),
    "deep": ((4,), 2, {"num_enc_layers": 4, "num_q": 5, "num_bins": 21}),
    "image": ((9, 64, 64), 2, {"latent_dim": 32, "num_channels": 2}),
    "tasks": ((4,), 3, {"action_dims": [1, 3], "task_dim": 5}),
}


@pytest.mark.parametrize("case", CASES)
def test_sizes_are_read_off_the_tensors(case, tmp_path):
    obs_shape, action_dim, options = CASES[case]
    source = small(obs_shape, action_dim, **options)
    model = read(as_official(source, tmp_path / "agent.pt"), obs_shape, action_dim)
    assert same(source, model) == list(source.state_dict())
    for name in ("mlp_dim", "latent_dim", "num_q", "num_bins", "num_enc_layers", "task_dim"):
        assert getattr(model.options, name) == getattr(source.options, name), name
        assert model.build_config["arguments"][name] == getattr(source.options, name), name


def test_numbered_tensors_of_the_older_layout(tmp_path):
    source = small(action_dims=[1, 2], task_dim=3)
    state = torch.load(as_official(source, tmp_path / "a.pt"), weights_only=True)["model"]
    kinds = ["weight", "bias", "ln.weight", "ln.bias"]
    old = {}
    for name, value in state.items():
        part, _, rest = name.partition("params.")
        if part in ("_Qs.", "_target_Qs_") and "__" not in rest:
            layer, kind = rest.split(".", 1)
            prefix = "_Qs" if part == "_Qs." else "_target_Qs"
            old[f"{prefix}.params.{4 * int(layer) + kinds.index(kind)}"] = value
        elif "__" not in name and name not in ("_action_masks", "log_std_min", "log_std_dif"):
            old[name] = value
    torch.save(old, tmp_path / "old.pt")  # without "model" around it
    model = read(tmp_path / "old.pt", action_dims=[1, 2])
    assert same(source, model) == list(source.state_dict())
    # The older layout does not say which actions a task has.
    assert read(tmp_path / "old.pt").tasks.masks.tolist() == [[1, 1], [1, 1]]


def test_a_tensor_that_does_not_fit_is_named_with_both_shapes(tmp_path):
    file = as_official(small(), tmp_path / "agent.pt")
    with pytest.raises(
        ValueError, match=r"'_encoder.state.0.weight' has shape \(8, 4\), expected"
    ) as e:
        read(file, obs_shape=(5,))
    assert "(8, 5) for obs_shape=(5,), action_dim=2" in str(e.value)
    with pytest.raises(
        ValueError, match=r"'_dynamics.0.weight' has shape \(8, 18\), expected \(8, 19\)"
    ):
        read(file, action_dim=3)
    with pytest.raises(ValueError, match=r"lack '_encoder\.rgb\.2\.weight'"):
        read(file, obs_shape=(9, 64, 64), num_channels=1)


def test_a_missing_tensor_is_named(tmp_path):
    content = torch.load(as_official(small(), tmp_path / "agent.pt"), weights_only=True)
    del content["model"]["_pi.1.ln.bias"]
    torch.save(content, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=r"lack '_pi.1.ln.bias' \(8,\), which a model for"):
        read(tmp_path / "agent.pt")


def test_files_of_another_kind(tmp_path):
    file = tmp_path / "agent.pt"
    for content in ({"model": {"weight": torch.zeros(2)}}, torch.zeros(3), {"step": 3}):
        torch.save(content, file)
        with pytest.raises(ValueError, match="it is not a checkpoint of the official TD-MPC2"):
            read(file)
    whole = as_official(small(), file).read_bytes()
    for damaged in (b"", b"no checkpoint", whole[:-200], whole[: len(whole) // 2]):
        file.write_bytes(damaged)
        with pytest.raises(
            ValueError, match=r"agent.pt cannot be read as tensors alone.*nothing in"
        ):
            read(file)
    with pytest.raises(ValueError, match="no file or folder"):
        read(tmp_path / "gone.pt")


class Hostile:
    def __reduce__(self):
        return (os.system, ("touch /tmp/worldloom_was_here",))


def test_a_hostile_file_runs_nothing(tmp_path):
    torch.save({"model": {"_dynamics.0.weight": Hostile()}}, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match="nothing in it was executed"):
        read(tmp_path / "agent.pt")
    assert not os.path.exists("/tmp/worldloom_was_here")


def test_spaces_must_be_given(tmp_path):
    file = as_official(small(), tmp_path / "agent.pt")
    with pytest.raises(ValueError, match="pass obs_shape and action_dim"):
        create_world_model(file)
    with pytest.raises(ValueError, match=r"discrete=True, but the policy in .* has continuous"):
        read(file, discrete=True)
