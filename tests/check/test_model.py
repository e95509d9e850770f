"""A right model passes; each kind of mistake is named with its method, finding and remedy."""

import re
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from worldloom.check import ProtocolError, check_world_model
from worldloom.protocol import LatentState, ReplayField, Trajectory
from worldloom.saving import SavableModel


class Toy(nn.Module):
    """A world model in thirty lines: the latent is a code of obs; actions move it."""

    def __init__(self, obs_dim=4, action_dim=2, size=8):
        super().__init__()
        self.encoder = nn.Linear(obs_dim, size)
        self.dynamics = nn.Linear(size + action_dim, size)
        self.heads = nn.Linear(size, obs_dim + 2)

    def encode(self, obs):
        code = self.encoder(obs).tanh()
        return LatentState(code, None, code, {"age": torch.zeros(len(code), dtype=torch.int64)})

    def predict(self, state, action):
        code = self.dynamics(torch.cat([state.features, action], -1)).tanh()
        return LatentState(code, None, code, {"age": state.extras["age"] + 1})

    def observe(self, state, action, obs):
        return replace(self.encode(obs), extras={"age": state.extras["age"] + 1})

    def decode(self, state):
        out = self.heads(state.features)
        return {"obs": out[:, 2:], "reward": out[:, :1], "continue": out[:, 1:2].sigmoid()}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        heads = [self.decode(state) for state in states[1:]]
        rewards = torch.stack([head["reward"] for head in heads])
        return Trajectory(states, rewards, torch.stack([head["continue"] for head in heads]))

    def compute_loss(self, batch):
        obs, actions = batch["obs"].transpose(0, 1), batch["actions"].transpose(0, 1)
        state = self.predict(self.encode(obs[0]), actions[0])
        heads = self.decode(state)
        kept = ~batch["is_first"][:, 1:2]
        reward = (kept * (heads["reward"] - batch["rewards"][:, 1:2]).square()).mean()
        going_on = F.binary_cross_entropy(
            heads["continue"], (~batch["is_terminal"][:, 1:2]).float()
        )
        obs_loss = (heads["obs"] - obs[1]).square().mean()
        loss = reward + going_on + obs_loss
        return {"loss": loss, "reward_loss": reward, "rows": torch.tensor(len(kept))}


def check(model, **options):
    return check_world_model(model, **({"obs_shape": (4,), "action_dim": 2} | options))


def problems_of(model, **options):
    with pytest.raises(ProtocolError) as caught:
        check(model, **options)
    return caught.value.problems


def test_a_right_model_passes_without_a_word():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert check(Toy()) is None


def test_the_model_and_the_random_state_are_left_as_they_were():
    class Moving(Toy):
        def __init__(self):
            super().__init__()
            self.register_buffer("calls", torch.zeros(()), persistent=False)

        def compute_loss(self, batch):
            self.calls += 1
            return super().compute_loss(batch)

    model = Moving().eval()
    model.encoder.train()
    model.heads.weight.grad = grad = torch.ones_like(model.heads.weight)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    torch.manual_seed(3)
    check(model)
    drawn = torch.rand(4)
    torch.manual_seed(3)
    assert torch.equal(drawn, torch.rand(4))
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
    assert model.calls == 0
    assert (model.training, model.encoder.training, model.heads.training) == (False, True, False)
    assert model.heads.weight.grad is grad and torch.equal(grad, torch.ones_like(grad))
    assert model.heads.bias.grad is None


def test_sizes_come_from_the_model_when_it_has_them():
    model = Toy()
    with pytest.raises(ValueError, match=r"obs_shape is not known.*no attribute.*Pass it, as in"):
        check_world_model(model)
    with pytest.raises(ValueError, match="action_dim is not known"):
        check_world_model(model, obs_shape=(4,))
    model.obs_shape, model.action_dim, model.discrete = (4,), 2, True
    assert check_world_model(model) is None
    with pytest.raises(ValueError, match="batch_size is 1 and length 5; expected at least 2 rows"):
        check_world_model(model, batch_size=1)


