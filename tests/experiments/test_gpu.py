"""The script for a GPU, run on the CPU, where nothing can be recorded."""

import json

import pytest

from experiments.gpu import measure


@pytest.mark.parametrize(("case", "precision"), [("one", "32-true"), ("two", "bf16-mixed")])
def test_both_ways_are_measured(monkeypatch, tmp_path, capsys, case, precision):
    sizes = {"batch": 2, "length": 4}
    cases = {
        "one": {"model": "dreamerv3:tiny", **sizes},
        "two": {"model": "tdmpc2:1m", "batch": 4, "length": 3},
    }
    monkeypatch.setattr(measure, "CASES", cases)
    file = tmp_path / "gpu.json"
    args = ["--device=cpu", "--seconds=0", "--least=1", "--no-reference", f"--json={file}"]
    rows = measure.main([*args, "--cases", case, "--precisions", precision])
    assert [(row.case, row.precision, row.way) for row in rows] == [
        (case, precision, "eager"),
        (case, precision, "captured"),
    ]
    assert all(row.ms >= row.least > 0 and row.decision > 0 for row in rows)
    assert not rows[0].reason and rows[1].reason  # this machine has no CUDA graphs
    written = json.loads(file.read_text())
    assert written["device"] == "cpu" and len(written["rows"]) == 2
    assert written["rows"][1]["ms"] == rows[1].ms
    assert f"| {case} | {precision} | eager |" in capsys.readouterr().out
