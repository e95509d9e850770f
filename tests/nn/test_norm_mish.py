"""Bias, layer norm and Mish against torch's own functions."""

import pytest
import torch
import torch.nn.functional as F

from worldloom.nn import norm_mish as module
from worldloom.nn.norm_mish import norm_mish

F64 = torch.float64
UNITS = 6


@pytest.fixture(autouse=True, params=[2**18, 4 * UNITS])
def piece(request, monkeypatch):
    """All rows at once, and in pieces of four rows whose last is smaller."""
    monkeypatch.setattr(module, "CACHED_VALUES", request.param)


def inputs(dtype, spread=2.0):
    torch.manual_seed(0)
    x = spread * torch.randn(2, 5, UNITS, dtype=F64)
    parameters = [torch.randn(UNITS, dtype=F64) for _ in range(3)]
    parameters[1] += 2
    exact = torch.float32 if dtype == torch.bfloat16 else dtype
    return [x.to(dtype), *(p.to(exact) for p in parameters)]


def composed(x, bias, scale, shift):
    return F.mish(F.layer_norm(x + bias, (UNITS,), scale, shift))


def test_value_and_gradients_in_double_precision():
    given = [x.requires_grad_() for x in inputs(F64)]
    torch.testing.assert_close(norm_mish(*given), composed(*given), rtol=1e-12, atol=1e-12)
    weights = torch.randn(2, 5, UNITS, dtype=F64)
    wanted = torch.autograd.grad((composed(*given) * weights).sum(), given)
    found = torch.autograd.grad((norm_mish(*given) * weights).sum(), given)
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-10)


def test_gradients_are_those_of_differences():
    given = [x.requires_grad_() for x in inputs(F64)]
    assert torch.autograd.gradcheck(norm_mish, given)


def test_bfloat16_is_rounded_once():
    given = inputs(torch.bfloat16)
    exact = composed(*(x.double() for x in given))
    with_grad = norm_mish(*(x.clone().requires_grad_() for x in given))
    without = norm_mish(*(x.clone() for x in given))
    for found in (with_grad, without):
        assert found.dtype == torch.bfloat16
        # Half a unit in the last place of bfloat16, and float32's rounding of the norm.
        torch.testing.assert_close(found.double(), exact, rtol=2**-8, atol=1e-5)


def test_gradients_in_bfloat16():
    given = inputs(torch.bfloat16)
    weights = torch.randn(2, 5, UNITS).bfloat16()
    exact = [x.double().requires_grad_() for x in given]
    (composed(*exact) * weights.double()).sum().backward()
    given = [x.requires_grad_() for x in given]
    (norm_mish(*given) * weights).sum().backward()
    for ours, theirs in zip(given, exact, strict=True):
        assert ours.grad.dtype == ours.dtype
        error = (ours.grad.double() - theirs.grad).abs().max()
        assert error <= 2**-8 * theirs.grad.abs().max() + 1e-5


@pytest.mark.parametrize("grad", [False, True])
def test_far_out(grad):
    """exp overflows in float32 above 88; Mish and its slope are then n and 1."""
    x = torch.tensor([[-1.0, 1.0]]).bfloat16().requires_grad_(grad)
    scale = torch.full((2,), 1000.0)
    found = norm_mish(x, torch.zeros(2), scale, torch.zeros(2))
    assert found.tolist() == [[0.0, 1000.0]]
    if grad:
        found.sum().backward()
        assert x.grad.isfinite().all()


def test_nan_stays():
    x = torch.tensor([[1.0, torch.nan], [1.0, 2.0]]).bfloat16()
    found = norm_mish(x, *torch.zeros(3, 2))
    assert found[0].isnan().all() and found[1].isfinite().all()
