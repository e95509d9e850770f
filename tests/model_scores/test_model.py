"""Scores of models whose scores are known."""

import copy
import itertools
import math

import numpy as np
import pytest
import torch

from tests.model_scores.walks import LIMIT, Constant, Delayed, Still, Walk, make_window
from worldloom import create_world_model
from worldloom.model_scores.model import average_scores, score_model
from worldloom.model_scores.rollouts import HORIZONS
from worldloom.protocol import LatentState

CALM = dict(size=0.1, rows=64)  # hardly any episode ends before its 64 rows


def score(model, window, **options):
    scores, failures = score_model(model, window, **options)
    assert not failures
    return scores


def pairs(window, ahead, starts=range(4, 20, 7)):
    """(stream, row, row `ahead` steps later) of all pairs in one episode, by hand."""
    first, last = window["is_first"].numpy(), window["is_last"].numpy()
    for t in starts:
        for e in range(len(first)):
            later = t + ahead
            if later < first.shape[1] and not first[e, t + 1 : later + 1].any() and not last[e, t]:
                yield e, t, later


def error_by_hand(window, ahead, predict):
    """Mean squared error of predict(stream, row, later row), in variances of each number."""
    obs = window["obs"].numpy()
    scale = obs.reshape(-1, 2).var(0)
    errors = [(predict(*p) - obs[p[0], p[2]]) ** 2 / scale for p in pairs(window, ahead)]
    return np.mean(errors)


def test_a_perfect_model_makes_no_errors():
    scores = score(Walk(), make_window(streams=6, length=40))
    for name in ("obs_error/1", "obs_error/5", "obs_error/15", "reward_error", "continue_error"):
        assert scores[name] == pytest.approx(0, abs=1e-9)
    for name in ("reward_calibration", "continue_calibration"):
        assert scores[name] == pytest.approx(0, abs=1e-6)


@pytest.mark.parametrize("length", [None, 30, 7])
def test_a_model_that_predicts_no_change_is_as_wrong_as_that(length):
    window = make_window(length=length)
    obs, scores = window["obs"].numpy(), score(Still(), window)
    shown = [h for h in HORIZONS if f"obs_error/{h}" in scores]
    assert shown == [h for h in HORIZONS if any(True for _ in pairs(window, h))]
    for h in shown:
        expected = error_by_hand(window, h, lambda e, t, later: obs[e, t])
        assert scores[f"obs_error/{h}"] == pytest.approx(expected, rel=1e-4)
        assert scores[f"obs_error_no_change/{h}"] == pytest.approx(expected, rel=1e-4)


def test_a_model_that_predicts_the_mean_is_as_wrong_as_that():
    window = make_window(**CALM)
    mean = window["obs"].reshape(-1, 2).mean(0)
    scores = score(Constant(mean), window)
    for h in HORIZONS:
        expected = error_by_hand(window, h, lambda *_: mean.numpy())
        assert scores[f"obs_error/{h}"] == pytest.approx(expected, rel=1e-4)
        assert scores[f"obs_error_mean/{h}"] == pytest.approx(expected, rel=1e-4)
        assert scores[f"obs_error_mean/{h}"] > scores["obs_error_no_change/1"]


def test_a_model_that_is_a_step_late_is_wrong_by_a_step():
    window = make_window(**CALM)
    actions, scores = window["actions"].numpy(), score(Delayed(), window)
    scale = window["obs"].numpy().reshape(-1, 2).var(0)
    for h in HORIZONS:
        steps = [actions[e, later - 1] ** 2 / scale for e, _, later in pairs(window, h)]
        assert scores[f"obs_error/{h}"] == pytest.approx(np.mean(steps), rel=1e-3)
    assert scores["obs_error/1"] == pytest.approx(scores["obs_error_no_change/1"], rel=1e-4)
    assert scores["obs_error/15"] < scores["obs_error_no_change/15"]


