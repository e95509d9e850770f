"""Updates of several ranks, by Lightning's DDP, against those of one process with all the rows."""

import warnings

import lightning
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

from tests.rank_processes import run_ranks
from worldloom import create_world_model
from worldloom.ranks import sum_counts, world_size
from worldloom.training.module import WorldModelModule
from worldloom.training.optimizers import Adam, LaProp

ROWS, STEPS, UPDATES = 8, 5, 2
TIGHT = 1e-11


class MaskedMean(nn.Module):
    """A custom model whose loss is a mean over the rows that were not cut short."""

    def __init__(self):
        super().__init__()
        self.net = nn.Linear(5, 5)

    def compute_loss(self, batch):
        mask = (~batch["is_last"].any(1)).double()
        error = (self.net(batch["obs"][:, :-1]) - batch["obs"][:, 1:]).square().mean((1, 2))
        total = sum_counts(mask.sum()).clamp(min=1)
        return {"loss": world_size() * (error * mask).sum() / total}


class Late(MaskedMean):
    """A custom model with a head that its loss uses from the second update on."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(5, 1)
        self.calls = 0

    def compute_loss(self, batch):
        self.calls += 1
        losses = super().compute_loss(batch)
        if self.calls > 1:
            losses["loss"] = losses["loss"] + self.head(batch["obs"]).square().mean()
        return losses


CUSTOM = {"custom": MaskedMean, "late": Late}
DREAMERV3 = dict(units=16, deter=32, hidden=8, stoch=4, classes=4, imag_length=4)
TDMPC2 = dict(num_q=5, enc_dim=16, mlp_dim=16, latent_dim=16, num_bins=21, dropout=0.0)


def build(name, seed, **options):
    """Build a small model in float64 and its family's optimiser."""
    torch.manual_seed(seed)
    if name in CUSTOM:
        return CUSTOM[name]().double().train(), lambda p: torch.optim.SGD(p, 0.1)
    small = TDMPC2 | {"episode_length": 100} if name.startswith("tdmpc2") else DREAMERV3
    spaces = dict(obs_shape=(5,), action_dim=3)
    warm = options.pop("warm", False)
    model = create_world_model(name, **spaces, **small | options).double().train()
    with torch.no_grad():
        for p in model.parameters():  # some heads begin at zero, which would hide their gradients
            p.add_(0.2 * torch.randn_like(p))
        if warm and small is DREAMERV3:
            model.retnorm.first.fill_(-0.2), model.retnorm.second.fill_(0.3)
            model.retnorm.corr.fill_(0.9)
        elif warm:
            model.scale.value.fill_(1.7)
        if name.startswith("tdmpc2") and model.tasks is not None:
            model.tasks.embedding.weight *= 10  # above the norm to which look-ups rescale rows
    if small is DREAMERV3:
        return model, lambda params: LaProp(params, warmup=0)
    return model, lambda params: Adam(params, max_norm=20.0)


def make_batch(seed, short):
    """Make rows [B, T], of which the first ones, `short` in number, leave their episode."""
    g = torch.Generator().manual_seed(seed)
    ends = {name: torch.zeros(ROWS, STEPS, dtype=torch.bool) for name in ("first", "last", "over")}
    for row in range(short):
        ends["last"][row, 1] = ends["first"][row, 2] = True
        ends["over"][row, 1] = row != 1
    numbers = {"generator": g, "dtype": torch.float64}
    return {
        "obs": torch.randn(ROWS, STEPS, 5, **numbers),
        "actions": torch.rand(ROWS, STEPS, 3, **numbers) * 2 - 1,
        "rewards": 3 * torch.randn(ROWS, STEPS, **numbers),
        "task": torch.arange(ROWS) // 3,
        **{f"is_{'terminal' if k == 'over' else k}": v for k, v in ends.items()},
    }


def share_noise(rank, size, axis):
    """Let torch draw the noise of all ranks, of which each takes the part of its rows."""
    originals, calls = (torch.rand, torch.randn), [0]

    def draw(kind, shape, dtype):
        calls[0] += 1
        shape, rows = list(shape), shape[axis]
        shape[axis] = rows * size
        noise = originals[kind](
            shape, generator=torch.Generator().manual_seed(calls[0]), dtype=dtype
        )
        if rows == 2 * ROWS // size:  # both views of DreamerPro, one after the other
            halves = noise.unflatten(axis, (2, size, -1)).select(axis + 1, rank)
            return halves.flatten(axis, axis + 1)
        return noise.narrow(axis, rank * rows, rows)

    torch.rand_like = lambda x: draw(0, x.shape, x.dtype)
    torch.randn = lambda shape, dtype, device: draw(1, shape, dtype)


class Recorder(lightning.Callback):
    """Keeps the losses and the gradients that the optimiser sees."""

    def __init__(self):
        self.losses, self.gradients = [], []

    def on_before_optimizer_step(self, trainer, pl_module, optimizer):
        self.losses.append(pl_module._losses["loss"].item())
        self.gradients.append(
            {
                name: p.grad.clone()
                for name, p in pl_module.model.named_parameters()
                if p.grad is not None
            }
        )


