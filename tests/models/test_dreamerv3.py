"""DreamerV3 as its users meet it; tests/reference compares its numbers with the official ones."""

import pytest
import torch

from worldloom import LatentState, Trajectory, check_world_model, create_world_model
from worldloom.models.dreamerv3.behavior import rollout
from worldloom.random_batches import RandomData

TINY = dict(units=16, depth=4, deter=32, hidden=16, classes=4, stoch=4)
B, T = 3, 5
SEVERAL = {"front": (3, 32, 48), "back": (1, 32, 48), "speed": (3,), "grid": (2, 2)}
SPACES = {
    "vector, continuous": ((4,), 2, False),
    "vector, discrete": ((4,), 3, True),
    "scalar, one action": ((), 1, False),
    "image, discrete": ((3, 64, 64), 3, True),
    "wide image, continuous": ((1, 32, 48), 2, False),
    "dict, multi-discrete": (SEVERAL, (3, 2), True),
}


def build(spaces="vector, continuous", **options):
    torch.manual_seed(0)
    return create_world_model("dreamerv3:size1m", *SPACES[spaces], **(TINY | options))


def data_for(model, rows=B, length=T):
    return RandomData.for_model(model, None, None, None, rows, length)


def batch_for(model, length=T, context=False):
    batch = data_for(model, length=length).batch()
    if context:
        batch["context"] = {
            "deter": torch.randn(B, model.rssm.deter).tanh(),
            "stoch": torch.eye(4)[torch.randint(4, (B, 4))].flatten(1),
        }
    return batch


def like(obs, shape):
    """Whether observations are float32 of [B, *shape], or a dict of such."""
    if isinstance(shape, dict):
        return set(obs) == set(shape) and all(like(obs[key], shape[key]) for key in shape)
    return obs.shape == (B, *shape) and obs.dtype == torch.float32


# ---- the protocol --------------------------------------------------------------------------------


@pytest.mark.parametrize("spaces", SPACES)
def test_every_method_has_the_shapes_of_the_protocol(spaces):
    model = build(spaces)
    obs_shape, _, discrete = SPACES[spaces]
    data = data_for(model)
    width = sum(data.groups)
    state = model.encode(data.obs(B))
    for now in (
        state,
        model.predict(state, data.actions(B)),
        model.observe(state, data.actions(B), data.obs(B)),
    ):
        assert isinstance(now, LatentState)
        assert now.deterministic.shape == (B, 32) and now.stochastic.shape == (B, 16)
        assert torch.equal(now.features, torch.cat([now.deterministic, now.stochastic], -1))
        one_hot = now.stochastic.unflatten(-1, (4, 4))
        assert ((one_hot == 0) | (one_hot == 1)).all() and (one_hot.sum(-1) == 1).all()
        preds = model.decode(now)
        assert set(preds) == {"obs", "reward", "continue"}
        assert like(preds["obs"], obs_shape)
        assert preds["reward"].shape == preds["continue"].shape == (B, 1)
    trajectory = model.imagine(state, data.actions(T, B))
    assert isinstance(trajectory, Trajectory) and len(trajectory) == T
    assert len(trajectory.states) == T + 1 and trajectory.states[0] is state
    assert trajectory.rewards.shape == trajectory.continues.shape == (T, B, 1)
    for deterministic in (False, True):
        action = model.policy(state, deterministic=deterministic)
        assert action.shape == (B, width)
        if discrete:
            for part in action.split(data.groups, -1):
                assert (part.sum(-1) == 1).all() and ((part == 0) | (part == 1)).all()
    if not discrete:
        assert model.policy(state, deterministic=True).abs().max() <= 1
    losses = model.compute_loss(data.batch())
    assert all(value.shape == () and value.isfinite() for value in losses.values())


@pytest.mark.parametrize("spaces", SPACES)
def test_keeps_the_protocol(spaces, recwarn):
    check_world_model(build(spaces))
    assert not recwarn.list


