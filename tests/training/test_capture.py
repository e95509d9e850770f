"""Recorded updates, with a graph that runs on the CPU: it repeats a function on fixed tensors."""

import copy
import logging
import random
from functools import partial

import pytest
import torch
from lightning import Callback, Trainer
from torch import nn

from worldloom import create_world_model
from worldloom.training import LaProp, ReplayBuffer, ReplayDataModule, WorldModelModule
from worldloom.training import capture as capturing
from worldloom.training import module as modules
from worldloom.training.optimizers import Adam
from worldloom.trees import flatten_tree

pytestmark = pytest.mark.filterwarnings("ignore:.*does not have many workers")

OBS, ACTIONS, ROWS, STEPS = 6, 2, 4, 5


class Graphs:
    """Records as CUDA does: recording changes nothing, and a launch overwrites the same tensors.

    recording, launching: whether a function is recorded, or repeated, in which a real graph would
        keep Python's values.
    """

    def __init__(self, module):
        self.module, self.recorded, self.launched = module, 0, 0
        self.recording = self.launching = False

    def tensors(self):
        states = [self.module.model.state_dict(keep_vars=True)]
        states += [s for o in self.module.trainer.optimizers for s in o.state.values()]
        tensors = [x for s in states for x in s.values() if isinstance(x, torch.Tensor)]
        return tensors + [x.grad for x in self.module.parameters() if x.grad is not None]

    def record(self, run):
        model = self.module.model
        with torch.no_grad():
            before = [(x, x.clone()) for x in self.tensors()]
        is_step = any(p.grad is not None for p in model.parameters())
        self.recording = True
        fixed = run()
        self.recording = False
        gradients = [(p, p.grad) for p in model.parameters() if p.grad is not None]
        with torch.no_grad():
            for x, value in before:
                x.copy_(value)
        self.recorded += 1

        def launch():
            self.launched += 1
            if is_step:
                run()
                return
            model.zero_grad(set_to_none=True)
            self.launching = True
            result = flatten_tree(run())
            self.launching = False
            for name, x in flatten_tree(fixed).items():
                if isinstance(x, torch.Tensor):
                    x.copy_(result[name])
            for p, gradient in gradients:
                gradient.copy_(p.grad)
            model.zero_grad(set_to_none=True)

        return launch, fixed


class Custom(nn.Module):
    """A model of nothing but `compute_loss`, with hooks to spoil it."""

    def __init__(self, spoil=lambda model: None):
        super().__init__()
        self.net = nn.Linear(OBS, OBS)
        self.register_buffer("scale", torch.ones(()))
        self.spoil = [spoil]  # not a plain attribute
        self.calls = 0 if spoil is None else "unused"

    def compute_loss(self, batch):
        self.spoil[0](self)
        error = (self.net(batch["obs"][:, :-1]) - batch["obs"][:, 1:]).square().mean()
        with torch.no_grad():
            self.scale.lerp_(error, 0.1)
        return {"loss": error / self.scale, "scale": self.scale.clone()}


class TensorLaProp(LaProp):
    """LaProp as a graph computes it, with tensors as factors, which rounds in another order."""

    def apply(self, group, params, factors):
        super().apply(group, params, tuple(map(torch.as_tensor, factors)))


class TensorAdam(Adam):
    """Adam with learning rates as tensors."""

    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        ((rates,),) = self.advance()
        self.apply(tuple(torch.tensor(rate) for rate in rates))
        return loss


def build(name):
    torch.manual_seed(0)
    if name == "custom":
        return Custom(), partial(torch.optim.SGD, lr=0.1)
    small = {"units": 8, "deter": 16, "hidden": 8, "stoch": 4, "classes": 4, "blocks": 2}
    spaces = {"obs_shape": (OBS,), "action_dim": ACTIONS}
    if name == "dreamerv3":
        optimizer = partial(TensorLaProp, lr=1e-3, warmup=4, weight_decay=0.1)
        return create_world_model("dreamerv3:size1m", **spaces, **small), optimizer
    small = {"enc_dim": 8, "mlp_dim": 8, "latent_dim": 16, "num_bins": 11}
    return create_world_model("tdmpc2:1m", **spaces, **small), partial(TensorAdam, max_norm=1.0)


def data_module(model, updates):
    buffer = ReplayBuffer(400, (OBS,), ACTIONS, fields=getattr(model, "replay_fields", None))
    generator = torch.Generator().manual_seed(0)
    for _ in range(3):
        arrays = {
            "obs": torch.randn(31, OBS, generator=generator),
            "actions": torch.randn(30, ACTIONS, generator=generator).tanh(),
            "rewards": torch.randn(30, generator=generator),
            "dones": torch.zeros(30),
        }
        buffer.add_episode(**arrays)
    return ReplayDataModule(buffer, batch_size=ROWS, sequence_length=STEPS, total_steps=updates)


class Losses(Callback):
    """The losses of all updates."""

    def __init__(self):
        self.all = []

    def on_train_batch_end(self, trainer, pl_module, outputs, batch, batch_idx):
        self.all.append({k: v.item() for k, v in pl_module._losses.items()})


def train(name, monkeypatch, capture, updates=9, model=None, change=lambda module: None, **options):
    """Train for some updates; return the module, the losses and the graphs."""
    built, optimizer = build(name)
    model = model or built
    module = WorldModelModule(model, optimizer, capture=capture, **options)
    graphs, losses = Graphs(module), Losses()
    start = partial(capturing.start_capture, record=graphs.record)
    monkeypatch.setattr(modules, "start_capture", start)
    change(module)
    torch.manual_seed(1)
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[losses],
    )
    trainer.fit(module, data_module(model, updates))
    return module, losses.all, graphs


