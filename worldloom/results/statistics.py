"""Statistics of few runs on one or several tasks, as defined by Agarwal et al. (2021).

"Deep Reinforcement Learning at the Edge of the Statistical Precipice", which the package rliable
accompanies. The scores of an algorithm are a list with one array per task, whose last axis is the
runs. Tasks may have different numbers of runs. A statistic reduces the last axis, so it applies to
one set of scores and to all resamples of a bootstrap at once.
"""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

Scores = Sequence[np.ndarray]  # one array [..., runs] per task
REPEATS = 2000  # resamples of a bootstrap


def mean(scores: Scores) -> Any:
    """Return the mean over tasks of the mean over runs: [...]."""
    return np.mean([np.mean(task, axis=-1) for task in scores], axis=0)


def interquartile_mean(scores: Scores) -> Any:
    """Return the mean of the middle half of all runs of all tasks together: [...].

    A quarter of the scores is left out at each end, rounded down to whole scores. One to three
    scores are all used.
    """
    together = np.sort(np.concatenate(list(scores), axis=-1), axis=-1)
    count = together.shape[-1]
    cut = count // 4
    return together[..., cut : count - cut].mean(axis=-1)


def optimality_gap(scores: Scores, target: float = 1.0) -> Any:
    """Return by how much the scores miss a target on average: [...].

    Scores above the target count as the target.
    """
    return target - np.minimum(np.concatenate(list(scores), axis=-1), target).mean(axis=-1)


def performance_profile(scores: Scores, thresholds: np.ndarray) -> Any:
    """Return the share of all runs of all tasks whose score is above each threshold.

    thresholds: [K]; the result has the shape [..., K].
    """
    together = np.concatenate(list(scores), axis=-1)
    return (together[..., None, :] > thresholds[:, None]).mean(axis=-1)


def probability_of_improvement(scores: Scores, others: Scores) -> Any:
    """Return how probable it is that a run scores more than a run of another algorithm: [...].

    The share of all pairs of a task in which the first is higher, where equal scores count as half
    (the Mann-Whitney U statistic divided by the number of pairs), averaged over tasks. Both need
    the same tasks in the same order.
    """
    shares = []
    for task, other in zip(scores, others, strict=True):
        pairs = task[..., :, None], other[..., None, :]
        wins = np.greater(*pairs) + 0.5 * np.equal(*pairs)
        shares.append(wins.mean(axis=(-2, -1)))
    return np.mean(shares, axis=0)


def bootstrap_interval(
    statistic: Callable[..., Any],
    *groups: Scores,
    confidence: float = 0.95,
    repeats: int = REPEATS,
    seed: int = 0,
) -> tuple[Any, Any]:
    """Return the lower and upper end of a confidence interval, by the stratified bootstrap.

    The runs of each task are resampled with replacement among themselves, independently of other
    tasks and groups, and the percentiles of the statistic are taken over the resamples. The same
    scores give the same interval.

    statistic: takes one list of arrays [repeats, runs] per group, returns [repeats, ...].
    groups: scores [runs] per task, each with at least one run.
    """
    rng = np.random.default_rng(seed)
    resamples = [
        [task[rng.integers(len(task), size=(repeats, len(task)))] for task in scores]
        for scores in groups
    ]
    tail = (1 - confidence) / 2
    low, high = np.quantile(statistic(*resamples), [tail, 1 - tail], axis=0)
    return low, high