def test_decoded_images_are_in_pixels_and_vectors_in_their_own_units():
    model = build("dict, multi-discrete")
    with torch.no_grad():
        model.decoder.image.imgout.bias.fill_(100.0)  # a sigmoid of nearly 1
        model.decoder.vec["speed"].weight.zero_()
        model.decoder.vec["speed"].bias.fill_(3.0)
    obs = model.decode(model.encode(data_for(model).obs(B)))["obs"]
    assert (obs["front"] == 255).all() and (obs["back"] == 255).all()
    torch.testing.assert_close(obs["speed"], torch.full((B, 3), 3.0).expm1())


def test_observations_are_concatenated_by_sorted_keys_as_officially():
    """The order of obs_shape, and that of the observations themselves, changes nothing."""
    shapes = {"b": (2,), "y": (3, 64, 64), "a": (3,), "x": (1, 64, 64)}
    encoder = create_world_model("dreamerv3:size1m", shapes, 2).encoder
    obs = {key: torch.rand(4, *shape) for key, shape in shapes.items()}
    flat = torch.cat([obs["a"], obs["b"]], -1)
    assert torch.equal(encoder.vector_input(obs, 1), flat.sign() * torch.log1p(flat.abs()))
    obs |= {key: torch.full((4, *shapes[key]), value) for key, value in (("x", 255), ("y", 0))}
    seen = []
    encoder.cnn.register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    encoder(obs)
    assert seen[0][0, 0, 0].tolist() == [0.5, -0.5, -0.5, -0.5]  # x, then y


def test_continue_is_a_probability_without_the_discount_that_is_folded_into_it():
    model = build()
    state = model.encode(data_for(model).obs(B))
    with torch.no_grad():
        model.cont.out.weight.zero_()
        model.cont.out.bias.fill_(torch.logit(torch.tensor(0.5 * (1 - 1 / 333))))
    torch.testing.assert_close(model.decode(state)["continue"], torch.full((B, 1), 0.5))
    with torch.no_grad():
        model.cont.out.bias.fill_(20.0)
    assert (model.decode(state)["continue"] == 1).all()


def test_imagining_is_predicting_step_by_step():
    model = build("vector, discrete")
    data = data_for(model)
    state, actions = model.encode(data.obs(B)), data.actions(T, B)
    torch.manual_seed(3)
    trajectory = model.imagine(state, actions)
    torch.manual_seed(3)
    for t in range(T):
        state = model.predict(state, actions[t])
        torch.testing.assert_close(trajectory.states[t + 1].features, state.features)
        torch.testing.assert_close(trajectory.rewards[t], model.decode(state)["reward"])
        torch.testing.assert_close(trajectory.continues[t], model.decode(state)["continue"])


def test_imagination_in_mixed_precision_does_not_depend_on_unwritten_memory(monkeypatch):
    """Products in bfloat16 may read beyond the rows of a strided matrix."""
    model, empty = build(classes=5, stoch=5, units=25), torch.Tensor.new_empty

    def unwritten(self, *shape, **options):
        return empty(self, *shape, **options).fill_(torch.nan)

    monkeypatch.setattr(torch.Tensor, "new_empty", unwritten)
    with torch.autocast("cpu", torch.bfloat16):
        start = torch.randn(19, model.feature_dim)
        features, actions, policy = rollout(model.rssm, model.actor, start, 5)
    assert features.isfinite().all() and actions.isfinite().all()
    assert all(entropy.isfinite().all() for entropy in policy.entropy().values())


def test_acting_follows_the_same_filter_as_training():
    """encode and observe give the latents that compute_loss computes, episode by episode."""
    model = build()
    batch = batch_for(model)
    first = batch["is_first"].clone()
    first[:, 0] = True
    torch.manual_seed(1)
    sequences = model.prepare_batch(batch)
    _, _, deter, stoch = model.world_model_terms(sequences)
    torch.manual_seed(1)
    state = model.encode(batch["obs"][:, 0])
    for t in range(T):
        if t:
            obs, rng = batch["obs"][:, t], torch.get_rng_state()
            fresh = model.encode(obs)
            torch.set_rng_state(rng)
            state = model.observe(state, batch["actions"][:, t - 1], obs)
            state = LatentState.where(first[:, t], fresh, state)
        torch.testing.assert_close(state.deterministic, deter[:, t])
        torch.testing.assert_close(state.stochastic, stoch[:, t])


# ---- compute_loss --------------------------------------------------------------------------------

