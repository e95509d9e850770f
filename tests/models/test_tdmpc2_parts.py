"""What a TD-MPC2 may have beside its core: an end to foresee, choices, a decoder, pixels."""

import math

import pytest
import torch
import torch.nn.functional as F

from worldloom import create_world_model
from worldloom.models.tdmpc2 import draws
from worldloom.models.tdmpc2.encoder import SHIFT
from worldloom.models.tdmpc2.layers import (
    Ensemble,
    apply_all_at_once,
    apply_one_by_one,
    drop,
    joint_linear,
)
from worldloom.nn.shifts import shift_images
from worldloom.random_batches import RandomData
from worldloom.training.optimizers import Adam

SMALL = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_channels=1, num_q=3, dropout=0.1)
SMALL |= dict(num_samples=16, num_elites=4, num_pi_trajs=3)
B, T = 3, 4


def create(*spaces, **options):
    torch.manual_seed(0)
    return create_world_model("tdmpc2:1m", *(spaces or ((4,), 2)), **(SMALL | options))


def build(*spaces, **options):
    """A small model of random weights: reward and Q-functions would begin at zero."""
    model = create(*spaces, **options)
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def batch_for(model, seed=1, rows=B, length=T):
    """Rows of one episode each, without a border."""
    torch.manual_seed(seed)
    batch = RandomData.for_model(model, None, None, None, rows, length).batch()
    for key in ("is_first", "is_last", "is_terminal"):
        batch[key] = torch.zeros(rows, length, dtype=torch.bool)
    return batch


def losses_of(model, batch, seed=2):
    """The losses and statistics, and the gradients of those parameters that have one."""
    model.zero_grad()
    model.scale.value.fill_(1.0)  # every call moves it
    torch.manual_seed(seed)
    losses = model.compute_loss(batch)
    losses["loss"].backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return {name: value.detach() for name, value in losses.items()}, grads


def assert_same(left, right, but=()):
    """The same numbers, bit for bit, but for names that begin with one of `but`."""

    def rest(numbers):
        return {name: x for name, x in numbers.items() if not name.startswith(tuple(but))}

    assert set(rest(left)) == set(rest(right))
    torch.testing.assert_close(rest(left), rest(right), rtol=0, atol=0)


# ---- episodic: foreseeing terminations -----------------------------------------------------------

HEAD = ("termination", "terminates")


def linear(inputs, outputs, normed=True):
    return inputs * outputs + outputs + 2 * outputs * normed


def test_the_head_adds_its_own_parameters_and_none_else():
    def count(model):
        return sum(p.numel() for p in model.parameters() if p.requires_grad)

    hidden, last = linear(18, 16) + linear(16, 16), linear(16, 101, False)
    core = linear(4, 16) + linear(16, 16)  # encoder
    core += hidden + linear(16, 16)  # dynamics
    core += 4 * (hidden + last)  # reward and three Q-functions
    core += 2 * linear(16, 16) + linear(16, 4, False)  # policy
    plain = create()
    assert count(plain) == core
    assert plain.termination is None and "terminates" not in plain.state_dict()
    for episodic in (True, "auto"):
        assert count(create(episodic=episodic)) == core + 2 * linear(16, 16) + 17
    assert count(create(episodic=False)) == core


def three_of_the_same(**options):
    """Models that never, from the first termination on, and always foresee them."""
    always = build(episodic=True, **options)
    never, auto = build(**options), build(episodic="auto", **options)
    weights = {k: v for k, v in always.state_dict().items() if k != "terminates"}
    assert auto.load_state_dict(weights, strict=False).missing_keys == ["terminates"]
    assert not never.load_state_dict(weights, strict=False).missing_keys
    return never, auto, always


