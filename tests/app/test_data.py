import torch
from torch import nn

from worldloom.acting import Actor
from worldloom.app.data import make_acting_copy


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.layer = nn.Linear(2, 3)
        self.register_buffer("seen", torch.zeros(()))

    def policy(self, state, deterministic=False):
        return self.layer(state)


def test_an_acting_copy_acts_with_the_weights_of_its_last_sync():
    actor = Actor(Model())
    copied, sync = make_acting_copy(actor)
    before = {name: value.clone() for name, value in copied.model.state_dict().items()}
    with torch.no_grad():
        for value in actor.model.state_dict().values():
            value += 1.0
    for name, value in copied.model.state_dict().items():
        assert torch.equal(value, before[name])  # training goes on without it
    sync()
    for name, value in copied.model.state_dict().items():
        assert torch.equal(value, actor.model.state_dict()[name])
        assert not torch.equal(value, before[name])


def test_an_acting_copy_follows_to_the_device_of_the_model():
    actor = Actor(Model())
    copied, sync = make_acting_copy(actor)
    actor.model.to("meta")
    sync()
    assert copied.device.type == "meta"