def train(rank, size, name, options, short, strategy="ddp"):
    """Make updates with Lightning's trainer on this rank's share of the rows."""
    warnings.simplefilter("ignore")
    model, optimizer = build(name, seed=rank, **options)  # DDP begins with the weights of rank 0
    rows = slice(rank * ROWS // size, (rank + 1) * ROWS // size)
    batches = [
        {key: value[rows] for key, value in make_batch(seed, short).items()}
        for seed in range(UPDATES)
    ]
    share_noise(rank, size, -2 if name.startswith("tdmpc2") else 0)
    torch.manual_seed(rank)  # of the two Q-functions; those of rank 0 count
    recorder = Recorder()
    quiet = ("logger", "enable_checkpointing", "enable_progress_bar", "enable_model_summary")
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=strategy if size > 1 else "auto",
        max_epochs=1,
        callbacks=[recorder],
        use_distributed_sampler=False,
        **dict.fromkeys(quiet, False),
    )
    assert trainer.world_size == size
    trainer.fit(WorldModelModule(model, optimizer), DataLoader(batches, batch_size=None))
    return recorder.losses, recorder.gradients, model.state_dict()


def distance(found, expected):
    """Return the largest relative difference of the arrays of two dicts."""
    assert found.keys() == expected.keys()
    pairs = [(found[name].double(), x.double()) for name, x in expected.items()]
    return max(float((a - b).norm() / b.norm().clamp(min=1e-6)) for a, b in pairs)


MEANSTD = {"valnorm": {"impl": "meanstd"}, "advnorm": {"impl": "meanstd"}}
PROTOTYPES = {"num_prototypes": 7, "proto_dim": 4, "freeze_prototypes_iters": 0}
# Number of ranks, model, its options, number of rows that are cut short, and strategy.
CASES = {
    "dreamerv3-cold": (2, "dreamerv3:size1m", {}, 3),
    "dreamerv3-warm": (2, "dreamerv3:size1m", {"warm": True, **MEANSTD}, 3),
    "dreamerv3-four": (4, "dreamerv3:size1m", {"warm": True}, 3),
    "r2dreamer": (2, "r2dreamer:size1m", {}, 3),
    "infonce": (2, "infonce:size1m", {}, 3),
    "dreamerpro": (2, "dreamerpro:size1m", {"representation": PROTOTYPES}, 3),
    "dreamerpro-four": (4, "dreamerpro:size1m", {"representation": PROTOTYPES}, 3),
    "tdmpc2-cold": (2, "tdmpc2:1m", {"episodic": "auto"}, 3),
    "tdmpc2-warm": (2, "tdmpc2:1m", {"episodic": True, "warm": True}, 3),
    "tdmpc2-tasks": (2, "tdmpc2:1m", {"action_dims": [3, 1, 2], "task_dim": 8}, 0),
    "tdmpc2-whole": (2, "tdmpc2:1m", {"decoder": True}, 0),
    "tdmpc2-four": (4, "tdmpc2:1m", {"episodic": "auto", "warm": True}, 7),
    "custom": (2, "custom", {}, 3),
    "late": (2, "late", {}, 3, "ddp_find_unused_parameters_true"),
}


@pytest.mark.parametrize("case", CASES)
def test_ranks_update_as_one_process_does(case):
    size, *arguments = CASES[case]
    ((losses, gradients, state),) = run_ranks(train, 1, 1, *arguments)
    ranks = run_ranks(train, size, size, *arguments)
    assert all(len(x[0]) == UPDATES for x in ranks)
    means = torch.tensor([x[0] for x in ranks], dtype=torch.float64).mean(0)
    assert torch.allclose(means, torch.tensor(losses, dtype=torch.float64), rtol=TIGHT, atol=0)
    for _, found, weights in ranks:
        assert max(map(distance, found, gradients)) < TIGHT
        assert distance(weights, state) < TIGHT
    assert all(torch.equal(ranks[0][2][k], x[2][k]) for x in ranks for k in state)


def test_a_parameter_without_gradient_is_named_before_weights_differ():
    with pytest.raises(ValueError, match=r"depend on head\.weight, head\.bias, so"):
        run_ranks(train, 2, 2, "late", {}, 3)


def act_alone(rank):
    """Act and compute a loss outside training on the last rank only; the first one does nothing."""
    model, _ = build("tdmpc2:1m", rank, episodic="auto")
    if rank == 1:
        batch = make_batch(0, short=3)
        model.policy(model.encode(batch["obs"][:, 0]))
        model.eval().compute_loss(batch)
        build("dreamerv3:size1m", rank)[0].eval().compute_loss(batch)
    return world_size()


def test_only_losses_in_training_wait_for_other_ranks():
    assert run_ranks(act_alone, 2, seconds=60) == [2, 2]