def test_auto_is_none_until_a_termination_was_seen_and_true_from_then_on():
    never, auto, always = three_of_the_same()
    for seed in (1, 2):
        batch = batch_for(auto, seed)
        (losses, grads), plain, _ = (losses_of(m, batch) for m in (auto, never, always))
        assert losses["termination_loss"] == 0
        assert not any(g.any() for name, g in grads.items() if name.startswith(HEAD))
        for mine, other in zip((losses, grads), plain, strict=True):
            assert_same(mine, other, HEAD)
    batch["is_terminal"][1, 2] = batch["is_last"][1, 2] = True
    auto.eval().compute_loss(batch)
    assert not auto.terminates
    auto.train()
    for now in (batch, batch_for(auto, 3)):
        (losses, grads), wanted = losses_of(auto, now), losses_of(always, now)
        assert losses["termination_loss"] > 0 and auto.terminates
        for mine, other in zip((losses, grads), wanted, strict=True):
            assert_same(mine, other)


def test_that_a_termination_was_seen_is_saved(tmp_path):
    model = build(episodic="auto")
    for seen in (False, True):
        batch = batch_for(model)
        batch["is_terminal"][0, -1] = seen
        model.compute_loss(batch)
        model.save_pretrained(tmp_path)
        again = create_world_model(tmp_path)
        assert again.build_config["arguments"]["episodic"] == "auto"
        assert_same(again.state_dict(), model.state_dict())
        assert bool(again.terminates) is seen


def test_before_a_termination_was_seen_the_head_is_not_listened_to():
    never, auto, always = three_of_the_same()
    for model in (auto, always):
        with torch.no_grad():
            model.termination.layers[-1].weight.zero_()
            model.termination.layers[-1].bias.fill_(math.log(3))  # three quarters: terminal
    obs, actions = torch.randn(B, 4), torch.rand(T, B, 2)

    def acting(model):
        torch.manual_seed(3)
        state = model.encode(obs)
        action, after = model.policy(state)
        trajectory = model.imagine(state, actions)
        return action, after.extras["plan"], model.decode(state)["continue"], trajectory.continues

    def assert_all_same(left, right):
        for mine, other in zip(acting(left), acting(right), strict=True):
            assert torch.equal(mine, other)

    assert_all_same(auto, never)
    assert (acting(auto)[2] == 1).all() and (acting(auto)[3] == 1).all()
    auto.terminates.fill_(True)
    assert_all_same(auto, always)
    torch.testing.assert_close(acting(auto)[2], torch.full((B, 1), 0.25))
    torch.testing.assert_close(acting(auto)[3], torch.full((T, B, 1), 0.25))
    assert not torch.equal(acting(auto)[0], acting(never)[0])


def test_terminations_without_a_head_are_warned_of():
    model = build()
    batch = batch_for(model)
    model.compute_loss(batch)
    batch["is_terminal"][0, -1] = True
    with pytest.warns(
        UserWarning, match="no head to predict them in planning; create it with"
    ) as w:
        model.compute_loss(batch)
    assert len(w) == 1 and w[0].filename == __file__


# ---- discrete actions ----------------------------------------------------------------------------


@pytest.fixture
def same_heads(monkeypatch):
    monkeypatch.setattr(draws, "draw_two_heads", lambda count, device: torch.tensor([0, 2]))


def test_the_value_of_a_choice_is_its_expectation(same_heads):
    model = build((4,), 3, True).eval()
    z = model.encode(torch.randn(2 * B, 4)).deterministic.unflatten(0, (2, B))
    choice = model.sample_prior(z, None)
    probs = model.actor(z).softmax(-1)
    expected = torch.zeros(2, B)
    for index in range(3):
        action = torch.eye(3)[index].expand(2, B, 3)
        expected = expected + probs[..., index] * model.estimate_values(z, action, None).mean(0)
    found = model.estimate_policy_value(z, choice, None)
    torch.testing.assert_close(found, expected)


