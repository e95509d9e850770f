"""Devices that are misspelt or missing: one line that says which there are."""

import pytest
import torch

from worldloom import create_world_model
from worldloom.devices import require_accelerator, require_device

# The tests run on machines with and without GPUs; no machine has a hundred.
MISTAKES = {
    "gpu": "device is 'gpu' (did you mean 'cuda'?); expected one of cpu",
    "cpuu": "device is 'cpuu' (did you mean 'cpu'?); expected one of cpu",
    "cuda:99": "device 'cuda:99' is not available: ",
    "xpu:99": "device 'xpu:99' is not available: ",
    "hpu": "device 'hpu' is not available: ",
}


@pytest.mark.parametrize("device", MISTAKES)
def test_a_missing_device_is_one_line(device):
    with pytest.raises(ValueError) as raised:
        create_world_model("dreamerv3:tiny", (3,), 2, device=device)
    (line,) = str(raised.value).splitlines()
    assert line.startswith(MISTAKES[device]) and "expected one of cpu" in line


def test_a_device_that_is_there_is_returned():
    assert require_device("cpu") == torch.device("cpu")
    assert require_device(torch.device("meta")).type == "meta"


@pytest.mark.parametrize("devices", [1, 2, "auto", [0], "1"])
@pytest.mark.parametrize("accelerator", ["gpu", "cuda", "mps"])
def test_no_gpu(monkeypatch, accelerator, devices):
    monkeypatch.setattr("worldloom.devices.usable_devices", lambda: ["cpu"])
    with pytest.raises(ValueError, match=rf"trainer.accelerator is {accelerator}, but .*GPU"):
        require_accelerator(accelerator, devices)
    require_accelerator("cpu", devices)
    require_accelerator("auto", devices)


@pytest.mark.parametrize(
    ("devices", "fits"),
    [(1, True), (2, False), ([0], True), ([1], False), ("auto", True), (-1, True), ("3", False)],
)
def test_fewer_gpus_than_asked_for(monkeypatch, devices, fits):
    monkeypatch.setattr("worldloom.devices.usable_devices", lambda: ["cpu", "cuda:0"])
    if fits:
        require_accelerator("gpu", devices)
    else:
        with pytest.raises(ValueError, match=r"trainer.devices is .*this machine has 1: cuda:0"):
            require_accelerator("gpu", devices)


def test_a_misspelt_accelerator():
    with pytest.raises(ValueError, match=r"accelerator is 'gpuu' \(did you mean 'gpu'\?\)"):
        require_accelerator("gpuu", 1)
