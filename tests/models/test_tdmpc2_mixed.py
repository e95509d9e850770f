"""TD-MPC2 in mixed bfloat16 on a CPU: how often weights are cast, plans, tracing.

tests/reference compares losses and gradients with float32.
"""

from collections import Counter

import pytest
import torch

from tests.models.test_tdmpc2_parts import batch_for, build
from tests.nn.test_casts import CountCasts
from worldloom.models.tdmpc2 import draws

TASKS = dict(action_dims=[1, 2], task_dim=3, episode_lengths=[70, 90])


def mixed():
    return torch.autocast("cpu", torch.bfloat16)


def weight_casts(model, run):
    """Casts of tensors with the shape of each weight, and the number of these weights, by name."""
    # Shapes of these weights differ from those of activations, but not from each other.
    named = model.named_parameters()
    shapes = {k: tuple(p.shape) for k, p in named if k.endswith("weight") and p.ndim > 1}
    with CountCasts() as counted, mixed():
        run()
    casts = Counter(counted.shapes)
    same = Counter(shapes.values())
    return {name: (casts[shape], same[shape]) for name, shape in shapes.items()}


def test_an_update_casts_each_weight_once():
    model = build(num_q=3, num_bins=37, enc_dim=17, mlp_dim=19, latent_dim=24).train()
    batch = batch_for(model)
    for name, (casts, weights) in weight_casts(model, lambda: model.compute_loss(batch)).items():
        assert casts == weights, name


@pytest.mark.parametrize("options", [{}, TASKS])
def test_a_plan_casts_each_weight_at_most_once(options):
    model = build(num_q=3, num_bins=37, enc_dim=17, mlp_dim=19, latent_dim=24, **options).eval()
    rows = torch.randn(2, 4)
    state = model.encode(rows, torch.tensor([0, 1])) if options else model.encode(rows)
    found = weight_casts(model, lambda: model.policy(state))
    used = [name for name in found if name.startswith(("dynamics", "reward", "actor"))]
    assert len(used) == 9 and all(found[name][0] > 0 for name in used)
    for name, (casts, weights) in found.items():
        assert casts <= weights, name


@pytest.mark.parametrize("options", [{}, TASKS, {"episodic": True}])
def test_returns_of_sequences(options):
    """The planner's values are those of float32 but for roundings of products."""
    model = build(**options).eval()
    planner, rows = model.make_planner(), torch.randn(2, 4)
    state = model.encode(rows, torch.tensor([0, 1])) if options is TASKS else model.encode(rows)
    torch.manual_seed(1)
    actions = 2 * torch.rand(2, 50, 3, 2) - 1
    with torch.no_grad():
        found = []
        for enabled in (False, True):
            torch.manual_seed(2)
            with torch.autocast("cpu", torch.bfloat16, enabled=enabled):
                found.append(planner.compute_returns(state, actions))
    exact, half = found
    assert half.dtype == torch.float32 and half.isfinite().all()
    assert (half - exact).abs().mean() < 0.1 * exact.std(1).mean() + 0.02 * exact.abs().mean()


def test_discrete_actions_and_pixels_train_and_plan():
    model = build((3, 64, 64), 3, True, num_channels=1, latent_dim=16).train()
    with mixed():
        losses = model.compute_loss(batch_for(model))
        action, _ = model.policy(model.encode(torch.zeros(2, 3, 64, 64, dtype=torch.uint8)))
    losses["loss"].backward()
    assert all(value.isfinite() for value in losses.values())
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.requires_grad)
    assert action.sum(-1).tolist() == [1.0, 1.0]


def test_dropped_entries_get_no_gradient(monkeypatch):
    """All but one of the first units of every Q-function are dropped."""
    model = build(mlp_dim=16).train()
    kept = lambda n, probability: torch.tensor([i for i in range(n) if i % 16])  # noqa: E731
    monkeypatch.setattr(draws, "draw_dropped", kept)
    with mixed():
        model.compute_loss(batch_for(model))["loss"].backward()
    grad = model.critic.layers[0].weight.grad
    assert grad[:, 1:].abs().max() == 0 and grad.isfinite().all()


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to a")
def test_torch_func_and_compile_take_torch_functions():
    model = build(dropout=0.0).train()
    z, action = torch.randn(5, 16), torch.randn(5, 2)

    def value(action):
        next_z = model.predict_latent(z, action, None)
        q = model.critic(z, action).float()
        return (
            next_z.square().sum() + model.predict_reward(z, action, None).sum() + q.square().sum()
        )

    def differentiate(function):
        own = action.clone().requires_grad_()
        return torch.autograd.grad(function(own), own)[0]

    with mixed():
        wanted = differentiate(value)
        traced = (
            torch.func.grad(value)(action),
            differentiate(torch.compile(value, backend="eager", fullgraph=True)),
        )
    for grad in traced:
        torch.testing.assert_close(grad, wanted, rtol=0.1, atol=0.02 * wanted.abs().max().item())


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_compiled_loss():
    model = build(dropout=0.0).train()
    batch, found = batch_for(model), []
    for function in (model.compute_loss, torch.compile(model.compute_loss, backend="eager")):
        model.scale.value.fill_(1.0)
        torch.manual_seed(3)
        with mixed():
            found.append(function(batch)["loss"])
    torch.testing.assert_close(found[1], found[0], rtol=0.02, atol=1e-3)


def test_a_model_in_bfloat16_alone_is_not_mixed():
    model, half = build().bfloat16(), torch.randn(3, 18).bfloat16()
    with CountCasts() as counted:
        assert model.dynamics(half).dtype == torch.bfloat16
    assert not counted.shapes
