"""Statistics against numbers computed by hand and against scipy, in the way of rliable."""

import numpy as np
import pytest

from worldloom.results.statistics import (
    bootstrap_interval,
    interquartile_mean,
    mean,
    optimality_gap,
    performance_profile,
    probability_of_improvement,
)


@pytest.mark.parametrize(
    ("scores", "expected"),
    [
        ([5.0], 5.0),
        ([1.0, 2.0, 9.0], 4.0),  # a quarter of three scores is none
        ([1.0, 2.0, 4.0, 100.0], 3.0),
        ([0.0, 1.0, 2.0, 3.0, 100.0], 2.0),
        ([0, 1, 2, 3, 4, 5, 6, 1000.0], 3.5),
    ],
)
def test_interquartile_mean_by_hand(scores, expected):
    assert interquartile_mean([np.random.default_rng(0).permutation(scores)]) == expected


def test_statistics_of_several_tasks_by_hand():
    scores = [np.array([0.0, 1.0]), np.array([0.5, 0.5, 2.0, 3.0])]
    assert mean(scores) == (0.5 + 1.5) / 2  # each task counts the same
    assert interquartile_mean(scores) == (0.5 + 0.5 + 1.0 + 2.0) / 4  # each run counts the same
    assert optimality_gap(scores) == pytest.approx(1 - (0 + 1 + 0.5 + 0.5 + 1 + 1) / 6)
    assert optimality_gap(scores, target=2.0) == pytest.approx(2 - (0 + 1 + 0.5 + 0.5 + 2 + 2) / 6)
    profile = performance_profile(scores, np.array([-1.0, 0.0, 0.5, 2.9, 3.0]))
    assert profile == pytest.approx([1, 5 / 6, 3 / 6, 1 / 6, 0])


def test_probability_of_improvement_by_hand():
    x, y = np.array([1.0, 3.0]), np.array([0.0, 1.0, 2.0])
    assert probability_of_improvement([x], [y]) == pytest.approx((1 + 0.5 + 3) / 6)
    assert probability_of_improvement([y], [x]) == pytest.approx(1 - 4.5 / 6)
    assert probability_of_improvement([x, x], [y, x]) == pytest.approx((4.5 / 6 + 0.5) / 2)


def test_statistics_equal_scipys():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(1)
    for runs in (1, 2, 3, 5, 10):
        x, y = rng.normal(size=(runs, 4)).round(1), rng.normal(0.3, size=(7, 4)).round(1)
        trimmed = stats.trim_mean(x, proportiontocut=0.25, axis=None)
        assert interquartile_mean(list(x.T)) == pytest.approx(trimmed)
        shares = [
            stats.mannwhitneyu(x[:, task], y[:, task], alternative="greater")[0] / (runs * 7)
            for task in range(4)
        ]
        found = probability_of_improvement(list(x.T), list(y.T))
        assert found == pytest.approx(np.mean(shares))


def test_statistics_apply_to_all_resamples_at_once():
    rng = np.random.default_rng(2)
    x, y = ([rng.normal(size=(6, 3)), rng.normal(size=(6, 5))] for _ in range(2))
    thresholds = np.linspace(-1, 1, 4)
    for function, groups in (
        (mean, [x]),
        (interquartile_mean, [x]),
        (optimality_gap, [x]),
        (lambda s: performance_profile(s, thresholds), [x]),
        (probability_of_improvement, [x, y]),
    ):
        each = [function(*[[task[i] for task in group] for group in groups]) for i in range(6)]
        np.testing.assert_allclose(function(*groups), each, rtol=1e-12)


def test_bootstrap_equals_the_exact_distribution_of_resamples():
    """All 27 resamples of three runs: percentiles of their means, up to the sampling error."""
    scores = np.array([0.0, 3.0, 9.0])
    exact = [np.mean([a, b, c]) for a in scores for b in scores for c in scores]
    low, high = bootstrap_interval(mean, [scores], confidence=0.8, repeats=20_000)
    expected = np.quantile(exact, [0.1, 0.9], method="inverted_cdf")
    assert [low, high] == pytest.approx(expected)


def test_bootstrap_resamples_within_tasks():
    """Tasks far apart, whose runs are equal, leave nothing to vary; pooled resampling would."""
    low, high = bootstrap_interval(interquartile_mean, [np.full(3, 0.0), np.full(3, 100.0)])
    assert low == high == 50.0


def test_bootstrap_is_reproducible_and_covers_the_truth():
    rng = np.random.default_rng(3)
    covered = 0
    for _ in range(200):
        scores = [rng.normal(size=20)]
        low, high = bootstrap_interval(mean, scores, repeats=500)
        assert (low, high) == bootstrap_interval(mean, scores, repeats=500)
        covered += low < 0 < high
    assert 0.86 < covered / 200 < 0.99


def test_everything_equals_a_second_implementation_of_rliables_definitions():
    """In loops over matrices [runs, tasks], as rliable takes them: numbers of runs of all kinds."""
    rng = np.random.default_rng(4)
    for runs, tasks in ((1, 1), (2, 3), (3, 2), (5, 1), (6, 4), (7, 3)):
        x, y = (rng.integers(0, 6, size=(runs, tasks)) / 4 for _ in range(2))  # with ties
        flat = sorted(x.ravel())
        cut = int(0.25 * len(flat))  # scipy's trim_mean with proportiontocut=0.25
        assert interquartile_mean(list(x.T)) == pytest.approx(
            sum(flat[cut : len(flat) - cut]) / (len(flat) - 2 * cut)
        )
        gap = 1.0 - sum(min(score, 1.0) for score in flat) / len(flat)
        assert optimality_gap(list(x.T)) == pytest.approx(gap)
        for threshold in (0.0, 0.3, 0.5, 1.25):
            share = sum(score > threshold for score in flat) / len(flat)
            assert performance_profile(list(x.T), np.array([threshold])) == pytest.approx([share])
        wins = [
            sum(1.0 if a > b else 0.5 if a == b else 0.0 for a in x[:, t] for b in y[:, t])
            for t in range(tasks)
        ]
        expected = sum(wins) / tasks / runs**2
        assert probability_of_improvement(list(x.T), list(y.T)) == pytest.approx(expected)


def test_the_bootstrap_interval_equals_that_of_a_second_implementation():
    rng = np.random.default_rng(5)
    scores = rng.normal(size=(6, 3)) + np.array([0.0, 5.0, 20.0])
    found = []
    for _ in range(8000):
        columns = [scores[rng.choice(6, size=6), task] for task in range(3)]
        flat = np.sort(np.concatenate(columns))
        found.append(flat[4:14].mean())  # 18 scores without a quarter, 4, at each end
    low, high = bootstrap_interval(interquartile_mean, list(scores.T), repeats=8000)
    # The error of a percentile of 8,000 resamples is about 2 % of their standard deviation.
    assert [low, high] == pytest.approx(np.percentile(found, [2.5, 97.5]), abs=0.2 * np.std(found))
