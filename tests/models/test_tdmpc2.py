"""What TD-MPC2 learns from: transitions, terminations and the losses over them.

tests/reference compares its numbers with the official ones; here are the cases that the official
code never meets, such as sequences that leave their episode.
"""

import math

import numpy as np
import pytest
import torch

from tests.models.test_tdmpc2_parts import batch_for as whole_episodes
from tests.models.test_tdmpc2_parts import losses_of
from worldloom import check_world_model, create_world_model
from worldloom.models.tdmpc2 import draws
from worldloom.nn import distributions
from worldloom.replay.buffer import ReplayBuffer

SMALL = dict(enc_dim=16, mlp_dim=16, latent_dim=16, num_channels=1, num_q=3, dropout=0.0)
SMALL |= dict(num_samples=16, num_elites=4, num_pi_trajs=3)
B, T = 4, 4
H = T - 1
NO_HEAD = "a batch contains terminations, but this model has no head"


def build(*spaces, **options):
    """A small model of random weights: reward and Q-functions would begin at zero."""
    torch.manual_seed(0)
    model = create_world_model("tdmpc2:1m", *(spaces or ((4,), 2)), **(SMALL | options))
    with torch.no_grad():
        for p in model.parameters():
            p += 0.3 * torch.randn_like(p)
    return model


def batch_for(model, seed=1):
    return whole_episodes(model, seed, B, T)


def assert_equal(left, right):
    """The same numbers, bit for bit; names as well."""
    assert set(left) == set(right)
    torch.testing.assert_close(left, right, rtol=0, atol=0)


@pytest.fixture
def no_noise(monkeypatch):
    """Policies act by their mean, and the first and the last of three Q-functions are drawn."""

    def zeros(like, *shape):
        return like.new_zeros(shape or like.shape)

    monkeypatch.setattr(distributions, "standard_normal", zeros)
    monkeypatch.setattr(draws, "draw_two_heads", lambda count, device: torch.tensor([0, 2]))


# ---- the protocol --------------------------------------------------------------------------------

BOTH = {"camera": (3, 64, 64), "speed": (3,)}
SPACES = {
    "vector": ((4,), 2),
    "image": ((3, 64, 64), 2),
    "dict": (BOTH, 2),
    "discrete": ((4,), 3, True),
    "scalar": ((), 1),
}
KINDS = [
    ("vector", {}),
    ("vector", {"mpc": False}),
    ("vector", {"decoder": True}),
    ("vector", {"episodic": True}),
    ("image", {"episodic": "auto"}),
    ("dict", {"decoder": True}),
    ("discrete", {"episodic": "auto"}),
    ("discrete", {"mpc": False}),
    ("scalar", {"decoder": True}),
]


@pytest.mark.filterwarnings(f"ignore:{NO_HEAD}")
@pytest.mark.parametrize(("spaces", "options"), KINDS, ids=str)
def test_keeps_the_protocol(spaces, options):
    check_world_model(build(*SPACES[spaces], **options))


def test_every_parameter_learns_but_for_the_target():
    model = build(BOTH, 2, episodic=True, decoder=True)
    _, grads = losses_of(model, batch_for(model))
    learned = {name for name, grad in grads.items() if grad.any()}
    rest = {name for name, _ in model.named_parameters()} - learned
    assert rest == {f"target_critic.{name}" for name, _ in model.critic.named_parameters()}


def test_the_policy_s_loss_reaches_the_policy_alone_and_no_other_loss_does():
    model = build(episodic=True)
    data = model.read_transitions(batch_for(model))
    terms, _, rollout = model.compute_model_losses(data)
    torch.stack(list(terms.values())).sum().backward()
    assert all(p.grad is None for p in model.actor.parameters())
    assert model.encoder.vector.layers[0].linear.weight.grad.any()
    model.zero_grad()
    model.compute_policy_loss(rollout.z.detach(), data)[0].backward()
    with_gradient = {name for name, p in model.named_parameters() if p.grad is not None}
    assert with_gradient == {f"actor.{name}" for name, _ in model.actor.named_parameters()}