class Seeing(Toy):
    """Takes an image and a vector, and remembers what it was given."""

    def __init__(self):
        super().__init__(obs_dim=3 * 4 * 4 + 4, action_dim=5)
        self.given = []

    def encode(self, obs):
        self.given.append(obs)
        return super().encode(self.flat(obs))

    def decode(self, state):
        heads = super().decode(state)
        image, vector = heads["obs"].split([48, 4], -1)
        return heads | {"obs": {"image": image.reshape(-1, 3, 4, 4), "vector": vector}}

    def compute_loss(self, batch):
        self.given.append(batch["actions"])
        return {"loss": self.encode({k: v[:, 0] for k, v in batch["obs"].items()}).features.mean()}

    @staticmethod
    def flat(obs):
        return torch.cat([obs["image"].flatten(1) / 255, obs["vector"]], -1)


@pytest.mark.filterwarnings("ignore:.*no gradient reaches")
def test_dict_observations_images_and_several_choices():
    model = Seeing()
    shapes = {"image": (3, 4, 4), "vector": (4,)}
    assert check(model, obs_shape=shapes, action_dim=(2, 3), discrete=True) is None
    assert model.given[0]["image"].dtype == torch.uint8
    assert model.given[0]["vector"].dtype == torch.float32
    actions = next(value for value in model.given if isinstance(value, torch.Tensor))
    one_hot = torch.stack([part.sum(-1) for part in actions.split((2, 3), -1)], -1)
    # Zeros where the episode of the second row ends, one choice of each kind everywhere else.
    expected = torch.ones(3, 5, 2)
    expected[1, 2] = 0
    assert torch.equal(one_hot, expected)

    decode = model.decode
    model.decode = lambda state: decode(state) | {"obs": {"image": torch.zeros(3, 4, 4, 3)}}
    (problem,) = problems_of(model, obs_shape=shapes, action_dim=(2, 3), discrete=True)
    assert "decode: 'obs.image' has shape [3, 4, 4, 3]; expected [3, 3, 4, 4]" in problem


def test_statistics_may_be_numbers():
    class Counting(Toy):
        def compute_loss(self, batch):
            numbers = {"rows": 3, "share": 0.5, "norm": np.float32(2), "count": np.array(4)}
            return super().compute_loss(batch) | numbers

    assert check(Counting()) is None


def test_features_default_to_the_parts_of_the_state():
    class Short(Toy):
        def encode(self, obs):
            state = super().encode(obs)
            parts = state.deterministic.split([3, 5], -1)
            return LatentState(*parts, extras=state.extras)

        def predict(self, state, action):
            code = self.dynamics(torch.cat([state.features, action], -1)).tanh()
            return LatentState(*code.split([3, 5], -1), extras={"age": state.extras["age"] + 1})

    model = Short()
    obs = torch.randn(3, 4)
    assert torch.equal(model.encode(obs).features, Toy.encode(model, obs).features)
    assert check(model) is None
    code = torch.randn(3, 8)
    assert LatentState(code).features is code and LatentState(code).stochastic is None


class Recorded(SavableModel, Toy):
    """A model that can be built again, and one that depends on more than its arguments."""

    extra = 1

    def __init__(self, width=8):
        super().__init__(size=width)
        self.more = nn.Linear(8, self.extra).requires_grad_(False)


def test_a_model_is_built_again_from_its_record(monkeypatch):
    assert check(Recorded()) is None
    model = Recorded()
    model.late = nn.Parameter(torch.ones(2), requires_grad=False)
    (problem,) = problems_of(model)
    assert "the constructor: late differs in a model built from the recorded arguments" in problem
    model = Recorded()
    monkeypatch.setattr(Recorded, "extra", 3)
    (problem,) = problems_of(model)
    assert "more.bias, more.weight differs" in problem

    class Local(Recorded):
        pass

    with pytest.warns(UserWarning, match="Local is saved as .*which other programs cannot import"):
        check(Local())


def test_not_a_module_and_missing_methods_are_listed_together():
    class Half:
        encode = Toy.encode
        decode = predict = compute_loss = Toy.decode

    problems = problems_of(Half())
    assert len(problems) == 3
    assert problems[0].startswith("the class: Half is not a torch.nn.Module; expected one")
    assert problems[1].startswith(
        "observe: the method is missing; expected observe(self, state, action, obs)"
    )
    assert problems[2].startswith("imagine: the method is missing; expected imagine(self, ")


