"""Model scores during training: when, on which rows, and without effect on what is learnt."""

import math
from types import SimpleNamespace

import pytest
import torch
from torch import nn

from tests.model_scores.walks import Still, Walk, make_window
from tests.training.test_callbacks import Stop, dreamer, fit, offline, online
from worldloom.ranks import Ranks
from worldloom.training import ReplayBuffer
from worldloom.training.model_scores import STREAMS, WINDOW, ModelScores

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*which other programs cannot import"
)


def scored(notes):
    return [step for step, _ in notes.of("imagination/obs_error/1")]


def test_the_model_is_scored_every_so_many_updates_and_at_the_end():
    assert scored(fit(offline(9), ModelScores(every=4), model=dreamer())) == [4, 8, 9]
    assert scored(fit(offline(9), ModelScores(), model=dreamer())) == [9]  # auto: 50 at least
    assert scored(fit(offline(9), ModelScores(every=0), model=dreamer())) == []
    assert scored(fit(offline(9), ModelScores(5), Stop(after=7), model=dreamer())) == [5, 7]


def test_auto_means_ten_per_run_and_is_kept_on_resume():
    data, first, again = offline(40_000), ModelScores(), ModelScores()
    first.on_train_start(SimpleNamespace(datamodule=data), None)
    assert first.state_dict() == {"interval": 4000, "total": 40_000, "done": 0}
    again.load_state_dict({"interval": 77, "total": 40_000, "done": 60})
    again.on_train_start(SimpleNamespace(datamodule=data), None)
    assert again.interval == 77 and again.state_dict()["done"] == 60
    with pytest.raises(ValueError, match="every is 'often'; expected a number of updates, auto"):
        ModelScores(every="often")


def test_scores_have_the_position_of_the_other_metrics():
    notes = fit(online(), ModelScores(every=5), model=dreamer())
    assert scored(notes) == [28, 48, 60]
    (row, *_) = [row for _, row in notes.metrics if "imagination/obs_error/1" in row]
    assert row["counters/updates"] == 5 and row["counters/env_steps"] == 28
    assert row.keys() >= {"imagination/kl", "imagination/value_bias", "imagination/obs_error/5"}


def test_scoring_does_not_change_what_is_learnt():
    model, watched = dreamer(), dreamer()
    torch.manual_seed(1)
    fit(offline(6), model=model)
    torch.manual_seed(1)
    fit(offline(6), ModelScores(every=1), model=watched)
    for name, value in model.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


# ---- the rows ------------------------------------------------------------------------------------


class Trainer:
    """What the callback needs of a trainer, with a replay of rows of a window."""

    is_global_zero = True

    def __init__(self, window, ranks=None):
        streams, rows = window["rewards"].shape
        self.buffer = ReplayBuffer(10_000, (2,), 2, num_envs=streams)
        names = ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal")
        for t in range(rows):
            self.buffer.add(*(window[name][:, t] for name in names))
        self.datamodule = SimpleNamespace(
            buffer=self.buffer,
            collector=None,
            ranks=ranks or Ranks(),
            update_replay=lambda: None,
        )
        self.lightning_module = SimpleNamespace(updates=0, seconds=0.0)
        self.logged, self.callback_metrics = [], {}
        self.loggers = [SimpleNamespace(log_metrics=lambda row, step: self.logged.append(row))]

    def score(self, callback, model, updates=1):
        self.lightning_module.updates, self.lightning_module.model = updates, model
        callback.interval = 1
        callback.act(self, self.lightning_module)
        return self.logged[-1] if self.logged else {}


class Seen(Walk):
    """Remembers the observations with which its sequences start."""

    def __init__(self):
        super().__init__()
        self.starts = []

    def encode(self, obs):
        self.starts.append(obs)
        return super().encode(obs)


def test_the_newest_rows_are_scored():
    window = make_window(streams=2, rows=WINDOW + 200, size=0.001)
    model = Seen()
    Trainer(window).score(ModelScores(), model)
    for start in model.starts[0]:
        ((_, row),) = (window["obs"] == start).all(-1).nonzero().tolist()
        assert row >= 200


def test_other_streams_have_their_turn():
    window = make_window(streams=20, rows=64, size=0.001)
    trainer, model, found = Trainer(window), Seen(), []
    for updates in range(3):
        model.starts.clear()
        trainer.score(ModelScores(), model, updates)
        found.append(
            {
                int((window["obs"][:, 0] == row).all(-1).nonzero())
                for row in model.starts[0][:STREAMS]
            }
        )
    assert found[0] == {*range(STREAMS)} and set.union(*found) == {*range(20)}


class TwoRanks(Ranks):
    """Another rank has other scores."""

    size = 2

    def __init__(self, other):
        super().__init__()
        self.other = other

    def gather(self, item):
        return [item, self.other]


def test_the_scores_of_all_ranks_are_averaged():
    window = make_window(size=0.1)
    alone = Trainer(window).score(ModelScores(), Still())
    other = {"obs_error/1": 10.0, "kl": 3.0}
    both = Trainer(window, TwoRanks(other)).score(ModelScores(), Still())
    name = "imagination/obs_error/1"
    assert both[name] == pytest.approx((alone[name] + 10) / 2)
    assert both["imagination/kl"] == 3.0


# ---- custom models -------------------------------------------------------------------------------


def test_an_error_of_the_model_is_reported_once_and_does_not_stop_the_run(caplog):
    class Unable(Walk):
        def decode(self, state):
            raise NotImplementedError("no decoder yet")

    callback, trainer = ModelScores(), Trainer(make_window())
    for updates in range(3):
        row = trainer.score(callback, Unable(), updates)
    assert "imagination/reward_error" in row and "imagination/obs_error/1" not in row
    expected = "the model's observations are not scored: NotImplementedError: no decoder yet"
    assert caplog.text.count(expected) == 1


def test_a_model_without_any_of_it_logs_nothing(caplog):
    class Only(nn.Module):
        """Trains, but does nothing else."""

        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(1))

    trainer = Trainer(make_window())
    assert trainer.score(ModelScores(), Only()) == {}
    assert "the model's states are not scored: AttributeError" in caplog.text


def test_a_model_that_diverges_is_logged_as_such():
    class Lost(Walk):
        def predict(self, state, action):
            return super().predict(state, action * math.nan)

    row = Trainer(make_window()).score(ModelScores(), Lost())
    assert math.isnan(row["imagination/obs_error/1"])