def test_the_policy_s_gradient_is_that_of_an_expectation(same_heads):
    model = build((4,), 3, True, entropy_coef=0.2).double().eval()
    model.scale.value.fill_(2.5)
    batch = batch_for(model)
    data = model.read_transitions(batch)
    z = torch.randn(T, B, 16, dtype=torch.float64).softmax(-1)
    loss, _ = model.compute_policy_loss(z, data)
    (found,) = torch.autograd.grad(loss, model.actor.layers[-1].bias)
    with torch.no_grad():
        p = model.actor(z).softmax(-1)
        every = [torch.eye(3, dtype=p.dtype)[i].expand(T, B, 3) for i in range(3)]
        q = torch.stack([model.estimate_values(z, action, None).mean(0) for action in every], -1)
        entropy = -(p * p.log()).sum(-1, keepdim=True)
        # d(p·q)/d logit_j = p_j (q_j - p·q), and of the entropy -p_j (log p_j + entropy).
        slope = p * (q - (p * q).sum(-1, keepdim=True)) / 2.5 - 0.2 * p * (p.log() + entropy)
        expected = -(0.5 ** torch.arange(T)[:, None, None] * slope).mean(1).mean(0)
    torch.testing.assert_close(found, expected)
    value = (0.2 * entropy.squeeze(-1) + (p * q).sum(-1) / 2.5).mean(1)
    torch.testing.assert_close(loss, -(0.5 ** torch.arange(T) * value).mean())


def test_the_prior_learns_which_choice_is_better():
    """Each of eight latents has its own better choice, by Q-functions that stay as they are."""
    model = build((4,), 2, True, num_q=2, dropout=0.0)
    data = model.read_transitions(batch_for(model, rows=8, length=2))
    z = torch.eye(8).repeat(2, 1, 2)
    with torch.no_grad():
        model.critic.layers[-1].weight *= 3
        each = [
            model.estimate_values(z, torch.eye(2)[i].expand(2, 8, 2), None).mean(0)
            for i in range(2)
        ]
    better = torch.stack(each, -1).argmax(-1)
    assert better[0].sum() == 4  # no single choice suits all
    optimizer = Adam(model.actor.parameters(), lr=0.03)
    for _ in range(60):
        optimizer.zero_grad()
        model.compute_policy_loss(z, data)[0].backward()
        optimizer.step()
    assert torch.equal(model.sample_prior(z, None).mode, torch.eye(2)[better])


@pytest.mark.parametrize(
    ("spaces", "options"),
    [
        (((4,), (3, 4), True), {}),
        (((4,), {"arm": 2, "leg": 1}), {}),
        (((4,), {"arm": 2, "leg": 3}, {"arm": False, "leg": True}), {}),
        (((4,), 3, True), dict(action_dims=[3, 2], task_dim=4)),
    ],
)
def test_actions_that_it_cannot_take_are_refused(spaces, options):
    with pytest.raises(ValueError, match=r"TD-MPC2 cannot act with .* Use dreamerv3"):
        create(*spaces, **options)


# ---- decoder -------------------------------------------------------------------------------------

DECODER = ("decoder", "reconstruction")
BOTH = {"camera": (3, 64, 64), "speed": (3,)}


@pytest.mark.parametrize("shape", [(4,), BOTH], ids=["vector", "dict"])
def test_a_decoder_changes_no_other_number(shape):
    plain, decoding = create(shape, 2), create(shape, 2, decoder=True)
    assert_same(decoding.state_dict(), plain.state_dict(), DECODER)
    batch = batch_for(plain)
    adams = [Adam(m.parameter_groups(), lr=1e-2, max_norm=20) for m in (plain, decoding)]
    for step in range(3):
        (losses, grads), wanted = losses_of(decoding, batch, step), losses_of(plain, batch, step)
        total = losses.pop("loss")
        torch.testing.assert_close(total, wanted[0].pop("loss") + losses["reconstruction_loss"])
        assert_same(losses, wanted[0], DECODER)
        assert_same(grads, wanted[1], DECODER)
        for model, adam in zip((plain, decoding), adams, strict=True):
            adam.step()
            model.after_update()
        assert_same(decoding.state_dict(), plain.state_dict(), DECODER)
    assert plain.reward.layers[-1].weight.any()  # zero at first: the steps were real ones


