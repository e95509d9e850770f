"""Losses and gradients that are not finite: what stops, what is skipped, and what is saved."""

import logging
import os
import random
import re
import sys
from functools import partial

import numpy as np
import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from worldloom import create_world_model
from worldloom.diagnose import diagnose
from worldloom.diagnose import main as diagnose_command
from worldloom.training import LaProp, ReplayBuffer, ReplayDataModule, WorldModelModule
from worldloom.training.nonfinite import FILE, MOST_IN_A_ROW
from worldloom.training.optimizers import Adam
from worldloom.training.precision import PRECISIONS, require_precision

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

NAN, INF = float("nan"), float("inf")
FAMILIES = {
    "dreamerv3:size1m": dict(
        units=16, depth=4, deter=32, hidden=16, classes=4, stoch=4, imag_length=3
    ),
    "tdmpc2:1m": dict(
        enc_dim=16, mlp_dim=16, latent_dim=16, num_channels=1, num_q=3, num_samples=16
    )
    | dict(num_elites=4, num_pi_trajs=3),
}


class Toy(nn.Module):
    """Fits rewards, keeps a running scale in place, and leaves latents; draws nothing."""

    def __init__(self, obs_shape=(4,), action_dim=2, discrete=False):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(3))
        self.register_buffer("scale", torch.ones(()))
        self.register_buffer("slow", torch.zeros(3))

    def compute_loss(self, batch):
        error = self.weight.sum() - batch["rewards"][:, 1:].mean()
        self.scale.lerp_(batch["rewards"].abs().mean(), 0.1)
        replay = {"replay": {"code": batch["rewards"][:, 1:, None]}} if "context" in batch else {}
        fit = (error / self.scale).square()
        return {"loss": fit + self.weight.square().sum(), "fit_loss": fit.detach(), **replay}

    def after_update(self):
        self.slow.lerp_(self.weight.detach(), 0.5)


class Spoil(Callback):
    """Put one bad number into a field of some batches, on their way to the model."""

    def __init__(self, field, value, *updates):
        self.field, self.value, self.updates = field, value, updates

    def on_train_batch_start(self, trainer, pl_module, batch, batch_idx):
        if batch_idx + 1 in self.updates:
            batch[self.field][1, 2] = self.value


def data_for(model, updates):
    buffer = ReplayBuffer(200, (4,), 2, fields=getattr(model, "replay_fields", None))
    rng = torch.Generator().manual_seed(0)
    for _ in range(3):
        buffer.add_episode(
            obs=torch.randn(31, 4, generator=rng),
            actions=torch.rand(30, 2, generator=rng) * 2 - 1,
            rewards=torch.randn(30, generator=rng),
            dones=torch.zeros(30),
        )
    return ReplayDataModule(buffer, batch_size=4, sequence_length=6, total_steps=updates)


def family(name):
    torch.manual_seed(0)
    return create_world_model(name, (4,), 2, **FAMILIES[name])


SGD = partial(torch.optim.SGD, lr=0.1)


def fit(model, updates, *callbacks, optimizer=SGD, **options):
    """Train; return the module and the data."""
    trainer = {
        k: options.pop(k)
        for k in ("accumulate_grad_batches", "detect_anomaly", "precision")
        if k in options
    }
    module = WorldModelModule(model, optimizer, **options)
    data = data_for(model, updates)
    Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
        **trainer,
    ).fit(module, data)
    return module, data


def stopped(model, updates, *callbacks, **options):
    """Train until it stops; return the message."""
    with pytest.raises(FloatingPointError) as caught:
        fit(model, updates, *callbacks, **options)
    return str(caught.value)


def assert_same(left, right):
    """Equal bit for bit, NaN to NaN."""
    torch.testing.assert_close(left, right, rtol=0, atol=0, equal_nan=True)


# ---- stop ----------------------------------------------------------------------------------------