def require_same(one, other):
    for a, b in zip(one.model.state_dict().items(), other.model.state_dict().items(), strict=True):
        assert a[0] == b[0]
        assert torch.equal(a[1], b[1]), a[0]


@pytest.mark.parametrize("name", ["custom", "dreamerv3", "tdmpc2"])
def test_recorded_updates_are_the_updates(name, monkeypatch):
    eager, losses, unused = train(name, monkeypatch, "off")
    assert not unused.recorded
    recorded, found, graphs = train(name, monkeypatch, "on")
    # Updates of warm-up, and one to record; a launch to compare; then loss and step are launched.
    with_step = name != "custom"
    assert graphs.recorded == 1 + with_step
    assert graphs.launched == 1 + (9 - capturing.WARM_UP - 1) * (1 + with_step)
    assert recorded.updates == 9
    assert losses == found
    require_same(eager, recorded)


def bad_batch(module, update):
    """Let the batch of one update contain NaN, which reaches the loss."""
    compute = module.guard.begin

    def begin(batch):
        if module.updates + 1 == update:
            batch["rewards"][0, 1] = torch.nan
            batch["obs"][0, 1] = torch.nan
        compute(batch)

    module.guard.begin = begin


@pytest.mark.parametrize("name", ["custom", "dreamerv3", "tdmpc2"])
def test_a_rejected_update_changes_nothing(name, monkeypatch):
    change = partial(bad_batch, update=7)
    eager, _, _ = train(name, monkeypatch, "off", change=change, nonfinite="skip")
    recorded, _, graphs = train(name, monkeypatch, "on", change=change, nonfinite="skip")
    assert graphs.recorded and recorded.guard.skipped == eager.guard.skipped == 1
    require_same(eager, recorded)
    with pytest.raises(FloatingPointError, match="update 7"):
        train(name, monkeypatch, "on", change=change)


def count(model):
    model.calls = 1 if model.calls == "unused" else model.calls + 1


def replace_buffer(model):
    model.scale = model.scale + 0


SPOILT = {
    "calls": count,
    "scale": replace_buffer,
    "random numbers": lambda model: random.random(),
}


@pytest.mark.parametrize("name", SPOILT)
def test_what_a_graph_would_not_repeat_is_found_and_named(name, monkeypatch, caplog):
    model = Custom(SPOILT[name])
    with caplog.at_level(logging.WARNING):
        module, _, graphs = train("custom", monkeypatch, "on", model=copy.deepcopy(model))
    assert not graphs.launched and module.updates == 9
    said = [r for r in caplog.records if r.name == capturing.__name__]
    assert len(said) == 1 and said[0].getMessage().endswith(module.captured.reason)
    assert module.captured.reason.startswith("compute_loss changes ")
    assert name in module.captured.reason
    eager, _, _ = train("custom", monkeypatch, "off", model=model)
    require_same(eager, module)


@pytest.mark.parametrize("source", ["weight", "batch"])
def test_a_graph_that_keeps_a_value_is_found(source, monkeypatch, caplog):
    """As a weight that was cast before the recording, or a number that was read from the batch."""
    kept = {}

    def change(module):
        compute = module.model.compute_loss

        def compute_loss(batch):
            tensor = module.model.net.weight if source == "weight" else batch["obs"]
            value = tensor.abs().max().item()
            if kept["graphs"].recording:
                kept["value"] = value
            value = kept["value"] if kept["graphs"].launching else value
            return {"loss": compute(batch)["loss"] * value}

        module.model.compute_loss = compute_loss

    original = Graphs.__init__

    def remember(self, module):
        original(self, module)
        kept["graphs"] = self

    monkeypatch.setattr(Graphs, "__init__", remember)
    module, _, graphs = train("custom", monkeypatch, "on", change=change)
    assert "recorded loss differs" in module.captured.reason
    assert graphs.launched == 1 and module.updates == 9
    assert "not recorded as CUDA graphs: the recorded loss differs" in caplog.text


def test_a_batch_of_another_shape_is_computed_without_the_graph(monkeypatch):
    def change(module):
        begin = module.guard.begin

        def shorten(batch):
            if module.updates == 6:
                for name in ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal"):
                    batch[name] = batch[name][:, :4]
            begin(batch)

        module.guard.begin = shorten

    eager, _, _ = train("tdmpc2", monkeypatch, "off", change=change)
    recorded, _, graphs = train("tdmpc2", monkeypatch, "on", change=change)
    assert graphs.launched == 1 + 2 * (9 - capturing.WARM_UP - 2)
    require_same(eager, recorded)


def test_without_a_gpu_nothing_is_recorded_and_on_is_an_error():
    model, optimizer = build("custom")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False)
    torch_optimizer = optimizer(model.parameters())
    assert capturing.start_capture("auto", trainer, model, torch_optimizer) is None
    with pytest.raises(ValueError, match="trains on cpu, and only CUDA has graphs"):
        capturing.start_capture("on", trainer, model, torch_optimizer)


@pytest.mark.parametrize(("given", "mode"), [("auto", "auto"), (True, "on"), (False, "off")])
def test_yaml_reads_on_and_off_as_booleans(given, mode):
    assert capturing.require_mode("capture", given) == mode


def test_another_mode_is_an_error():
    with pytest.raises(ValueError, match="capture is maybe; expected one of auto, on, off"):
        capturing.require_mode("capture", "maybe")
