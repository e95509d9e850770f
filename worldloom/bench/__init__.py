"""What training with a model costs on this machine; `python -m worldloom.bench` prints it."""

from worldloom.bench.growth import Growth, fitted_exponent, grow
from worldloom.bench.measure import BenchConfig, Measurement, count_flops, measure, random_batch

__all__ = [
    "BenchConfig",
    "Growth",
    "Measurement",
    "count_flops",
    "fitted_exponent",
    "grow",
    "measure",
    "random_batch",
]
