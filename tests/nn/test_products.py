"""Float32 products by oneDNN, against float64; the rule that chooses them."""

import pytest
import torch
import torch.nn.functional as F

from worldloom.nn import products
from worldloom.nn.products import linear, multiply


@pytest.fixture
def onednn(monkeypatch):
    """Let oneDNN compute every float32 product; return the shapes of those it has computed."""
    monkeypatch.setattr(products, "uses_onednn", lambda: True)
    monkeypatch.setattr(products, "FEWEST", 0)
    monkeypatch.setattr(products, "BLOCK_ROWS", 1)
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    shapes, compute = [], products._multiply

    def record(x, kernel, base):
        shapes.append((*x.shape, kernel.shape[-1]))
        return compute(x, kernel, base)

    monkeypatch.setattr(products, "_multiply", record)
    return shapes


def layouts(x):
    """The same values contiguous, transposed in memory, and with gaps between the rows."""
    gaps = torch.zeros(*x.shape[:-1], 2 * x.shape[-1])
    gaps[..., : x.shape[-1]] = x
    return [x, x.mT.contiguous().mT, gaps[..., : x.shape[-1]]]


BASES = [None, (5,), (1, 5), (7, 5)]


@pytest.mark.parametrize("base", BASES)
def test_products_and_gradients_are_exact_in_all_layouts(base, onednn):
    torch.manual_seed(0)
    start = [torch.randn(7, 4), torch.randn(4, 5)]
    last = None if base is None else torch.randn(base)
    grad = torch.randn(7, 5)
    for x in layouts(start[0]):
        for kernel in layouts(start[1]):
            check([x, kernel, last], grad)
    assert len(onednn) == 9 * 4  # the product with and without gradient, and two gradients


@pytest.mark.parametrize("base", [None, (3, 1, 5), (1, 1, 5), (3, 7, 5)])
def test_products_of_blocks(base, onednn):
    torch.manual_seed(0)
    start = [torch.randn(3, 7, 4), torch.randn(3, 4, 5)]
    last = None if base is None else torch.randn(base)
    for x in layouts(start[0]):
        for kernel in layouts(start[1]):
            check([x, kernel, last], torch.randn(3, 7, 5))
    assert (3, 7, 4, 5) in onednn


def check(inputs, grad):
    leaves = [None if x is None else x.detach().requires_grad_() for x in inputs]
    exact = [None if x is None else x.detach().double().requires_grad_() for x in inputs]
    found = multiply(*leaves)
    expected = exact[0] @ exact[1]
    expected = expected if exact[2] is None else expected + exact[2]
    torch.testing.assert_close(found.double(), expected, atol=1e-5, rtol=1e-5)
    with torch.no_grad():
        torch.testing.assert_close(multiply(*leaves), found, atol=0, rtol=0)
    found.backward(grad)
    expected.backward(grad.double())
    for leaf, right in zip(leaves, exact, strict=True):
        if leaf is not None:
            assert leaf.grad.dtype == torch.float32 and leaf.grad.shape == leaf.shape
            torch.testing.assert_close(leaf.grad.double(), right.grad, atol=1e-5, rtol=1e-5)


def test_linear_is_torchs_with_any_leading_axes(onednn):
    torch.manual_seed(0)
    weight, bias = torch.randn(5, 4, requires_grad=True), torch.randn(5, requires_grad=True)
    for shape in ((4,), (7, 4), (2, 3, 4), (0, 4)):
        x = torch.randn(shape)
        torch.testing.assert_close(linear(x, weight, bias), F.linear(x, weight, bias))
    expanded = linear(torch.randn(3, 4), weight).sum()  # its gradient has no memory of its own
    expanded.backward()
    assert weight.grad.is_contiguous() and onednn


def test_other_products_are_torchs(onednn):
    x, kernel = torch.randn(7, 4), torch.randn(4, 5)
    multiply(x.double(), kernel.double())
    with torch.autocast("cpu", torch.bfloat16):
        multiply(x, kernel)
    torch.func.vmap(lambda row: multiply(row.unsqueeze(0), kernel))(x)
    assert not onednn


def test_small_products_are_torchs(onednn, monkeypatch):
    monkeypatch.setattr(products, "FEWEST", 7 * 4 * 5)
    multiply(torch.randn(7, 4), torch.randn(4, 5))
    assert len(onednn) == 1
    multiply(torch.randn(6, 4), torch.randn(4, 5))
    monkeypatch.setattr(products, "BLOCK_ROWS", 8)
    multiply(torch.randn(9, 7, 4), torch.randn(9, 4, 5))
    assert len(onednn) == 1


@pytest.mark.parametrize(
    ("vendor", "mkl", "setting", "expected"),
    [
        ("AuthenticAMD", True, None, "onednn"),
        ("AuthenticAMD", True, "auto", "onednn"),
        ("AuthenticAMD", True, "torch", "torch"),
        ("AuthenticAMD", False, None, "torch"),  # torch without MKL uses another library
        ("GenuineIntel", True, None, "torch"),
        ("GenuineIntel", True, "onednn", "onednn"),
        ("", True, None, "torch"),  # ARM, or not Linux
    ],
)
def test_the_library_depends_on_processor_and_setting(
    vendor, mkl, setting, expected, onednn, monkeypatch
):
    monkeypatch.setattr(products, "processor_field", lambda name: vendor)
    monkeypatch.setattr(torch.backends.mkl, "is_available", lambda: mkl)
    monkeypatch.delenv(products.SETTING, raising=False)
    if setting:
        monkeypatch.setenv(products.SETTING, setting)
    library, reason = products.chosen_library()
    assert library == expected and reason


def test_an_unknown_setting_is_named(monkeypatch):
    monkeypatch.setenv(products.SETTING, "mkl")
    with pytest.raises(ValueError, match="WORLDLOOM_PRODUCTS is 'mkl'; expected auto, torch or"):
        products.chosen_library()


def test_an_operator_that_is_missing_or_wrong_is_not_used(monkeypatch):
    monkeypatch.setenv(products.SETTING, "onednn")
    compute = products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *args: 1.01 * compute(*args))
    assert products.chosen_library()[0] == "torch"

    def missing(*args):
        raise AttributeError("'_OpNamespace' 'mkldnn' object has no attribute")

    monkeypatch.setattr(products, "_multiply", missing)
    assert products.chosen_library()[0] == "torch"
