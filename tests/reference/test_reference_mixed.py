"""Losses and gradients of DreamerV3 in mixed precision against float32, on the recorded batches."""

import pytest
import torch
from torch import Tensor

from tests.reference.dreamerv3_format import Agent, clone, gradients, replaced, sampling
from tests.reference.reference_format import Recording, agent_folders
from tests.reference.test_reference_losses import replay_batch
from worldloom.nn import distributions
from worldloom.protocol import split_result

# Largest relative difference of a loss term; bfloat16 has 8 significant bits.
TOLERANCE = 0.02


@pytest.mark.parametrize("folder", agent_folders("dreamerv3"))
def test_mixed_precision_is_near_float32(folder: str) -> None:
    agent = Agent(folder)
    noise = Recording(folder, "loss_noise.npz", "float32").group("noise")
    batch, model = replay_batch(agent, "float32"), agent.build("float32").train()
    exact = clone(model)
    drawn: list[Tensor] = []

    def record(probs: Tensor) -> Tensor:
        drawn.append(original(probs))
        return drawn[-1]

    with sampling(noise or None):
        original = distributions.sample_classes
        with replaced(original, record):
            expected, _ = split_result(exact.compute_loss(batch))
        # Other samples would be other states, so both precisions see the same ones.
        samples = iter(drawn)
        with (
            replaced(original, lambda probs: next(samples)),
            torch.autocast("cpu", torch.bfloat16),
        ):
            found, _ = split_result(model.compute_loss(batch))
    assert next(samples, None) is None
    for name, loss in expected.items():
        if name.endswith("loss"):
            assert found[name].item() == pytest.approx(loss.item(), rel=TOLERANCE), name
    expected["loss"].backward()
    found["loss"].backward()
    flat = [torch.cat([g.flatten() for g in gradients(m).values()]) for m in (exact, model)]
    assert torch.cosine_similarity(*flat, dim=0) > 0.999
