import numpy as np
import pytest
import torch

from worldloom.protocol import LatentState, Trajectory
from worldloom.training.drawing import (
    ERROR,
    HEIGHT,
    IMAGINED,
    LABELS,
    MODEL,
    OBSERVED,
    TILE,
    TRUE,
    WIDTH,
)
from worldloom.training.pictures import Stretch, find_stretches, open_loop, predict


class Counter:
    """A model whose state is [B, 2]: the number of rows that were watched, and those imagined.

    It decodes what `answer` returns for the state, and remembers what it is asked.
    """

    def __init__(self, answer):
        self.calls, self.answer = [], answer

    def encode(self, obs):
        self.calls.append(("encode", obs))
        rows = len(next(iter(obs.values())) if isinstance(obs, dict) else obs)
        return self._state(torch.tensor([[1.0, 0.0]]).expand(rows, 2))

    def observe(self, state, action, obs):
        self.calls.append(("observe", action, obs))
        return self._state(state.features + torch.tensor([1.0, 0.0]))

    def imagine(self, state, actions):
        self.calls.append(("imagine", actions))
        states = [state]
        for _ in actions:
            states.append(self._state(states[-1].features + torch.tensor([0.0, 1.0])))
        return Trajectory(states, torch.zeros(0), torch.zeros(0))

    def decode(self, state):
        return self.answer(state.features)

    @staticmethod
    def _state(features):
        return LatentState(features, None, features)


def batch_of(obs, first=((0,),)):
    """Sequences of a replay; `first` lists the starts of episodes in each.

    Actions count all rows, and the rewards count them from 100 on.
    """
    lead = (next(iter(obs.values())) if isinstance(obs, dict) else obs).shape[:2]
    is_first = torch.zeros(lead, dtype=torch.bool)
    for row, starts in enumerate(first):
        is_first[row, list(starts)] = True
    count = torch.arange(lead[0] * lead[1], dtype=torch.float32).reshape(lead)
    return {
        "obs": obs,
        "actions": count.unsqueeze(-1),
        "rewards": 100 + count,
        "is_first": is_first,
    }


def cut(batch, context=3, length=50, sequences=3):
    return find_stretches(batch["is_first"], context, length)[:sequences]


def draw(answer, batch, context=3):
    return open_loop(Counter(answer), batch, cut(batch, context), context)


def colours(picture, colour):
    return int((picture == colour).all(-1).sum())


# ---- which rows ----------------------------------------------------------------------------------


def test_the_longest_and_newest_parts_of_episodes_are_chosen():
    batch = batch_of(torch.zeros(2, 20, 1), first=((0, 4, 9), (7,)))
    whole = [Stretch(1, 7, 20), Stretch(0, 9, 20), Stretch(1, 0, 7), Stretch(0, 4, 9)]
    assert cut(batch, sequences=9) == whole  # the first four rows are too few for context and 2
    assert cut(batch, sequences=2) == whole[:2]
    parts = [Stretch(0, 9, 16), Stretch(1, 7, 14), Stretch(1, 0, 7), Stretch(1, 14, 20)]
    assert cut(batch, length=7, sequences=9) == [*parts, Stretch(0, 4, 9)]


def test_short_episodes_are_observed_for_fewer_rows():
    batch = batch_of(torch.zeros(1, 10, 1), first=((0, 4, 6),))
    assert cut(batch, context=5) == [Stretch(0, 6, 10), Stretch(0, 0, 4)]
    model = Counter(lambda x: {"obs": x[:, :1]})
    (first, *_) = open_loop(model, batch, cut(batch, context=5), 5).values()
    assert [name for name, *_ in model.calls] == ["encode", "observe", "imagine"]  # 2 of 4 rows
    assert first.shape == (HEIGHT, WIDTH, 3)


@pytest.mark.parametrize("first", [((0, 2, 4, 6),), ((1, 3, 5, 7),)])
def test_episodes_of_two_rows_cannot_be_imagined(first):
    batch = batch_of(torch.zeros(1, 8, 3), first)
    assert cut(batch) == [] and draw(lambda x: {"obs": x}, batch) == {}


