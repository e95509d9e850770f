"""Random functions of torch take their numbers from elsewhere."""

import numpy as np
import pytest
import torch

from worldloom.export.noise import Draw, Noise, NoiseInputs


def replace(function):
    """Return the result of a function, the draws that it made and their numbers."""
    draws, numbers, rng = [], [], np.random.default_rng(0)

    def take(draw):
        draws.append(draw)
        numbers.append(draw.make(rng))
        return numbers[-1]

    state = torch.get_rng_state()
    with Noise(take):
        result = function()
    assert torch.equal(torch.get_rng_state(), state)
    return result, draws, numbers


def below(x):
    return (x < 0.3).float()


@pytest.mark.parametrize(
    "function, draw, expected",
    [
        (lambda: torch.rand(2, 3), Draw("uniform", (2, 3)), lambda x: x),
        (lambda: torch.rand((2,), dtype=torch.float64), Draw("uniform", (2,)), torch.Tensor.double),
        (lambda: torch.rand_like(torch.ones(2)), Draw("uniform", (2,)), lambda x: x),
        (lambda: torch.randn(size=(2, 3)), Draw("normal", (2, 3)), lambda x: x),
        (lambda: torch.randn_like(torch.ones(4).half()), Draw("normal", (4,)), torch.Tensor.half),
        (lambda: torch.randint(7, (5,)), Draw("integers", (5,), 7), lambda x: x),
        (lambda: torch.randint(2, 7, (5,)), Draw("integers", (5,), 5), lambda x: x + 2),
        (lambda: torch.randint(2, high=7, size=(5,)), Draw("integers", (5,), 5), lambda x: 2 + x),
        (lambda: torch.randperm(6), Draw("permutation", (6,), 6), lambda x: x),
        (lambda: torch.normal(2.0, 3.0, (4,)), Draw("normal", (4,)), lambda x: 2 + 3 * x),
        (lambda: torch.normal(torch.ones(3), 2.0), Draw("normal", (3,)), lambda x: 1 + 2 * x),
        (lambda: torch.empty(3).uniform_(-1, 1), Draw("uniform", (3,)), lambda x: 2 * x - 1),
        (lambda: torch.empty(3).normal_(1, 2), Draw("normal", (3,)), lambda x: 1 + 2 * x),
        (lambda: torch.empty(3).exponential_(2.0), Draw("exponential", (3,)), lambda x: x / 2),
        (lambda: torch.bernoulli(torch.full((9,), 0.3)), Draw("uniform", (9,)), below),
    ],
)  # fmt: skip
def test_functions_return_the_given_numbers(function, draw, expected):
    result, draws, numbers = replace(function)
    assert draws == [draw]
    wanted = expected(numbers[0])
    assert result.dtype == wanted.dtype
    assert torch.allclose(result, wanted)


def test_numbers_have_their_distribution():
    rng = np.random.default_rng(0)
    many = {kind: Draw(kind, (20_000,)).make(rng) for kind in ("uniform", "normal", "exponential")}
    moments = {kind: (float(x.mean()), float(x.std())) for kind, x in many.items()}
    assert moments["uniform"] == pytest.approx((0.5, 12**-0.5), abs=0.02)
    assert moments["normal"] == pytest.approx((0, 1), abs=0.03)
    assert moments["exponential"] == pytest.approx((1, 1), abs=0.03)
    assert torch.bincount(Draw("integers", (6000,), 3).make(rng)).tolist() == pytest.approx(
        [2000] * 3, abs=150
    )
    rows = Draw("permutation", (50, 4), 4).make(rng)
    assert (rows.sort(1).values == torch.arange(4)).all()
    assert len(rows.unique(dim=0)) > 15


@pytest.mark.parametrize("replacement", [True, False])
def test_multinomial_has_the_given_probabilities(replacement):
    probs = torch.tensor([[1.0, 3.0, 0.0, 4.0]]).expand(8000, 4)  # unnormalised
    index = replace(lambda: torch.multinomial(probs, 1, replacement))[0]
    shares = torch.bincount(index.flatten(), minlength=4) / 8000
    assert shares.tolist() == pytest.approx([1 / 8, 3 / 8, 0, 1 / 2], abs=0.02)
    several = replace(lambda: torch.multinomial(probs[:5], 3, True))[0]
    assert several.shape == (5, 3) and several.dtype == torch.int64
    assert not (several == 2).any()


def test_several_samples_without_replacement_are_left_to_torch():
    with Noise(lambda draw: pytest.fail("took numbers")):
        assert len(torch.multinomial(torch.ones(4), 4).unique()) == 4


def test_inputs_join_the_numbers_of_a_distribution():
    draws = {
        "observe": [Draw("normal", (1, 2)), Draw("permutation", (3,), 3)],
        "choose": [Draw("normal", (3,)), Draw("permutation", (3,), 3), Draw("uniform", (2,))],
    }
    noise = NoiseInputs(draws)
    assert {name: draw.shape for name, draw in noise.list_inputs().items()} == {
        "noise/normal": (5,),
        "noise/permutation3": (2, 3),
        "noise/uniform": (2,),
    }
    numbers = noise.make(np.random.default_rng(0))
    found = noise.unpack(noise.pack(numbers))
    for part, each in numbers.items():
        assert all(torch.equal(x, y) for x, y in zip(each, found[part], strict=True))
    # What nothing depends on is neither an input nor drawn from one.
    noise.unused = {("choose", 0), ("choose", 2)}
    assert noise.list_inputs()["noise/normal"].shape == (2,)
    assert "noise/uniform" not in noise.list_inputs()
    found = noise.unpack(noise.pack(numbers))
    assert torch.equal(found["observe"][0], numbers["observe"][0])
    assert not found["choose"][0].any() and not found["choose"][2].any()
