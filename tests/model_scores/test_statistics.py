import math

import numpy as np
import pytest
import torch

from worldloom.model_scores.statistics import (
    measure_calibration,
    measure_error,
    measure_spread,
)


def test_the_error_is_a_share_of_the_variance():
    true = torch.tensor([1.0, 2.0, 3.0, 6.0])  # mean 3, variance 3.5
    assert measure_error(true, true) == 0
    assert measure_error(torch.full((4,), 3.0), true) == pytest.approx(1)
    assert measure_error(true + 2, true) == pytest.approx(4 / 3.5)
    assert measure_error(true, true + 2) == pytest.approx(4 / 3.5)


def test_numbers_that_hardly_vary_are_compared_with_a_tenth_of_their_size():
    ones = torch.ones(5)
    assert measure_spread(ones).item() == pytest.approx(0.01)
    assert measure_error(ones - 0.05, ones) == pytest.approx(0.25)
    assert measure_error(torch.zeros(5), torch.zeros(5)) is None
    assert measure_error(torch.zeros(0), torch.zeros(0)) is None


def test_calibration_is_the_distance_of_bins_from_the_truth():
    rng = np.random.default_rng(0)
    chance = torch.tensor(rng.choice([0.1, 0.4, 0.9], 30_000))
    happens = torch.tensor(rng.random(30_000)) < chance
    assert measure_calibration(chance, happens) < 0.01
    # The mean is right on average; a constant is off by its distance from the mean.
    share = happens.double().mean()
    assert measure_calibration(share.expand(30_000), happens) == pytest.approx(0, abs=1e-9)
    off = measure_calibration(torch.full((30_000,), 0.7), happens)
    assert off == pytest.approx(abs(0.7 - share.item()))
    # Too sure: 0 for 0.1, and 1 for 0.4 and 0.9.
    sure = (chance > 0.2).double()
    assert measure_calibration(sure, happens) == pytest.approx((0.1 + 0.6 + 0.1) / 3, abs=0.01)


def test_predictions_that_are_not_finite_have_no_calibration():
    assert math.isnan(measure_calibration(torch.tensor([1.0, math.nan]), torch.ones(2)))
    assert math.isnan(measure_error(torch.tensor([1.0, math.nan]), torch.tensor([1.0, 2.0])))