def test_rewards_and_ends_are_compared_up_to_fifteen_steps_ahead():
    window = make_window(streams=8, length=25)
    scores = score(Constant([0.5, LIMIT + 1]), window)  # always ends, always the reward 0.5
    rows = [(e, later) for h in range(1, 16) for e, _, later in pairs(window, h)]
    true = np.array([window["rewards"][row] for row in rows])
    wrong = np.mean((true - 0.5) ** 2) / true.var()
    assert scores["reward_error"] == pytest.approx(wrong, rel=1e-4)
    off = abs(true.mean() - 0.5) / true.std()
    assert scores["reward_calibration"] == pytest.approx(off, rel=1e-4)
    goes_on = 1 - np.array([window["is_terminal"][row] for row in rows], float)
    spread = max(goes_on.var(), 0.01 * goes_on.mean())
    assert scores["continue_error"] == pytest.approx(goes_on.mean() / spread, rel=1e-4)
    assert scores["continue_calibration"] == pytest.approx(goes_on.mean(), rel=1e-4)


class Grey(Still):
    """Sees images [1, 4, 4], and predicts them all grey."""

    def encode(self, obs):
        return LatentState(obs.float().flatten(1))

    def observe(self, state, action, obs):
        return self.encode(obs)

    def decode(self, state):
        grey = state.features.new_full((len(state), 1, 4, 4), 90.0)
        return super().decode(state) | {"obs": grey}


def test_pixels_are_compared_with_their_common_variance():
    images = torch.randint(256, (3, 64, 1, 4, 4), dtype=torch.uint8)
    images[..., 0, 0] = 7  # a pixel that never changes
    window = {**make_window(**CALM), "obs": images}
    pixels = images.float().numpy()
    late = np.array([pixels[e, later] for e, _, later in pairs(window, 5)])
    expected = ((late - 90) ** 2).mean() / pixels.reshape(-1, 16).var(0).mean()
    assert score(Grey(), window)["obs_error/5"] == pytest.approx(expected, rel=1e-4)


class Named(Walk):
    """Sees a dict, decodes two of its keys, and knows nothing."""

    def encode(self, obs):
        return super().encode(obs["point"])

    def observe(self, state, action, obs):
        return super().encode(obs["point"])

    def decode(self, state):
        point = state.features
        return super().decode(state) | {"obs": {"point": 0 * point, "task": 0 * point + 9}}


def test_keys_of_dicts_are_averaged_and_constants_left_out():
    window = make_window(**CALM)
    point = window["obs"]
    expected = error_by_hand(window, 5, lambda *_: np.zeros(2))
    obs = {"point": point, "task": torch.ones_like(point), "other": torch.randn(3, 64, 5)}
    assert score(Named(), {**window, "obs": obs})["obs_error/5"] == pytest.approx(
        expected, rel=1e-4
    )
    obs["task"] = 9 + torch.randn(3, 64, 2)  # the mean is right
    both = score(Named(), {**window, "obs": obs})["obs_error/5"]
    task = error_by_hand({**window, "obs": obs["task"]}, 5, lambda *_: np.full(2, 9.0))
    assert both == pytest.approx((expected + task) / 2, rel=1e-4)


def test_a_number_that_hardly_varies_counts_little():
    class Wide(Still):
        def decode(self, state):
            point = torch.nn.functional.pad(state.features[..., :2], (0, 1), value=0.01)
            return super().decode(state) | {"obs": point}

    window = make_window(**CALM)
    window["obs"] = torch.cat([window["obs"], 1e-6 * torch.randn(3, 64, 1)], -1)
    window["actions"] = torch.zeros(3, 64, 3)
    assert score(Wide(), window)["obs_error/1"] < 1


# ---- models that cannot be scored in every way ---------------------------------------------------


class Blind(Walk):
    def decode(self, state):
        heads = super().decode(state)
        return {key: heads[key] for key in ("reward", "continue")}


class Broken(Walk):
    """Imagines, but cannot decode what it imagined."""

    def decode(self, state):
        raise NotImplementedError("no decoder yet")


class Unable(Walk):
    def encode(self, obs):
        raise RuntimeError("no")


