"""Sizes of the official presets, and initial values."""

import csv
import json
import math
import re
from typing import Any

import pytest
import torch

from tests.reference.dreamerv3_format import (
    hyperparameters,
    official_params,
    official_state,
    spaces,
)
from tests.reference.reference_format import (
    ROOT,
)
from worldloom import create_world_model
from worldloom.models.dreamerv3 import DreamerV3
from worldloom.presets import load_preset


def counts() -> dict[str, Any]:
    path = ROOT / "dreamerv3" / "preset_counts.json"
    return json.loads(path.read_text()) if path.is_file() else {"presets": {}, "cases": {}}


SIZES = sorted(counts()["presets"])
CASES = sorted(counts()["cases"])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("size", SIZES)
def test_reference_parameter_counts(size: str, case: str) -> None:
    preset, case_spaces = counts()["presets"][size], counts()["cases"][case]
    arguments = hyperparameters(with_overrides(counts()["defaults"], preset["overrides"]))
    where = spaces(case_spaces["obs"], case_spaces["act"])
    with torch.device("meta"):
        assert parameters_by_module(DreamerV3(**where, **arguments)) == preset[case]
        if size == "defaults":  # no preset of ours, but equal to one of the sizes
            return
        where.pop("obs_classes")
        ours = create_world_model(f"dreamerv3:{size}", **where, device="meta")
    assert parameters_by_module(ours) == preset[case]


@pytest.mark.parametrize("size", SIZES)
def test_reference_preset_options(size: str) -> None:
    """Our YAML presets have the official values of every option, not only of the sizes."""
    if size == "defaults":
        pytest.skip("the official defaults are one of the sizes")
    official = hyperparameters(
        with_overrides(counts()["defaults"], counts()["presets"][size]["overrides"])
    )
    ours = load_preset(f"dreamerv3:{size}")
    for name, wanted in official.items():
        if name in ("units", "depth"):
            continue  # set by each group there
        if isinstance(wanted, dict):
            shared = {k: ours[k] for k in ("units", "depth") if k in wanted}
            assert shared | ours[name] == wanted, name
        else:
            assert ours[name] == wanted, name


def with_overrides(tree: dict[str, Any], overrides: dict[str, Any], path: str = "") -> Any:
    """Apply {pattern of a dotted path: value or values} as the official presets do."""
    result = {}
    for key, value in tree.items():
        name = f"{path}.{key}" if path else key
        change = [new for pattern, new in overrides.items() if re.fullmatch(pattern, name)]
        if isinstance(value, dict):
            for new in change:
                value = value | new
            result[key] = with_overrides(value, overrides, name)
        else:
            result[key] = change[-1] if change else value
    return result


def parameters_by_module(model: DreamerV3) -> dict[str, int]:
    sizes: dict[str, int] = {}
    for name, p in official_params(model).items():
        module = name.split("/")[0]
        sizes[module] = sizes.get(module, 0) + p.numel()
    return {**sizes, "total": sum(sizes.values())}


def test_reference_initial_values() -> None:
    """Every tensor starts as parameters.csv says, and every row of it has a tensor."""
    path = ROOT / "dreamerv3" / "parameters.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    rows = [row for row in rows if row["name"].split("/")[-1] in ("kernel", "bias", "scale")]
    torch.manual_seed(0)
    model = create_world_model(
        "dreamerv3:size1m",
        obs_shape={"image": (3, 32, 32), "vector": (40,), "word": (3,)},
        action_dim={"choice": 12, "move": 10},
        discrete={"choice": True, "move": False},
        obs_classes={"word": 16},
    )
    state = {k: v for k, v in official_state(model).items() if not k.endswith("/value")}
    seen = set()
    for name, value in state.items():
        matches = [row for row in rows if re.fullmatch(pattern_of(row["name"]), name)]
        assert len(matches) == 1, f"{name}: {len(matches)} rows of parameters.csv"
        seen.add(matches[0]["name"])
        check_initial(name, value, matches[0]["initial value"].split(" (")[0])
    assert {row["name"] for row in rows} == seen
    for name, value in state.items():
        if name.startswith("val/"):
            torch.testing.assert_close(state[name.replace("val/", "slowval/", 1)], value)


def pattern_of(name: str) -> str:
    """Turn a name of parameters.csv with {i}, {k} and {m} into a regular expression."""
    pattern = re.escape(name).replace(r"\{i\}", r"\d+").replace(r"\{k\}", "[^/]+")
    return pattern.replace(r"\{m\}", "(val|slowval)")


def check_initial(name: str, value: torch.Tensor, rule: str) -> None:
    if rule in ("0", "1"):
        assert (value == float(rule)).all(), name
        return
    match = re.fullmatch(r"(?:([\d.]+) )?(N|NB)", rule)
    assert match, f"{name}: unknown rule {rule!r}"
    scale = float(match[1] or 1)
    # Linear (in, out), blocks (blocks, in, out), convolution (height, width, in, out).
    fan_in = math.prod(value.shape[:-1])
    unit = value.double() * math.sqrt(fan_in) / scale
    count = unit.numel()
    # Mean 0 and deviation 1 within 6 standard errors; cut off at two deviations.
    assert abs(unit.mean()) < 6 / math.sqrt(count), name
    assert abs(unit.std() - 1) < 6 * 0.5 / math.sqrt(count), name
    assert unit.abs().max() <= 2 * 1.1368 + 1e-5, name
    if count > 1000:
        assert unit.abs().max() > 2.1, name
