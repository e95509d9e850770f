"""Mish against torch's own, which is computed in double precision."""

import pytest
import torch
import torch.nn.functional as F

from worldloom.nn.mish import mish

F64 = torch.float64
# Around zero, around the minimum at -1.19 and where the ratio saturates in single precision.
POINTS = [0.0, 1e-30, -1e-30, -1.1924, 8.6, 16.6, 17.3]
POINTS += torch.linspace(-30, 30, 601).tolist()
FAR = [100.0, -100.0, 1e4, -1e4, 1e30, -1e30]


def value_and_slope(function, x):
    x = x.clone().requires_grad_()
    y = function(x)
    (slope,) = torch.autograd.grad(y.sum(), x)
    return y.detach(), slope


def truth(x):
    """Value and slope in double precision, rounded to what x has."""
    return tuple(out.to(x.dtype) for out in value_and_slope(F.mish, x.to(F64)))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_value_and_slope(dtype):
    x = torch.tensor(POINTS, dtype=dtype)
    eps = torch.finfo(dtype).eps
    (y, slope), (want_y, want_slope) = value_and_slope(mish, x), truth(x)
    # A handful of roundings. The slope is a sum that crosses zero, so its error is absolute, and
    # torch's own loses a rounding times x where it takes the square of a number near one from one.
    torch.testing.assert_close(y, want_y, rtol=8 * eps, atol=0.0)
    assert ((slope - want_slope).abs() <= (8 + x.abs()) * eps).all()


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_values_far_out(dtype):
    x = torch.tensor(FAR, dtype=dtype)
    # exp(-100) is less than the least normal number of single precision, which keeps few digits.
    tiny = torch.finfo(dtype).tiny
    torch.testing.assert_close(mish(x), truth(x)[0], rtol=8 * torch.finfo(dtype).eps, atol=tiny)


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_slopes_far_out(dtype):
    x = torch.tensor(FAR, dtype=dtype)
    found, wanted = value_and_slope(mish, x)[1], truth(x)[1]
    torch.testing.assert_close(found, wanted, rtol=0.0, atol=8 * torch.finfo(dtype).eps)


def test_slope_is_that_of_differences():
    x = torch.linspace(-6, 6, 49, dtype=F64, requires_grad=True)
    assert torch.autograd.gradcheck(mish, (x,))


@pytest.mark.parametrize("dtype", [torch.float32, F64])
def test_the_same_without_gradients_and_the_input_stays(dtype):
    torch.manual_seed(0)
    x = torch.randn(4, 5, 6, dtype=dtype).transpose(0, 2)
    kept = x.clone()
    plain = mish(x)
    assert not plain.requires_grad and plain.shape == x.shape
    leaf = x.clone().requires_grad_()
    tracked = mish(leaf)
    assert tracked.requires_grad and torch.equal(tracked.detach(), plain)
    with torch.no_grad():
        assert torch.equal(mish(leaf), plain)
    tracked.square().sum().backward()
    assert torch.equal(x, kept) and torch.equal(leaf.detach(), kept)
    # Incoming gradients count: the chain rule.
    torch.testing.assert_close(leaf.grad, 2 * plain * value_and_slope(F.mish, kept)[1])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_torch_s_own(dtype):
    x = torch.linspace(-5, 5, 21).to(dtype)
    assert mish(x).dtype == dtype and torch.equal(mish(x), F.mish(x))