def test_decoded_observations_are_in_their_own_units():
    model = build(BOTH, 2, decoder=True)
    picture, vector = model.decoder.heads
    state = model.encode(RandomData.for_model(model, None, None, None, B, T).obs(B))
    with torch.no_grad():
        for layer in (picture[-1], vector.layers[-1]):
            layer.weight.zero_()
        vector.layers[-1].bias.copy_(torch.tensor([0.0, 3.0, -3.0]))
        picture[-1].bias.copy_(torch.tensor([0.5, 7.0, -7.0]))
    obs = model.decode(state)["obs"]
    # symexp of what the head says, and grey levels cut to what there is.
    torch.testing.assert_close(obs["speed"], torch.tensor([[0, math.expm1(3), -math.expm1(3)]] * B))
    assert obs["camera"].shape == (B, 3, 64, 64) and obs["camera"].dtype == torch.float32
    assert obs["camera"].amax((0, 2, 3)).tolist() == [127.5, 255, 0]
    assert obs["camera"].amin((0, 2, 3)).tolist() == [127.5, 255, 0]
    assert "obs" not in build().decode(build().encode(torch.zeros(B, 4)))


def test_the_decoder_learns_to_show_what_was_seen():
    """A black and a white image, and vectors."""
    model = create({"camera": (1, 64, 64), "speed": (3,)}, 2, decoder=True)
    batch = batch_for(model, rows=2, length=2)
    images = torch.tensor([[0, 255], [255, 0]]).byte()[..., None, None, None]
    batch["obs"]["camera"] = images.expand(2, 2, 1, 64, 64)
    first = {key: value[:, 0] for key, value in batch["obs"].items()}
    with torch.no_grad():
        for p in model.encoder.parameters():
            p *= 3  # latents as far apart as those of a trained encoder
    adam = Adam(model.decoder.parameters(), lr=5e-3)
    for _ in range(35):
        adam.zero_grad()
        model.compute_loss(batch)["loss"].backward()
        adam.step()
    seen = model.decode(model.encode(first))["obs"]
    for key, value in first.items():
        # Much less than the best constant would leave: the observations are told apart.
        best = (value.float() - value.float().mean(0)).square().mean()
        assert (seen[key] - value).square().mean() < best / 5


def test_a_decoder_draws_no_random_number_of_others():
    after = []
    for decoder in (False, True):
        torch.manual_seed(7)
        create_world_model("tdmpc2:1m", (4,), 2, decoder=decoder, **SMALL)
        after.append(torch.rand(3))
    assert torch.equal(*after)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"num_bins": 1}, "num_bins is 1; expected at least 2"),
        ({"vmin": 10.0, "vmax": -10.0}, r"vmin is 10.0; expected a number below vmax = -10.0"),
        ({"dropout": 1.5}, r"'dropout' is 1.5; expected a number in \[0, 1\]"),
        ({"tau": -1.0}, r"'tau' is -1.0; expected a number in \[0, 1\]"),
        ({"discount_denom": 0}, "discount_denom is 0; expected above 0"),
        ({"discount_min": 2.0}, r"discount_min is 2.0; expected from 0 to discount_max = 0.995"),
        ({"episode_length": "abc"}, "episode_length is 'abc'; expected at least 1, or null"),
        ({"episode_length": 0}, "episode_length is 0; expected at least 1, or null"),
        ({"num_pi_trajs": 16}, "num_pi_trajs is 16; expected from 0 to below num_samples = 16"),
        ({"num_elites": 17}, "num_elites is 17; expected at most num_samples = 16"),
        ({"task_dim": 64}, "task_dim is 64; expected 0 for a single task"),
        ({"episode_lengths": [5, 6]}, "name several tasks with action_dims"),
        ({"action_dims": [1.5, 2]}, r"action_dims is \[1.5, 2\]; expected a whole number"),
        ({"latent_dim": 20}, "latent_dim is 20; expected a multiple of simnorm_dim = 8"),
        ({"num_q": 1}, "num_q is 1; expected at least 2"),
        ({"episodic": "yes"}, "episodic is 'yes'; expected true, false, auto or null"),
    ],
)
def test_hyperparameters_that_make_no_sense_are_refused(options, message):
    with pytest.raises(ValueError, match=message):
        create((4,), 2, **options)