def test_all_problems_are_listed_at_once_and_numbered():
    class Broken(Toy):
        def decode(self, state):
            return {"reward": super().decode(state)["reward"].squeeze(-1)}

        def compute_loss(self, batch):
            return {"loss": super().compute_loss(batch)["loss"].detach()}

        def imagine(self, initial_state, actions):
            raise NotImplementedError("later")

    with pytest.raises(ValueError, match="Broken breaks the WorldModel protocol in 4 places") as e:
        check(Broken())
    lines = str(e.value).splitlines()[1:]
    assert [line[:5] for line in lines] == ["  1. ", "  2. ", "  3. ", "  4. "]
    assert all("; expected " in line and ". Fix: " in line for line in lines)
    assert isinstance(e.value.__cause__, NotImplementedError)


def changed(method, change):
    """Toy with what one of its methods returns put through `change`."""

    def method_of(self, *args):
        return change(getattr(Toy, method)(self, *args))

    return type("Changed", (Toy,), {method: method_of})()


def with_extras(**extras):
    return lambda state: replace(state, extras=state.extras | extras)


def with_entry(name, change):
    return lambda result: result | {name: change(result[name])}


def with_tensors(name, change):
    return lambda result: replace(result, **{name: change(getattr(result, name))})


MISTAKES = {
    "state type": (
        changed("encode", lambda state: state.features),
        "encode: returned float32 [3, 8]; expected a worldloom.LatentState",
    ),
    "lost batch axis": (
        changed("encode", with_tensors("features", lambda x: x.flatten())),
        "encode: features has shape [24]; expected [3, n]. Fix: keep the batch axis",
    ),
    "extra without batch axis": (
        changed("encode", with_extras(clock=torch.zeros(()))),
        "encode: extras.clock has shape []; expected [3, ...]",
    ),
    "no tensor": (
        changed("encode", with_extras(age=0)),
        "encode: extras.age is an int; expected a tensor [3, ...]",
    ),
    "integer features": (
        changed("encode", with_tensors("features", lambda x: x.long())),
        "encode: features is torch.int64; expected a floating dtype",
    ),
    "features not finite": (
        changed("encode", with_tensors("features", lambda x: x / 0)),
        "encode: features contains NaN or infinity",
    ),
    "another device": (
        changed("encode", with_tensors("features", lambda x: x.to("meta"))),
        "encode: features is on meta; expected cpu. Fix: make its source a parameter",
    ),
    "predict in another layout": (
        changed("predict", with_tensors("deterministic", lambda x: x[:, :5])),
        "predict: deterministic is float32 [3, 5]; expected float32 [3, 8], as from encode",
    ),
    "predict in another dtype": (
        changed("predict", with_extras(age=torch.zeros(3))),
        "predict: extras.age is float32 [3]; expected int64 [3], as from encode",
    ),
    "observe forgets an extra": (
        changed("observe", with_tensors("extras", lambda _: {})),
        "observe: extras.age is nothing; expected int64 [3], as from encode",
    ),
    "decode no dict": (
        changed("decode", lambda heads: heads["reward"]),
        "decode: returned float32 [3, 1]; expected a dict",
    ),
    "decode without continue": (
        changed("decode", lambda heads: {"reward": heads["reward"], "continue_": 1}),
        "decode: there is no 'continue'; expected 'continue' of shape [3, 1]",
    ),
    "reward squeezed": (
        changed("decode", with_entry("reward", lambda x: x.squeeze(-1))),
        "decode: 'reward' has shape [3]; expected [3, 1]",
    ),
    "continue as logits": (
        changed("decode", with_entry("continue", lambda x: x + 3)),
        "expected probabilities in [0, 1]. Fix: apply a sigmoid to its logits",
    ),
    "obs shape": (
        changed("decode", with_entry("obs", lambda x: x[:, :3])),
        "decode: 'obs' has shape [3, 3]; expected [3, 4]",
    ),
    "obs key": (
        changed("decode", with_entry("obs", lambda x: {"state": x})),
        "decode: there is 'obs.state'; expected only ['obs']",
    ),
    "trajectory type": (
        changed("imagine", lambda trajectory: trajectory.rewards),
        "imagine: returned float32 [5, 3, 1]; expected a worldloom.Trajectory",
    ),
    "trajectory without the first state": (
        changed("imagine", with_tensors("states", lambda states: states[1:])),
        "imagine: 5 states for 5 actions; expected 6. Fix: start the list with initial_state",
    ),
    "trajectory from elsewhere": (
        changed("imagine", with_tensors("states", lambda states: [states[1], *states[1:]])),
        "imagine: states[0] is another state; expected initial_state",
    ),
    "batch axis before time": (
        changed("imagine", with_tensors("rewards", lambda x: x.transpose(0, 1))),
        "imagine: rewards has shape [3, 5, 1]; expected [5, 3, 1]",
    ),
    "rewards of departure": (
        changed("imagine", with_tensors("rewards", lambda x: x.roll(1, 0))),
        'imagine: rewards[t] are not decode(states[t + 1])["reward"]',
    ),
    "continues out of range": (
        changed("imagine", with_tensors("continues", lambda x: -x)),
        "imagine: continues ranges from -",
    ),
    "losses no dict": (
        changed("compute_loss", lambda losses: losses["loss"]),
        'compute_loss: returned float32 []; expected a dict with "loss"',
    ),
    "no loss": (
        changed("compute_loss", lambda losses: {"total": losses["loss"]}),
        "compute_loss: returned a dict of ['total']; expected a dict with \"loss\"",
    ),
    "loss per row": (
        changed("compute_loss", with_entry("loss", lambda x: x.expand(3))),
        "compute_loss: 'loss' has shape [3]; expected [] (a scalar). Fix: take its mean",
    ),
    "loss not finite": (
        changed("compute_loss", with_entry("loss", lambda x: x.log() * 0 / 0)),
        "compute_loss: 'loss' contains NaN or infinity",
    ),
    "loss detached": (
        changed("compute_loss", with_entry("loss", lambda x: x.detach())),
        "compute_loss: 'loss' requires no gradient",
    ),
    "statistic as a string": (
        changed("compute_loss", with_entry("rows", str)),
        "compute_loss: 'rows' is a str; expected a tensor [] (a scalar)",
    ),
    "loss as a number": (
        changed("compute_loss", with_entry("loss", lambda x: x.item())),
        "compute_loss: 'loss' is a float; expected a tensor [] (a scalar)",
    ),
    "loss without effect": (
        changed("compute_loss", with_entry("loss", lambda x: x * 0)),
        "compute_loss: no parameter gets a gradient other than zero",
    ),
    "gradient not finite": (
        # The root of zero: fine forwards, infinite backwards.
        changed("compute_loss", with_entry("loss", lambda x: x + (x - x.detach()).sqrt())),
        "are not finite; expected finite gradients. Fix: look for a root",
    ),
    "policy out of range": (
        type("Bold", (Toy,), {"policy": lambda self, state, deterministic: torch.ones(3, 2) * 2})(),
        "policy: row 0 of the action is [2.0, 2.0]; expected it in [-1, 1]",
    ),
    "value shape": (
        type("Flat", (Toy,), {"value": lambda self, state: state.features[:, 0]})(),
        "value: the value has shape [3]; expected [3, 1]",
    ),
    "discount out of range": (
        type("Bold", (Toy,), {"discount": lambda self, state: state.features[:, :1] * 0 + 2})(),
        "discount: the discount ranges from 2 to 2; expected probabilities in [0, 1]",
    ),
    "latents without a prediction": (
        type("Half", (Toy,), {"latent_probs": lambda self, state, action, obs: state.features})(),
        "latent_probs: returned float32 [3, 8]; expected a pair of tensors",
    ),
    "policy shape": (
        type("Flat", (Toy,), {"policy": lambda self, state, deterministic: torch.ones(3)})(),
        "policy: the action has shape [3]; expected [3, 2]",
    ),
}


