"""Weights in bfloat16: when they are cast, and where their gradients go."""

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worldloom.nn.casts import cast, cast_once, is_mixed_on_cpu


class CountCasts(TorchDispatchMode):
    """Shapes of the float32 tensors that were cast to bfloat16."""

    def __init__(self) -> None:
        super().__init__()
        self.shapes: list[tuple[int, ...]] = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if func is torch.ops.aten._to_copy.default:
            dtypes = args[0].dtype, kwargs.get("dtype")
            self.shapes += [tuple(args[0].shape)] * (dtypes == (torch.float32, torch.bfloat16))
        return func(*args, **kwargs)


def test_values_are_rounded_and_gradients_are_float32():
    weight = torch.nn.Parameter(torch.tensor([1.0, 1 + 2**-9, 3.0]))
    half = cast(weight)
    assert half.dtype == torch.bfloat16 and half.tolist() == [1.0, 1.0, 3.0]
    (half * torch.tensor([1.0, 2.0, 4.0], dtype=torch.bfloat16)).sum().backward()
    assert weight.grad.dtype == torch.float32 and weight.grad.tolist() == [1.0, 2.0, 4.0]


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_dtypes_stay(dtype):
    weight = torch.ones(3, dtype=dtype)
    assert cast(weight) is weight


@pytest.mark.parametrize("grad_first", [False, True])
def test_one_cast_serves_uses_with_and_without_gradient(grad_first):
    weight = torch.nn.Parameter(torch.randn(4, 3))
    with CountCasts() as counted, cast_once():
        for with_grad in (grad_first, not grad_first):
            with torch.set_grad_enabled(with_grad):
                found = cast(weight).sum()
                assert found.requires_grad == with_grad
                if with_grad:
                    found.backward()
        assert not cast(weight.detach()).requires_grad
    assert counted.shapes == [(4, 3)]
    assert torch.equal(weight.grad, torch.ones(4, 3))


def test_changed_weights_are_cast_again_in_the_next_block():
    weight = torch.nn.Parameter(torch.zeros(2))
    for value in (1.0, 2.0):
        with torch.no_grad():
            weight.fill_(value)
        with cast_once():
            assert cast(weight).tolist() == [value, value]


def test_parts_of_a_weight_are_not_mistaken_for_it():
    weight = torch.randn(2, 3)
    with cast_once():
        whole, first = cast(weight), cast(weight[0])
    assert torch.equal(whole[0], first)


def test_only_bfloat16_on_a_cpu_counts_as_mixed():
    x = torch.zeros(2)
    assert not is_mixed_on_cpu(x)
    with torch.autocast("cpu", torch.bfloat16):
        assert is_mixed_on_cpu(x) and not is_mixed_on_cpu(x.to("meta"))
        torch.func.vmap(lambda row: pytest.fail("mixed") if is_mixed_on_cpu(row) else row)(x)
        assert not is_mixed_on_cpu(x.double())
    with torch.autocast("cpu", torch.float16):
        assert not is_mixed_on_cpu(x)
