"""Fields that a model stores with every row of the replay and rewrites when it trains."""

from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from worldloom.protocol import ReplayField
from worldloom.training import ReplayBuffer, ReplayDataModule, WorldModelModule

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*LeafSpec:FutureWarning"
)
ROWS = 6
PLAN = {
    "mean": ReplayField((2, 3), every_row=True),
    "std": ReplayField((3,), torch.float16, every_row=True),
}
LATENT_PLAN = {**PLAN, "deter": ReplayField((1,))}


class Planning(nn.Module):
    """Stores a plan's mean and std with every row, and counts in the mean how often it trains."""

    replay_fields = PLAN
    context_rows = 0  # rows in front of those that are trained on

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.seen = []

    def compute_loss(self, batch):
        stored = batch["stored"]
        assert stored["mean"].shape == (4, ROWS + self.context_rows, 2, 3)
        self.seen.append((batch["index"], stored["mean"][..., 0, 0].clone()))
        loss = (self.weight - batch["rewards"].mean()).square()
        plan = {"mean": stored["mean"] + 1, "std": torch.full((4, 2, 3), 0.5)}  # std: last 2 rows
        return {"loss": loss, "replay": plan}


class Remembering(Planning):
    """Starts from the latents of row 0 as well."""

    replay_fields = LATENT_PLAN
    context_rows = 1

    def compute_loss(self, batch):
        assert batch["context"]["deter"].shape == (4, 1) and set(batch["context"]) == {"deter"}
        assert set(batch["stored"]) == {"mean", "std"}
        result = super().compute_loss(batch)
        result["replay"]["deter"] = batch["rewards"][:, 1:, None]
        return result


def data_for(model, updates, **options):
    buffer = ReplayBuffer(90, (2,), 1, fields=model.replay_fields, **options)
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        buffer.add_episode(
            obs=torch.randn(26, 2, generator=rng),
            actions=torch.zeros(25, 1),
            rewards=torch.randn(25, generator=rng),
            dones=torch.zeros(25),
        )
    return ReplayDataModule(buffer, batch_size=4, sequence_length=ROWS, total_steps=updates)


def trainer(*callbacks, max_epochs=1, **options):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    quiet |= {"enable_checkpointing": False, "accelerator": "cpu"}
    return Trainer(max_epochs=max_epochs, callbacks=list(callbacks), **quiet, **options)


def fit(model, updates, *callbacks, nonfinite="stop", **options):
    module = WorldModelModule(model, partial(torch.optim.SGD, lr=0.1), nonfinite=nonfinite)
    data = data_for(model, updates)
    trainer(*callbacks, **options).fit(module, data)
    return data


def stored(data):
    """Return all rows of the fields, by name."""
    rows = data.buffer.state_dict()["streams"][0]
    return {name: x.clone() for name, x in rows.items() if name.startswith("fields")}


def expected_counts(seen, skipped=()):
    """Count for every row in how many batches it was; a batch must have had the counts so far."""
    counts = np.zeros(78)
    for number, (index, mean) in enumerate(seen, 1):
        row = index[:, 1:].numpy() + np.arange(mean.shape[1])
        assert (mean.numpy() == counts[row]).all()
        if number not in skipped:
            counts[np.unique(row)] += 1
    return counts


@pytest.mark.parametrize("cls", [Planning, Remembering])
@pytest.mark.parametrize("accumulate", [1, 3])
def test_rows_keep_what_the_model_returned_last(cls, accumulate):
    model = cls()
    data = fit(model, 12, accumulate_grad_batches=accumulate)
    rows = stored(data)
    counts = expected_counts(model.seen)
    assert data.buffer.context_rows == model.context_rows and counts.max() > 1
    assert (rows["fields['mean']"].numpy() == counts[:, None, None]).all()
    std = rows["fields['std']"]
    assert std.dtype == torch.float16 and set(std.unique().tolist()) == {0.0, 0.5}
    if cls is Remembering:
        changed = rows["fields['deter']"][:, 0] != 0
        rewards = data.buffer.state_dict()["streams"][0]["rewards"]
        assert changed.any() and torch.equal(rows["fields['deter']"][changed, 0], rewards[changed])


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_skipped_update_leaves_the_fields_alone(accumulate):
    class Spoil(Callback):
        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if batch_idx + 1 in (3, 6):
                batch["rewards"][0, 0] = torch.nan

    model = Planning()
    data = fit(model, 8, Spoil(), nonfinite="skip", accumulate_grad_batches=accumulate)
    counts = expected_counts(model.seen, skipped=(3, 6))
    assert (stored(data)["fields['mean']"].numpy() == counts[:, None, None]).all()


def test_what_a_callback_saves_has_the_fields_of_the_same_update(tmp_path):
    class Save(Callback):
        """Save in the middle, as the run's checkpoints do: before the next batch is drawn."""

        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            if batch_idx == 4:
                trainer.save_checkpoint(tmp_path / "middle.ckpt")

    whole = fit(Remembering(), 10, Save())
    model = Remembering()
    data = data_for(model, 10, seed=5)
    module = WorldModelModule(model, partial(torch.optim.SGD, lr=0.1))
    trainer(max_epochs=-1).fit(module, data, ckpt_path=tmp_path / "middle.ckpt")
    assert len(model.seen) == 5
    for name, rows in stored(whole).items():
        assert torch.equal(rows, stored(data)[name]), name


def test_fields_that_do_not_fit_are_rejected():
    buffer = data_for(Planning(), 1).buffer
    index = buffer.sample(2, 4)["index"]
    for values, message in (
        ({"mean": torch.zeros(2, 5, 2, 3)}, r"\['mean'\] have shape \(2, 5, 2, 3\).*last n of 4"),
        ({"mean": torch.zeros(2)}, r"\['mean'\] have shape \(2,\); expected \[B, n, ...\]"),
        ({"mean": torch.zeros(2, 4, 3)}, r"has shape \(2, 4, 3\); expected \(2, 4, 2, 3\)"),
        ({"code": torch.zeros(2, 4)}, r"fields are \['code'\] but this replay stores \['mean', "),
    ):
        with pytest.raises(ValueError, match=message):
            buffer.write_fields(index, values, 4)
