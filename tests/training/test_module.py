import math
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from worldloom.protocol import ReplayField, split_result
from worldloom.training import ReplayBuffer, ReplayDataModule, WorldModelModule
from worldloom.training.metrics import RunningMeans

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")


class Line(nn.Module):
    """Learns to predict rewards by one number; only what the trainer needs."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.fixed = nn.Parameter(torch.ones(()), requires_grad=False)
        self.register_buffer("slow", torch.zeros(()))
        self.losses = []

    def compute_loss(self, batch):
        assert self.training and torch.is_grad_enabled()
        loss = (self.weight - batch["rewards"].mean() - 1).square()
        self.losses.append(loss.item())
        return {"loss": loss, "twice": 2 * loss, "rows": torch.tensor(len(batch["rewards"]))}

    def after_update(self):
        self.slow.lerp_(self.weight.detach(), 0.5)


def data_module(updates, fields=None):
    buffer = ReplayBuffer(200, (2,), 1, fields=fields)
    for seed in range(2):
        rng = torch.Generator().manual_seed(seed)
        obs, rewards = torch.randn(21, 2, generator=rng), torch.randn(20, generator=rng)
        actions = torch.zeros(20, 1)
        buffer.add_episode(obs=obs, actions=actions, rewards=rewards, dones=torch.zeros(20))
    return ReplayDataModule(buffer, batch_size=3, sequence_length=4, total_steps=updates)


def module_of(model, lr=0.1, **options):
    return WorldModelModule(model, partial(torch.optim.SGD, lr=lr), **options)


def trainer_of(callbacks=(), max_epochs=1, **options):
    return Trainer(
        accelerator="cpu",
        max_epochs=max_epochs,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **options,
    )


class Witness(Callback):
    """Calls a function after each batch, before the module's own hook."""

    def __init__(self, see):
        self.see = see

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.see(trainer, pl_module, batch)


def test_one_update_for_each_batch_and_then_it_ends():
    model, data = Line(), data_module(7)
    module = module_of(model)
    trainer = trainer_of()
    trainer.fit(module, data)
    assert module.updates == data.updates == trainer.global_step == len(model.losses) == 7
    assert not trainer.interrupted


def test_trains_as_a_plain_loop_does():
    """`compute_loss(batch)["loss"]`, any optimiser, `after_update`: nothing else happens."""
    model, data = Line(), data_module(7)
    trainer_of().fit(module_of(model), data)
    plain = Line()
    optimizer = torch.optim.SGD([plain.weight], lr=0.1)
    for batch in data_module(7)._offline():
        optimizer.zero_grad()
        plain.compute_loss(batch)["loss"].backward()
        optimizer.step()
        plain.after_update()
    assert plain.losses == model.losses
    for name, value in plain.state_dict().items():
        assert torch.equal(value, model.state_dict()[name]), name


def test_callbacks_see_an_update_that_is_complete():
    """What is saved after a batch holds that batch's count, weights and slow targets."""
    seen, slow = [], []

    def see(trainer, module, batch):
        seen.append((module.updates, trainer.datamodule.updates))
        model = module.model
        slow.append(torch.equal(model.slow, before[-1].lerp(model.weight.detach(), 0.5)))
        before.append(model.slow.clone())

    before = [torch.zeros(())]
    trainer_of([Witness(see)]).fit(module_of(Line()), data_module(5))
    assert seen == [(i, i) for i in range(1, 6)]
    assert slow == [True] * 5


def test_accumulated_batches_are_one_update():
    model = Line()
    module = module_of(model)
    trainer_of(accumulate_grad_batches=3).fit(module, data_module(6))
    assert module.updates == 2 and len(model.losses) == 6


def test_only_what_is_trained_goes_to_the_optimiser():
    given = []

    def optimizer(params):
        given.extend(params)
        return torch.optim.SGD(given, lr=0.1)

    model = Line()
    WorldModelModule(model, optimizer).configure_optimizers()
    assert given == [model.weight]
    model.parameter_groups = lambda: [{"params": [model.fixed], "lr": 3.0}]
    given.clear()
    groups = WorldModelModule(model, optimizer).configure_optimizers().param_groups
    assert groups[0]["lr"] == 3.0 and groups[0]["params"] == [model.fixed]


