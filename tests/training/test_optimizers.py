import copy
import math

import pytest
import torch
from torch import nn

from worldloom.training import LaProp
from worldloom.training.optimizers import Adam

F64 = torch.float64


class PlainLaProp:
    """One parameter tensor after the formulas of the reference, in Python floats, one by one.

    g <- g / max(1, |g| / (agc max(pmin, |p|)));  v <- b2 v + (1 - b2) g^2
    u = g / (sqrt(v / (1 - b2^k)) + eps);         m <- b1 m + (1 - b1) u
    u = m / (1 - b1^k) + wd p;                    p <- p - lr min(1, (k - 1) / warmup) u
    """

    def __init__(self, p, lr, betas, eps, agc, pmin, warmup, weight_decay):
        self.p = list(p)
        self.v, self.m = [0.0] * len(p), [0.0] * len(p)
        self.lr, self.betas, self.eps, self.agc, self.pmin = lr, betas, eps, agc, pmin
        self.warmup, self.weight_decay, self.k = warmup, weight_decay, 0

    def step(self, g):
        self.k += 1
        b1, b2 = self.betas
        limit = self.agc * max(self.pmin, math.hypot(*self.p))
        clip = max(1.0, math.hypot(*g) / limit) if self.agc else 1.0
        lr = self.lr * (min(1.0, (self.k - 1) / self.warmup) if self.warmup else 1.0)
        for i, gi in enumerate(g):
            gi /= clip
            self.v[i] = b2 * self.v[i] + (1 - b2) * gi * gi
            u = gi / (math.sqrt(self.v[i] / (1 - b2**self.k)) + self.eps)
            self.m[i] = b1 * self.m[i] + (1 - b1) * u
            u = self.m[i] / (1 - b1**self.k) + self.weight_decay * self.p[i]
            self.p[i] -= lr * u


def parameters(seed=0):
    torch.manual_seed(seed)
    shapes = [(3, 4), (5,), (2, 2, 3), (1,)]
    return [nn.Parameter(torch.randn(shape, dtype=F64)) for shape in shapes]


def gradients(params, steps, seed=1):
    torch.manual_seed(seed)
    # From far below to far above the clipping threshold.
    return [[torch.randn_like(p) * 10 ** (k % 5 - 2) for p in params] for k in range(steps)]


def take(optimizer, params, grads):
    for p, g in zip(params, grads, strict=True):
        p.grad = g
    optimizer.step()


DEFAULTS = dict(lr=0.01, betas=(0.9, 0.999), eps=1e-20, agc=0.3, pmin=1e-3, warmup=4)
CASES = {
    "as DreamerV3": {},
    "no warm-up": {"warmup": 0},
    "no clipping": {"agc": 0.0},
    "tight clipping": {"agc": 1e-3},
    "weight decay": {"weight_decay": 0.1},
    "other averages": {"betas": (0.5, 0.9), "eps": 1e-3},
    "large smallest norm": {"pmin": 100.0},
}


@pytest.mark.parametrize("case", CASES)
def test_equals_the_formulas_written_out(case):
    options = DEFAULTS | CASES[case]
    params = parameters()
    decay = options.pop("weight_decay", 0.0)
    optimizer = LaProp(params, weight_decay=decay, **options)
    plain = [
        PlainLaProp(p.flatten().tolist(), weight_decay=decay * (p.ndim > 1), **options)
        for p in params
    ]
    for grads in gradients(params, 12):
        take(optimizer, params, grads)
        for second, g in zip(plain, grads, strict=True):
            second.step(g.flatten().tolist())
    for p, second in zip(params, plain, strict=True):
        expected = torch.tensor(second.p, dtype=F64).view_as(p)
        # The warm-up is float32: its rate is off by up to 1e-7 of itself.
        torch.testing.assert_close(p.detach(), expected, rtol=0.0, atol=12 * 0.01 * 3e-7)