# ---- pixels --------------------------------------------------------------------------------------

SHIFTS = torch.tensor([[0, 0], [6, 6], [3, 3], [0, 6], [5, 1], [2, 4]])


@pytest.mark.parametrize("dtype", [torch.uint8, torch.float32, torch.float64])
def test_shifts_are_crops_of_what_bilinear_sampling_gives(dtype):
    torch.manual_seed(0)
    images = torch.randint(256, (len(SHIFTS), 2, 10, 10)).to(dtype)
    found = shift_images(images, SHIFTS, SHIFT)
    assert found.dtype == dtype
    padded = F.pad(images.double(), (3, 3, 3, 3), mode="replicate")
    for image, whole, (x, y) in zip(found, padded, SHIFTS.tolist(), strict=True):
        assert torch.equal(image.double(), whole[:, y : y + 10, x : x + 10])
    # As the official code has it: centres of the first ten pixels, moved by the shift.
    at = torch.linspace(-1 + 1 / 16, 1 - 1 / 16, 16, dtype=torch.float64)[:10]
    grid = torch.stack(torch.meshgrid(at, at, indexing="xy"), -1)
    grid = grid + SHIFTS[:, None, None] * 2 / 16
    sampled = F.grid_sample(padded, grid, align_corners=False)
    # Positions of up to 16 pixels in double precision, times 255 grey levels.
    torch.testing.assert_close(found.double(), sampled, rtol=0, atol=1e-11)


def test_every_step_is_shifted_anew_in_acting_too(monkeypatch):
    model, drawn = build((3, 64, 64), 2).eval(), []
    draw = draws.draw_shifts

    def noted(images, most, device):
        drawn.append((images, most))
        return draw(images, most, device)

    monkeypatch.setattr(draws, "draw_shifts", noted)
    batch = batch_for(model)
    model.compute_loss(batch)
    state = model.encode(batch["obs"][:, 0])
    model.observe(state, batch["actions"][:, 0], batch["obs"][:, 1])
    assert drawn == [(B, 6)] * (T + 2)
    again = model.encode(batch["obs"][:, 0])
    assert not torch.equal(again.deterministic, state.deterministic)


def test_the_order_of_declaration_does_not_matter():
    one, other = create(BOTH, 2), create(dict(reversed(BOTH.items())), 2)
    assert_same(one.state_dict(), other.state_dict())
    batch = batch_for(one)
    swapped = {**batch, "obs": dict(reversed(batch["obs"].items()))}
    for mine, theirs in zip(losses_of(one, batch), losses_of(other, swapped), strict=True):
        assert_same(mine, theirs)


def test_several_observations_add_up_before_simnorm(monkeypatch):
    monkeypatch.setattr(draws, "draw_shifts", lambda n, most, device: torch.full((n, 2), 3))
    model = build(BOTH, 2)
    obs = RandomData.for_model(model, None, None, None, B, T).obs(B)
    x = obs["camera"].float() / 255 - 0.5  # a shift by three is none
    for conv, stride in zip(model.encoder.image.convs, (2, 2, 2, 1), strict=True):
        x = F.conv2d(x.relu() if conv.weight.shape[-1] < 7 else x, conv.weight, conv.bias, stride)
    logits = (x.flatten(1) + model.encoder.vector(obs["speed"])).reshape(B, 2, 8)
    torch.testing.assert_close(model.encode(obs).features, logits.softmax(-1).flatten(1))


@pytest.mark.parametrize(
    ("shape", "options", "message"),
    [
        ((3, 32, 32), {}, r"images of 64x64 pixels, but 'obs' has shape \(3, 32, 32\); resize it"),
        ((3, 64, 64), {"num_channels": 2}, "num_channels=2 makes 32 features .* latent_dim is 16"),
        ((4,), {"latent_dim": 20}, "latent_dim is 20; expected a multiple of simnorm_dim = 8"),
        ((4,), {"num_q": 1}, "num_q is 1; expected at least 2"),
        ((4,), {"episodic": "yes"}, "episodic is 'yes'; expected true, false, auto or null"),
    ],
)
def test_sizes_that_do_not_fit(shape, options, message):
    with pytest.raises(ValueError, match=message):
        create(shape, 2, **options)