def test_the_context_is_observed_and_the_rest_imagined_from_its_actions():
    obs = torch.randn(2, 10, 3)
    batch = batch_of(obs, first=((0, 8), (3,)))
    parts = cut(batch)
    assert parts == [Stretch(0, 0, 8), Stretch(1, 3, 10)]
    model = Counter(lambda x: {"obs": x[:, :1].expand(-1, 3), "reward": x[:, 1:]})
    found = predict(model, batch, parts, 3)
    assert [call[0] for call in model.calls] == ["encode", "observe", "observe", "imagine"]
    assert torch.equal(model.calls[0][1], torch.stack([obs[0, 0], obs[1, 3]]))
    for t in (1, 2):
        _, action, seen = model.calls[t]
        assert action.flatten().tolist() == [t - 1, 10 + 3 + t - 1]
        assert torch.equal(seen, torch.stack([obs[0, t], obs[1, 3 + t]]))
    imagined = model.calls[3][1][..., 0].T.tolist()  # the last action leads out of the sequence
    assert imagined[0] == [2, 3, 4, 5, 6] and imagined[1][:4] == [15, 16, 17, 18]
    truth, guess = found[""]
    assert (truth[0] == obs[0, :8].numpy()).all() and (truth[1, :7] == obs[1, 3:].numpy()).all()
    assert guess[0, :, 0].tolist() == [1, 2, 3, 3, 3, 3, 3, 3]  # rows that were watched
    rewards, predicted = found["rewards"]
    assert rewards[0].tolist() == [100, 101, 102, 103, 104, 105, 106, 107]
    # The reward for arriving at a row; nothing leads to the first one.
    assert predicted[0].tolist() == [100, 0, 0, 1, 2, 3, 4, 5]


# ---- what is drawn -------------------------------------------------------------------------------


def test_a_vector_has_a_picture_of_each_sequence_and_one_of_the_rewards():
    obs = torch.randn(2, 8, 3)
    pictures = draw(lambda x: {"obs": torch.zeros(len(x), 3), "reward": x[:, :1]}, batch_of(obs))
    assert set(pictures) == {"open_loop", "open_loop_2", "open_loop_rewards"}
    for picture in pictures.values():
        assert picture.dtype == np.uint8 and picture.shape == (HEIGHT, WIDTH, 3)
        assert min(colours(picture[30:], c) for c in (TRUE, MODEL, ERROR, IMAGINED)) > 20
        assert min(colours(picture[13:28], c) for c in (TRUE, MODEL, ERROR, IMAGINED)) > 5  # legend


def test_a_perfect_prediction_hides_the_truth_and_has_no_error():
    obs = torch.arange(16.0).reshape(1, 16, 1)
    perfect = lambda x: {"obs": x.sum(1, keepdim=True) - 1}  # noqa: E731
    picture = draw(perfect, batch_of(obs))["open_loop"][30:]
    assert colours(picture, TRUE) == 0 < colours(picture, MODEL) and colours(picture, ERROR) < 50
    picture = draw(lambda x: {"obs": x[:, :1]}, batch_of(obs))["open_loop"][30:]
    assert colours(picture, TRUE) > 20 and colours(picture, ERROR) > 200


def test_the_dimensions_with_the_largest_errors_are_drawn(monkeypatch):
    from worldloom.training import pictures as module

    seen = []
    real = module.draw_curves
    monkeypatch.setattr(module, "draw_curves", lambda *args: seen.append(args) or real(*args))
    torch.manual_seed(0)
    obs = torch.randn(1, 9, 4, 5)
    wrong = torch.zeros(20)
    wrong[[3, 7, 8, 11, 19]] = 5.0

    def answer(x):
        return {"obs": (obs[0].flatten(1) + wrong).reshape(9, 4, 5)}

    draw(answer, batch_of(obs))
    panels, title, context, error = seen[0]
    assert [name for name, *_ in panels] == ["[3]", "[7]", "[8]", "[11]", "[19]"]
    assert title.endswith("the worst 5 of 20") and context == 3
    deviation = obs[0].flatten(1).numpy().std(0)
    assert error == pytest.approx(np.full(9, (wrong.numpy() / deviation).mean()), rel=1e-5)