TERMS = {"dreamerv3:size1m": "kl_loss, reconstruction_loss", "tdmpc2:1m": "consistency_loss"}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_bad_batch_stops_before_it_changes_anything_and_its_command_reproduces_it(
    name, commands, tmp_path
):
    laprop = partial(LaProp, lr=1e-2, warmup=0)
    torch.manual_seed(1)
    before = family(name)
    fit(before, 2, optimizer=laprop)
    torch.manual_seed(1)
    model = family(name)
    message = stopped(
        model, 5, Spoil("actions", NAN, 3), optimizer=laprop, folder=tmp_path, config={"seed": 1}
    )
    assert f"the loss is not finite at update 3: {TERMS[name]}" in message
    assert "the batch's actions contained NaN or infinity" in message
    assert_same(model.state_dict(), before.state_dict())

    file = tmp_path / "checkpoints" / FILE
    assert [path.name for path in file.parent.iterdir()] == [FILE]  # nothing temporary is left
    command = message.splitlines()[-1].split()
    assert command == ["python", "-m", "worldloom.diagnose", str(file)]
    printed = commands.good(command[3:], tmp_path, module=command[2])["out"]
    assert f"update 3: {TERMS[name]}" in printed
    assert re.search(
        r"\n  actions +\[4, \d, 2\] float32 .*<- 2 NaN, 0 infinite, first at \[1, 2, 0\]",
        printed,
    )
    assert "forward:   it came with actions\n" in printed
    assert printed.endswith("reproduced: the loss or a gradient is not finite again\n")
    # As any checkpoint, it can be loaded as a model: the one before the update.
    assert_same(create_world_model(file).state_dict(), before.state_dict())


def test_an_observation_that_is_not_finite_stops_both_families(tmp_path):
    for name in FAMILIES:
        message = stopped(family(name), 5, Spoil("obs", NAN, 3), folder=tmp_path / name)
        assert "at update 3" in message and "the batch's obs contained NaN" in message
        assert diagnose(tmp_path / name / "checkpoints" / FILE).reproduced


def test_infinite_rewards_stop_and_leave_no_running_scale_behind():
    before, model = Toy(), Toy()
    fit(before, 1)
    message = stopped(model, 3, Spoil("rewards", INF, 2))
    assert message.startswith("the loss is not finite at update 2: fit_loss; the batch's rewards")
    assert "nonfinite=skip" in message and "worldloom.diagnose" not in message  # no folder
    assert_same(model.state_dict(), before.state_dict())


class Root(Toy):
    """A finite loss whose gradient is NaN: 0 times the derivative of sqrt at 0."""

    def compute_loss(self, batch):
        losses = super().compute_loss(batch)
        root = 0 * (self.weight - self.weight.detach()).sqrt().sum()
        return losses | {"loss": losses["loss"] + root, "root_loss": root.detach()}


@pytest.mark.parametrize("anomaly", [False, True])
def test_a_gradient_that_is_not_finite_stops_and_tells_the_operation(anomaly, tmp_path):
    model = Root()
    message = stopped(model, 3, folder=tmp_path, detect_anomaly=anomaly)
    found = (
        "a gradient is not finite at update 1: .*SqrtBackward0"
        if anomaly
        else ("gradients are not finite at update 1, 1 of 1: weight")
    )
    assert re.match(f"{found}.*; .*lower training.learning_rate", message, re.S)
    assert torch.equal(model.weight, torch.ones(3)) and model.weight.grad is None
    assert model.scale == 1.0 and model.slow.count_nonzero() == 0
    assert "diagnose(" in message  # the model does not say how to build it, so no command can

    diagnosis = diagnose(tmp_path / "checkpoints" / FILE, model=Root())
    assert diagnosis.reproduced and diagnosis.bad_gradients == ["weight"]
    assert not diagnosis.bad_terms and diagnosis.forward is None
    assert "SqrtBackward0" in diagnosis.backward
    assert "root = 0 * (self.weight - self.weight.detach()).sqrt().sum()" in diagnosis.backward
    assert "gradients: 1 of 1 not finite: weight" in str(diagnosis)


