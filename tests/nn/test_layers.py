import math

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from worldloom.nn import layers
from worldloom.nn.layers import (
    MLP,
    BlockDense,
    BlockLinear,
    Conv,
    Dense,
    Linear,
    RMSNorm,
    init_kernel,
    max_pool,
    norm_silu,
    rms_norm,
)

F64 = torch.float64


@pytest.fixture(autouse=True)
def seeded():
    torch.manual_seed(0)


def shuffled(module):
    """Give every tensor random values, so that none is left at a neutral one."""
    module.double()
    with torch.no_grad():
        for p in module.parameters():
            p.normal_()
    return module


# ---- norm ----------------------------------------------------------------------------------------


def test_rms_norm_is_torchs():
    x, scale = torch.randn(4, 6, dtype=F64), torch.randn(6, dtype=F64)
    expected = F.rms_norm(x, (6,), weight=scale, eps=1e-4)
    torch.testing.assert_close(rms_norm(x, scale), expected)


def test_rms_norm_ignores_the_size_of_its_input_and_survives_zero():
    x = torch.randn(4, 6, dtype=F64)
    scale = torch.ones(6, dtype=F64)
    # eps = 1e-4 beside a mean square of about 1e10 leaves a relative error of 1e-14 / 2.
    torch.testing.assert_close(rms_norm(1e5 * x, scale), rms_norm(1e7 * x, scale))
    assert (rms_norm(torch.zeros(2, 6), torch.ones(6)) == 0).all()


def test_half_precision_is_normalised_in_float32():
    x = torch.randn(4, 512).bfloat16()
    norm = RMSNorm(512)
    assert norm(x).dtype == torch.bfloat16
    assert torch.equal(norm(x), norm(x.float()).bfloat16())


@pytest.fixture(params=[1 << 18, 25], ids=["whole", "pieces"])
def pieces(request, monkeypatch):
    """Compute in one piece, or in pieces of one or a few rows."""
    monkeypatch.setattr(layers, "CACHED_VALUES", request.param)


SHAPES = pytest.mark.parametrize(
    ("shape", "scale"), [((5, 7), (7,)), ((2, 3, 7), (7,)), ((4, 3, 5), (4, 1, 5))]
)


@SHAPES
def test_norm_and_silu_in_one_are_norm_and_silu(shape, scale, pieces):
    x = torch.randn(shape, dtype=F64, requires_grad=True)
    scale = torch.randn(scale, dtype=F64, requires_grad=True)

    def in_one(x, scale):
        return norm_silu(x * 1.0, scale)  # a result that may be used up

    expected = F.silu(rms_norm(x, scale, -1 if scale.ndim == 1 else (0, 2)))
    torch.testing.assert_close(in_one(x, scale), expected)
    with torch.no_grad():
        torch.testing.assert_close(in_one(x, scale), expected)
    torch.autograd.gradcheck(in_one, (x, scale))
    torch.autograd.gradcheck(lambda x: in_one(x, scale.detach()), (x,))


@SHAPES
def test_mixed_precision_rounds_only_input_and_output_of_norm_and_silu(shape, scale, pieces):
    x, grad = torch.randn(shape).bfloat16(), torch.randn(shape).bfloat16()
    scale = torch.randn(scale, requires_grad=True)
    exact = x.double().requires_grad_()
    expected = F.silu(rms_norm(exact, scale.double(), -1 if scale.ndim == 1 else (0, 2)))
    expected_grads = torch.autograd.grad(expected, [exact, scale], grad.double())
    with torch.no_grad():
        assert torch.equal(norm_silu(x.clone(), scale), expected.float().bfloat16())
    x.requires_grad_()
    found = norm_silu(x.clone(), scale)
    assert torch.equal(found, expected.float().bfloat16())
    by_x, by_scale = torch.autograd.grad(found, [x, scale], grad)
    assert by_x.dtype == torch.bfloat16 and by_scale.dtype == torch.float32
    torch.testing.assert_close(by_x, expected_grads[0].bfloat16())
    torch.testing.assert_close(by_scale, expected_grads[1])


# ---- dense ---------------------------------------------------------------------------------------


def test_dense_is_linear_then_norm_then_silu():
    layer = shuffled(Dense(5, 7))
    x = torch.randn(3, 2, 5, dtype=F64)
    y = x @ layer.linear.weight.T + layer.linear.bias
    expected = F.silu(F.rms_norm(y, (7,), weight=layer.norm.scale, eps=1e-4))
    torch.testing.assert_close(layer(x), expected)
    stack = shuffled(MLP(5, 7, 3))
    assert len(stack) == 3 and stack(x).shape == (3, 2, 7)
    torch.testing.assert_close(stack(x), stack[2](stack[1](stack[0](x))))


@pytest.mark.parametrize(("outscale", "fan_in"), [(1.0, 400), (0.1, 400), (0.0, 400)])
def test_kernels_start_with_the_variance_they_promise(outscale, fan_in):
    layer = Linear(fan_in, 300, outscale)
    assert (layer.bias == 0).all()
    std = outscale / math.sqrt(fan_in)
    count = layer.weight.numel()
    assert layer.weight.std().item() == pytest.approx(std, rel=5 / math.sqrt(count))
    assert layer.weight.mean().abs().item() <= 5 * std / math.sqrt(count)
    # Cut off at two deviations of the uncut normal.
    assert layer.weight.abs().max().item() <= 2 * 1.1368 * std * (1 + 1e-6)


