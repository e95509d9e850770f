import math

import pytest
import torch

from worldloom.nn.symlog import symexp, symlog


def test_values_by_hand():
    x = torch.tensor([0.0, 1.0, -1.0, math.e - 1, 1 - math.e], dtype=torch.float64)
    expected = torch.tensor([0.0, math.log(2), -math.log(2), 1.0, -1.0], dtype=torch.float64)
    torch.testing.assert_close(symlog(x), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_inverse_of_each_other_over_all_magnitudes(dtype):
    size = torch.logspace(-12, 6, 200, dtype=dtype)
    x = torch.cat([-size, torch.zeros(1, dtype=dtype), size])
    # An error of eps / 2 in y = symlog(x) <= 14 becomes about y * eps relative in x.
    tolerance = 16 * torch.finfo(dtype).eps
    torch.testing.assert_close(symexp(symlog(x)), x, rtol=tolerance, atol=0.0)
    torch.testing.assert_close(symlog(symexp(symlog(x))), symlog(x), rtol=tolerance, atol=0.0)


def test_odd_and_steepest_at_zero():
    x = torch.linspace(-3, 3, 13, dtype=torch.float64, requires_grad=True)
    torch.testing.assert_close(symlog(x), -symlog(-x), rtol=0.0, atol=0.0)
    (slope,) = torch.autograd.grad(symlog(x).sum(), x)
    inside = x != 0  # sign(0) has no slope, so there it is zero: nothing is learned from one point
    torch.testing.assert_close(slope[inside], 1 / (1 + x[inside].abs()))
