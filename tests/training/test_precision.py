"""trainer.precision=auto: the rule, and what Linux and torch report about bfloat16."""

import sys
from contextlib import nullcontext

import pytest
import torch

from worldloom import devices
from worldloom.training import precision
from worldloom.training.precision import choose_precision, require_precision, split_precision

CPU, GPU = torch.device("cpu"), torch.device("cuda", 1)
X86, ARM, OLD = ["amx_bf16", "avx512_bf16"], ["bf16"], []


@pytest.fixture
def machine(monkeypatch):
    """Pretend to be a machine: (features of the processor, whether its GPU multiplies bfloat16)."""

    def set_up(features, gpu=None):
        monkeypatch.setattr(precision, "bfloat16_features", lambda: features)
        monkeypatch.setattr(torch.cuda, "device", lambda device: nullcontext())
        monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: f"GPU {device.index}")
        # Older GPUs emulate bfloat16, which is slow.
        monkeypatch.setattr(
            torch.cuda,
            "is_bf16_supported",
            lambda including_emulation=True: including_emulation or gpu,
        )

    return set_up


@pytest.mark.parametrize(
    ("features", "gpu", "device", "parameters", "dtype", "chosen", "reason"),
    [
        (X86, None, CPU, 3_000_000, torch.float32, "bf16-mixed", "amx_bf16, avx512_bf16"),
        (ARM, None, CPU, 10**8, torch.float32, "bf16-mixed", "(bf16)"),
        (X86, None, CPU, 2_999_999, torch.float32, "32-true", "2,999,999 parameters"),
        (OLD, None, CPU, 10**8, torch.float32, "32-true", "does not multiply"),
        (OLD, True, CPU, 10**8, torch.float32, "32-true", "does not multiply"),
        (X86, None, CPU, 10**8, torch.float64, "32-true", "weights are float64"),
        (OLD, True, GPU, 10, torch.float32, "bf16-mixed", "GPU 1"),
        (X86, False, GPU, 10**8, torch.float32, "32-true", "GPU 1 does not multiply"),
        (OLD, True, GPU, 10**8, torch.float64, "32-true", "weights are float64"),
        (X86, None, torch.device("mps"), 10**8, torch.float32, "32-true", "not on mps"),
    ],
)
def test_the_rule(machine, features, gpu, device, parameters, dtype, chosen, reason):
    machine(features, gpu)
    found, why = choose_precision(parameters, device, dtype)
    assert found == chosen and reason in why
    assert choose_precision(parameters, device, dtype) == (found, why)


@pytest.mark.parametrize(
    ("text", "features"),
    [
        ("processor\t: 0\nflags\t\t: fpu amx_bf16 avx512f avx512_bf16\nbugs\t\t:\n", X86),
        ("flags\t\t: fpu avx512f avx512_bf16 amx_tile amx_int8\n", ["avx512_bf16"]),
        ("flags\t\t: fpu avx512f avx512vl avx512_vnni\nmodel name : with bf16\n", []),
        ("processor\t: 0\nFeatures\t: fp asimd sve i8mm bf16\n", ARM),
        ("Features\t: fp asimd svebf16\n", []),
        ("", []),
    ],
)
def test_features_are_those_that_linux_lists(monkeypatch, text, features):
    kernels = torch.ops.mkldnn
    monkeypatch.setattr(kernels, "_is_mkldnn_bf16_supported", lambda: True, raising=False)
    monkeypatch.setattr(devices.Path, "read_text", lambda path: text)
    assert devices.bfloat16_features() == features
    monkeypatch.setattr(kernels, "_is_mkldnn_bf16_supported", lambda: False)
    assert devices.bfloat16_features() == []


@pytest.mark.parametrize("missing", ["/proc/cpuinfo", "oneDNN"])
def test_other_systems_have_none(monkeypatch, missing):
    def fail(*_):
        raise (OSError if missing.startswith("/") else RuntimeError)(missing)

    name = "_is_mkldnn_bf16_supported"
    monkeypatch.setattr(torch.ops.mkldnn, name, lambda: True, raising=False)
    if missing == "oneDNN":
        monkeypatch.setattr(torch.ops.mkldnn, name, fail)
    else:
        monkeypatch.setattr(devices.Path, "read_text", fail)
    assert devices.bfloat16_features() == []


@pytest.mark.skipif(
    sys.platform != "linux" or not hasattr(torch.cpu, "get_capabilities"),
    reason="needs Linux, and a torch that lists what the processor has",
)
def test_features_of_this_machine_are_those_that_torch_finds():
    known = torch.cpu.get_capabilities()
    assert devices.bfloat16_features() == [name for name in devices.BFLOAT16 if known.get(name)]


def test_a_recorded_choice_is_read_back():
    assert split_precision("auto:bf16-mixed") == ("auto", "bf16-mixed")
    assert split_precision("auto") == ("auto", "")
    for other in ("32-true", None, 32):
        assert split_precision(other) == (other, "")
    require_precision("auto:bf16-mixed")
    with pytest.raises(ValueError, match=r"trainer\.precision is autos; .*64, auto \(float32"):
        require_precision("autos")
    with pytest.raises(ValueError, match="16-mixed, which is float16"):
        require_precision("auto:16-mixed")
