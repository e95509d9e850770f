"""Values of models that know the return, or are wrong by a known amount."""

import pytest
import torch

from tests.model_scores.walks import Walk, make_window
from worldloom.model_scores.latents import score_latents
from worldloom.model_scores.model import score_model
from worldloom.model_scores.sequences import cut_sequences
from worldloom.model_scores.values import compute_returns

GAMMA = 0.9


class Countdown(Walk):
    """Values of episodes that pay 1 in each step: obs is the number of steps that are left."""

    def __init__(self, off=0.0, discount=GAMMA):
        super().__init__()
        self.off, self.gamma = off, discount

    def value(self, state):
        return (1 - GAMMA ** state.features[:, :1]) / (1 - GAMMA) + self.off

    def discount(self, state):
        return self.gamma


def countdown(rows, length, terminal=True):
    """Rows [2, rows] of episodes of `length` steps that pay 1 each."""
    age = torch.arange(rows).expand(2, rows) % (length + 1)
    last = age == length
    return {
        "obs": (length - age).float().unsqueeze(-1),
        "actions": -torch.ones(2, rows, 1),
        "rewards": (age > 0).float(),
        "is_first": age == 0,
        "is_last": last,
        "is_terminal": last & terminal,
    }


def test_a_critic_that_knows_the_return_makes_no_error():
    scores, _ = score_model(Countdown(), countdown(200, 30))
    assert scores["value_error"] == pytest.approx(0, abs=1e-9)
    assert scores["value_bias"] == pytest.approx(0, abs=1e-4)


def test_a_critic_that_is_too_optimistic_has_a_bias():
    scores, _ = score_model(Countdown(off=2.0), countdown(201 * 3, 200))  # whole episodes
    assert scores["value_bias"] == pytest.approx(2, abs=1e-4)
    assert scores["value_error"] > 0.1


def test_a_time_limit_is_completed_by_the_critic_itself():
    """The critic believes that a time limit is an end, where the return of the rest is 2."""
    scores, _ = score_model(Countdown(off=2.0), countdown(201 * 3, 20, terminal=False))
    assert 0 < scores["value_bias"] < 2


def brute_force(window, values, final_row, gamma, e, t):
    """The discounted return after row t of a stream, completed by values where it is cut off."""
    total, weight, row = 0.0, 1.0, t
    while True:
        row += 1
        total += weight * window["rewards"][e, row].item()
        weight *= gamma
        if window["is_terminal"][e, row]:
            return total
        if window["is_last"][e, row] or row == final_row:
            return total + weight * values[e, row].item()


@pytest.mark.parametrize("length", [7, 50, 100, None])
def test_returns_are_those_of_a_loop_over_the_rows(length):
    window = make_window(streams=3, rows=150, length=length, size=0.15)
    values = torch.randn(3, 150, dtype=torch.double)
    sequences = cut_sequences(window, 6)
    at = sequences.last.unsqueeze(1) + torch.arange(-19, 1)
    at = torch.cat([at, sequences.end.unsqueeze(1)], 1)
    gammas = torch.linspace(0.8, 0.99, len(at), dtype=torch.double)
    of_rows = values[sequences.stream.unsqueeze(1), at]
    returns = compute_returns(window, sequences, of_rows, gammas)
    checked = 0
    for n, (e, last) in enumerate(zip(sequences.stream, sequences.last, strict=True)):
        for t in range(20):
            row = int(last) - 19 + t
            if window["is_last"][e, row] or row == 149:
                continue
            expected = brute_force(window, values, 149, gammas[n].item(), e, row)
            assert returns[n, t].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)
            checked += 1
    assert checked > 80


def test_the_discount_may_differ_between_rows():
    one = score_model(Countdown(), countdown(200, 30))[0]
    each = score_model(Countdown(discount=torch.full((6, 1), GAMMA)), countdown(200, 30), 6)[0]
    assert each["value_error"] == pytest.approx(one["value_error"], abs=1e-9)


def test_a_model_without_critic_has_no_scores_of_values():
    class Half(Walk):
        value = None

        def discount(self, state):
            return GAMMA

    for model in (Walk(), Half()):
        scores, failures = score_model(model, make_window())
        assert not failures and not any("value" in name for name in scores)


# ---- latents -------------------------------------------------------------------------------------


class Classes(Walk):
    """Two variables with four classes, of which it uses two; its prediction is always the same."""

    def latent_probs(self, state, action, obs):
        assert torch.equal(state.features + action, obs)
        predicted = torch.tensor([0.7, 0.1, 0.1, 0.1]).expand(len(obs), 2, 4)
        inferred = torch.tensor([0.5, 0.5, 0.0, 0.0]).expand(len(obs), 2, 4)
        return predicted, inferred


def test_divergence_and_unused_classes_are_those_of_the_formula():
    scores, failures = score_model(Classes(), make_window(streams=6, length=20))
    each = 0.5 * torch.tensor(0.5 / 0.7).log() + 0.5 * torch.tensor(0.5 / 0.1).log()
    assert not failures
    assert scores["kl"] == pytest.approx(2 * each.item(), rel=1e-4)
    assert scores["unused_classes"] == 0.5


def test_impossible_classes_give_a_finite_divergence():
    class Wrong(Walk):
        def latent_probs(self, state, action, obs):
            yes = torch.eye(2).expand(len(obs), 2, 2)
            return yes, yes.flip(-1)

    window = make_window()
    sequences = cut_sequences(window, 3)
    model = Wrong()
    states = [model.encode(sequences.rows["obs"][:, t]) for t in range(20)]
    found = score_latents(model, sequences, states)
    assert found["kl"] == pytest.approx(2 * 6 * torch.tensor(10.0).log().item(), rel=1e-5)
