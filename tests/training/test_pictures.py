import numpy as np
import pytest
import torch

from worldloom.protocol import LatentState, Trajectory
from worldloom.training.pictures import MODEL, TRUE, open_loop


class Recorder:
    """Remembers what it is asked; its state holds the number of rows that were watched."""

    def __init__(self, obs=None, decodes=True):
        self.calls = []
        self.obs, self.decodes = obs, decodes

    def encode(self, obs):
        self.calls.append(("encode", obs))
        return self._state(1.0)

    def observe(self, state, action, obs):
        self.calls.append(("observe", action, obs))
        return self._state(state.features.item() + 1)

    def imagine(self, state, actions):
        self.calls.append(("imagine", actions))
        ahead = [self._state(state.features.item() + 1 + t) for t in range(len(actions))]
        return Trajectory([state, *ahead], torch.zeros(0), torch.zeros(0))

    def decode(self, state):
        self.calls.append(("decode", state.features.flatten().tolist()))
        return {"obs": self.obs, "reward": None} if self.decodes else {"reward": None}

    @staticmethod
    def _state(count):
        x = torch.full((1, 1), count)
        return LatentState(x, None, x)


def batch_of(obs, first=((0,), (0,))):
    """Two rows of sequences; `first` lists the rows' starts of episodes."""
    lead = (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[:2]
    is_first = torch.zeros(lead, dtype=torch.bool)
    for row, starts in enumerate(first):
        is_first[row, list(starts)] = True
    actions = torch.arange(lead[0] * lead[1], dtype=torch.float32).reshape(*lead, 1)
    return {"obs": obs, "actions": actions, "is_first": is_first}


def vectors(steps=8, width=3):
    return torch.randn(2, steps, width)


def test_watches_the_context_and_imagines_the_rest_from_its_actions():
    obs = vectors()
    model = Recorder(obs[0])
    open_loop(model, batch_of(obs), context=3)
    names = [call[0] for call in model.calls]
    assert names == ["encode", "observe", "observe", "imagine", "decode"]
    assert torch.equal(model.calls[0][1], obs[:1, 0])
    for t in (1, 2):
        _, action, seen = model.calls[t]
        assert action.tolist() == [[t - 1.0]] and torch.equal(seen, obs[:1, t])
    assert model.calls[3][1].flatten().tolist() == [2, 3, 4, 5, 6]  # the last one leads out of it
    assert model.calls[4][1] == list(range(1, 9))  # all eight states, in order


def test_takes_the_longest_stretch_of_one_episode():
    obs = vectors(10)
    model = Recorder(obs[1, 2:9])
    open_loop(model, batch_of(obs, first=((0, 4), (0, 2, 9))), context=2)
    assert torch.equal(model.calls[0][1], obs[1:, 2])
    assert model.calls[2][1].flatten().tolist() == [13, 14, 15, 16, 17]
    assert model.calls[3][1] == list(range(1, 8))


@pytest.mark.parametrize("first", [((0, 3, 6), (2, 4)), ((0, 2, 4, 6), (1, 3, 5, 7))])
def test_nothing_is_drawn_where_episodes_are_too_short(first):
    assert open_loop(Recorder(), batch_of(vectors(), first), context=5) == {}


def test_nothing_is_drawn_by_models_that_decode_no_observations():
    assert open_loop(Recorder(decodes=False), batch_of(vectors()), context=3) == {}


def test_vectors_are_drawn_as_curves_of_truth_and_prediction():
    obs = vectors(width=3)
    (picture,) = open_loop(Recorder(obs[0] + 1), batch_of(obs), context=3).values()
    assert picture.dtype == np.uint8 and picture.shape == (3 * 90, 640, 3)
    for panel in np.split(picture, 3):
        for colour in (TRUE, MODEL):
            assert (panel == colour).all(-1).any()
    # A perfect prediction hides the truth entirely.
    (picture,) = open_loop(Recorder(obs[0]), batch_of(obs), context=3).values()
    assert not (picture == TRUE).all(-1).any()


def test_at_most_eight_dimensions_are_drawn():
    obs = torch.randn(2, 8, 4, 5)
    (picture,) = open_loop(Recorder(obs[0]), batch_of(obs), context=3).values()
    assert picture.shape == (8 * 90, 640, 3)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_drawn_as_a_film_of_truth_prediction_and_error(channels):
    obs = torch.randint(256, (2, 8, channels, 16, 32), dtype=torch.uint8)
    guess = obs[0].float()
    guess[:, :, :8] = 0
    (film,) = open_loop(Recorder(guess), batch_of(obs), context=3).values()
    scale = 128 // 32
    assert film.dtype == np.uint8 and film.shape == (8, 22 * scale, (3 * 32 + 6) * scale, 3)
    small = film[:, ::scale, ::scale]
    truth, predicted, error = np.split(small[:, 3:-3, 3:-3], 3, axis=2)
    shown = obs[0].permute(0, 2, 3, 1).numpy()
    shown = shown[..., :3] if channels >= 3 else shown[..., :1].repeat(3, -1)
    assert (truth == shown).all()
    assert (predicted[:, 8:] == shown[:, 8:]).all() and (predicted[:, :8] == 0).all()
    assert (error[:, 8:] == 128).all()  # grey where the prediction is right
    wrong = 128 - shown[:, :8] / 2  # dark where it is too dark
    assert np.abs(error[:, :8] - wrong).max() <= 1
    green, red = (40, 160, 60), (200, 50, 40)
    for t, frame in enumerate(small):
        assert (frame[0] == (green if t < 3 else red)).all()


def test_each_observation_of_a_dict_has_a_picture():
    obs = {
        "view": torch.randint(256, (2, 8, 3, 16, 16), dtype=torch.uint8),
        "speed": torch.randn(2, 8, 2),
    }
    guess = {key: value[0].float() for key, value in obs.items()}
    pictures = open_loop(Recorder(guess), batch_of(obs), context=3)
    assert set(pictures) == {"open_loop/view", "open_loop/speed"}
    assert pictures["open_loop/view"].ndim == 4 and pictures["open_loop/speed"].ndim == 3


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("shape", [(3,), (3, 16, 16)])
def test_a_model_that_diverges_does_not_end_the_run_here(value, shape):
    obs = torch.zeros(2, 8, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    (picture,) = open_loop(Recorder(torch.full((8, *shape), value)), batch_of(obs), 3).values()
    assert picture.dtype == np.uint8


def test_constants_are_drawn_without_dividing_by_zero():
    obs = torch.zeros(2, 8, 1)
    (picture,) = open_loop(Recorder(obs[0]), batch_of(obs), context=3).values()
    assert (picture == MODEL).all(-1).any()