class Log(Toy):
    """Finite numbers go in, and a layer makes -inf of them."""

    class Layer(nn.Module):
        def forward(self, x):
            return (x * 0).log()

    def __init__(self):
        super().__init__()
        self.layer = self.Layer()

    def compute_loss(self, batch):
        losses = super().compute_loss(batch)
        hidden = torch.where(batch["is_first"], -INF, 0.0)  # meant so: it was given
        losses["mask"] = hidden.exp().mean()
        losses["log_loss"] = self.layer(self.weight).mean()
        return losses | {"loss": losses["loss"] + losses["log_loss"]}


def test_the_first_module_that_makes_infinity_of_finite_numbers_is_named(tmp_path):
    message = stopped(Log(), 1, folder=tmp_path)
    assert message.startswith("the loss is not finite at update 1: log_loss; look for very large")
    diagnosis = diagnose(tmp_path / "checkpoints" / FILE, model=Log())
    assert re.match(r"module layer \(Layer\), given \[3\] float32 +1 to 1\n", diagnosis.forward)
    assert f"{__file__}:" in diagnosis.forward and "self.layer(self.weight)" in diagnosis.forward
    assert diagnosis.bad_terms == ["log_loss"]


class Draws(Toy):
    """Draws from every generator there is."""

    def compute_loss(self, batch):
        drawn = {"torch": torch.rand(()), "numpy": np.random.rand(), "python": random.random()}
        drawn = {name: torch.as_tensor(x, dtype=torch.float32) for name, x in drawn.items()}
        return {"loss": self.weight.sum() * batch["rewards"].sum(), **drawn}


def test_the_random_numbers_are_those_of_the_run(tmp_path):
    stopped(Draws(), 3, Spoil("rewards", NAN, 3), folder=tmp_path)
    diagnosis = diagnose(tmp_path / "checkpoints" / FILE, model=Draws())
    assert diagnosis.reproduced
    for name in ("torch", "numpy", "python"):
        assert diagnosis.losses[name] == diagnosis.before[name], name
    assert " was " not in str(diagnosis)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "64-true"])
def test_the_precision_is_that_of_the_run(precision, tmp_path):
    """The heads that the bad number does not reach say the same.

    But for rounding: watched layers are computed one by one. bfloat16 rounds a thousand times more.
    """
    spoil = Spoil("obs", NAN, 3)
    stopped(family("dreamerv3:size1m"), 3, spoil, folder=tmp_path, precision=precision)
    diagnosis = diagnose(tmp_path / "checkpoints" / FILE)
    assert f"precision {precision}, on cpu" in str(diagnosis)
    assert np.isfinite(diagnosis.before["policy_loss"])
    for name, value in diagnosis.before.items():
        assert diagnosis.losses[name] == pytest.approx(value, rel=1e-5, nan_ok=True), name


class Checks(Toy):
    """Refuses bad numbers itself, as torch's distributions do."""

    def compute_loss(self, batch):
        if not batch["rewards"].isfinite().all() or len(batch["rewards"]) == 0:
            raise ValueError("expected finite rewards\nbut got others")
        return super().compute_loss(batch)


def test_an_error_that_bad_numbers_explain_is_handled_as_they_are(tmp_path):
    message = stopped(Checks(), 3, Spoil("rewards", NAN, 2), folder=tmp_path)
    assert message.startswith("the loss at update 2 failed: expected finite rewards; the batch's r")
    diagnosis = diagnose(tmp_path / "checkpoints" / FILE, model=Checks())
    assert diagnosis.reproduced and "ValueError: expected finite" in diagnosis.raised
    module, _ = fit(Checks(), 3, Spoil("rewards", NAN, 2), nonfinite="skip")
    assert (module.updates, module.guard.skipped) == (3, 1)