def test_the_first_step_of_a_warm_up_moves_nothing_but_is_remembered():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = LaProp(params, lr=1.0, warmup=10, weight_decay=0.5)
    first, second = gradients(params, 2)
    take(optimizer, params, first)
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0.0, atol=0.0)
    take(optimizer, params, second)
    assert all(not torch.equal(p, b) for p, b in zip(params, before, strict=True))


def test_the_rate_rises_and_falls_linearly_to_a_tenth():
    p = nn.Parameter(torch.tensor([100.0], dtype=F64))
    optimizer = LaProp([p], lr=0.1, warmup=4, anneal=14, betas=(0.0, 0.0))
    moves = []
    for _ in range(20):
        before = p.item()
        take(optimizer, [p], [torch.ones(1, dtype=F64)])  # one unit of the rate each
        moves.append((before - p.item()) / 0.1)
    rising = [k / 4 for k in range(4)]
    falling = [1 - 0.9 * k / 10 for k in range(10)]
    assert moves == pytest.approx(rising + falling + [0.1] * 6, rel=1e-6, abs=1e-6)


def test_the_size_of_the_gradient_does_not_matter_only_its_direction():
    def after(scale):
        params = parameters()
        optimizer = LaProp(params, lr=0.01, warmup=0)
        for grads in gradients(params, 3):
            take(optimizer, params, [g * scale for g in grads])
        return [p.detach() for p in params]

    # Clipped either way, both times to the same norms.
    torch.testing.assert_close(after(1e6), after(1e9))


def test_parameters_without_a_gradient_are_left_alone():
    params = parameters()
    optimizer = LaProp(params, lr=0.01, warmup=0, weight_decay=0.1)
    before = params[0].detach().clone()
    take(optimizer, params, [None, *gradients(params, 1)[0][1:]])
    assert torch.equal(params[0], before) and params[0] not in optimizer.state
    take(optimizer, params, [None] * 4)  # nothing at all is no error either


def test_parameters_that_skip_steps_count_their_own():
    """As if each were trained alone, whatever the others did meanwhile."""
    options = dict(lr=0.01, warmup=3)
    steps = gradients(parameters(), 8)
    together, alone = parameters(), parameters()
    optimizer = LaProp(together, **options)
    for k, grads in enumerate(steps):
        take(
            optimizer, together, [g if i == 1 or k % (i + 2) else None for i, g in enumerate(grads)]
        )
    for i, p in enumerate(alone):
        single = LaProp([p], **options)
        for k, grads in enumerate(steps):
            if i == 1 or k % (i + 2):
                take(single, [p], [grads[i]])
    torch.testing.assert_close(together, alone, rtol=1e-12, atol=0.0)


def test_groups_have_options_of_their_own():
    params = parameters()
    before = [p.detach().clone() for p in params]
    groups = [{"params": params[:2], "lr": 0.0}, {"params": params[2:]}]
    optimizer = LaProp(groups, lr=0.01, warmup=0)
    take(optimizer, params, gradients(params, 1)[0])
    moved = [not torch.equal(p, b) for p, b in zip(params, before, strict=True)]
    assert moved == [False, False, True, True]


def test_zero_gradients_move_nothing():
    params = parameters()
    before = [p.detach().clone() for p in params]
    optimizer = LaProp(params, lr=0.01, warmup=0)
    take(optimizer, params, [torch.zeros_like(p) for p in params])
    torch.testing.assert_close([p.detach() for p in params], before, rtol=0.0, atol=0.0)


def test_gradients_are_not_changed():
    params = parameters()
    grads = gradients(params, 1)[0]
    copies = [g.clone() for g in grads]
    take(LaProp(params, agc=1e-3), params, grads)
    assert all(torch.equal(g, c) for g, c in zip(grads, copies, strict=True))


