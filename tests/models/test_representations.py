"""DreamerV3 with other representation losses: options, a probe, a user's own loss, and files."""

import sys

import pytest
import torch

from worldloom import check_world_model, create_world_model
from worldloom.models.dreamerv3 import dreamerpro
from worldloom.models.dreamerv3.dreamerpro import assign, shift_sequences
from worldloom.models.dreamerv3.representation import (
    Posterior,
    Representation,
    barlow_loss,
    infonce_loss,
)
from worldloom.random_batches import RandomData
from worldloom.training.optimizers import LaProp

SMALL = dict(units=8, depth=2, deter=16, hidden=8, stoch=4, classes=4, blocks=2, imag_length=3)
SPACES = {"obs_shape": {"image": (3, 16, 16), "pose": (3,)}, "action_dim": 2}
OBS = {"image": torch.zeros(2, 3, 16, 16, dtype=torch.uint8), "pose": torch.zeros(2, 3)}
LOSSES = {"r2dreamer": ["barlow"], "infonce": ["infonce"], "dreamerpro": ["swav", "temp", "norm"]}


class Nearest(Representation):
    """A loss of a user's own: the projected state is to be near the tokens."""

    def __init__(self, model, *, power=2.0):
        super().__init__(model)
        self.power = power
        self.proj = torch.nn.Linear(model.feature_dim, model.encoder.width)
        self.register_buffer("updates", torch.zeros(()))

    def compute_terms(self, model, posterior):
        assert isinstance(posterior, Posterior)
        error = self.proj(posterior.features) - posterior.tokens
        return {"near": error.abs().pow(self.power).mean(-1)}

    def after_update(self, model):
        self.updates += 1


def build(name, seed=0, **options):
    torch.manual_seed(seed)
    return create_world_model(f"{name}:size1m", **SPACES, **SMALL, **options)


def batch_for(model, rows=3, steps=5, seed=0):
    torch.manual_seed(seed)
    data = RandomData.for_model(model, SPACES["obs_shape"], 2, False, rows, steps)
    return data.batch(ends=True)


def losses_of(model, batch, seed=0):
    torch.manual_seed(seed)
    return {k: v for k, v in model.compute_loss(batch).items() if k != "replay"}


@pytest.mark.parametrize("name", LOSSES)
def test_the_terms_are_added_with_their_weights(name):
    model = build(name)
    losses = losses_of(model, batch_for(model))
    assert not [key for key in losses if key.startswith("reconstruction")]
    official = {"dyn": "dyn", "rep": "rep", "reward": "rew", "continue": "con", "policy": "policy"}
    official |= {"value": "value", "replay_value": "repval"}
    weights = {f"{public}_loss": model.scales[term] for public, term in official.items()}
    weights |= {f"{term}_loss": model.scales[term] for term in LOSSES[name]}
    total = sum(weight * losses[key] for key, weight in weights.items())
    torch.testing.assert_close(losses["loss"], total)
    assert model.scales["barlow" if name == "r2dreamer" else LOSSES[name][0]] == (
        0.05 if name == "r2dreamer" else 1
    )


@pytest.mark.parametrize("name", LOSSES)
def test_the_model_keeps_the_protocol_and_predicts_no_observation(name):
    model = build(name)
    check_world_model(model, **SPACES)
    state = model.encode(OBS)
    assert "obs" not in model.decode(state) and "reward" in model.decode(state)


@pytest.mark.parametrize("name", LOSSES)
def test_a_probe_changes_no_other_number(name):
    models = [build(name), build(name, decoder=True)]
    probe = {k for k in models[1].state_dict() if k.startswith("decoder.")}
    assert probe and models[0].decoder is None
    optimizers = [LaProp(m.parameters(), lr=1e-2, warmup=0) for m in models]
    for step in range(3):
        batch = batch_for(models[0], seed=step)
        found = []
        for model, optimizer in zip(models, optimizers, strict=True):
            optimizer.zero_grad()
            losses = losses_of(model, batch, seed=step)
            losses["loss"].backward()
            optimizer.step()
            model.after_update()
            found.append(losses)
        for key in found[0].keys() - {"loss"}:
            assert torch.equal(found[0][key], found[1][key]), key
    plain, probed = (m.state_dict() for m in models)
    assert plain.keys() == probed.keys() - probe
    assert all(torch.equal(plain[key], probed[key]) for key in plain)
    # The probe itself learns.
    fresh = build(name, decoder=True).state_dict()
    assert not all(torch.equal(fresh[key], probed[key]) for key in probe)
    state = models[1].encode(OBS)
    assert models[1].decode(state)["obs"]["image"].shape == (2, 3, 16, 16)


def test_tokens_get_no_gradient_from_contrast_and_redundancy():
    tokens = torch.randn(6, 4, requires_grad=True)
    projected = torch.randn(6, 4, requires_grad=True)
    for loss in (
        barlow_loss(projected, tokens.detach(), 0.1),
        infonce_loss(projected, tokens.detach()),
    ):
        loss.backward()
    assert projected.grad is not None and tokens.grad is None


def test_equal_columns_without_correlation_have_the_smallest_barlow_loss():
    n = 4
    x = torch.tensor([[1.0, 1.0], [1.0, -1.0], [-1.0, 1.0], [-1.0, -1.0]])
    # Perfect but for the division by N: each diagonal element is (N - 1) / N.
    assert barlow_loss(x, x, 1.0).item() == pytest.approx(2 * (1 / n) ** 2, abs=1e-6)
    assert barlow_loss(x, x.flip(1), 1.0).item() == pytest.approx(2 + 2 * (3 / 4) ** 2, abs=1e-6)