def test_the_fan_of_a_block_layer_is_its_whole_input():
    layer = BlockLinear(512, 512, 8)
    assert layer.weight.std().item() == pytest.approx(1 / math.sqrt(512), rel=0.05)
    kernel = torch.empty(40, 30, 5, 5)
    init_kernel(kernel, kernel[0].numel())
    assert kernel.std().item() == pytest.approx(1 / math.sqrt(30 * 25), rel=0.05)


def test_torch_func_takes_the_layers_for_functions():
    stack, x = shuffled(MLP(5, 7, 2)), torch.randn(3, 5, dtype=F64)

    def loss(weights, x):
        return torch.func.functional_call(stack, weights, (x,)).square().sum()

    weights = dict(stack.named_parameters())
    grads = torch.func.grad(loss)({k: v.detach() for k, v in weights.items()}, x)
    loss(weights, x).backward()
    torch.testing.assert_close(grads, {k: v.grad for k, v in weights.items()})
    with torch.no_grad():
        torch.testing.assert_close(torch.vmap(stack)(x), stack(x))


# ---- blocks --------------------------------------------------------------------------------------


def by_block(x, blocks):
    return x.unflatten(-1, (blocks, -1)).transpose(0, 1)


def flat(y):
    return y.transpose(0, 1).flatten(1)


@pytest.mark.parametrize("blocks", [1, 2, 4])
def test_a_block_layer_is_a_dense_one_with_a_block_diagonal_kernel(blocks):
    layer = shuffled(BlockLinear(12, 8, blocks))
    x = torch.randn(5, 12, dtype=F64)
    dense = torch.block_diag(*layer.weight)  # [12, 8]
    torch.testing.assert_close(flat(layer(by_block(x, blocks))), x @ dense + layer.bias)


def test_a_block_dense_layer_gives_every_block_the_shared_input():
    blocks, own, shared, units = 4, 3, 5, 8
    layer = shuffled(BlockDense(blocks * own, shared, units, blocks))
    x, y = torch.randn(6, blocks * own, dtype=F64), torch.randn(6, shared, dtype=F64)
    pairs = zip(x.split(own, -1), layer.linear.weight, strict=True)
    parts = [torch.cat([part, y], -1) @ kernel for part, kernel in pairs]
    z = torch.cat(parts, -1) + layer.linear.bias
    # One norm over all units, not one for each block.
    expected = F.silu(F.rms_norm(z, (units,), weight=layer.norm.scale, eps=1e-4))
    got = layer(by_block(x, blocks), y, layer.kernels())
    torch.testing.assert_close(flat(got), expected)


def test_blocks_must_divide_both_sides():
    with pytest.raises(ValueError, match=r"12 inputs, 9 outputs and 4 blocks; blocks must divide"):
        BlockLinear(12, 9, 4)


# ---- images --------------------------------------------------------------------------------------


@pytest.mark.parametrize("kernel", [1, 3, 5])
def test_convolutions_keep_the_size_of_channels_last_images(kernel):
    layer = shuffled(Conv(3, 4, kernel))
    x = torch.randn(2, 6, 8, 3, dtype=F64)
    y = layer(x)
    assert y.shape == (2, 6, 8, 4)
    plain = nn.Conv2d(3, 4, kernel, padding="same").double()
    plain.load_state_dict(layer.state_dict())
    torch.testing.assert_close(y, plain(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1))


def test_a_convolution_looks_at_its_surroundings_and_no_further():
    layer = shuffled(Conv(1, 1, 3))
    x = torch.zeros(1, 7, 7, 1, dtype=F64)
    x[0, 2, 4, 0] = 1.0
    seen = (layer(x) - layer.bias).abs()[0, :, :, 0] > 0
    expected = torch.zeros(7, 7, dtype=torch.bool)
    expected[1:4, 3:6] = True
    assert torch.equal(seen, expected)


def test_even_kernels_are_refused():
    with pytest.raises(ValueError, match="kernel is 4; expected an odd size"):
        Conv(3, 4, 4)


def test_max_pooling_splits_the_gradient_among_equal_maxima(pieces):
    x = torch.randint(3, (2, 4, 6, 5)).double().requires_grad_()  # many are equal
    expected = F.max_pool2d(x.permute(0, 3, 1, 2), 2).permute(0, 2, 3, 1)
    torch.testing.assert_close(max_pool(x), expected)
    assert torch.equal(max_pool(x.detach()), expected)
    pick = torch.randn(2, 2, 3, 5, dtype=F64)
    (grad,) = torch.autograd.grad((max_pool(x) * pick).sum(), x)
    blocks = x.detach().reshape(2, 2, 2, 3, 2, 5).movedim(2, 3).flatten(3, 4)  # [N, H, W, 4, C]
    greatest = (blocks == blocks.amax(3, keepdim=True)).double()
    shares = greatest / greatest.sum(3, keepdim=True) * pick.unsqueeze(3)
    torch.testing.assert_close(grad, shares.unflatten(3, (2, 2)).movedim(3, 2).reshape(x.shape))