def test_a_saved_state_goes_on_where_it_stopped(tmp_path):
    steps = gradients(parameters(), 9)
    whole, halves = parameters(), parameters()
    optimizer = LaProp(whole, lr=0.01, warmup=6)
    for grads in steps:
        take(optimizer, whole, grads)
    optimizer = LaProp(halves, lr=0.01, warmup=6)
    for grads in steps[:4]:
        take(optimizer, halves, grads)
    torch.save(optimizer.state_dict(), tmp_path / "state.pt")
    optimizer = LaProp(halves, lr=0.5, warmup=1)  # the loaded options count
    optimizer.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    for grads in steps[4:]:
        take(optimizer, halves, grads)
    torch.testing.assert_close(halves, whole, rtol=0.0, atol=0.0)


def test_a_closure_is_called_with_gradients_on():
    p = nn.Parameter(torch.ones(2))
    optimizer = LaProp([p], lr=0.1, warmup=0)

    def closure():
        optimizer.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == 2.0
    assert (p < 1).all()


def test_learns():
    """Down a badly scaled bowl."""
    p = nn.Parameter(torch.tensor([3.0, -2.0]))
    optimizer = LaProp([p], lr=0.02, warmup=10)
    scale = torch.tensor([1.0, 1e4])
    for _ in range(400):
        optimizer.zero_grad()
        (scale * p.square()).sum().backward()
        optimizer.step()
    assert p.abs().max() < 0.1


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"lr": -1e-3}, "lr=-0.001, .*none may be negative"),
        ({"eps": -1.0}, "eps=-1.0"),
        ({"agc": -0.3}, "agc=-0.3"),
        ({"warmup": -1}, "warmup=-1"),
        ({"weight_decay": -0.1}, "weight_decay=-0.1"),
        ({"betas": (0.9, 1.0)}, r"betas=\(0.9, 1.0\); expected two, both at least 0 and below 1"),
        ({"betas": (-0.1, 0.9)}, r"betas=\(-0.1, 0.9\)"),
        ({"betas": (0.9,)}, r"betas=\(0.9,\); expected two"),
        ({"anneal": 500, "warmup": 1000}, "anneal=500; expected 0 for none, or more than warmup"),
    ],
)
def test_bad_options(options, message):
    with pytest.raises(ValueError, match=message):
        LaProp(parameters(), **options)


# ---- Adam in groups ------------------------------------------------------------------------------


def groups(params):
    """Two groups that are clipped together, one of them slow; one clipped alone."""
    return [
        {"params": params[:2], "lr_scale": 0.3, "clip": "model"},
        {"params": params[2:3], "clip": "model"},
        {"params": params[3:], "clip": "policy", "eps": 1e-5},
    ]


@pytest.mark.parametrize("clip", [None, 0.5])
def test_adam_is_two_official_optimisers_in_one(clip):
    """Like two plain Adams with clip_grad_norm_ of their own, as the official code has them."""
    ours, theirs = parameters(), parameters()
    adam = Adam(groups(ours), lr=0.01, max_norm=clip)
    model = torch.optim.Adam(
        [{"params": theirs[:2], "lr": 0.003}, {"params": theirs[2:3]}], lr=0.01
    )
    policy = torch.optim.Adam(theirs[3:], lr=0.01, eps=1e-5)
    for grads in gradients(ours, steps=8):
        take(adam, ours, [g.clone() for g in grads])
        for p, g in zip(theirs, grads, strict=True):
            p.grad = g.clone()
        if clip is not None:
            nn.utils.clip_grad_norm_(theirs[:3], clip)
            nn.utils.clip_grad_norm_(theirs[3:], clip)
        model.step()
        policy.step()
    for p, q in zip(ours, theirs, strict=True):
        # Same formulas in the same order: only how torch groups tensors may differ.
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_adam_takes_plain_parameters_and_a_closure():
    ours, theirs = parameters(), parameters()
    adam, plain = Adam(ours, lr=0.01), torch.optim.Adam(theirs, lr=0.01)
    for params, optimizer in ((ours, adam), (theirs, plain)):

        def closure(params=params):
            loss = sum((p**2).sum() for p in params)
            loss.backward()
            return loss

        assert optimizer.step(closure) == sum((p**2).sum() for p in parameters())
    assert all(torch.equal(p, q) for p, q in zip(ours, theirs, strict=True))