def test_a_state_is_recognised_among_all_rows():
    assert infonce_loss(50 * torch.eye(5), torch.eye(5)).item() < 1e-6
    assert infonce_loss(torch.zeros(5, 3), torch.randn(5, 3)).item() == pytest.approx(
        torch.tensor(5.0).log().item()
    )


def test_assignments_share_the_prototypes():
    torch.manual_seed(0)
    q = assign(torch.randn(4, 10, 5), 0.5, 50)
    torch.testing.assert_close(q.sum(-1), torch.ones(4, 10))
    torch.testing.assert_close(q.sum((0, 1)), torch.full((5,), 40 / 5), rtol=1e-3, atol=0)


def test_a_shifted_image_repeats_its_edge():
    image = torch.arange(12.0).reshape(1, 1, 1, 3, 4)
    shifts = torch.tensor([[3, 1]])  # two pixels to the left, none up or down, with a pad of 1
    padded = torch.nn.functional.pad(image[0], (1, 1, 1, 1), mode="replicate")
    assert torch.equal(shift_sequences(image, torch.tensor([[2, 0]]), 1)[0], padded[..., 0:3, 2:6])
    assert torch.equal(shift_sequences(image, torch.tensor([[1, 1]]), 1), image)
    assert shifts.shape == (1, 2)


def test_prototypes_stay_until_their_time_and_copies_follow():
    options = {"name": "dreamerpro", "num_prototypes": 6, "proto_dim": 4}
    options |= {"freeze_prototypes_iters": 3, "ema_update_every": 2, "ema_update_fraction": 0.5}
    model = build("dreamerpro", representation=options)
    module = model.representation
    assert isinstance(module, dreamerpro.Prototypes)
    torch.testing.assert_close(module.prototypes.norm(dim=-1), torch.ones(6))
    optimizer = LaProp(model.parameters(), lr=1e-2, warmup=0)
    weight = model.encoder.mlp.first.linear.weight
    for update in range(4):
        before = module.prototypes.detach().clone()
        copy = module.slow_encoder.mlp.first.linear.weight.detach().clone()
        optimizer.zero_grad()
        losses_of(model, batch_for(model, seed=update))["loss"].backward()
        assert (module.prototypes.grad != 0).any() == (update >= 2)
        optimizer.step()
        model.after_update()
        assert torch.allclose(module.prototypes, before, atol=1e-6) == (update < 2)
        moved = copy.lerp(weight.detach(), 0.5) if update % 2 else copy
        torch.testing.assert_close(module.slow_encoder.mlp.first.linear.weight, moved)
    assert not any(p.requires_grad for p in module.slow_encoder.parameters())


@pytest.mark.parametrize("name", LOSSES)
def test_a_saved_model_is_the_same(name, tmp_path):
    model = build(name)
    model.save_pretrained(tmp_path / "model")
    loaded = create_world_model(tmp_path / "model")
    batch = batch_for(model)
    first, second = losses_of(model, batch), losses_of(loaded, batch)
    assert first.keys() == second.keys()
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.fixture
def own_loss(monkeypatch):
    """The import path of Nearest, in a module that can be imported by name."""
    module = type(sys)("my_losses")
    module.Nearest, Nearest.__module__ = Nearest, "my_losses"
    monkeypatch.setitem(sys.modules, "my_losses", module)
    return "my_losses.Nearest"


def test_a_loss_of_ones_own(own_loss, tmp_path):
    option = {"_target_": own_loss, "power": 1.0}
    model = create_world_model(
        "dreamerv3:size1m",
        **SPACES,
        **SMALL,
        representation=option,
        decoder=False,
        loss_scales={"near": 0.5},
    )
    losses = losses_of(model, batch_for(model))
    assert losses["near_loss"] > 0
    model.after_update()
    assert model.representation.updates == 1
    model.save_pretrained(tmp_path / "model")
    with pytest.raises(ValueError, match=r"names 'my_losses.Nearest', which is not part of worldl"):
        create_world_model(tmp_path / "model")
    loaded = create_world_model(tmp_path / "model", allow=own_loss)
    assert torch.equal(losses_of(loaded, batch_for(model))["near_loss"], losses["near_loss"])


WRONG = {
    "representation is 'r2dreamr'; did you mean": {"representation": "r2dreamr"},
    "r2dreamer has no hyperparameter 'lambda'": {
        "representation": {"name": "r2dreamer", "lambda": 1.0}
    },
    "expected a subclass of": {"representation": {"_target_": "torch.nn.Linear"}},
    "cannot import": {"representation": {"_target_": "my_pkg.Missing"}},
    "learns from reconstructions": {"representation": "decoder", "decoder": False},
    "hyperparameter 'representation' is 3": {"representation": 3},
}


@pytest.mark.parametrize("message", WRONG)
def test_a_wrong_option_is_explained(message):
    with pytest.raises(ValueError, match="representation") as found:
        build("r2dreamer", **WRONG[message])
    assert message.removesuffix("; did you mean") in str(found.value)
    assert "\n" not in str(found.value)


def test_an_option_of_the_preset_can_be_changed_alone():
    model = build("r2dreamer", representation={"lambd": 1.0})
    assert model.representation.lambd == 1.0
    assert build("dreamerv3", representation="infonce", decoder=False).decoder is None
    assert build("dreamerv3", representation="infonce").decoder is not None  # a probe