def test_the_target_follows_by_tau():
    model = build(tau=0.25)
    pairs = list(zip(model.target_critic.parameters(), model.critic.parameters(), strict=True))
    expected = [0.75 * slow + 0.25 * fast for slow, fast in pairs]
    model.after_update()
    torch.testing.assert_close([slow for slow, _ in pairs], expected)


@pytest.mark.parametrize("ended", [[], [1], [0, 1, 2, 3]])
def test_only_training_moves_the_scale_of_values(ended, no_noise):
    """And of the first states only those in which somebody acts."""
    model = build(tau=0.25, episodic=True)
    with torch.no_grad():
        model.critic.layers[-1].weight *= 30  # so that values differ by more than one
    batch = batch_for(model)
    batch["is_terminal"][ended, 0] = batch["is_last"][ended, 0] = True
    model.eval().compute_loss(batch)
    assert model.scale.value == 1
    z = model.encode(batch["obs"][:, 0]).deterministic
    q = model.estimate_values(z, model.sample_prior(z, None).mode, None).mean(0).tolist()
    acts = [value for b, value in enumerate(q) if b not in ended]
    spread = np.diff(np.percentile(acts, [5, 95])).item() if acts else 1.0
    assert spread > 1.5 or not acts
    out = model.train().compute_loss(batch)
    assert out["policy_scale"].item() == pytest.approx(1 + 0.25 * (spread - 1), rel=1e-5)


# ---- terminated, truncated, ordinary -------------------------------------------------------------


def soft_ce(logits, x):
    """Cross entropy of logits [101] with the two-hot code of a number, as README 3.4 has it."""
    position = (math.copysign(math.log1p(abs(x)), x) + 10) / 0.2
    low = math.floor(position)
    code = torch.zeros(101, dtype=torch.float64)
    code[low] = 1 - (position - low)
    code[min(low + 1, 100)] += position - low
    return -(code * logits.double().log_softmax(-1)).sum()


def say(layer, bins):
    """Make every Q-function answer symexp(-10 + 0.2 * bin), whatever it sees."""
    with torch.no_grad():
        layer.weight.zero_()
        layer.bias.zero_()
        for head, index in enumerate(bins):
            layer.bias[head, index] = 200.0  # exp(-200) is zero in float32


def known_values(**options):
    """A model whose discount is 1 - 1/40 and whose values beyond a step are e - 1.

    Heads 0 and 2 are drawn, of which the second has the lesser value; the first head, the third
    and the Q-functions in training would all give something else.
    """
    model = build(episode_length=200, **options)
    say(model.target_critic.layers[-1], [70, 30, 55])  # symexp of 4, -4 and 1
    return model


def flags(*places):
    out = torch.zeros(B, T, dtype=torch.bool)
    for place in places:
        out[place] = True
    return out


AHEAD = (1 - 1 / 40) * (math.e - 1)  # what a bootstrapped value adds to a reward


