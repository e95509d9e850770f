import math

import pytest
import torch

from worldloom.nn.twohot import (
    sparse_cross_entropy,
    symexp_bins,
    symlog_twohot_loss,
    symlog_twohot_mean,
    twohot_loss,
    twohot_mean,
)

F64 = torch.float64
CPU = torch.device("cpu")
TARGETS = [-3e6, -784.77, -1.0, -0.3, 0.0, 1e-9, 0.5, 1.0, 784.77, 2e7, 4.8e8]


def code_of(target, bins=255):
    """The two-hot code of a number, read off the gradient of the loss at uniform logits."""
    logits = torch.zeros(bins, dtype=F64, requires_grad=True)
    (grad,) = torch.autograd.grad(twohot_loss(logits, torch.tensor(target, dtype=F64)), logits)
    return (1 / bins - grad).where((1 / bins - grad).abs() > 1e-15, 0.0)


@pytest.mark.parametrize("bins", [2, 3, 40, 41, 255])
def test_bins_mirror_each_other_and_rise(bins):
    x = symexp_bins(bins, F64, CPU)
    assert len(x) == bins and (x == -x.flip(0)).all() and (x.diff() >= 0).all()
    assert x[-1].item() == pytest.approx(math.expm1(20), rel=1e-12)
    # Even numbers have two bins at zero, as in the official code; but for two of them.
    assert (x == 0).sum() == (2 - bins % 2 if bins > 2 else 0)


@pytest.mark.parametrize("bins", [40, 255])
@pytest.mark.parametrize("target", TARGETS)
def test_the_mean_of_a_code_is_its_number(target, bins):
    code = code_of(target, bins)
    mean = twohot_mean(code.log())
    # The code comes back through exp and log; its bins reach up to |target| * exp(40 / (bins - 1)).
    scale = max(abs(target), 1.0) * math.exp(40 / (bins - 1))
    assert mean.item() == pytest.approx(target, abs=1e-12 * scale * bins)


@pytest.mark.parametrize("target", TARGETS)
def test_a_code_lies_on_the_two_nearest_bins(target):
    x, code = symexp_bins(255, F64, CPU), code_of(target)
    on = code.nonzero().flatten()
    assert len(on) <= 2 and code.sum().item() == pytest.approx(1.0)
    below, above = x[on.min()], x[on.max()]
    assert below <= target <= above and (len(on) == 1 or on[1] == on[0] + 1)


@pytest.mark.parametrize(("target", "bin_"), [(1e12, -1), (-1e12, 0), (float("inf"), -1)])
def test_beyond_the_ends_all_mass_is_on_the_end(target, bin_):
    code = code_of(target)
    assert code[bin_].item() == pytest.approx(1.0) and code.abs().sum().item() == pytest.approx(1.0)


@pytest.mark.parametrize("bins", [2, 3, 40, 255])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
@pytest.mark.parametrize("level", [0.0, 3.0])
def test_uniform_logits_mean_exactly_zero(bins, dtype, level):
    mean = twohot_mean(torch.full((4, bins), level, dtype=dtype))
    assert (mean == 0).all() and mean.dtype in (torch.float32, torch.float64)


def test_the_gradient_is_softmax_minus_code():
    torch.manual_seed(0)
    logits = torch.randn(len(TARGETS), 255, dtype=F64, requires_grad=True)
    target = torch.tensor(TARGETS, dtype=F64)
    (grad,) = torch.autograd.grad(twohot_loss(logits, target).sum(), logits)
    codes = torch.stack([code_of(x) for x in TARGETS])
    torch.testing.assert_close(grad, logits.softmax(-1).detach() - codes, rtol=0.0, atol=1e-14)