WORLD = {"dyn_loss", "rep_loss", "reward_loss", "continue_loss"}
BEHAVIOR = {"policy_loss", "value_loss", "replay_value_loss"}
SUMS = {"loss", "kl_loss", "reconstruction_loss"}


def loss_names(losses):
    return {name for name in losses if "loss" in name}


def test_losses_have_the_documented_names_and_add_up():
    model = build()
    losses = model.compute_loss(batch_for(model))
    assert loss_names(losses) == SUMS | WORLD | BEHAVIOR
    torch.testing.assert_close(losses["kl_loss"], losses["dyn_loss"] + 0.1 * losses["rep_loss"])
    parts = ("reward", "continue", "policy", "value")
    total = losses["kl_loss"] + losses["reconstruction_loss"] + 0.3 * losses["replay_value_loss"]
    total = total + sum(losses[f"{name}_loss"] for name in parts)
    torch.testing.assert_close(losses["loss"], total)
    graphs = {name for name, value in losses.items() if value.requires_grad}
    assert graphs == {"loss"}


def test_each_observation_has_a_reconstruction_loss_of_its_own():
    model = build("dict, multi-discrete")
    losses = model.compute_loss(batch_for(model))
    parts = [losses[f"reconstruction_loss/{key}"] for key in SEVERAL]
    torch.testing.assert_close(losses["reconstruction_loss"], torch.stack(parts).sum())
    assert loss_names(losses) >= SUMS | WORLD | BEHAVIOR


def test_weights_of_the_terms_are_hyperparameters():
    model = build(loss_scales={"rec": 2.0, "policy": 0.0, "value": 0.0, "repval": 0.0})
    losses = model.compute_loss(batch_for(model))
    total = losses["kl_loss"] + losses["reconstruction_loss"]
    total = total + losses["reward_loss"] + losses["continue_loss"]
    torch.testing.assert_close(losses["loss"], total)


def test_without_an_actor_critic_only_the_world_model_is_trained():
    model, whole = build(actor_critic=False), build()
    assert model.policy is None
    assert not any(name.split(".")[0] in ("actor", "critic") for name in model.state_dict())
    batch = batch_for(model)
    losses = model.compute_loss(batch)
    assert set(losses) == SUMS | WORLD | {"dyn_ent", "rep_ent"}
    model.after_update()
    # The world model's own terms are those of the whole model with the same weights.
    model.load_state_dict({k: v for k, v in whole.state_dict().items() if k in model.state_dict()})
    torch.manual_seed(2)
    alone = model.compute_loss(batch)
    torch.manual_seed(2)
    both = whole.compute_loss(batch)
    for name in WORLD:
        torch.testing.assert_close(alone[name], both[name])


def test_every_parameter_learns_but_for_the_slow_critic():
    model = build("dict, multi-discrete")
    # Zero kernels at the heads' ends let no gradient through at the very start.
    with torch.no_grad():
        for head in (model.reward, model.critic):
            head.out.weight.normal_()
    model.compute_loss(batch_for(model))["loss"].backward()
    idle = {name for name, p in model.named_parameters() if p.grad is None or not p.grad.any()}
    assert idle == {name for name, _ in model.named_parameters() if name.startswith("slow_critic")}


def test_the_actor_and_critic_do_not_shape_the_world_model_unless_asked():
    """All but the replay value loss, whose gradient reaches it officially too."""
    world = ("encoder", "rssm", "decoder")

    def gradient(**options):
        only = {"loss_scales": dict.fromkeys(("rec", "rew", "con", "dyn", "rep", "repval"), 0.0)}
        model = build(**only, **options)
        with torch.no_grad():
            model.critic.out.weight.normal_()
        model.compute_loss(batch_for(model))["loss"].backward()
        named = [p for name, p in model.named_parameters() if name.split(".")[0] in world]
        return sum(p.grad.abs().sum() for p in named if p.grad is not None)

    assert gradient() == 0
    assert gradient(ac_grads=True) > 0


# ---- memory of latents ---------------------------------------------------------------------------