@pytest.mark.parametrize("name", MISTAKES)
def test_a_mistake_is_named(name):
    model, message = MISTAKES[name]
    problems = problems_of(model)
    assert any(message in problem for problem in problems), problems
    # One mistake may show in several places, but never as a flood.
    assert len(problems) <= 3, problems


def test_a_method_that_fails_is_named_with_line_and_input():
    (problem,) = problems_of(Toy(obs_dim=3), obs_shape=(3,), action_dim=1)[:1]
    assert re.match(r"predict: raised RuntimeError in test_model\.py:\d+: mat1 and mat2", problem)
    assert "expected predict(self, state, action) -> LatentState for state.deterministic" in problem
    assert "action float32 [3, 1]" in problem


def test_rows_that_see_each_other():
    class Normalising(Toy):
        def encode(self, obs):
            return super().encode(obs - obs.mean(0))

    problems = problems_of(Normalising())
    assert problems[0].startswith("encode: row 0 changed when only the other rows of obs did")


def test_state_kept_on_the_module_is_not_repeatable():
    class Counting(Toy):
        calls = 0

        def encode(self, obs):
            self.calls += 1
            return super().encode(obs * self.calls)

    problems = problems_of(Counting())
    assert problems[0].startswith("encode: gave two results for one observation")
    assert any("differed between two calls under the same torch seed" in p for p in problems)


