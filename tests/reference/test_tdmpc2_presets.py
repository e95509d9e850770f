"""Sizes of the official TD-MPC2 models, and initial values."""

import csv
import json
import re
from typing import Any

import pytest
import torch
from torch import Tensor

from tests.reference.reference_format import ROOT
from tests.reference.tdmpc2_format import FAMILY, official_params, official_state
from worldloom import create_world_model
from worldloom.presets import load_preset

# The width of the task embedding for 80 tasks, as the README says.
TASK_DIM = 96


def counts() -> dict[str, Any]:
    path = ROOT / FAMILY / "preset_counts.json"
    return json.loads(path.read_text()) if path.is_file() else {"sizes": {}, "cases": {}}


COUNTS = [
    (size, case)
    for size, entry in counts()["sizes"].items()
    for case in counts()["cases"]
    if case in entry
]


@pytest.mark.parametrize(("size", "case"), COUNTS)
def test_tdmpc2_parameter_counts(size: str, case: str) -> None:
    """As many parameters as officially, in the preset that has the size's name."""
    entry, where = counts()["sizes"][size], counts()["cases"][case]
    arguments: dict[str, Any] = {
        "obs_shape": {key: tuple(shape) for key, shape in where["obs_shape"].items()},
        "action_dim": where["action_dim"],
        "episodic": where.get("episodic", False),
    }
    if where.get("multitask"):
        tasks = int(re.sub(r"\D", "", case))
        arguments |= {"action_dims": tasks * [where["action_dim"]], "task_dim": TASK_DIM}
    with torch.device("meta"):
        model = create_world_model(f"tdmpc2:{size}m", **arguments, device="meta")
    assert sum(p.numel() for p in official_params(model).values()) == entry[case]


@pytest.mark.parametrize("size", counts()["sizes"])
def test_tdmpc2_preset_options(size: str) -> None:
    ours = load_preset(f"tdmpc2:{size}m")
    overrides = counts()["sizes"][size]["overrides"]
    assert {name: ours[name] for name in overrides} == overrides


def test_tdmpc2_initial_values() -> None:
    """Every tensor starts as parameters.csv says, and every row of it has a tensor."""
    path = ROOT / FAMILY / "parameters.csv"
    if not path.is_file():
        pytest.skip(f"{path} is not there")
    with path.open() as file:
        rows = list(csv.DictReader(line for line in file if not line.startswith("#")))
    # The Q-functions once more, and notes of the library that saves them.
    rows = [row for row in rows if not re.match(r"_detach_|.*__", row["name"])]
    torch.manual_seed(0)
    model = create_world_model(
        "tdmpc2:5m",
        obs_shape={"rgb": (9, 64, 64), "state": (39,)},
        action_dim=4,
        action_dims=[2, 4, 1],
        task_dim=TASK_DIM,
        num_enc_layers=3,
        episodic=True,
    )
    state = official_state(model)
    rules = {row["name"]: row["initial value"] for row in rows}
    seen = {name: row_of(name, set(rules), state) for name in state}
    assert set(seen.values()) == set(rules)
    for name, value in state.items():
        check_initial(name, value, rules[seen[name]], state)
    for name, value in state.items():
        if name.startswith("_target_Qs_params."):
            assert value.equal(state[name.replace("_target_Qs_params", "_Qs.params")])


def row_of(name: str, rows: set[str], state: dict[str, Tensor]) -> str:
    """Name the row of parameters.csv for a tensor; {i} is a hidden layer, {last} the last one."""
    if name in rows:
        return name
    match = re.fullmatch(r"(.+?\.)(\d+)(\..+)", name)
    assert match, f"no row of parameters.csv for {name}"
    part, index, rest = match.groups()
    later = f"{part}{int(index) + 1}.bias" in state
    row = f"{part}{{{'i' if later else 'last'}}}{rest}"
    assert row in rows, f"no row of parameters.csv for {name}"
    return row


def check_initial(name: str, value: Tensor, rule: str, state: dict[str, Tensor]) -> None:
    x, errors = value.double(), 6 / value.numel() ** 0.5  # within 6 standard errors
    if re.fullmatch(r"-?\d+", rule):
        assert (x == float(rule)).all(), name
    elif rule == "TN":
        assert abs(x.mean()) < 0.02 * errors, name
        assert abs(x.std() / 0.02 - 1) < errors, name
        assert x.abs().max() > 0.04 or x.numel() < 1000, name  # not cut off at two deviations
    elif rule == "U(-0.02, 0.02)":
        check_uniform(name, x, 0.02)
    elif rule == "torch Conv2d default":
        kernel = state[name.rsplit(".", 1)[0] + ".weight"]
        check_uniform(name, x, kernel[0].numel() ** -0.5)
    else:
        assert rule == "ones then zeros", f"{name}: unknown rule {rule!r}"
        assert x.tolist() == [[1, 1, 0, 0], [1, 1, 1, 1], [1, 0, 0, 0]]


def check_uniform(name: str, x: Tensor, bound: float) -> None:
    assert x.abs().max() <= bound * (1 + 1e-6), name
    # The deviation of n uniform numbers is bound / sqrt(3), to about 0.45 / sqrt(n) of itself.
    assert abs(x.std() * 3**0.5 / bound - 1) < 6 * 0.5 / x.numel() ** 0.5, name
