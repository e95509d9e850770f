"""Loss terms that subclasses add are weighted, added to the loss and named."""

from pathlib import Path

import pytest
import torch

from worldloom import create_world_model
from worldloom.check import check_world_model
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.models.tdmpc2 import TDMPC2
from worldloom.random_batches import RandomData

SIZES = {
    "dreamerv3:size1m": dict(units=8, deter=16, hidden=8, classes=4, stoch=4)
    | dict(reward_head={"bins": 11}, critic={"bins": 11}),
    "tdmpc2:1m": dict(enc_dim=8, mlp_dim=8, latent_dim=16, num_channels=1, num_bins=11)
    | dict(num_samples=12, num_elites=3, num_pi_trajs=3, episodic=True),
}
BASES = {"dreamerv3:size1m": DreamerV3, "tdmpc2:1m": TDMPC2}
FAMILIES = list(SIZES)
EXAMPLE = Path(__file__).resolve().parents[2] / "examples" / "own_loss.py"
EXTRA = {"size_loss", "drift_loss", "none_loss"}


class Hook:
    """Adds a term for each row and step, a scalar and a number."""

    def auxiliary_losses(self, batch, features):
        self.given = batch, features
        return {"size": features.square().mean(-1), "drift_loss": features.mean(), "none": 0}


class Dreamer(Hook, DreamerV3):
    pass


class Planner(Hook, TDMPC2):
    pass


class MoreDreamer(DreamerV3):
    """Adds a term, and leaves out the reconstruction and a part of the KL loss."""

    def world_model_terms(self, seq):
        terms, stats, deter, stoch = super().world_model_terms(seq)
        kept = {k: v for k, v in terms.items() if k != "rep" and not k.startswith("rec/")}
        return kept | {"size": deter.square()}, stats, deter, stoch


class MorePlanner(TDMPC2):
    def compute_model_losses(self, data):
        terms, stats, rollout = super().compute_model_losses(data)
        return terms | {"size": rollout.z.square()}, stats, rollout


HOOKED = {"dreamerv3:size1m": Dreamer, "tdmpc2:1m": Planner}
OVERRIDDEN = {"dreamerv3:size1m": MoreDreamer, "tdmpc2:1m": MorePlanner}


def build(name, cls=None, **options):
    torch.manual_seed(0)
    target = {} if cls is None else {"_target_": f"{__name__}.{cls.__name__}"}
    return create_world_model(name, (4,), 2, **(SIZES[name] | options | target)).train()


def batch_of(model, length=5):
    data = RandomData.for_model(model, (4,), 2, False, 3, length)
    fields = getattr(model, "replay_fields", {})
    with data.seeded():
        return data.batch() | data.replay_inputs(fields, 3, length)


def losses(model, **options):
    torch.manual_seed(7)
    return model.compute_loss(batch_of(model, **options))


@pytest.mark.parametrize("name", FAMILIES)
def test_terms_are_averaged_weighted_added_and_named(name):
    plain, hooked = losses(build(name)), build(name, HOOKED[name])
    found = losses(hooked)
    assert set(found) - set(plain) == EXTRA and not set(plain) - set(found)
    for key in set(plain) - {"loss", "replay"}:
        assert torch.equal(found[key], plain[key]), key
    batch, features = hooked.given
    assert set(batch) >= {"obs", "actions", "rewards"}
    # The last T rows: DreamerV3 does not train on the row of context.
    rows = 4 if name.startswith("dreamer") else 5
    assert features.shape == (3, rows, hooked.feature_dim)
    assert hooked.encode(batch["obs"][:, 0]).features.shape == (3, hooked.feature_dim)
    torch.testing.assert_close(found["size_loss"], features.square().mean())
    torch.testing.assert_close(found["drift_loss"], features.mean())
    assert not found["size_loss"].requires_grad and found["none_loss"] == 0
    total = plain["loss"] + found["size_loss"] + found["drift_loss"]
    torch.testing.assert_close(found["loss"], total)

    scales = {"size": 3.0, "drift_loss": 0.0}
    weighted = losses(build(name, HOOKED[name], loss_scales=scales))
    torch.testing.assert_close(weighted["loss"], plain["loss"] + 3 * found["size_loss"])
    assert torch.equal(weighted["size_loss"], found["size_loss"])


@pytest.mark.parametrize("name", FAMILIES)
def test_the_features_carry_gradient_to_the_encoder(name):
    model = build(name, HOOKED[name])
    losses(model)
    _, features = model.given
    features[:, -1].square().sum().backward()
    assert next(model.encoder.parameters()).grad.abs().sum() > 0


@pytest.mark.parametrize("name", FAMILIES)
def test_a_hook_that_returns_nothing_changes_nothing(name, monkeypatch):
    model, hooked = build(name), build(name, HOOKED[name])
    monkeypatch.setattr(HOOKED[name], "auxiliary_losses", lambda self, batch, features: {})
    one, drawn = losses(model), torch.rand(3)
    other = losses(hooked)
    assert torch.equal(torch.rand(3), drawn)  # as many random numbers were drawn
    assert list(one) == list(other)
    for key in set(one) - {"replay"}:
        assert torch.equal(one[key], other[key]), key
    one["loss"].backward()
    other["loss"].backward()
    for a, b in zip(model.parameters(), hooked.parameters(), strict=True):
        assert (a.grad is None and b.grad is None) or torch.equal(a.grad, b.grad)