def test_other_errors_stay_what_they_are():
    class Broken(Toy):
        def compute_loss(self, batch):
            raise ValueError("a mistake")

    for mode in ("stop", "skip"):
        with pytest.raises(ValueError, match="a mistake"):
            fit(Broken(), 2, nonfinite=mode)


def test_weights_that_are_not_finite_are_told_from_data():
    model = Toy()
    model.weight.data[1] = NAN
    assert "the weights were already not finite (weight): start" in stopped(model, 1)


class Steep(Toy):
    """Gradients of 2e30, whose squares float32 and bfloat16 cannot hold."""

    def compute_loss(self, batch):
        return {"loss": 1e30 * self.weight.square().sum()}


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "bf16-true"])
def test_large_numbers_are_no_fault(precision):
    module, _ = fit(Steep(), 2, precision=precision, optimizer=partial(torch.optim.SGD, lr=1e-31))
    assert module.updates == 2 and module.guard.skipped == 0
    # 1 - 2e30 * 1e-31 = 0.8, twice; bfloat16 has 8 bits: a relative error of 2**-9 each time.
    expected = torch.full((3,), 0.64, dtype=module.model.weight.dtype)
    torch.testing.assert_close(module.model.weight.detach(), expected, rtol=1e-2, atol=0.0)


def test_what_cannot_be_saved_is_said(tmp_path):
    (tmp_path / "checkpoints").write_text("in the way")
    message = stopped(Toy(), 1, Spoil("rewards", NAN, 1), folder=tmp_path)
    assert "fit_loss" in message and "the batch could not be saved to" in message


# ---- skip ----------------------------------------------------------------------------------------