def test_models_without_a_hook_are_trained_too():
    class Bare(Line):
        after_update = property()  # as if it were not there

    module = module_of(Bare())
    trainer_of().fit(module, data_module(2))
    assert module.updates == 2


def test_latents_come_back_with_the_batch():
    class Remembering(Line):
        def compute_loss(self, batch):
            assert set(batch["context"]) == {"code"}
            return super().compute_loss(batch) | {"replay": {"code": batch["obs"][:, 1:, :1]}}

    data = data_module(30, fields={"code": ReplayField((1,))})
    trainer_of().fit(module_of(Remembering()), data)
    batch = data.buffer.sample(100, 2)
    known = batch["context"]["code"] != 0  # rows that were trained on
    assert known.float().mean() > 0.5
    assert torch.equal(batch["context"]["code"][known], batch["obs"][:, 0, :1][known])


# ---- clipping and norms --------------------------------------------------------------------------


class Vector(nn.Module):
    """Has a gradient of (3, 4), of norm 5, at every step."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(2))

    def compute_loss(self, batch):
        return {"loss": (self.weight * torch.tensor([3.0, 4.0])).sum()}


def test_gradients_are_clipped_as_the_trainer_says():
    free, clipped = Vector(), Vector()
    trainer_of().fit(module_of(free), data_module(1))
    trainer_of(gradient_clip_val=1.0).fit(module_of(clipped), data_module(1))
    torch.testing.assert_close(free.weight.detach(), torch.tensor([-0.3, -0.4]))
    # Torch divides by the norm plus 1e-6.
    expected = torch.tensor([-0.06, -0.08])
    torch.testing.assert_close(clipped.weight.detach(), expected, rtol=1e-6, atol=0.0)


def test_the_norm_before_clipping_is_measured_once_per_flush():
    norms = []

    def see(trainer, module, batch):
        norms.append(module.metrics.once.get("grad_norm"))
        if module.updates % module.log_every == 0:
            module.metrics.flush()

    module = module_of(Vector(), log_every=3)
    trainer_of([Witness(see)], gradient_clip_val=1.0).fit(module, data_module(6))
    assert norms == [None, None, pytest.approx(5.0), None, None, pytest.approx(5.0)]


# ---- losses that are not finite ------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_a_loss_that_is_not_finite_ends_the_run_and_names_the_term(bad):
    class Broken(Line):
        def compute_loss(self, batch):
            losses = super().compute_loss(batch)
            if len(self.losses) == 3:
                losses["kl_loss"] = losses["loss"] = losses["loss"] * bad
            return losses

    model = Broken()
    message = r"the loss is not finite at update 3: kl_loss; .*lower training\.learning_rate"
    with pytest.raises(FloatingPointError, match=message):
        trainer_of().fit(module_of(model), data_module(9))
    assert model.weight.isfinite()


# ---- checkpoints ---------------------------------------------------------------------------------


def test_checkpoints_hold_plain_data_and_resume_exactly(tmp_path):
    model = Line()
    model.build_config = {"model": "my_pkg.Line", "arguments": {"obs_shape": (2,)}}
    part = trainer_of(max_steps=4, max_epochs=-1)
    part.fit(module_of(model, config={"seed": 3}), data_module(9))
    part.save_checkpoint(tmp_path / "part.ckpt", weights_only=False)
    loaded = torch.load(tmp_path / "part.ckpt", weights_only=True)
    assert loaded["hyper_parameters"] == {"model": model.build_config, "run": {"seed": 3}}
    assert loaded["updates"] == 4

    whole, rest = Line(), Line()
    trainer_of().fit(module_of(whole), data_module(9))
    module = module_of(rest)
    path = tmp_path / "part.ckpt"
    rest_of_it = trainer_of(max_epochs=-1)
    rest_of_it.fit(module, data_module(9), ckpt_path=path, weights_only=True)
    assert module.updates == 9 and model.losses + rest.losses == whole.losses
    for name, value in whole.state_dict().items():
        assert torch.equal(value, rest.state_dict()[name]), name


def test_a_resumed_run_writes_the_same_means(tmp_path):
    """Saved at update 4, in the midst of an interval of 6, with skipped updates on both sides."""

    class Sometimes(Line):
        def __init__(self, bad):
            super().__init__()
            self.bad = bad

        def compute_loss(self, batch):
            losses = super().compute_loss(batch)
            return losses | {"loss": losses["loss"] * (nan if len(self.losses) in self.bad else 1)}

    def flush(trainer, module, batch):
        if module.updates % 6 == 0:
            seen.append(module.metrics.flush())

    def fit(updates, bad, path=None):
        seen.clear()
        module = module_of(Sometimes(bad), log_every=6, nonfinite="skip")
        trainer = trainer_of([Witness(flush)], max_epochs=-1, max_steps=updates)
        trainer.fit(module, data_module(12), ckpt_path=path, weights_only=True)
        return trainer, module, list(seen)

    nan, seen = float("nan"), []
    _, _, whole = fit(12, (3, 5, 8))
    part, module, none = fit(4, (3,))
    part.save_checkpoint(tmp_path / "part.ckpt", weights_only=False)
    assert none == [] and module.metrics.count == 3
    _, module, rest = fit(12, (1, 4), tmp_path / "part.ckpt")
    assert (module.updates, module.guard.skipped, module.guard.in_a_row) == (12, 3, 0)
    assert rest == whole and [m["skipped"] for m in whole] == [2.0, 3.0]


# ---- what compute_loss may return ----------------------------------------------------------------

ONE = torch.ones(())


@pytest.mark.parametrize(
    ("value", "expected"),
    [
        (0.1, 0.1),
        (3, 3.0),
        (True, 1.0),
        (np.float32(0.5), 0.5),
        (np.int64(7), 7.0),
        (np.bool_(True), 1.0),
        (np.array([0.25]), 0.25),
        (np.array(2), 2.0),
        (torch.tensor([[4.0]]), 4.0),
        (torch.tensor(True), 1.0),
        (torch.tensor(5), 5.0),
    ],
)
def test_every_kind_of_number_is_a_scalar(value, expected):
    metrics = RunningMeans()
    metrics.add(split_result({"loss": ONE, "x": value})[0])
    assert metrics.flush() == {"loss": 1.0, "x": expected}


@pytest.mark.parametrize(
    ("value", "held"),
    [
        (torch.zeros(3, 4), r"Tensor of shape \[3, 4\] and type torch.float32"),
        (torch.zeros(0), r"Tensor of shape \[0\]"),
        (torch.zeros((), dtype=torch.complex64), ".* type torch.complex64"),
        (np.zeros(2), r"ndarray of shape \[2\]"),
        (np.array("a"), ".* type <U1"),
        (1 + 2j, "a complex"),
        (np.str_("1"), "a str_"),
        ("12", r"a str \(12\)"),
        (None, "None"),
        ({"a": 1.0}, "a dict"),
        ([1.0], "a list"),
    ],
)
def test_what_is_no_scalar_is_named(value, held):
    message = f"compute_loss returned 'probe', {held}.*; expected a scalar: a number, or a tensor"
    with pytest.raises(ValueError, match=message):
        split_result({"loss": ONE, "probe": value})


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ({"loss": ONE, 3: ONE}, "returned the name 3; expected a string"),
        ({"los": ONE, "kl": ONE}, "returned a dict with 'los', 'kl'; expected a dict with 'loss'"),
        ({}, "returned a dict without keys; expected a dict with 'loss'"),
        (ONE, r"returned Tensor of shape \[\] .*; expected a dict with 'loss'"),
        (None, "returned None; expected a dict with 'loss'"),
        ((ONE, {}), "returned a tuple .*; expected a dict with 'loss'"),
    ],
)
def test_another_result_is_rejected(result, message):
    with pytest.raises(ValueError, match=message):
        split_result(result)


@pytest.mark.parametrize("loss", [torch.tensor(2.0), 2.0])
def test_a_loss_without_gradient_stops_at_the_first_update(loss):
    class Detached(Line):
        def compute_loss(self, batch):
            return super().compute_loss(batch) | {"loss": loss}

    model = Detached()
    with pytest.raises(ValueError, match="returned 'loss' = 2 without a gradient; expected"):
        trainer_of().fit(module_of(model), data_module(9))
    assert len(model.losses) == 1


def test_a_statistic_that_is_nan_does_not_stop_the_run():
    class Undefined(Line):
        def compute_loss(self, batch):
            return super().compute_loss(batch) | {"ratio": float("nan")}

    module = module_of(Undefined())
    trainer_of().fit(module, data_module(3))
    means = module.metrics.flush()
    assert math.isnan(means["ratio"]) and math.isfinite(means["loss"])


# ---- means ---------------------------------------------------------------------------------------


def test_metrics_are_means_since_the_last_flush():
    metrics = RunningMeans()
    assert metrics.flush() == {}
    for a in (1.0, 2.0, 6.0):
        metrics.add({"a": torch.tensor(a), "count": torch.tensor(int(a))})
    metrics.once["norm"] = torch.tensor(0.5)
    assert metrics.count == 3
    assert metrics.flush() == {"a": 3.0, "count": 3.0, "norm": 0.5}
    assert metrics.flush() == {} and metrics.count == 0
    metrics.add({"b": torch.tensor(4.0)})  # other names after a flush
    assert metrics.flush() == {"b": 4.0}
    metrics.once["skipped"] = torch.tensor(2.0)  # and nothing else: all updates were skipped
    assert metrics.flush() == {"skipped": 2.0}


def test_names_that_alternate_keep_their_own_means():
    metrics, other = RunningMeans(), RunningMeans()
    for update in range(10):
        name, value = ("even", 100.0) if update % 2 == 0 else ("odd", 1.0)
        scalars = {"loss": torch.tensor(2.0), name: torch.tensor(value)}
        metrics.add(scalars if update < 5 else dict(reversed(scalars.items())))
        if update == 6:  # in the midst of an interval, as a checkpoint does
            other.load_state_dict(metrics.state_dict())
            metrics = other
    assert metrics.flush() == {"loss": 2.0, "even": 100.0, "odd": 1.0}


def test_sums_of_bfloat16_do_not_stop_at_256():
    metrics = RunningMeans()
    for _ in range(1000):
        metrics.add({"loss": torch.tensor(1.0, dtype=torch.bfloat16)})
    assert metrics.flush() == {"loss": 1.0}


def test_a_models_own_statistic_replaces_that_of_the_trainer():
    metrics = RunningMeans()
    metrics.once |= {"grad_norm": torch.tensor(5.0), "skipped": torch.tensor(1.0)}
    metrics.add({"loss": torch.tensor(2.0), "grad_norm": torch.tensor(3.0)})
    assert metrics.flush() == {"loss": 2.0, "grad_norm": 3.0, "skipped": 1.0}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs two devices")
def test_numbers_and_tensors_of_a_gpu_are_averaged_without_waiting():
    metrics = RunningMeans()
    for value in (1.0, 3.0):
        torch.cuda.set_sync_debug_mode("error")
        metrics.add(split_result({"loss": torch.full((), value, device="cuda"), "n": value})[0])
        torch.cuda.set_sync_debug_mode("default")
    assert metrics.flush() == {"loss": 2.0, "n": 2.0}


def test_a_state_of_metrics_stays_as_it_was_taken():
    metrics, other = RunningMeans(), RunningMeans()
    metrics.add({"a": torch.tensor(1.0)})
    state = metrics.state_dict()
    metrics.add({"a": torch.tensor(7.0)})
    metrics.once["norm"] = torch.tensor(0.5)
    other.load_state_dict(state)
    assert other.flush() == {"a": 1.0} and metrics.flush() == {"a": 4.0, "norm": 0.5}
    other.load_state_dict(RunningMeans().state_dict())
    assert other.flush() == {}
