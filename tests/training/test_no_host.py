"""Whole updates on meta tensors, which have no values: nothing in them waits for a GPU."""

import pytest
import torch
from torch import nn

from tests.no_host import HostUse, NoHost
from worldloom import create_world_model
from worldloom.training.nonfinite import all_finite
from worldloom.training.optimizers import Adam, LaProp

ROWS, STEPS, ACTIONS = 4, 6, 3
SPACES = {
    "vector": (8,),
    "image": (3, 64, 64),
    "dict": {"image": (3, 64, 64), "pose": (5,)},
}
MODELS = {
    "dreamerv3": ("dreamerv3:tiny", "vector", {}),
    "dreamerv3, images": ("dreamerv3:size1m", "image", {}),
    "dreamerv3, both": ("dreamerv3:tiny", "dict", {}),
    "dreamerv3, choices": ("dreamerv3:tiny", "vector", {"discrete": True}),
    "dreamerv3, slow critic": (
        "dreamerv3:tiny",
        "vector",
        {"slow_critic": {"rate": 0.02, "every": 3}},
    ),
    "r2dreamer": ("r2dreamer:size1m", "vector", {"decoder": True}),
    "infonce": ("infonce:size1m", "vector", {}),
    "dreamerpro": ("dreamerpro:size1m", "dict", {"representation": {"ema_update_every": 2}}),
    "tdmpc2": ("tdmpc2:1m", "vector", {}),
    "tdmpc2, images": ("tdmpc2:1m", "image", {}),
    "tdmpc2, choices": ("tdmpc2:1m", "vector", {"discrete": True}),
    "tdmpc2, terminations": ("tdmpc2:1m", "vector", {"episodic": True}),
    "tdmpc2, probe": ("tdmpc2:1m", "vector", {"decoder": True}),
    "tdmpc2, tasks": ("tdmpc2:1m", "vector", {"action_dims": [2, 3], "task_dim": 8}),
}


class Custom(nn.Module):
    """A model of nothing but the protocol's `compute_loss`."""

    def __init__(self):
        super().__init__()
        self.net = nn.Sequential(nn.Linear(8 + ACTIONS, 16), nn.SiLU(), nn.Linear(16, 8))
        self.register_buffer("count", torch.zeros(()))

    def compute_loss(self, batch):
        guess = self.net(torch.cat([batch["obs"], batch["actions"]], -1))[:, :-1]
        self.count += 1
        error = (guess - batch["obs"][:, 1:]).square()
        return {"loss": error.mean(), "largest": error.max()}


def make_batch(space, task=False):
    shapes = SPACES[space]

    def obs(shape):
        image = len(shape) == 3
        return torch.empty(ROWS, STEPS, *shape, dtype=torch.uint8 if image else torch.float32)

    batch = {
        "obs": {k: obs(v) for k, v in shapes.items()} if isinstance(shapes, dict) else obs(shapes),
        "actions": torch.empty(ROWS, STEPS, ACTIONS),
        "rewards": torch.empty(ROWS, STEPS),
        "index": torch.empty(ROWS, 2, dtype=torch.int64),
    }
    for name in ("is_first", "is_last", "is_terminal"):
        batch[name] = torch.empty(ROWS, STEPS, dtype=torch.bool)
    return batch | ({"task": torch.empty(ROWS, dtype=torch.int64)} if task else {})


def prepare(model, space="vector", task=False):
    """Return a function that does a whole update of a model, on meta tensors."""
    model.to("meta")
    with torch.device("meta"):
        batch = make_batch(space, task)
        if fields := getattr(model, "replay_fields", None):
            batch["context"] = {k: torch.empty(ROWS, *f.shape) for k, f in fields.items()}
    if hasattr(model, "parameter_groups"):
        # torch's fused kernel has no meta version: the same formulas by its other kernels.
        optimizer = Adam(model.parameter_groups(), max_norm=20.0)
        for group in optimizer.param_groups:
            group |= {"fused": False, "foreach": True}
    else:
        optimizer = LaProp([p for p in model.parameters() if p.requires_grad])

    def update():
        loss = model.compute_loss(batch)["loss"]
        loss.backward()
        grads = [p.grad for p in model.parameters() if p.grad is not None]
        torch.isfinite(loss) & all_finite(grads, loss.device)
        if isinstance(optimizer, LaProp):  # with factors on the device, as in a recorded update
            for group, params, factors in optimizer.advance():
                optimizer.apply(group, params, [loss.detach()] * len(factors))
        else:
            optimizer.step()
        getattr(model, "after_update", lambda: None)()
        optimizer.zero_grad()

    return update


def check(update):
    update()  # the first update creates constants and the optimiser's state
    with NoHost():
        update()
        update()


@pytest.mark.parametrize("name", MODELS)
def test_no_update_waits_for_the_device(name):
    preset, space, options = MODELS[name]
    shape = SPACES[space]
    model = create_world_model(preset, obs_shape=shape, action_dim=ACTIONS, **options)
    check(prepare(model, space, "action_dims" in options))


def test_no_update_of_a_custom_model_waits_for_the_device():
    check(prepare(Custom()))


PLANTED = {
    "item": lambda x: x.sum().item(),
    "__bool__": lambda x: 1 if x.sum() > 0 else 2,
    "cpu": lambda x: x.cpu(),
    "__getitem__": lambda x: x[x > 0],
    "nonzero": lambda x: x.nonzero(),
    "tolist": lambda x: x.tolist(),
    "__int__": lambda x: int(x.sum()),
    "new_tensor": lambda x: x.new_tensor([1.0, 2.0]),
    "as_tensor": lambda x: torch.as_tensor([1.0], device=x.device),
    "to": lambda x: torch.ones(3).to(x.device),
    "copy_": lambda x: x.detach().copy_(torch.ones(x.shape)),
    "mul": lambda x: x * torch.ones(x.shape),
}


@pytest.mark.parametrize("name", PLANTED)
@pytest.mark.parametrize("place", ["loss", "backward", "after_update"])
def test_a_planted_wait_is_found_and_named(name, place):
    model = Custom()
    spoil, compute = PLANTED[name], model.compute_loss
    skip = [True]  # the first update is not checked

    def spoiled(x):
        if not skip:
            spoil(x)
        skip.clear()
        return x

    def compute_loss(batch):
        losses = compute(batch)
        if place == "loss":
            spoiled(batch["obs"])
        elif place == "backward":
            model.net[0].weight.register_hook(spoiled)
        return losses

    model.compute_loss = compute_loss
    if place == "after_update":
        model.after_update = lambda: spoiled(model.net[0].weight)
    update = prepare(model)
    with pytest.raises(HostUse, match=name) as found:
        check(update)
    assert "test_no_host.py" in str(found.value)