def test_noise_from_torch_is_repeatable():
    class Noisy(Toy):
        def encode(self, obs):
            return super().encode(obs + torch.randn_like(obs))

    assert check(Noisy()) is None


def test_inputs_changed_in_place():
    class Greedy(Toy):
        def imagine(self, initial_state, actions):
            actions.clamp_(-0.1, 0.1)
            initial_state.features.zero_()
            return super().imagine(initial_state, actions)

        def compute_loss(self, batch):
            batch["obs"] -= batch["obs"].mean()
            batch["extra"] = 1
            return super().compute_loss(batch)

    problems = problems_of(Greedy())
    imagine = "imagine: changed its input actions, initial_state.deterministic, initial_state.fea"
    assert any(problem.startswith(imagine) for problem in problems)
    assert any(
        p.startswith("compute_loss: changed its input batch.extra, batch.obs;") for p in problems
    )


def test_discrete_policies_return_one_hot():
    class Soft(Toy):
        def policy(self, state, deterministic):
            return torch.full((3, 2), 0.5)

    (problem,) = problems_of(Soft(), discrete=True)
    expected = "policy: row 0 of the action is [0.5, 0.5]; expected it one-hot, of sizes [2]"
    assert problem.startswith(expected)
    assert check(Soft()) is None


def test_latents_for_the_replay():
    class Remembering(Toy):
        def __init__(self, skipped):
            super().__init__()
            self.replay_fields = {"code": ReplayField((8,)), "age": ReplayField((), torch.int64)}
            self.skipped = skipped

        def replay_values(self, state):
            age = torch.zeros(len(state), dtype=torch.int64)
            return {"code": torch.zeros(len(state), 8), "age": age}

        def compute_loss(self, batch):
            losses = super().compute_loss(batch)
            if "context" in batch:
                rows, length = batch["rewards"].shape
                assert batch["context"]["code"].shape == (rows, 8)
                code = torch.zeros(rows, length - 1, 8)
                age = torch.zeros(rows, length, dtype=torch.int64)
                losses["replay"] = {"code": code, "age": age[:, self.skipped :]}
            return losses

    assert check(Remembering(skipped=1)) is None
    (problem,) = problems_of(Remembering(skipped=0))
    assert 'compute_loss: result["replay"]["age"] has shape [3, 5]; expected [3, 4]' in problem


def test_evaluation_mode_must_work_too():
    class Training(Toy):
        def compute_loss(self, batch):
            return super().compute_loss(batch) if self.training else {}

    (problem,) = problems_of(Training())
    assert problem.startswith("compute_loss after eval(): returned a dict of []")


def test_saving_must_not_need_pickle():
    class Extra(nn.Linear):
        def get_extra_state(self):
            return {"shape": re.compile("x")}

        def set_extra_state(self, state):
            pass

    model = Toy()
    model.encoder = Extra(4, 8)
    (problem,) = problems_of(model)
    assert problem.startswith("state_dict: saving and loading raised")
    assert "expected to load with torch.load(weights_only=True)" in problem


def test_saving_must_bring_everything_back():
    class Forgetful(Toy):
        def load_state_dict(self, state_dict, strict=True, assign=False):
            state_dict.pop("heads.bias")
            return super().load_state_dict(state_dict, strict=False)

    (problem,) = problems_of(Forgetful())
    assert problem.startswith("state_dict: heads.bias has another value after saving")


def test_no_parameters():
    class Empty(nn.Module):
        encode = predict = observe = decode = imagine = compute_loss = lambda self, *_: None

    assert "has no parameters" in problems_of(Empty())[-1]


def test_warns_of_parameters_without_gradient():
    model = Toy()
    model.target = nn.Linear(2, 2)
    with pytest.warns(UserWarning, match=r"no gradient reaches target\.weight, target\.bias"):
        check(model)
    model.target.requires_grad_(False)
    check(model)


def test_warns_of_tensors_that_would_not_be_saved_or_moved():
    model = Toy()
    model.encoder.scale = torch.ones(3)
    with pytest.warns(UserWarning, match=r"encoder\.scale is a tensor but neither parameter nor"):
        check(model)