def test_adam_goes_on_exactly_after_a_restart():
    params = parameters()
    adam = Adam(groups(params), lr=0.01, max_norm=1.0)
    first, second = gradients(params, steps=2)
    take(adam, params, first)
    copies = [nn.Parameter(p.detach().clone()) for p in params]
    again = Adam(groups(copies), lr=0.01, max_norm=1.0)
    again.load_state_dict(copy.deepcopy(adam.state_dict()))
    take(adam, params, [g.clone() for g in second])
    take(again, copies, [g.clone() for g in second])
    assert all(torch.equal(p, q) for p, q in zip(params, copies, strict=True))


def test_adam_refuses_to_clip_to_nothing():
    with pytest.raises(ValueError, match=r"max_norm=0\.0; expected above 0, or None"):
        Adam(parameters(), max_norm=0.0)


def test_a_model_of_vectors_alone_has_nothing_to_decay():
    vector = nn.Parameter(torch.ones(3))
    vector.grad = torch.zeros(3)
    LaProp([vector], lr=0.1, warmup=0, weight_decay=0.5).step()
    assert vector.tolist() == [1.0, 1.0, 1.0]


def test_lightning_may_clip_its_gradients_in_mixed_precision():
    # What Lightning asks, and refuses a fused optimiser for; scaling is for float16 alone.
    weight = nn.Parameter(torch.ones(3))
    assert not getattr(Adam([weight]), "_step_supports_amp_scaling", False)


def test_the_reported_rate_is_the_one_in_use():
    """In the parameter groups, where Lightning's LearningRateMonitor reads it."""
    p = nn.Parameter(torch.tensor([100.0], dtype=F64))
    optimizer = LaProp([p], lr=0.1, warmup=4, anneal=14, betas=(0.0, 0.0))
    assert optimizer.param_groups[0]["lr"] == 0.0
    for _ in range(20):
        before = p.item()
        take(optimizer, [p], [torch.ones(1, dtype=F64)])  # moves by one rate
        assert before - p.item() == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-6)
    assert optimizer.param_groups[0]["lr"] == pytest.approx(0.01)


def test_groups_report_rates_of_their_own():
    params = parameters()
    optimizer = LaProp(params[:2], lr=0.01, warmup=2)
    optimizer.add_param_group({"params": params[2:], "lr": 0.5})
    for grads in gradients(params, 3):
        take(optimizer, params, grads)
    assert [group["lr"] for group in optimizer.param_groups] == [0.01, 0.5]


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_factors_may_be_tensors(weight_decay):
    ours, others = parameters(), parameters()
    options = {"lr": 0.01, "warmup": 3, "weight_decay": weight_decay}
    optimizer, other = LaProp(ours, **options), LaProp(others, **options)
    for grads in gradients(ours, 6):
        take(optimizer, ours, [g.clone() for g in grads])
        for p, g in zip(others, grads, strict=True):
            p.grad = g
        for group, params, factors in other.advance():
            other.apply(group, params, [torch.tensor(x, dtype=F64) for x in factors])
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)


def test_adam_takes_its_learning_rates_as_tensors_for_one_step():
    ours, others = parameters(), parameters()
    groups = [
        [{"params": p[:2], "clip": "a"}, {"params": p[2:], "lr_scale": 0.3}] for p in (ours, others)
    ]
    optimizer, other = (Adam(group, lr=0.01, max_norm=0.5) for group in groups)
    for grads in gradients(ours, 4):
        take(optimizer, ours, [g.clone() for g in grads])
        for p, g in zip(others, grads, strict=True):
            p.grad = g
        ((rates,),) = other.advance()
        other.apply(tuple(torch.tensor(rate, dtype=F64) for rate in rates))
    for p, q in zip(ours, others, strict=True):
        torch.testing.assert_close(p, q, rtol=1e-12, atol=1e-14)
    assert [group["lr"] for group in other.param_groups] == [0.01, 0.003]
    assert not any(group["capturable"] for group in other.param_groups)
