"""Cost of training and acting with a model on this machine: `python -m worldloom.bench`."""

from worldloom.bench.measure import (
    BenchConfig,
    Measurement,
    TrainedModel,
    count_flops,
    measure,
    read_settings,
)

__all__ = [
    "BenchConfig",
    "Measurement",
    "TrainedModel",
    "count_flops",
    "measure",
    "read_settings",
]