def test_context_gives_row_zero_and_the_new_latents_come_back():
    model = build()
    batch = batch_for(model, context=True)
    sequences = model.prepare_batch(batch)
    assert torch.equal(sequences.deter, batch["context"]["deter"])
    assert torch.equal(sequences.prev_actions, batch["actions"][:, :-1])
    assert torch.equal(sequences.rewards, batch["rewards"][:, 1:])
    given = dict(batch)
    replay = model.compute_loss(batch)["replay"]
    assert batch == given
    for name, field in model.replay_fields.items():
        assert replay[name].shape == (B, T - 1, *field.shape)
        assert not replay[name].requires_grad


def test_context_matters_only_where_the_episode_goes_on():
    model = build()
    batch = batch_for(model, context=True)
    batch["is_first"][:, 1:] = False
    batch["is_first"][0, 1] = True

    def latents(shift):
        batch["context"]["deter"] = batch["context"]["deter"] + shift
        torch.manual_seed(0)
        return model.world_model_terms(model.prepare_batch(batch))[2][:, 0]

    same, other = latents(0.0), latents(0.3)
    assert torch.equal(same[0], other[0])
    assert not torch.isclose(same[1:], other[1:]).all(-1).any()


def test_without_replay_context_it_is_ignored():
    model = build(replay_context=False)
    assert model.replay_fields == {}
    batch = batch_for(model, context=True)
    plain = {key: value for key, value in batch.items() if key != "context"}
    model.eval()  # in training mode a call moves the return scale
    torch.manual_seed(0)
    with_context = model.compute_loss(batch)
    torch.manual_seed(0)
    without = model.compute_loss(plain)
    assert with_context == without and "replay" not in with_context


# ---- rows, seeds and modes -----------------------------------------------------------------------


def test_rows_of_a_batch_are_independent():
    model = build("vector, discrete")
    batch = batch_for(model)
    batch["obs"].requires_grad_()
    terms, _, deter, _ = model.world_model_terms(model.prepare_batch(batch))
    total = sum(term[0].sum() for term in terms.values()) + deter[0].sum()
    (grad,) = torch.autograd.grad(total, batch["obs"])
    assert grad[0].any() and not grad[1:].any()


def test_episodes_in_one_row_are_independent():
    model = build()
    batch = batch_for(model)
    batch["is_first"][:] = False
    batch["is_first"][:, 3] = True
    batch["obs"].requires_grad_()
    batch["actions"].requires_grad_()
    _, _, deter, stoch = model.world_model_terms(model.prepare_batch(batch))
    later = deter[:, 3:].square().sum() + (stoch[:, 3:] * torch.randn(16)).sum()
    obs, actions = torch.autograd.grad(later, (batch["obs"], batch["actions"]))
    assert not obs[:, :3].any() and obs[:, 3:4].any()
    assert not actions[:, :3].any() and actions[:, 3].any()


def test_terms_do_not_look_ahead():
    model = build()
    batch = batch_for(model)
    batch["obs"].requires_grad_()
    batch["actions"].requires_grad_()
    terms, _, deter, _ = model.world_model_terms(model.prepare_batch(batch))
    early = sum(term[:, :3].sum() for term in terms.values()) + deter[:, :3].sum()
    obs, actions = torch.autograd.grad(early, (batch["obs"], batch["actions"]))
    assert obs[:, 2].any() and not obs[:, 3:].any()
    assert actions[:, 1].any() and not actions[:, 2:].any()


def test_seeds_reproduce_and_differ():
    model, batch = build().eval(), batch_for(build())

    def losses(seed):
        torch.manual_seed(seed)
        return model.compute_loss(batch)

    assert losses(1) == losses(1)
    assert losses(1)["loss"] != losses(2)["loss"]


def test_only_training_mode_moves_the_return_scale():
    model = build()
    batch = batch_for(model)
    with torch.no_grad():
        model.reward.out.bias.normal_()  # rewards other than zero
    model.eval().compute_loss(batch)
    assert model.retnorm.corr == 0
    model.train().compute_loss(batch)
    assert model.retnorm.corr == pytest.approx(0.01) and model.retnorm.second != 0


