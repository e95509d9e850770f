"""`worldloom doctor`: a report that also appears where packages are missing or broken."""

import re
import sys

from worldloom import __version__, devices, doctor
from worldloom.app.compose import Overrides
from worldloom.training import precision


def test_the_report_names_what_is_there(capsys, monkeypatch):
    monkeypatch.setattr(doctor, "probe", lambda name: None if name == "egl" else "no display")
    monkeypatch.setattr(doctor, "import_each", lambda names: dict.fromkeys(names, ""))
    doctor.doctor_command(Overrides(()))
    out = capsys.readouterr().out
    for text in (f"worldloom  {__version__} in ", "numpy ", "torch ", "CPU ", "GPU ", "GB free in"):
        assert text in out
    assert "gymnasium" in out and "TensorBoard" in out


def test_it_tells_what_auto_chooses_and_why(capsys, monkeypatch):
    monkeypatch.setattr(devices, "usable_devices", lambda: ["cpu", "mps"])
    monkeypatch.setattr(devices, "bfloat16_features", lambda: ["amx_bf16"])
    monkeypatch.setattr(precision, "bfloat16_features", lambda: ["amx_bf16"])
    monkeypatch.setattr(doctor, "_renderers", lambda: [])
    monkeypatch.setattr(doctor, "_parts", lambda: [])
    doctor.doctor_command(Overrides(()))
    out = capsys.readouterr().out
    assert "instructions for bfloat16: amx_bf16\n" in out
    assert "precision  trainer.precision=auto chooses:\n" in out
    assert re.search(r"^ {11}32-true on cpu: the model has 2,999,999 parameters", out, re.MULTILINE)
    assert re.search(r"^ {11}bf16-mixed on cpu: .*\(amx_bf16\)", out, re.MULTILINE)
    assert out.count("on mps:") == 1
    monkeypatch.setattr(devices, "bfloat16_features", list)
    monkeypatch.setattr(precision, "bfloat16_features", list)
    doctor.doctor_command(Overrides(()))
    out = capsys.readouterr().out
    assert "instructions for bfloat16: none\n" in out
    assert out.count("on cpu: this processor does not multiply bfloat16") == 1


def test_broken_packages_are_named_and_do_not_end_it(tmp_path, monkeypatch, capsys):
    (tmp_path / "wandb.py").write_text("raise RuntimeError('broken\\nin two lines')")
    (tmp_path / "h5py.py").write_text("import os; os._exit(7)")
    (tmp_path / "minari.py").write_text("")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.syspath_prepend(tmp_path)
    errors = doctor.import_each(["wandb", "h5py", "minari"])
    assert errors == {
        "wandb": "RuntimeError: broken in two lines",
        "h5py": "importing it ended the process with code 7",
        "minari": "",
    }
    monkeypatch.setattr(doctor, "_devices", lambda: 1 / 0)
    monkeypatch.setattr(doctor, "_renderers", lambda: [])
    monkeypatch.setitem(sys.modules, "mlflow", None)
    doctor.doctor_command(Overrides(()))
    out = capsys.readouterr().out
    assert "W&B is installed but broken: RuntimeError: broken in two lines" in out
    assert "ZeroDivisionError" in out and "GB free in" in out