OPTIMIZERS = {
    "sgd": partial(torch.optim.SGD, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adam": partial(Adam, lr=0.1, max_norm=1.0),
    "adamw": partial(torch.optim.AdamW, lr=0.1),
    "laprop": partial(LaProp, lr=0.1, warmup=4),
}


@pytest.mark.parametrize("bad", ["rewards", "gradient"])
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_skipped_update_is_as_if_its_batch_had_never_been_drawn(optimizer, bad):
    class Sometimes(Toy):
        seen = 0

        def compute_loss(self, batch):
            self.seen += 1
            losses = super().compute_loss(batch)
            if bad == "gradient" and self.seen == 3:
                losses["loss"] = losses["loss"] + (0 * self.weight[1:]).sqrt().sum()
            return losses

    spoil = [Spoil("rewards", NAN, 3)] if bad == "rewards" else []
    module, _ = fit(Sometimes(), 6, *spoil, optimizer=OPTIMIZERS[optimizer], nonfinite="skip")

    plain = Toy()
    steps = OPTIMIZERS[optimizer]([plain.weight])
    for number, batch in enumerate(data_for(plain, 6)._offline(), 1):
        if number != 3:
            steps.zero_grad()
            plain.compute_loss(batch)["loss"].backward()
            steps.step()
            plain.after_update()
    assert_same(module.model.state_dict(), plain.state_dict())
    assert_same(module.trainer.optimizers[0].state_dict(), steps.state_dict())


@pytest.mark.parametrize("name", FAMILIES)
def test_nothing_of_a_skipped_batch_is_left_in_either_family(name):
    """No weight, buffer, or latent in the replay; a NaN in the middle of a row reaches them all."""
    runs = []
    for updates, bad in ((2, ()), (3, (3,))):
        model = family(name)
        torch.manual_seed(1)
        module, data = fit(
            model, updates, Spoil("actions", NAN, *bad), optimizer=Adam, nonfinite="skip"
        )
        streams = data.buffer.state_dict()["streams"][0]
        rows = {k: v for k, v in streams.items() if k.startswith("fields")}
        steps = module.trainer.optimizers[0].state_dict()["state"]
        runs.append((model.state_dict(), steps, rows))
    assert name.startswith("tdmpc2") or runs[0][2]  # DreamerV3 stores latents
    assert_same(runs[1], runs[0])


def test_skipped_updates_are_counted_and_logged():
    seen = []

    class See(Callback):
        def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
            seen.append((module.updates, trainer.global_step, trainer.datamodule.updates))
            if module.updates % 2 == 0:
                seen.append(module.metrics.flush())

    fit(Toy(), 6, Spoil("rewards", NAN, 3, 6), See(), nonfinite="skip", log_every=2)
    counts, means = seen[0::3] + seen[1::3], seen[2::3]
    assert sorted(counts) == [(n, n, n) for n in range(1, 7)]
    assert [m.get("skipped") for m in means] == [None, 1.0, 2.0]
    assert all(np.isfinite(list(m.values())).all() and "fit_loss" in m for m in means)


def test_the_first_skipped_update_is_told_and_saved_and_only_that(tmp_path, caplog):
    with caplog.at_level(logging.WARNING, "worldloom.training.nonfinite"):
        fit(Toy(), 6, Spoil("rewards", NAN, 2, 4, 5), nonfinite="skip", folder=tmp_path)
    (record,) = [r for r in caplog.records if r.name == "worldloom.training.nonfinite"]
    assert "counted as stats/skipped: the loss is not finite at update 2" in record.getMessage()
    saved = torch.load(tmp_path / "checkpoints" / FILE, weights_only=True)
    assert saved["nonfinite"]["update"] == 2 and saved["updates"] == 1


def test_when_nothing_is_learned_any_more_it_stops():
    all_but_one = [n for n in range(2, MOST_IN_A_ROW + 10) if n != 5]
    message = stopped(Toy(), 300, Spoil("rewards", NAN, *all_but_one), nonfinite="skip")
    assert message.startswith("100 updates in a row were skipped, so the model no longer learns;")
    assert f"at update {5 + MOST_IN_A_ROW}: fit_loss" in message


@pytest.mark.parametrize("bad", [4, 5, 6])
def test_one_bad_batch_spoils_an_accumulated_update(bad):
    options = dict(accumulate_grad_batches=3, nonfinite="skip")
    module, _ = fit(Toy(), 9, Spoil("rewards", NAN, bad), **options)
    assert (module.updates, module.guard.skipped) == (3, 1)
    without = Toy()
    steps = torch.optim.SGD([without.weight], lr=0.1)
    for number, batch in enumerate(data_for(without, 9)._offline(), 1):
        if number == bad:
            continue
        loss = without.compute_loss(batch)["loss"] / 3  # all of them move the running scale
        if number not in (4, 5, 6):
            loss.backward()
        if number in (3, 9):
            steps.step()
            steps.zero_grad()
            without.after_update()
    torch.testing.assert_close(module.model.state_dict(), without.state_dict())


# ---- what is refused -----------------------------------------------------------------------------


def test_other_modes_are_refused():
    with pytest.raises(ValueError, match=r"nonfinite is 'ignore'; expected stop .* or skip"):
        WorldModelModule(Toy(), torch.optim.SGD, nonfinite="ignore")


@pytest.mark.parametrize("given", [16, "16", "16-mixed", "16-true"])
def test_float16_is_refused(given):
    with pytest.raises(ValueError, match=r"which is float16: .* use trainer.precision=bf16-mixed"):
        require_precision(given)


def test_other_precisions_are_known_or_refused():
    for given in (None, 32, 64, *PRECISIONS):
        require_precision(given)
    with pytest.raises(ValueError, match=r"trainer\.precision is bf32; expected one of 32-true"):
        require_precision("bf32")


class Bomb:
    """A pickle that would leave a file behind."""

    def __init__(self, marker):
        self.marker = marker

    def __reduce__(self):
        return os.mkdir, (str(self.marker),)


def command(capsys, monkeypatch, *words):
    """Run the command in this process; return its exit code, stdout and stderr."""
    monkeypatch.setattr(sys, "argv", ["diagnose", *map(str, words)])
    with pytest.raises(SystemExit) as ended:
        diagnose_command()
    return ended.value.code, *capsys.readouterr()


def test_a_hostile_file_runs_no_code(tmp_path, capsys, monkeypatch):
    message = stopped(Toy(), 1, Spoil("rewards", NAN, 1), folder=tmp_path)
    file = tmp_path / "checkpoints" / FILE
    assert str(file) in message
    saved = torch.load(file, weights_only=True)
    saved["nonfinite"]["batch"]["obs"] = Bomb(tmp_path / "ran")
    torch.save(saved, file)
    code, _, err = command(capsys, monkeypatch, file)
    assert code == 1 and err.count("\n") == 1 and f"{file} cannot be read" in err
    # Nor does a name in it import anything.
    (tmp_path / "hostile.py").write_text(f"import os; os.mkdir({str(tmp_path / 'ran')!r})")
    monkeypatch.syspath_prepend(tmp_path)
    saved["nonfinite"]["batch"]["obs"] = torch.zeros(1)
    spaces = {"obs_shape": (4,), "action_dim": 2, "discrete": False}
    saved["hyper_parameters"]["model"] = {"model": "hostile.Model", "arguments": spaces}
    torch.save(saved, file)
    code, _, err = command(capsys, monkeypatch, file)
    assert code == 1 and "if you trust it, add model._target_=hostile.Model" in err
    assert not (tmp_path / "ran").exists()


def test_files_that_hold_no_batch_are_refused_by_one_line(tmp_path, capsys, monkeypatch):
    torch.save({"state_dict": {}, "updates": 3}, tmp_path / "last.ckpt")
    (tmp_path / "text.ckpt").write_text("no zip")
    for words, wanted in (
        ([tmp_path / "none.ckpt"], "none.ckpt does not exist; look in"),
        ([tmp_path / "text.ckpt"], "text.ckpt cannot be read: "),
        ([tmp_path / "last.ckpt"], "last.ckpt holds no batch; an ordinary checkpoint has none"),
        (["a", "b"], "2 files were named; expected one nonfinite.ckpt"),
    ):
        code, out, err = command(capsys, monkeypatch, *words)
        assert (code, out) == (1, "") and wanted in err and err.count("\n") == 1, err
    assert command(capsys, monkeypatch)[0] == 2
    assert command(capsys, monkeypatch, "--help")[0] == 0


def test_a_model_of_ones_own_is_built_where_it_is_allowed(tmp_path, capsys, monkeypatch):
    """The command of the message allows it: the run was the user's own."""
    (tmp_path / "my_toy.py").write_text(
        "from torch import nn\nimport torch\n\nclass Mine(nn.Module):\n"
        "    def __init__(self, obs_shape, action_dim, discrete, width=1):\n"
        "        super().__init__()\n        self.weight = nn.Parameter(torch.ones(width))\n\n"
        "    def compute_loss(self, batch):\n"
        "        return {'loss': (self.weight * batch['rewards'].mean()).sum()}\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    from worldloom.factory import build_model

    model = build_model({"_target_": "my_toy.Mine", "width": 3}, (4,), 2)
    message = stopped(model, 2, Spoil("rewards", NAN, 2), folder=tmp_path / "a run")
    line = message.splitlines()[-1]
    assert line.endswith("/a run/checkpoints/nonfinite.ckpt' model._target_=my_toy.Mine")
    file = tmp_path / "a run" / "checkpoints" / FILE
    code, out, _ = command(capsys, monkeypatch, file, "model._target_=my_toy.Mine")
    assert code == 0 and "not finite at update 2: loss" in out

    # Mended data is not reproduced, and the exit code says so.
    saved = torch.load(file, weights_only=True)
    saved["nonfinite"]["batch"]["rewards"].nan_to_num_(0.0)
    torch.save(saved, file)
    code, out, _ = command(capsys, monkeypatch, file, "model._target_=my_toy.Mine")
    assert code == 1 and "not reproduced: the loss and all gradients are finite this time" in out
    assert re.search(r"\n  loss +[-.\d]+ +was nan\n", out)