def test_the_slow_critic_follows_the_critic():
    model = build(slow_critic={"rate": 0.25, "every": 2})
    with torch.no_grad():
        for p in model.critic.parameters():
            p += 1.0
    before = [p.clone() for p in model.slow_critic.parameters()]
    expected = [0.75 * p + 0.25 * q for p, q in zip(before, model.critic.parameters(), strict=True)]
    for _ in range(2):  # the first call moves it, the second does not
        model.after_update()
        torch.testing.assert_close(list(model.slow_critic.parameters()), expected)
    model.after_update()
    assert not torch.equal(next(model.slow_critic.parameters()), expected[0])


# ---- bad batches ---------------------------------------------------------------------------------


def without(key):
    return lambda batch: batch.pop(key)


def replaced(key, change):
    return lambda batch: batch.__setitem__(key, change(batch[key]))


BAD = {
    "no obs": (without("obs"), r"the batch lacks \['obs'\]; compute_loss needs"),
    "no flag": (without("is_last"), r"the batch lacks \['is_last'\]"),
    "integer actions": (
        replaced("actions", lambda x: x.argmax(-1)),
        r"action has shape \(3, 5\); expected \[B, T, 2\], discrete actions one-hot",
    ),
    "too many actions": (replaced("actions", lambda x: torch.cat([x, x], -1)), r"\(3, 5, 4\)"),
    "rewards with an axis too many": (
        replaced("rewards", lambda x: x[..., None]),
        r"batch\['rewards'\] has shape \(3, 5, 1\); expected \(3, 5\)",
    ),
    "flags of another length": (
        replaced("is_first", lambda x: x[:, 1:]),
        r"batch\['is_first'\] has shape \(3, 4\); expected \(3, 5\)",
    ),
    "flags that are numbers": (
        replaced("is_terminal", lambda x: x.float()),
        r"batch\['is_terminal'\] has dtype torch.float32; expected torch.bool",
    ),
    "obs of another width": (
        replaced("obs", lambda x: x[..., :3]),
        r"obs has shape \(3, 5, 3\); expected \[B, T, 4\]",
    ),
    "obs of another length": (
        replaced("obs", lambda x: x[:, 1:]),
        r"obs 'obs' starts with \(3, 4\); expected \[B, T\] = \(3, 5\)",
    ),
    "obs in a dict": (
        replaced("obs", lambda x: {"obs": x}),
        "obs is a dict; this model expects a t",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches(case):
    model = build()
    batch = batch_for(model)
    change, message = BAD[case]
    change(batch)
    with pytest.raises(ValueError, match=message):
        model.compute_loss(batch)


def test_images_must_be_uint8():
    model = build("wide image, continuous")
    batch = batch_for(model)
    batch["obs"] = batch["obs"].float() / 255
    with pytest.raises(ValueError, match=r"image of dtype torch.float32; expected torch.uint8"):
        model.compute_loss(batch)


def test_one_row_is_no_sequence():
    model = build()
    batch = {k: v[:, :1] for k, v in batch_for(model).items()}
    with pytest.raises(ValueError, match="sequences have 1 rows; a loss over time needs at least"):
        model.compute_loss(batch)


def test_bad_inputs_when_acting():
    model = build("vector, discrete")
    state = model.encode(torch.zeros(B, 4))
    with pytest.raises(ValueError, match=r"obs has shape \(3, 5\); expected \[B, 4\]"):
        model.encode(torch.zeros(B, 5))
    with pytest.raises(ValueError, match=r"action has shape \(3,\); expected \[B, 3\]"):
        model.predict(state, torch.zeros(B))
    with pytest.raises(ValueError, match=r"expected \[T, B, 3\]"):
        model.imagine(state, torch.zeros(B, 3))
    with pytest.raises(ValueError, match="no stochastic part; it comes from another kind of model"):
        model.decode(LatentState(state.deterministic, None, state.features))


def test_the_world_model_alone_keeps_the_protocol():
    check_world_model(build(actor_critic=False))


@pytest.mark.parametrize("options, context", [({"imag_last": 1}, False), ({}, True)])
def test_one_start_has_no_replayed_return(options, context):
    model = build(**options)
    length = 2 if context else T
    losses = model.compute_loss(batch_for(model, length, context))
    assert "replay_value_loss" not in losses
    losses["loss"].backward()
    assert all(torch.isfinite(p.grad).all() for p in model.actor.parameters())
