import pytest
import torch

from worldloom.nn.simnorm import _SimNorm, simnorm


@pytest.mark.parametrize("group", [1, 2, 4, 8, 16])
@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_each_group_of_neighbours_is_a_softmax(shape, group):
    torch.manual_seed(0)
    x = 5 * torch.randn(shape, dtype=torch.float64)
    found = simnorm(x, group)
    assert found.shape == x.shape and (found > 0).all()
    for first in range(0, 16, group):
        mine, part = found[..., first : first + group], x[..., first : first + group]
        torch.testing.assert_close(mine.sum(-1), torch.ones(shape[:-1], dtype=torch.float64))
        torch.testing.assert_close(mine, part.exp() / part.exp().sum(-1, keepdim=True))


def test_values_by_hand():
    x = torch.tensor([3.0, 4.0, 0.0, 5.0]).log()
    torch.testing.assert_close(simnorm(x, 2), torch.tensor([3 / 7, 4 / 7, 0, 1]))
    torch.testing.assert_close(simnorm(x, 4), torch.tensor([3.0, 4, 0, 5]) / 12)


def test_what_is_added_to_a_whole_group_does_not_show():
    torch.manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64)
    moved = x + torch.randn(3, 2, dtype=torch.float64).repeat_interleave(8, -1)
    torch.testing.assert_close(simnorm(moved, 8), simnorm(x, 8))
    assert simnorm(x + 1e4, 8).isfinite().all()


def test_half_precision_is_computed_in_float32():
    x = torch.randn(3, 16).bfloat16()
    found = simnorm(x, 8)
    assert found.dtype == torch.float32
    assert torch.equal(found, simnorm(x.float(), 8))


def test_groups_must_divide_the_width():
    with pytest.raises(RuntimeError, match="unflatten"):
        simnorm(torch.zeros(3, 16), 5)


# ---- mixed precision on a CPU --------------------------------------------------------------------


def mixed(x, group=8):
    with torch.autocast("cpu", torch.bfloat16):
        return simnorm(x, group)


@pytest.mark.parametrize("shape", [(16,), (3, 16), (2, 3, 16)])
def test_mixed_precision_computes_in_float32(shape):
    torch.manual_seed(0)
    x = 10 * torch.randn(shape)
    assert mixed(x).dtype == torch.float32
    torch.testing.assert_close(mixed(x), simnorm(x, 8), rtol=1e-5, atol=1e-7)
    assert torch.equal(mixed(x.bfloat16()), mixed(x.bfloat16().float()))


def test_mixed_precision_beyond_its_limit():
    x = torch.tensor([200.0, 0.0, -1e4, -1e4, torch.nan, 0.0])
    found = mixed(x, 2)
    assert found[:4].tolist() == [1.0, pytest.approx(0.0, abs=1e-30), 0.5, 0.5]
    assert found[4:].isnan().all()


def test_gradient_in_mixed_precision():
    torch.manual_seed(0)
    x = torch.randn(3, 16, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: _SimNorm.apply(x, 8), (x,))
    x, weights = torch.randn(3, 16, requires_grad=True), torch.randn(3, 16)
    wanted = torch.autograd.grad((simnorm(x, 8) * weights).sum(), x)
    torch.testing.assert_close(torch.autograd.grad((mixed(x) * weights).sum(), x), wanted)
