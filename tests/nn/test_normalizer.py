import numpy as np
import pytest
import torch

from worldloom.nn.normalizer import Normalizer

F64 = torch.float64


def fed(values, **options):
    norm = Normalizer(**options).double()
    for value in values:
        norm.update(value)
    return [x.item() for x in norm.stats()]


def test_percentiles_of_one_batch():
    x = torch.randn(7, 11, dtype=F64)
    low, high = np.percentile(x, [5, 95])
    # With debiasing one update is as good as many of the same.
    for count in (1, 4):
        offset, scale = fed([x] * count, impl="perc", rate=0.01)
        assert offset == pytest.approx(low, rel=1e-9)
        assert scale == pytest.approx(high - low, rel=1e-9)


def test_mean_and_deviation_of_one_batch():
    x = 3 * torch.randn(200, dtype=F64) + 5
    offset, scale = fed([x] * 3, impl="meanstd", rate=0.1)
    assert offset == pytest.approx(x.mean().item(), rel=1e-9)
    assert scale == pytest.approx(x.std(correction=0).item(), rel=1e-9)


def test_none_changes_nothing():
    assert fed([torch.randn(9, dtype=F64)], impl="none") == [0.0, 1.0]


def test_without_debiasing_the_averages_start_from_zero():
    x = torch.tensor([0.0, 100.0], dtype=F64)
    for count in (1, 2, 30):
        share = 1 - 0.9**count
        offset, scale = fed([x] * count, impl="perc", rate=0.1, debias=False)
        assert offset == pytest.approx(5 * share) and scale == pytest.approx(90 * share)


@pytest.mark.parametrize("impl", ["perc", "meanstd"])
def test_debiasing_weighs_batches_by_their_age(impl):
    batches = [torch.randn(50, dtype=F64) + i for i in range(5)]
    weights = np.array([0.2 * 0.8 ** (4 - i) for i in range(5)])
    if impl == "perc":
        first, second = np.array([np.percentile(x, [5, 95]) for x in batches]).T
    else:
        first, second = np.array([[x.mean(), x.square().mean()] for x in batches]).T
    first, second = (np.average(x, weights=weights) for x in (first, second))
    offset, scale = fed(batches, impl=impl, rate=0.2)
    assert offset == pytest.approx(first)
    wanted = second - first if impl == "perc" else np.sqrt(second - first**2)
    assert scale == pytest.approx(wanted)


@pytest.mark.parametrize("impl", ["perc", "meanstd"])
def test_the_scale_has_a_floor(impl):
    constant = torch.full((20,), 3.0, dtype=F64)
    assert fed([constant], impl=impl, limit=0.5)[1] == 0.5


def test_before_any_update_it_is_harmless():
    assert fed([], impl="perc", limit=1.0) == [0.0, 1.0]


def test_the_state_is_saved_and_no_gradient_flows():
    norm, other = Normalizer(), Normalizer()
    x = torch.randn(30, requires_grad=True)
    norm.update(x)
    assert not any(value.requires_grad for value in norm.stats())
    other.load_state_dict(norm.state_dict())
    assert other.stats() == norm.stats()


def test_an_unknown_kind_is_refused():
    with pytest.raises(ValueError, match="impl is 'percentile'; expected perc, meanstd"):
        Normalizer("percentile")