def test_only_terminations_cut_the_value_target(no_noise):
    """Row 0 is terminated at its end and row 1 truncated; row 2 goes on; row 3 terminates inside.

    Row 3 shows its next episode from row 3 on, and a number there must not count.
    """
    model = known_values()
    batch = batch_for(model)
    batch["is_first"] = flags((3, 3))
    batch["is_last"] = flags((0, 3), (1, 3), (3, 2))
    batch["is_terminal"] = flags((0, 3), (3, 2))
    rewards = [[9, 1, 2, 3], [9, -1, 0.5, 4], [9, 0, 0, -7], [9, 5, 6, 99]]
    batch["rewards"] = torch.tensor(rewards)
    expected = torch.tensor(
        [
            [1 + AHEAD, 2 + AHEAD, 3],
            [-1 + AHEAD, 0.5 + AHEAD, 4 + AHEAD],
            [AHEAD, AHEAD, -7 + AHEAD],
            [5 + AHEAD, 6, math.nan],
        ]
    )
    with torch.no_grad():
        for layer in (model.critic.layers[-1], model.reward.layers[-1]):
            layer.weight.zero_()  # what the biases say is all that counts
    data = model.read_transitions(batch)
    assert data.alive.t().tolist() == [[1, 1, 1], [1, 1, 1], [1, 1, 1], [1, 1, 0]]
    counts = data.alive.t() == 1
    target = model.compute_model_losses(data)[2].target.t()
    # Float32 of numbers up to 7.
    torch.testing.assert_close(target[counts], expected[counts], rtol=1e-6, atol=1e-6)

    with pytest.warns(UserWarning, match=NO_HEAD):
        losses = model.compute_loss(batch)
    heads, bias = model.critic.layers[-1].bias, model.reward.layers[-1].bias
    value, reward = 0.0, 0.0
    for t in range(H):
        rows = [b for b in range(B) if counts[b, t]]
        for b in rows:
            each = [soft_ce(head, expected[b, t].item()) for head in heads]
            value += 0.5**t * sum(each) / 3 / len(rows) / H
            reward += 0.5**t * soft_ce(bias, rewards[b][t + 1]) / len(rows) / H
    # Float32 cross entropies: a few roundings of numbers near 5.
    assert losses["value_loss"].item() == pytest.approx(value.item(), rel=1e-6)
    assert losses["reward_loss"].item() == pytest.approx(reward.item(), rel=1e-6)


def test_value_targets_of_what_a_ring_that_wrapped_around_hands_out(no_noise):
    """Episode and step stand in each observation, so every transition can be told."""
    replay = ReplayBuffer(22, (4,), 2, seed=0)
    steps = [5, 6, 9, 7, 3]
    terminates, truncates = {0, 3}, {1, 4}  # episode 2 ends without either
    for episode, count in enumerate(steps):
        obs = np.zeros((count + 1, 4), np.float32)
        obs[:, 0], obs[:, 1] = episode, np.arange(count + 1)
        end = np.arange(count) == count - 1
        replay.add_episode(
            obs,
            np.zeros((count, 2), np.float32),
            (10 * episode + obs[1:, 1]).astype(np.float32),
            terminations=end & (episode in terminates),
            truncations=end & (episode in truncates),
        )
    for t in range(5):  # one that is still going on
        row = np.array([[5, t, 0, 0]], np.float32), np.zeros((1, 2)), np.array([50.0 + t])
        no = np.zeros(1, bool)
        replay.add(*row, np.array([t == 0]), no, no)

    model = known_values()
    batch = replay.sample(300, T, across_episodes=False)
    data = model.read_transitions(batch)
    seen = data.obs["obs"].long()
    episode, step = seen[:-1, :, 0], seen[:-1, :, 1]
    assert (episode == episode[0]).all() and (step == step[0] + torch.arange(H)[:, None]).all()
    # Of 40 rows the last 22 are stored: of episode 2 steps 5 to 9, which lie around the ring's end.
    starts = {(int(e), int(t)) for e, t in zip(episode[0], step[0], strict=True)}
    assert starts == {(2, 5), (2, 6), *((3, t) for t in range(5)), (4, 0), (5, 0), (5, 1)}
    assert (data.alive == 1).all()
    ended = (episode == 3) & (step == 6)
    assert torch.equal(data.terminated, ended.float()) and ended.any()
    arrived = 10.0 * episode + step + 1
    target = model.compute_model_losses(data)[2].target
    expected = torch.where(ended, arrived, arrived + AHEAD)
    torch.testing.assert_close(target, expected, rtol=1e-6, atol=0)


# ---- sequences that leave their episode ----------------------------------------------------------

# First row of the next episode in each batch row; T where there is none.
CUTS = {
    "nothing is cut": [T, T, T, T],
    "some are cut": [2, T, 1, 3],
    "all but one step is cut": [1, 1, 1, 1],
}