# ---- networks ------------------------------------------------------------------------------------


def test_a_linear_map_of_parts_is_that_of_their_concatenation():
    torch.manual_seed(0)
    layer = torch.nn.Linear(9, 5).double()
    parts = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 1, 4), (2, 3, 2), (3, 3))]
    for used in (parts, [parts[1], parts[1], torch.randn(2, 3, 5, dtype=torch.float64)]):
        joined = torch.cat([part.expand(2, 3, -1) for part in used], -1)
        found = joint_linear(used, layer.weight, layer.bias)
        torch.testing.assert_close(found, layer(joined), rtol=0, atol=1e-14)  # entries below ten


@pytest.mark.parametrize("members", [None, [3, 1]])
def test_member_by_member_is_all_at_once(members):
    torch.manual_seed(0)
    ensemble = Ensemble(4, 6, [8, 8], 3).double()
    for p in ensemble.parameters():
        torch.nn.init.normal_(p)
    layers = [layer.stacked for layer in ensemble.layers]
    chosen = None if members is None else torch.tensor(members)
    parts = [torch.randn(*shape, dtype=torch.float64) for shape in ((2, 5, 4), (1, 5, 2))]
    outputs, gradients = [], []
    for compute in (apply_one_by_one, apply_all_at_once):
        outputs.append(compute(parts, layers, chosen, 0.0))
        gradients.append(torch.autograd.grad(outputs[-1].square().sum(), ensemble.parameters()))
    assert outputs[0].shape == (len(members or range(4)), 2, 5, 3)
    torch.testing.assert_close(*outputs)
    torch.testing.assert_close(*gradients)


def test_each_number_is_dropped_with_the_same_probability_and_alone():
    torch.manual_seed(0)
    tries, count, p = 4000, 50, 0.1
    lost = torch.zeros(tries, count)
    for row in lost:
        at = draws.draw_dropped(count, p)
        assert (at.diff() > 0).all() and (at >= 0).all()
        row[at] = 1.0
    # Five deviations of a share, of a variance and of the correlation of neighbours.
    assert ((lost.mean(0) - p).abs() < 5 * (p * (1 - p) / tries) ** 0.5).all()
    totals = lost.sum(1)
    wanted = count * p * (1 - p)
    assert abs(totals.var() - wanted) < 5 * wanted * (2 / tries) ** 0.5
    together = (lost[:, 1:] * lost[:, :-1]).mean()
    assert abs(together - p * p) < 5 * (3 * p * p / (tries * (count - 1))) ** 0.5


@pytest.mark.parametrize("p", [1e-6, 0.1, 0.3])
def test_dropping_goes_on_to_the_last_number(p, monkeypatch):
    """Also if the first draws reach less far than six deviations."""
    geometric, calls = torch.Tensor.geometric_, []

    def short(self, probability):
        calls.append(len(self))
        return geometric(self, probability) if len(calls) > 2 else self.fill_(1)

    monkeypatch.setattr(torch.Tensor, "geometric_", short)
    torch.manual_seed(0)
    lost = draws.draw_dropped(20_000, p)
    short_of = sum(calls[:2])
    assert len(calls) > 2 and lost[:short_of].tolist() == list(range(short_of))
    rest = 20_000 - short_of
    share = (len(lost) - short_of) / rest
    assert abs(share - p) < 5 * (p * (1 - p) / rest) ** 0.5 + 1 / rest


def test_what_is_not_dropped_makes_up_for_it():
    torch.manual_seed(0)
    x = torch.randn(3, 400, requires_grad=True)
    y = drop(x, 0.25)
    y.sum().backward()
    stays = y != 0
    assert 0.15 < 1 - stays.float().mean() < 0.35
    torch.testing.assert_close(y[stays], (x / 0.75)[stays])
    torch.testing.assert_close(x.grad, stays / 0.75)
    assert drop(x, 0.0) is x
