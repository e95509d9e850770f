"""The backward pass by hand through the sequence, against autograd's over the same steps."""

from copy import deepcopy

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from worldloom.models.dreamerv3 import unrolled
from worldloom.models.dreamerv3.rssm import RSSM

SIZES = dict(deter=8, hidden=6, stoch=3, classes=4, blocks=4, img_layers=1, unimix=0.01)
LAYERS = dict(dyn_layers=1, obs_layers=1, absolute=False)


def rssm(**options):
    torch.manual_seed(0)
    model = RSSM(2, 5, **SIZES | LAYERS | options).double()
    for p in model.parameters():
        torch.nn.init.normal_(p)
    return model


def sequences(rows=3, steps=5):
    shapes = [(rows, 8), (rows, 12), (rows, steps, 5), (rows, steps, 2)]
    inputs = [torch.randn(shape, dtype=torch.float64, requires_grad=True) for shape in shapes]
    return inputs, torch.rand(rows, steps) < 0.3


def results(model, inputs, first):
    """What the sequence says, and a loss that weighs all of it."""
    torch.manual_seed(1)
    out = model.observe(*inputs, first)
    return out, sum((x * torch.randn_like(x)).sum() for x in out)


@pytest.mark.parametrize(
    "options",
    [{}, {"dyn_layers": 3, "obs_layers": 2, "blocks": 2}, {"unimix": 0.0}, {"absolute": True}],
)
def test_values_and_gradients_are_those_of_autograd(options, monkeypatch):
    model = rssm(**options)
    inputs, first = sequences()
    learnt = [*inputs, *(p for n, p in model.named_parameters() if not n.startswith("prior"))]
    values, loss = results(model, inputs, first)
    twice = [torch.autograd.grad(loss, learnt, retain_graph=True) for _ in range(2)]
    monkeypatch.setattr(RSSM, "_can_unroll", lambda *_: False)
    expected, loss = results(model, inputs, first)
    torch.testing.assert_close(values, expected)
    for grads in twice:
        torch.testing.assert_close(grads, torch.autograd.grad(loss, learnt, retain_graph=True))


def test_a_single_step_equals_the_sequence_of_one():
    model = rssm()
    (deter, stoch, tokens, actions), _ = sequences(steps=1)
    torch.manual_seed(1)
    whole = model.observe(deter, stoch, tokens, actions, torch.zeros(3, 1, dtype=torch.bool))
    torch.manual_seed(1)
    step = model.observe_step(deter, stoch, actions[:, 0], tokens[:, 0])
    torch.testing.assert_close([x[:, 0] for x in whole], list(step))


def test_a_weight_that_changes_before_the_backward_pass_is_noticed():
    model = rssm()
    inputs, first = sequences()
    _, loss = results(model, inputs, first)
    with torch.no_grad():
        model.gru.weight.add_(1.0)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def test_gradients_in_mixed_precision_are_near_those_of_float32(monkeypatch):
    def sample(probs):  # rounding must not change the samples
        return torch.arange(probs[..., 0].numel()).view(probs.shape[:-1]) * 7 % probs.shape[-1]

    monkeypatch.setattr(unrolled, "sample_classes", sample)
    model = rssm()
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(0.5)
    inputs, first = sequences()
    grads = []
    for mixed in (False, True):
        copy = deepcopy(model).float()
        leaves = [x.detach().float().requires_grad_() for x in inputs]
        with torch.autocast("cpu", torch.bfloat16, enabled=mixed):
            _, loss = results(copy, leaves, first)
        loss.backward()
        learnt = [p for n, p in copy.named_parameters() if not n.startswith("prior")]
        grads.append([x.grad.flatten() for x in (*leaves, *learnt)])
    for exact, found in zip(*grads, strict=True):
        assert torch.cosine_similarity(exact, found, dim=0) > 0.999
        torch.testing.assert_close(found.norm(), exact.norm(), rtol=0.03, atol=0)


class Casts(TorchDispatchMode):
    """Collect the shapes of what is cast to bfloat16."""

    def __init__(self):
        super().__init__()
        self.shapes = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._to_copy.default and kwargs.get("dtype") is torch.bfloat16:
            self.shapes.append(args[0].shape)
        return func(*args, **kwargs or {})


@pytest.mark.parametrize("hooked", [False, True])
def test_mixed_precision_casts_weights_once_not_at_every_step(hooked):
    model = rssm().float()
    if hooked:
        model.gru.register_forward_hook(lambda *_: None)
    weights = {p.shape for p in model.parameters() if p.ndim > 1}
    counts = []
    for steps in (2, 9):
        inputs, first = sequences(rows=7, steps=steps)  # no activation has a weight's shape
        with torch.autocast("cpu", dtype=torch.bfloat16), Casts() as casts:
            results(model, [x.detach().float().requires_grad_() for x in inputs], first)
        counts.append(sum(shape in weights for shape in casts.shapes))
    assert 0 < counts[0] == counts[1] <= sum(p.ndim > 1 for p in model.parameters())


class Adapted(torch.nn.Linear):
    """What a user puts in the place of a layer."""

    def forward(self, x):
        return super().forward(2 * x)


def test_what_users_put_into_the_layers_takes_part():
    model, calls = rssm(), []
    inputs, first = sequences()
    handle = model.gru.register_forward_hook(lambda *_: calls.append(1))
    results(model, inputs, first)
    assert len(calls) == first.shape[1]
    handle.remove()
    model.deter_in.linear = Adapted(8, 6).double()
    _, loss = results(model, inputs, first)
    loss.backward()
    assert model.deter_in.linear.weight.grad.abs().sum() > 0


def test_what_was_saved_is_freed_by_the_backward_pass():
    model = rssm()
    _, loss = results(model, *sequences())
    node = loss.grad_fn
    while not hasattr(node, "unrolled"):
        node = next(fn for fn, _ in node.next_functions if fn is not None)
    loss.backward()
    assert not any(layer.saved for layer in node.unrolled.layers())
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        loss.backward()