def cut(batch, starts, how):
    """Let another episode begin at given rows; a resumed run knows no last row before it."""
    for b, start in enumerate(starts):
        if start < T:
            batch["is_first"][b, start] = how != "is_last"
            batch["is_last"][b, start - 1] = how != "is_first"
    return batch


def polluted(batch, starts):
    """Replace everything after the border, and the action that leads nowhere."""
    torch.manual_seed(5)
    out = {key: value.clone() for key, value in batch.items()}
    for b, start in enumerate(starts):
        for key in ("is_first", "is_last", "is_terminal"):
            out[key][b, start + 1 :] = torch.rand(len(out[key][b, start + 1 :])) < 0.5
        out["obs"][b, start:] = 50 * torch.randn(T - start, 4)
        out["rewards"][b, start:] = 1e3 * torch.randn(T - start)
        out["is_terminal"][b, start:] = True
        out["actions"][b, start - 1 :] = 2 * torch.rand(T - start + 1, 2) - 1
    return out


@pytest.mark.parametrize("how", ["is_first", "is_last", "both"])
@pytest.mark.parametrize("cuts", CUTS)
def test_nothing_after_an_episode_s_border_counts(cuts, how):
    model = build(episodic=True, decoder=True, dropout=0.1)
    batch = cut(batch_for(model), CUTS[cuts], how)
    clean = losses_of(model, batch)
    model = build(episodic=True, decoder=True, dropout=0.1)
    other = losses_of(model, polluted(batch, CUTS[cuts]))
    for left, right in zip(clean, other, strict=True):
        assert_equal(left, right)


def gain_of(model, z):
    """What the policy's loss rewards at a latent [1, L], without noise: README 3.5 and 3.6."""
    mean, raw = model.actor(z).chunk(2, -1)
    log_std, action = -10 + 6 * (raw.tanh() + 1), mean.tanh()
    g = (-log_std - 0.9189385175704956).sum()
    logprob = g - (1 - action**2 + 1e-6).log().sum()
    scaled = -logprob * (2 * g / (logprob + 1e-8))
    return 1e-4 * scaled + q_of(model.critic, z, action).mean()


def q_of(critic, z, action):
    probs = critic(torch.cat([z, action], -1))[[0, 2], 0].softmax(-1)
    y = probs @ torch.linspace(-10, 10, 101, dtype=probs.dtype)
    return y.sign() * y.abs().expm1()


@torch.no_grad()
def by_hand(model, batch, starts):
    """The losses of README 3.6, one transition after the other, of those inside their episode."""
    names = ("consistency", "reward", "value", "termination", "policy")
    found = {name: [[] for _ in range(T)] for name in names}
    for b in range(B):
        z = model.encode(batch["obs"][b : b + 1, 0]).deterministic
        if not batch["is_terminal"][b, 0]:  # nobody acts there
            found["policy"][0].append(-gain_of(model, z))
        for t in range(starts[b] - 1):
            reward, over = batch["rewards"][b, t + 1], batch["is_terminal"][b, t + 1].double()
            goal = model.encode(batch["obs"][b : b + 1, t + 1]).deterministic
            best = model.actor(goal).chunk(2, -1)[0].tanh()
            target = reward + 0.995 * (1 - over) * q_of(model.target_critic, goal, best).min()
            joint = torch.cat([z, batch["actions"][b : b + 1, t]], -1)
            values = [soft_ce(logits[0], target.item()) for logits in model.critic(joint)]
            z = model.predict_latent(z, batch["actions"][b : b + 1, t], None)
            chance = model.termination(z).sigmoid().squeeze()
            found["consistency"][t].append(((z - goal) ** 2).mean())
            found["reward"][t].append(soft_ce(model.reward(joint)[0], reward.item()))
            found["value"][t].append(sum(values) / 3)
            found["termination"][t].append(-(over * chance + (1 - over) * (1 - chance)).log())
            found["policy"][t + 1].append(-gain_of(model, z))
    out = {}
    for name, steps in found.items():
        means = [0.5**t * sum(each) / max(len(each), 1) for t, each in enumerate(steps)]
        out[f"{name}_loss"] = sum(means) / (T if name == "policy" else H)
    every = [each for step in found["termination"] for each in step]
    out["termination_loss"] = sum(every) / max(len(every), 1)
    scales = dict(consistency=20, reward=0.1, value=0.1, termination=1, policy=1)
    out["loss"] = sum(scale * out[f"{name}_loss"] for name, scale in scales.items())
    return {name: float(value) for name, value in out.items()}