class Lost(Walk):
    def predict(self, state, action):
        return super().predict(state, action * math.nan)


def test_a_model_without_decoder_has_the_other_scores():
    scores = score(Blind(), make_window())
    assert scores["reward_error"] == pytest.approx(0, abs=1e-9)
    assert not any(name.startswith("obs_error") for name in scores)


def test_an_error_of_the_model_costs_only_the_scores_that_need_it():
    scores, failures = score_model(Broken(), make_window())
    assert scores["reward_error"] == pytest.approx(0, abs=1e-9)
    assert set(failures) == {"observations"} and "no decoder yet" in str(failures["observations"])
    scores, failures = score_model(Unable(), make_window())
    assert scores == {} and set(failures) == {"states"}


def test_a_model_that_diverges_has_scores_that_are_not_numbers():
    scores = score(Lost(), make_window())
    assert math.isnan(scores["obs_error/1"]) and math.isnan(scores["reward_error"])
    assert scores["obs_error_no_change/1"] > 0


@pytest.mark.parametrize("rows", [0, 1, 5])
def test_too_few_rows_have_no_scores(rows):
    assert score(Walk(), make_window(rows=rows)) == {}


def test_short_episodes_are_enough():
    scores = score(Walk(), make_window(length=2))
    assert "obs_error/1" in scores and "obs_error/5" not in scores


def test_random_state_and_modes_are_left_as_they_were():
    class Noisy(Walk):
        def predict(self, state, action):
            assert not self.training
            return super().predict(state, torch.rand_like(action))

    model, window = Noisy().train(), make_window()
    before, kept = torch.get_rng_state(), copy.deepcopy(window)
    scores = score(model, window)
    assert torch.equal(torch.get_rng_state(), before) and model.training
    torch.manual_seed(5)
    assert score(model, window) == scores  # with random numbers of its own
    assert all(torch.equal(window[key], kept[key]) for key in kept)


def test_a_long_window_is_cut_into_sequences_from_all_of_it():
    seen = []

    class Watching(Walk):
        def encode(self, obs):
            seen.append(obs)
            return super().encode(obs)

    window = make_window(streams=1, rows=512, size=0.001)
    assert not window["is_last"].any()
    score(Watching(), window)
    starts = [(window["obs"][0] == row).all(-1).nonzero().item() for row in seen[0]]
    assert len(starts) == 2 * 16 and starts[0] == 0 and starts[15] == 512 - 64
    assert all(29 <= b - a <= 30 for a, b in itertools.pairwise(starts[:16]))
    assert starts[16:] == 16 * [512 - 20]  # to judge the state at the end of the window


def test_the_mean_of_parts_leaves_out_what_they_lack():
    parts = [{"a": 1.0, "b": 2.0}, {}, {"a": 3.0}]
    assert average_scores(parts) == {"a": 2.0, "b": 2.0} and average_scores([]) == {}


# ---- both families -------------------------------------------------------------------------------

SMALL = {
    "dreamerv3:size1m": dict(deter=32, hidden=8, units=8, classes=4, stoch=4, depth=4),
    "tdmpc2:1m": dict(mlp_dim=16, latent_dim=16, enc_dim=16, decoder=True),
}


@pytest.mark.parametrize("preset", SMALL)
def test_untrained_models_of_both_families_have_all_scores(preset):
    model = create_world_model(preset, obs_shape=(2,), action_dim=2, **SMALL[preset])
    scores = score(model, make_window(streams=4, length=40))
    assert scores.keys() >= {
        *(f"obs_error{kind}/{h}" for kind in ("", "_no_change", "_mean") for h in (1, 5, 15)),
        *("reward_error", "reward_calibration", "continue_error", "continue_calibration"),
        *("value_error", "value_bias", "kl", "unused_classes"),
    }
    assert all(math.isfinite(value) for value in scores.values())
    assert scores["kl"] > 0 and 0 <= scores["unused_classes"] < 1
    assert scores["obs_error/1"] > scores["obs_error_no_change/1"]  # it has learnt nothing