@pytest.mark.parametrize("name", FAMILIES)
def test_terms_of_overridden_methods_are_weighted_added_and_named_too(name):
    found = losses(build(name, OVERRIDDEN[name]))
    doubled = losses(build(name, OVERRIDDEN[name], loss_scales={"size": 2.0}))
    torch.testing.assert_close(doubled["loss"], found["loss"] + found["size_loss"])
    assert found["size_loss"] > 0
    if name.startswith("dreamer"):  # a term that is left out is not reported
        assert "reconstruction_loss" not in found and "rep_loss" not in found
        torch.testing.assert_close(found["kl_loss"], found["dyn_loss"])


WRONG = {
    "no dict": (None, r"\.auxiliary_losses returned None; expected a dict {name: tensor}"),
    "no tensor": ({"x": "big"}, r"returned a str for 'x'; expected a tensor"),
    "a name of a loss": ({"reward": 1.0}, "'reward' would be logged as 'reward_loss', which the"),
    "one name twice": ({"x": 1.0, "x_loss": 1.0}, "'x_loss' would be logged as 'x_loss'"),
}


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize("wrong", WRONG)
def test_a_mistake_in_the_hook_is_named(name, wrong, monkeypatch):
    result, message = WRONG[wrong]
    monkeypatch.setattr(HOOKED[name], "auxiliary_losses", lambda self, batch, features: result)
    if wrong == "a name of a loss" and name.startswith("tdmpc2"):
        message = "'reward', which is a term of Planner already; choose another name"
    with pytest.raises(ValueError, match=message):
        losses(build(name, HOOKED[name]))


@pytest.mark.parametrize("name", FAMILIES)
def test_a_weight_without_its_term_is_reported(name):
    model = build(name, HOOKED[name], loss_scales={"sise": 2.0})
    with pytest.warns(UserWarning, match=r"has 'sise', but the loss has no such .*mean 'size'"):
        losses(model)


@pytest.mark.parametrize("name", FAMILIES)
@pytest.mark.parametrize(
    ("scales", "message"),
    [
        ({"size": "2"}, "'loss_scales.size' is '2'; expected float"),
        ({"size": float("nan")}, "'loss_scales.size' is nan; expected a finite number"),
        ({"size": True}, "'loss_scales.size' is True; expected float"),
        (2.0, "'loss_scales' is 2.0; expected a dict"),
    ],
)
def test_weights_are_numbers(name, scales, message):
    with pytest.raises(ValueError, match=message):
        build(name, HOOKED[name], loss_scales=scales)


def test_the_own_classes_of_worldloom_reject_unknown_weights():
    with pytest.raises(ValueError, match=r"'loss_scales.repp' \(did you mean 'loss_scales.rep'"):
        build("dreamerv3:size1m", loss_scales={"repp": 1.0})
    with pytest.raises(ValueError, match=r"has no hyperparameter 'loss_scales.size'"):
        build("tdmpc2:1m", loss_scales={"size": 1.0})
    with pytest.raises(ValueError, match=r"loss_scales is .*; expected extra terms only; the wei"):
        build("tdmpc2:1m", Planner, loss_scales={"reward": 1.0})


@pytest.mark.parametrize("name", FAMILIES)
def test_a_subclass_passes_the_check(name):
    model = build(name, HOOKED[name])
    model.auxiliary_losses = lambda batch, features: {"size": features.square().mean()}
    assert model.has_auxiliary_losses and check_world_model(model) is None


@pytest.mark.parametrize("name", FAMILIES)
def test_the_example_pairs_latents_and_actions_of_the_same_rows(name, tmp_path, monkeypatch):
    base = BASES[name]
    text = EXAMPLE.read_text().replace("TDMPC2", base.__name__)
    text = text.replace("models.tdmpc2", f"models.{name.partition(':')[0]}")
    module = f"inverse_{base.__name__.lower()}"
    (tmp_path / f"{module}.py").write_text(text)
    monkeypatch.syspath_prepend(tmp_path)
    options = SIZES[name] | {"_target_": f"{module}.InversePlanner"}
    model = create_world_model(name, (4,), 2, **options).train()
    for parameter in model.inverse[-1].parameters():
        torch.nn.init.zeros_(parameter)  # predicts no action at all
    batch = batch_of(model)
    first = 1 if name.startswith("dreamer") else 0  # row 0 of DreamerV3 is context
    actions, is_last = batch["actions"][:, first:-1], batch["is_last"][:, first:-1]
    inside = (is_last.cumsum(1) == 0).float()
    expected = (actions.square().mean(-1) * inside).mean()
    torch.testing.assert_close(model.compute_loss(batch)["inverse_loss"], expected)
    assert expected > 0
