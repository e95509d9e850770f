import math

import pytest
import torch
from torch import distributions

from worldloom.nn import distributions as ours

F64 = torch.float64
DRAWS = 20_000


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


# ---- drawing -------------------------------------------------------------------------------------


@pytest.mark.parametrize("probs", [[0.1, 0.2, 0.7], [0.25] * 4, [0.9, 0.05, 0.03, 0.02]])
def test_classes_are_drawn_as_often_as_their_probability_says(probs):
    probs = torch.tensor(probs)
    index = ours.sample_classes(probs.expand(DRAWS, -1))
    counts = index.bincount(minlength=len(probs))
    expected = DRAWS * probs
    chi_square = ((counts - expected) ** 2 / expected).sum().item()
    # 20 is beyond the 99.98th percentile of chi-square with up to 3 degrees of freedom.
    assert chi_square < 20


def test_a_class_without_probability_is_never_drawn():
    probs = torch.tensor([0.0, 0.5, 0.0, 0.5, 0.0]).expand(DRAWS, -1)
    assert set(ours.sample_classes(probs).tolist()) == {1, 3}


def test_draws_of_different_variables_are_independent():
    index = ours.sample_classes(torch.full((DRAWS, 2, 2), 0.5)).float()
    correlation = torch.corrcoef(index.T)[0, 1].item()
    assert abs(correlation) < 5 / math.sqrt(DRAWS)  # five standard errors


def test_normal_draws_have_mean_and_deviation():
    mean, deviation = torch.tensor([1.0, -2.0]), torch.tensor([0.5, 3.0])
    x = ours.sample_normal(mean.expand(DRAWS, 2), deviation)
    error = 5 * deviation / math.sqrt(DRAWS)
    assert ((x.mean(0) - mean).abs() < error).all()
    assert ((x.std(0) - deviation).abs() < error).all()


def test_straight_through_samples_are_one_hot_with_the_gradient_of_the_probabilities():
    logits = torch.randn(6, 3, 5, dtype=F64, requires_grad=True)
    probs = ours.unimix_probs(logits, 0.01)
    sample = ours.sample_straight_through(probs)
    assert ((sample == 0) | (sample == 1)).all() and (sample.sum(-1) == 1).all()
    weight = torch.randn_like(sample)
    (got,) = torch.autograd.grad((sample * weight).sum(), logits, retain_graph=True)
    (expected,) = torch.autograd.grad((probs * weight).sum(), logits)
    torch.testing.assert_close(got, expected)


# ---- categorical latents -------------------------------------------------------------------------


@pytest.mark.parametrize("unimix", [0.0, 0.01, 0.5])
def test_unimix(unimix):
    logits = 10 * torch.randn(4, 3, 6, dtype=F64)
    probs = ours.unimix_probs(logits, unimix)
    torch.testing.assert_close(probs, (1 - unimix) * logits.softmax(-1) + unimix / 6)
    torch.testing.assert_close(ours.unimix_log_probs(logits, unimix).exp(), probs)
    assert ours.unimix_probs(logits.bfloat16(), unimix).dtype == torch.float32


@pytest.mark.parametrize("unimix", [0.0, 0.01])
def test_kl_and_entropy_are_torchs(unimix):
    p, q = torch.randn(2, 4, 3, 6, dtype=F64).unbind()
    dist = [distributions.Categorical(probs=ours.unimix_probs(x, unimix)) for x in (p, q)]
    expected = distributions.kl_divergence(*dist).sum(-1)
    for kl in ours.kl_divergence(p, q, unimix):
        torch.testing.assert_close(kl, expected)
    torch.testing.assert_close(ours.class_entropy(p, unimix), dist[0].entropy().sum(-1))


def test_each_side_of_the_kl_trains_one_distribution():
    p, q = torch.randn(2, 4, 3, 6, dtype=F64, requires_grad=True).unbind()
    p, q = p.detach().requires_grad_(), q.detach().requires_grad_()
    train_q, train_p = ours.kl_divergence(p, q, 0.01)
    whole = distributions.kl_divergence(
        *(distributions.Categorical(probs=ours.unimix_probs(x, 0.01)) for x in (p, q))
    )
    grad_p, grad_q = torch.autograd.grad(whole.sum(), (p, q))
    none, got_q = torch.autograd.grad(train_q.sum(), (p, q), allow_unused=True)
    assert none is None
    torch.testing.assert_close(got_q, grad_q)
    got_p, none = torch.autograd.grad(train_p.sum(), (p, q), allow_unused=True)
    assert none is None
    torch.testing.assert_close(got_p, grad_p)


# ---- policies ------------------------------------------------------------------------------------


def test_choices_are_torchs():
    logits = torch.randn(5, 7, dtype=F64)
    mine, torchs = ours.Classes(logits, 1), distributions.OneHotCategorical(logits=logits)
    event = mine.sample()
    torch.testing.assert_close(mine.log_prob(event), torchs.log_prob(event))
    torch.testing.assert_close(mine.entropy(), torchs.entropy())
    assert (mine.mode().argmax(-1) == logits.argmax(-1)).all()
    assert mine.entropy_bounds() == (0.0, math.log(7))
    uniform = ours.Classes(torch.zeros(2, 3, 7), 2)
    assert uniform.entropy()[0].item() == pytest.approx(uniform.entropy_bounds()[1])


def test_bounded_normals_are_torchs_between_their_bounds():
    raw = 50 * torch.randn(2, 400, 3, dtype=F64)
    mine = ours.BoundedNormal.from_raw(raw[0], raw[1], dims=1, minstd=0.1, maxstd=1.0)
    torchs = distributions.Independent(distributions.Normal(mine.mean, mine.stddev), 1)
    event = mine.sample()
    torch.testing.assert_close(mine.log_prob(event), torchs.log_prob(event))
    torch.testing.assert_close(mine.entropy(), torchs.entropy())
    assert mine.mode().abs().max() <= 1
    assert mine.stddev.min().item() == pytest.approx(0.1)
    assert mine.stddev.max().item() == pytest.approx(1.0)
    low, high = mine.entropy_bounds()
    assert low - 1e-9 <= mine.entropy().min() and mine.entropy().max() <= high + 1e-9


def test_binary_cross_entropy_of_soft_targets():
    logits, target = torch.randn(9, dtype=F64), torch.rand(9, dtype=F64)
    p = logits.sigmoid()
    expected = -(target * p.log() + (1 - target) * (1 - p).log())
    torch.testing.assert_close(ours.binary_cross_entropy(logits, target), expected)


@pytest.mark.parametrize("classes", [1, 2, 4, 8, 9])
def test_a_softmax_over_few_classes_is_torchs(classes):
    logits = 50 * torch.randn(5, 3, classes, dtype=F64)
    logits[0] += 1e4  # which no exponential survives
    logits.requires_grad_()
    pick = torch.randn(5, 3, classes, dtype=F64)
    expected = logits.softmax(-1)
    torch.testing.assert_close(ours.softmax(logits), expected)
    grads = [
        torch.autograd.grad((x * pick).sum(), logits)[0] for x in (ours.softmax(logits), expected)
    ]
    torch.testing.assert_close(*grads)
