"""The arithmetic and the axes of experiments/growth; never how long anything takes."""

import pytest

from experiments.growth import growth
from experiments.growth.growth import Growth, fit_exponent, format_table, measure_growth
from worldloom.bench import BenchConfig

TINY = {"deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "blocks": 2, "units": 8, "depth": 2}


def test_the_exponent_of_a_power_is_exact():
    sizes = [3, 6, 12, 24]
    assert fit_exponent(sizes, [0.7 * x**1.5 for x in sizes]) == pytest.approx(1.5, rel=1e-12)
    assert fit_exponent(sizes, [5.0] * 4) == 0
    # Least squares by hand: logarithms to base 2 of (0, 1, 2) and (0, 2, 1) have the slope 1/2.
    assert fit_exponent([1, 2, 4], [1, 4, 2]) == pytest.approx(0.5)
    growth = Growth("batch", "update", [1.0, 2.0, 4.0], [1.0, 1.0, 4.0])
    assert growth.exponent == pytest.approx(1) and growth.last == pytest.approx(2)


def test_what_is_steeper_than_linear_is_said():
    square = Growth("length", "update", [1, 2, 4], [1e-3, 4e-3, 16e-3])
    size = Growth("parameters", "update", [1, 2], [1e-3, 4e-3])
    head, sizes, ms, _, unmarked = format_table([square, size]).splitlines()
    assert head.split() == ["exponent", "last"]
    assert sizes.split() == ["length", "1", "2", "4"]
    assert ms.split() == [
        "ms",
        "per",
        "update",
        "1",
        "4",
        "16",
        *["2.00", "2.00", "above", "linear"],
    ]
    assert unmarked.split() == ["ms", "per", "update", "1", "4", "2.00", "2.00"]


TINY_PLANNER = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 16, "num_samples": 8, "num_elites": 2}


@pytest.mark.parametrize(
    ("model", "hyperparameters", "horizon", "lengths"),
    [
        ("dreamerv3:size1m", TINY, "horizon of imagination", [2, 4, 8]),
        # One step less than the sequences have rows.
        ("tdmpc2:1m", TINY_PLANNER | {"num_pi_trajs": 2}, "horizon of planning", [2, 3, 6]),
    ],
)
def test_every_axis_is_measured(monkeypatch, model, hyperparameters, horizon, lengths):
    assert growth.scale(256) == [32, 64, 128, 256, 512]
    assert growth.scale(4) == [1, 2, 4, 8, 16]
    monkeypatch.setattr(growth, "FACTORS", (1 / 2, 1, 2))
    for name in ("HORIZONS", "PLANS", "ENVS"):
        monkeypatch.setattr(growth, name, (1, 2))
    monkeypatch.setattr(growth, "MAX_PRESETS", 2)
    grown = measure_growth(
        BenchConfig(model=model, batch=8, length=4, repeats=1), **hyperparameters
    )
    sizes = {each.axis: each.sizes for each in grown}
    assert list(sizes) == ["batch", "length", horizon, "parameters", "environments"]
    assert sizes["batch"] == [4, 8, 16] and sizes["length"] == lengths
    assert sizes[horizon] == sizes["environments"] == [1, 2]
    assert all(time > 0 for each in grown for time in each.seconds)