@pytest.mark.parametrize("channels", [1, 3, 4])
def test_images_are_drawn_as_one_film_of_truth_prediction_and_error(channels):
    obs = torch.randint(256, (2, 8, channels, 16, 32), dtype=torch.uint8)
    guess = obs.transpose(0, 1).flatten(0, 1).float()  # [T * S, ...], as the states
    guess[:, :, :8] = 0
    film = draw(lambda x: {"obs": guess}, batch_of(obs, ((0,), (0, 6))))["open_loop"]
    assert film.dtype == np.uint8 and film.shape[0] == 8 and film.shape[3] == 3
    high, wide = TILE // 2, TILE
    shown = obs.permute(0, 1, 3, 4, 2).numpy()
    shown = shown[..., :3] if channels >= 3 else shown[..., :1].repeat(3, -1)
    for s, length in ((0, 8), (1, 6)):
        x = LABELS + s * (wide + 2)
        rows = [film[:, 16 + i * (high + 2) :, x : x + wide][:, :high:2, ::2] for i in range(3)]
        truth, predicted, error = (row[:length].astype(int) for row in rows)
        real = shown[s, :length].astype(int)
        assert (truth == real).all()
        assert (predicted[:, 8:] == real[:, 8:]).all() and (predicted[:, :8] == 0).all()
        assert (error[:, 8:] == 128).all()  # grey where the prediction is right
        assert np.abs(error[:, :8] - (128 - real[:, :8] / 2)).max() <= 1  # dark: it is too dark
        assert (rows[0][length:] == 255).all()  # after its end
    for t, frame in enumerate(film):
        assert colours(frame[:15], OBSERVED if t < 3 else IMAGINED) > 500


@pytest.mark.parametrize("side", [64, 84, 96, 256])
def test_a_film_is_not_larger_than_a_card_of_tensorboard_shows(side):
    obs = torch.full((3, 8, 3, side, side), 7, dtype=torch.uint8)
    film = draw(lambda x: {"obs": torch.zeros(len(x), 3, side, side)}, batch_of(obs, ((0,),) * 3))
    _, height, width, _ = film["open_loop"].shape
    assert height <= HEIGHT and width <= WIDTH
    assert (film["open_loop"][:, 30, LABELS + 8] == 7).all()


def test_each_observation_of_a_dict_has_pictures():
    obs = {
        "view": torch.randint(256, (1, 8, 3, 16, 16), dtype=torch.uint8),
        "speed": torch.randn(1, 8, 2),
    }
    guess = {key: value[0].float() for key, value in obs.items()}
    pictures = draw(lambda x: {"obs": guess}, batch_of(obs))
    assert set(pictures) == {"open_loop/view", "open_loop/speed"}
    assert pictures["open_loop/view"].ndim == 4 and pictures["open_loop/speed"].ndim == 3


def test_what_a_model_does_not_decode_is_left_out():
    batch = batch_of(torch.randn(1, 8, 3))
    assert draw(lambda x: {"continue": x[:, :1]}, batch) == {}
    assert draw(lambda x: {"obs": None, "reward": None}, batch) == {}
    assert list(draw(lambda x: {"reward": x[:, :1]}, batch)) == ["open_loop_rewards"]


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), 1e38])
@pytest.mark.parametrize("shape", [(3,), (3, 16, 16)])
def test_a_model_that_diverges_is_drawn(value, shape):
    obs = torch.zeros(1, 8, *shape, dtype=torch.uint8 if len(shape) == 3 else torch.float32)
    answer = {"obs": torch.full((8, *shape), value), "reward": torch.full((8, 1), value)}
    assert all(p.dtype == np.uint8 for p in draw(lambda x: answer, batch_of(obs)).values())


def test_constants_are_drawn_without_dividing_by_zero():
    picture = draw(lambda x: {"obs": torch.zeros(8, 1)}, batch_of(torch.zeros(1, 8, 1)))
    assert colours(picture["open_loop"][30:], MODEL) > 20
