"""Errors of predictions as shares of the variance of the truth, and calibration."""

import torch
from torch import Tensor

# Numbers that hardly vary are compared with a tenth of their typical size, a hundredth as variance.
LEAST = 0.01
BINS = 10


def measure_spread(true: Tensor) -> Tensor:
    """Return the variance [] of numbers [N], at least a hundredth of their mean square."""
    true = true.double()
    return torch.maximum(true.var(correction=0), LEAST * true.square().mean())


def measure_error(predicted: Tensor, true: Tensor) -> float | None:
    """Return the mean squared error of predictions [N] as a share of the truth's spread.

    0 for perfect predictions, 1 for the mean of a truth that varies. None without numbers, or if
    all are 0.
    """
    if not len(true) or (spread := measure_spread(true)) == 0:
        return None
    return ((predicted.double() - true).square().mean() / spread).item()


def measure_calibration(predicted: Tensor, true: Tensor) -> float:
    """Return the mean distance between predictions [N] and what happened on average, in bins.

    Each bin has about a tenth of the predictions; equal predictions share a bin. 0 if predictions
    are right on average wherever they are similar; NaN if one is not finite.
    """
    predicted, true = predicted.double().contiguous(), true.double()
    if not predicted.isfinite().all():
        return torch.nan
    levels = torch.linspace(0, 1, BINS + 1, dtype=torch.double, device=predicted.device)[1:-1]
    bins = torch.bucketize(predicted, predicted.quantile(levels))
    off = torch.bincount(bins, predicted - true, minlength=BINS)
    return (off.abs().sum() / len(true)).item()
