"""Compiled networks; `WORLDLOOM_COMPILE=1 pytest tests/reference` passes the arrays with them."""

import copy

import pytest
import torch
from torch import nn

from worldloom import create_world_model
from worldloom.training import compile as compiling
from worldloom.training.compile import compile_networks

pytestmark = [  # torch.compile meets deprecated parts of torch
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning"),
]
SPACES = {"obs_shape": (5,), "action_dim": 2}
SMALL = {"units": 8, "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "blocks": 2}


class Custom(nn.Module):
    """Two networks, one of them in a list, and a module that is no network."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(5, 8), nn.SiLU(), nn.Dropout(0.5), nn.Linear(8, 5))
        self.heads = nn.ModuleList([nn.Linear(5, 1)])

    def compute_loss(self, batch):
        return {"loss": self.heads[0](self.net(batch["obs"])).square().mean()}


@pytest.fixture
def no_trial(monkeypatch):
    """Skip the trial; networks are compiled when they are called."""
    monkeypatch.setattr(torch, "compile", lambda function, **options: function)


@pytest.mark.parametrize(
    ("name", "networks", "never"),
    [
        ("dreamerv3:size1m", {"encoder", "decoder", "reward", "critic", "rssm.prior"}, "rssm"),
        ("tdmpc2:1m", {"encoder", "dynamics", "reward", "critic", "target_critic"}, "tasks"),
    ],
)
def test_networks_and_no_loops_are_compiled(name, networks, never, no_trial):
    small = SMALL if name.startswith("dreamer") else {"mlp_dim": 8, "latent_dim": 16}
    model = create_world_model(name, **SPACES, **small)
    before = list(model.state_dict())
    found = compile_networks(model)
    assert networks <= set(found) and never not in found
    assert not any(a != b and b.startswith(f"{a}.") for a in found for b in found)
    assert list(model.state_dict()) == before
    # A copy, such as one that acts, is not compiled, and has the same weights.
    assert copy.deepcopy(model).encoder._compiled_call_impl is None


def test_a_machine_that_cannot_compile_is_reported(monkeypatch):
    def fail(function, **options):
        raise RuntimeError("no compiler found\nmore")

    monkeypatch.setattr(torch, "compile", fail)
    with pytest.raises(ValueError, match="fails on this machine: no compiler found; install a C"):
        compile_networks(Custom())


@pytest.mark.slow
def test_compiled_networks_give_the_same_losses_and_gradients():
    torch.manual_seed(0)
    model, batch = Custom(), {"obs": torch.randn(4, 5)}
    twin = copy.deepcopy(model)
    assert compile_networks(twin) == ["net", "heads.0"]
    losses = []
    for each in (model, twin):
        torch.manual_seed(1)  # dropout draws the same numbers
        loss = each.compute_loss(batch)["loss"]
        loss.backward()
        losses.append(loss.detach())
    torch.testing.assert_close(*losses)
    for one, other in zip(model.parameters(), twin.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert compiling.OPTIONS["fallback_random"]
    assert twin.net._compiled_call_impl is not None