def test_the_loss_is_a_cross_entropy_and_least_at_the_code():
    torch.manual_seed(1)
    logits = torch.randn(255, dtype=F64)
    code = code_of(0.7)
    expected = -(code * logits.log_softmax(-1)).sum()
    torch.testing.assert_close(twohot_loss(logits, torch.tensor(0.7)), expected)
    entropy = -(code * code.clamp(min=1e-300).log()).sum()
    best = twohot_loss((code + 1e-30).log(), torch.tensor(0.7, dtype=F64))
    torch.testing.assert_close(best, entropy)
    assert best < twohot_loss(logits, torch.tensor(0.7))


def test_targets_get_no_gradient_and_keep_their_shape():
    target = torch.randn(3, 4, requires_grad=True)
    loss = twohot_loss(torch.randn(3, 4, 41, requires_grad=True), target)
    assert loss.shape == (3, 4)
    loss.sum().backward()
    assert target.grad is None
    assert twohot_mean(torch.randn(3, 4, 41)).shape == (3, 4)


def test_half_precision_is_computed_in_float32():
    logits = torch.randn(5, 255).bfloat16()
    torch.testing.assert_close(twohot_mean(logits), twohot_mean(logits.float()), rtol=0.0, atol=0.0)
    assert twohot_loss(logits, torch.ones(5)).dtype == torch.float32


def test_one_bin_is_refused():
    with pytest.raises(ValueError, match="bins is 1; two-hot regression needs at least 2"):
        symexp_bins(1, F64, CPU)


# ---- bins that are even in symlog space (TD-MPC2) ------------------------------------------------

RANGES = [(-10.0, 10.0, 101), (-3.0, 5.0, 9), (-1.0, 1.0, 2)]
EVEN = [-2e4, -7.3, -1.0, -1e-6, 0.0, 0.4, 1.5, 784.77, 2e4]


def symexp_by_hand(y):
    return math.copysign(math.expm1(abs(y)), y)


def even_code(target, low, high, bins):
    """The code by its definition: linear interpolation between the bins around symlog(target)."""
    y = min(max(math.copysign(math.log1p(abs(target)), target), low), high)
    centres = torch.linspace(low, high, bins, dtype=F64)
    return (1 - (y - centres).abs() / ((high - low) / (bins - 1))).clamp(min=0.0)


@pytest.mark.parametrize(("low", "high", "bins"), RANGES)
@pytest.mark.parametrize("target", EVEN)
def test_even_bins_cross_entropy_and_gradient(target, low, high, bins):
    torch.manual_seed(0)
    logits = torch.randn(bins, dtype=F64, requires_grad=True)
    loss = symlog_twohot_loss(logits, torch.tensor(target, dtype=F64), low, high)
    (grad,) = torch.autograd.grad(loss, logits)
    code = even_code(target, low, high, bins)
    # A position among 101 bins is off by up to 100 roundings, and so is the code.
    torch.testing.assert_close(loss, -(code * logits.log_softmax(-1)).sum(), rtol=1e-12, atol=0.0)
    torch.testing.assert_close(grad, logits.softmax(-1).detach() - code, rtol=0.0, atol=1e-13)