@pytest.mark.parametrize("cuts", CUTS)
def test_losses_are_means_over_what_lies_inside_the_episodes(cuts, no_noise):
    model = build(episodic=True).double().eval()
    batch = cut(batch_for(model), CUTS[cuts], "both")
    batch = {k: v.double() if v.is_floating_point() else v for k, v in batch.items()}
    for b, start in enumerate(CUTS[cuts]):
        batch["is_terminal"][b, start - 1] = b % 2 == 0  # of those that end, two terminate
    losses = model.compute_loss(batch)
    expected = by_hand(model, batch, CUTS[cuts])
    # Double precision, of numbers up to 100.
    assert {k: losses[k].item() for k in expected} == pytest.approx(expected, rel=1e-11, abs=1e-12)
    assert {name for name in losses if name.endswith("loss")} == set(expected)


# ---- bad batches ---------------------------------------------------------------------------------

BAD = {
    "no obs": (lambda b: b.pop("obs"), "the batch lacks 'obs'"),
    "no flag": (lambda b: b.pop("is_last"), r"the batch lacks \['is_last'\]"),
    "numbers for flags": (
        lambda b: b.update(is_first=b["is_first"].float()),
        r"batch\['is_first'\] has dtype torch.float32; expected torch.bool",
    ),
    "an axis too many": (
        lambda b: b.update(rewards=b["rewards"][..., None]),
        r"batch\['rewards'\] has shape \(4, 4, 1\); expected \(4, 4\)",
    ),
    "one row": (
        lambda b: b.update({key: value[:, :1] for key, value in b.items()}),
        "sequences have 1 row; a transition needs 2",
    ),
}


@pytest.mark.parametrize("case", BAD)
def test_bad_batches(case):
    change, message = BAD[case]
    model = build()
    batch = dict(batch_for(model))
    change(batch)
    with pytest.raises(ValueError, match=message):
        model.compute_loss(batch)


# ---- beside the loss itself ----------------------------------------------------------------------


def test_two_losses_may_share_a_backward_pass():
    model = build(episodic="auto")
    one, two = batch_for(model, seed=1), batch_for(model, seed=2)
    two["is_terminal"][0, -1] = two["is_last"][0, -1] = True
    total = model.compute_loss(one)["loss"] + model.compute_loss(two)["loss"]
    total.backward()  # nothing that the first loss needs may have moved in place
    assert model.actor.layers[0].linear.weight.grad.abs().sum() > 0


def test_acting_in_inference_mode_spoils_no_training():
    model = build(action_dims=[1, 2], task_dim=3, num_bins=37, episode_lengths=[70, 90])
    batch = batch_for(model)
    rows = len(batch["rewards"])
    ids = torch.arange(rows) % 2
    with torch.inference_mode():
        model.policy(model.encode(torch.randn(rows, 4), ids))
    model.compute_loss({**batch, "task": ids})["loss"].backward()


def test_mixed_precision_keeps_distributions_in_full():
    model = build()
    z = model.encode(torch.randn(64, 4)).deterministic
    with torch.no_grad():
        torch.manual_seed(3)
        exact = model.sample_prior(z, None)
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16):
            mixed = model.sample_prior(z, None)
            again = model.predict_latent(z, mixed.action, None)
    assert again.dtype == mixed.action.dtype == mixed.entropy.dtype == torch.float32
    # The raw outputs are off by 2^-8 of themselves; nothing after them may add to that.
    raw = model.actor(z).abs().max() * 2**-7
    assert (mixed.log_std - exact.log_std).abs().max() <= 6 * raw  # half the range of log_std
