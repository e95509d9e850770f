"""The float32 reference arrays with all products by oneDNN (see `worldloom.nn.products`)."""

from collections.abc import Callable

import pytest
import torch

from tests.reference.reference_format import agent_folders
from tests.reference.test_reference_losses import test_reference_losses as dreamerv3_losses
from tests.reference.test_reference_training import test_reference_training as dreamerv3_updates
from tests.reference.test_tdmpc2_planning import test_tdmpc2_planning as tdmpc2_plans
from tests.reference.test_tdmpc2_update import test_tdmpc2_updates as tdmpc2_updates
from worldloom.nn import products


def dreamerv3_loss(folder: str, precision: str) -> None:
    dreamerv3_losses(folder, "loss_noise.npz", precision)


CASES = [
    *((x, f) for f in agent_folders("dreamerv3") for x in (dreamerv3_loss, dreamerv3_updates)),
    *((x, f) for f in agent_folders("tdmpc2") for x in (tdmpc2_updates, tdmpc2_plans)),
]


@pytest.mark.parametrize(("compare", "folder"), CASES)
def test_onednn_gives_the_recorded_arrays(
    compare: Callable, folder: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if not torch.backends.mkldnn.is_available():
        pytest.skip("torch without oneDNN")
    monkeypatch.setattr(products, "uses_onednn", lambda: True)
    monkeypatch.setattr(products, "FEWEST", 0)
    monkeypatch.setattr(products, "BLOCK_ROWS", 1)
    computed, compute = [], products._multiply
    monkeypatch.setattr(products, "_multiply", lambda *a: computed.append(1) or compute(*a))
    compare(folder, "float32")
    assert len(computed) > 50