@pytest.mark.parametrize(("low", "high", "bins"), RANGES)
@pytest.mark.parametrize("target", EVEN)
def test_even_bins_code_and_mean_are_inverse_within_the_range(target, low, high, bins):
    mean = symlog_twohot_mean(even_code(target, low, high, bins).log(), low, high)
    expected = min(max(target, symexp_by_hand(low)), symexp_by_hand(high))
    # An error of 1e-14 in symlog space is that much of 1 + |x| outside it.
    assert mean.item() == pytest.approx(expected, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("index", [0, 1, 50, 73, 99, 100])
def test_a_certain_bin_means_its_own_number(index):
    """The mean is taken in symlog space: two bins mean the number halfway between them there."""
    logits = torch.full((101,), -math.inf, dtype=F64)
    logits[index] = 0.0
    mean = symlog_twohot_mean(logits, -10.0, 10.0)
    assert mean.item() == pytest.approx(symexp_by_hand(-10 + 0.2 * index), rel=1e-13, abs=1e-13)
    if index < 100:
        logits[index + 1] = 0.0
        mean = symlog_twohot_mean(logits, -10.0, 10.0)
        halfway = symexp_by_hand(-10 + 0.2 * index + 0.1)
        assert mean.item() == pytest.approx(halfway, rel=1e-13, abs=1e-13)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
@pytest.mark.parametrize(("target", "end"), [(1e9, -1), (math.inf, -1), (-1e9, 0), (-math.inf, 0)])
def test_beyond_even_bins_the_end_takes_all(target, end, dtype):
    torch.manual_seed(0)
    logits = torch.randn(101, dtype=dtype)
    loss = symlog_twohot_loss(logits, torch.tensor(target, dtype=dtype), -10.0, 10.0)
    torch.testing.assert_close(loss, -logits.log_softmax(-1)[end])


def test_uniform_even_bins_mean_nothing():
    # A hundred roundings of terms below 0.1 each.
    assert symlog_twohot_mean(torch.zeros(101), -10.0, 10.0).abs() < 100 * 0.1 * 6e-8


def test_even_bins_keep_shapes_and_half_precision_is_computed_in_float32():
    target = torch.randn(3, 4, requires_grad=True)
    logits = torch.randn(3, 4, 101, requires_grad=True)
    loss = symlog_twohot_loss(logits, target, -10.0, 10.0)
    loss.sum().backward()
    assert loss.shape == (3, 4) and target.grad is None and logits.grad.any()
    half = logits.detach().bfloat16()
    for function in (
        lambda x: symlog_twohot_mean(x, -10.0, 10.0),
        lambda x: symlog_twohot_loss(x, target, -10.0, 10.0),
    ):
        assert function(half).dtype == torch.float32
        assert torch.equal(function(half), function(half.float()))


def test_a_target_that_is_no_number_gives_a_loss_that_is_none():
    """Not the loss of some bin, which would be learned without a word."""
    logits = torch.zeros(3, 11, requires_grad=True)
    target = torch.tensor([1.0, float("nan"), float("inf")])
    for loss in (twohot_loss(logits, target), symlog_twohot_loss(logits, target, -5.0, 5.0)):
        assert loss.isnan().tolist() == [False, True, False]


def test_the_loss_of_several_targets_is_the_sum_of_theirs():
    logits = torch.randn(4, 6, 41, dtype=F64, requires_grad=True)
    targets = 3 * torch.randn(2, 4, 6, dtype=F64)
    each = twohot_loss(logits, targets[0]) + 0.3 * twohot_loss(logits, targets[1])
    both = twohot_loss(logits, *targets, weights=(1.0, 0.3))
    torch.testing.assert_close(both, each)
    pick = torch.randn(4, 6, dtype=F64)
    grads = [torch.autograd.grad((x * pick).sum(), logits)[0] for x in (both, each)]
    torch.testing.assert_close(*grads)


def test_a_sparse_code_costs_what_torch_says_of_the_dense_one():
    logits = torch.randn(3, 2, 9, dtype=F64, requires_grad=True)
    index = torch.randint(9, (3, 2, 3))
    index[0, 0] = 4  # one bin three times
    mass = torch.rand(3, 2, 3, dtype=F64)
    dense = torch.zeros(3, 2, 9, dtype=F64).scatter_add_(-1, index, mass)
    expected = torch.nn.functional.cross_entropy(
        logits.movedim(-1, 1), dense.movedim(-1, 1), reduction="none"
    )
    torch.testing.assert_close(sparse_cross_entropy(logits, index, mass), expected)
    torch.testing.assert_close(
        sparse_cross_entropy(logits.detach(), index, mass), expected.detach()
    )
    torch.autograd.gradcheck(lambda x: sparse_cross_entropy(x, index, mass), (logits,))
