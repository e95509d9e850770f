import logging
import math
import time
from functools import partial
from types import SimpleNamespace

import pytest
import torch
from lightning import Callback, Trainer
from lightning.pytorch.loggers import Logger
from torch import nn

from worldloom import create_world_model, timing
from worldloom.acting import EvaluationStopped
from worldloom.ranks import Ranks
from worldloom.saving import read_saved
from worldloom.timing import Timer, phase
from worldloom.training import (
    ReplayBuffer,
    ReplayDataModule,
    WorldModelModule,
    callbacks,
    progress,
)
from worldloom.training.callbacks import Evaluation, MetricsWriter, OpenLoop
from worldloom.training.progress import Progress

pytestmark = pytest.mark.filterwarnings(
    "ignore:.*does not have many workers", "ignore:.*which other programs cannot import"
)


class Line(nn.Module):
    """Its loss in update k is k."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(()))
        self.build_config = {"model": "my_pkg.Line", "arguments": {"obs_shape": (2,)}}
        self.updates = 0

    def compute_loss(self, batch):
        self.updates += 1
        return {"loss": self.weight * 0 + self.updates}


class Overflows(Line):
    """A statistic that is infinite in update 4."""

    def compute_loss(self, batch):
        scalars = super().compute_loss(batch)
        return {**scalars, "ratio": torch.tensor(1.0 if self.updates != 4 else float("inf"))}


class Breaks(Line):
    def __init__(self, error):
        super().__init__()
        self.error = error

    def compute_loss(self, batch):
        if self.updates == 4:
            raise self.error
        return super().compute_loss(batch)


class FakeCollector:
    """Collects rows of noise from two environments; an episode ends every 5 ticks in env 0."""

    num_envs = 2
    ranks = Ranks()

    def __init__(self, buffer):
        self.buffer, self.ticks = buffer, 0
        self.finished, self.returns = [], []

    @property
    def env_steps(self):
        return 2 * self.ticks

    def step(self, stop=False):
        first = torch.full((2,), self.ticks == 0)
        none = torch.zeros(2, dtype=torch.bool)
        obs, zeros = torch.randn(2, 2), torch.zeros(2)
        self.buffer.add(obs, torch.zeros(2, 1), zeros, first, none, none)
        self.ticks += 1
        if self.ticks % 5 == 0:
            self.returns = [*self.returns, float(self.ticks)][-20:]
            episode = {"return": self.returns[-1], "length": 5, **self.counters()}
            self.finished.append(episode)

    def counters(self):
        return {"env_steps": self.env_steps, "frames": 3 * self.env_steps}

    def close(self):
        self.closed = True

    def state_dict(self):
        return {"ticks": self.ticks}

    def load_state_dict(self, state):
        self.ticks = state["ticks"]


class Notes(Logger):
    """Keeps what is logged."""

    name, version = "notes", ""

    def __init__(self):
        super().__init__()
        self.metrics, self.pictures = [], []

    def log_metrics(self, metrics, step=None):
        self.metrics.append((step, dict(metrics)))

    def log_hyperparams(self, *args, **kwargs):
        raise AssertionError("the module's settings are not logged by Lightning")

    def log_picture(self, name, picture, step):
        self.pictures.append((step, name, picture.shape))

    def of(self, name, beside=""):
        """All values of one name, as (step, value); beside: only where this is logged as well."""
        return [(step, m[name]) for step, m in self.metrics if {name, beside or name} <= {*m}]


BATCH = dict(batch_size=2, sequence_length=4)


def online(total_steps=60, ratio=2.0):
    """8 replayed steps per update; from env step 8 on an update every 4 env steps."""
    buffer = ReplayBuffer(500, (2,), 1, num_envs=2)
    collector = FakeCollector(buffer)
    return ReplayDataModule(buffer, collector, train_ratio=ratio, total_steps=total_steps, **BATCH)


def offline(total_steps):
    buffer = ReplayBuffer(500, (2,), 1)
    obs, actions = torch.randn(31, 2), torch.zeros(30, 1)
    buffer.add_episode(obs=obs, actions=actions, rewards=torch.zeros(30), dones=torch.zeros(30))
    return ReplayDataModule(buffer, total_steps=total_steps, **BATCH)


def fit(data, *callbacks, model=None, log_every=5):
    notes = Notes()
    module = WorldModelModule(
        model or Line(), partial(torch.optim.SGD, lr=0.1), log_every=log_every
    )
    trainer = Trainer(
        accelerator="cpu",
        max_epochs=1,
        logger=[notes],
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    trainer.fit(module, data)
    return notes


# ---- metrics -------------------------------------------------------------------------------------


def test_a_statistic_that_is_not_finite_is_reported_once(caplog):
    notes = fit(offline(20), MetricsWriter(), model=Overflows(), log_every=2)
    assert [step for step, ratio in notes.of("stats/ratio") if ratio == float("inf")] == [4]
    assert caplog.text.count("in the metrics up to update 4, stats/ratio is inf; training") == 1
    fit(offline(20), MetricsWriter(), log_every=2)
    assert caplog.text.count("in the metrics") == 1


def test_metrics_are_means_over_log_every_updates_at_the_env_step_of_the_last():
    notes = fit(online(), MetricsWriter())
    # Updates 1-5, 6-10 and the 3 that are left; (60 - 8) * 2 / 8 = 13 in all.
    assert notes.of("counters/updates", beside="loss/loss") == [(28, 5), (48, 10), (60, 13)]
    assert notes.of("loss/loss") == [(28, 3.0), (48, 8.0), (60, 12.0)]
    assert [step for step, _ in notes.of("stats/grad_norm")] == [28, 48]
    assert notes.of("replay/size") == [(28, 28), (48, 48), (60, 60)]
    assert notes.of("replay/ratio") == [(28, 2.0), (48, 2.0), (60, 2.0)]
    assert notes.of("counters/frames", beside="loss/loss") == [(28, 84), (48, 144), (60, 180)]


def test_nothing_is_logged_twice_when_the_run_ends_with_an_interval():
    notes = fit(online(total_steps=48), MetricsWriter())
    assert notes.of("counters/updates", beside="loss/loss") == [(28, 5), (48, 10)]
    assert all(value > 0 for _, value in notes.of("fps/env") + notes.of("fps/train"))


def test_episodes_are_logged_at_the_env_step_where_they_ended():
    data = online()
    notes = fit(data, MetricsWriter())
    assert notes.of("episode/return") == [(10 * k, 5.0 * k) for k in range(1, 7)]
    assert notes.of("episode/length") == [(10 * k, 5) for k in range(1, 7)]
    # With the counters of that moment, though they are written after the next update or later.
    assert notes.of("counters/env_steps", beside="episode/return") == [
        (10 * k, 10 * k) for k in range(1, 7)
    ]
    updates = [count for _, count in notes.of("counters/updates", beside="episode/return")]
    assert updates == [0, 2, 5, 7, 10, 12]
    assert data.collector.finished == []


def test_offline_the_axis_is_updates():
    notes = fit(offline(12), MetricsWriter())
    assert [step for step, _ in notes.of("loss/loss")] == [5, 10, 12]
    assert notes.of("fps/env") == [(5, 0), (10, 0), (12, 0)]


def test_rates_are_per_second(monkeypatch):
    clock = SimpleNamespace(now=100.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)

    class Tick(Callback):
        def on_train_batch_start(self, *args):
            clock.now += 2.0  # an update takes two seconds

    notes = fit(online(), Tick(), MetricsWriter())
    assert notes.of("fps/train") == [(step, pytest.approx(8 / 2)) for step in (28, 48, 60)]
    # Every two seconds come 4 steps; the first interval holds the 8 of prefill too.
    expected = [(28, 28 / 10), (48, 20 / 10), (60, 12 / 6)]
    assert notes.of("fps/env") == [(step, pytest.approx(rate)) for step, rate in expected]


def test_the_time_of_every_phase_is_logged_per_update(monkeypatch):
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr(callbacks, "timer_for", lambda device: Timer(lambda: clock.now))

    class Slow(Line):
        def compute_loss(self, batch):
            clock.now += 0.25
            with phase("imagine"):
                clock.now += 0.5
            return super().compute_loss(batch)

        def after_update(self):
            clock.now += 2.0

    class Tick(Callback):
        def on_train_batch_end(self, *args):
            clock.now += 1.0  # in no phase

    data = online()
    step = data.collector.step
    data.collector.step = lambda stop=False: step() or setattr(clock, "now", clock.now + 4.0)
    notes = fit(data, Tick(), MetricsWriter(), model=Slow())
    steps = (28, 48, 60)
    expected = {"loss": 250, "imagine": 500, "optimizer": 2000, "other": 1000, "backward": 0}
    for name, ms in expected.items():
        assert notes.of(f"timings/{name}") == [(step, pytest.approx(ms)) for step in steps], name
    # An update is due every 4 environment steps, 2 of the collector's; of the 13 updates the first
    # one needs what comes after the 8 steps of prefill, which are 4 of the collector's.
    assert notes.of("timings/prefill") == [(28, 4 * 4000 / 5)]
    assert notes.of("timings/collect") == [(step, 2 * 4000) for step in steps]
    for step, whole in notes.of("timings/update"):
        parts = next(m for at, m in notes.metrics if at == step and "timings/update" in m)
        times = [v for k, v in parts.items() if k.startswith("timings/") and k != "timings/update"]
        assert whole == pytest.approx(sum(times))


def test_nobody_listens_once_a_run_is_over():
    class Fails(Callback):
        def on_train_batch_end(self, *args):
            raise KeyError

    fit(offline(2), MetricsWriter())
    before = timing._active.get()
    with pytest.raises(KeyError):
        fit(offline(2), MetricsWriter(), Fails())
    assert before is None is timing._active.get()


# ---- evaluation ----------------------------------------------------------------------------------


class Scores:
    """Gives the next score at each call."""

    def __init__(self, *values):
        self.values = iter(values)

    def __call__(self):
        return {"return": next(self.values), "length": 1.0}


def test_evaluates_at_every_so_many_env_steps_and_at_the_end():
    notes = fit(online(), Evaluation(Scores(1.0, 2.0, 3.0, 4.0), every=20))
    # The first update after steps 20 and 40, and the one at 60, which is the end itself.
    assert notes.of("eval/return") == [(20, 1.0), (40, 2.0), (60, 3.0)]
    notes = fit(online(), Evaluation(Scores(1.0, 2.0, 3.0), every=25))
    assert notes.of("eval/return") == [(28, 1.0), (52, 2.0), (60, 3.0)]


def test_an_evaluation_that_was_stopped_is_repeated_with_the_same_model():
    class Stopped(Scores):
        def __call__(self):
            score = super().__call__()
            if score["return"] < 0:
                raise EvaluationStopped
            return score

    evaluation = Evaluation(Stopped(-1.0, 1.0, 2.0, 3.0), every=20)
    notes = fit(online(), evaluation)
    assert notes.of("eval/return") == [(20, 1.0), (40, 2.0), (60, 3.0)]
    again = Evaluation(Scores(), every=20)
    again.load_state_dict({**evaluation.state_dict(), "owed": 40})
    assert again.state_dict()["owed"] == 40


def test_no_evaluation_unless_asked():
    assert fit(online(), Evaluation(Scores(), every=0)).of("eval/return") == []


def test_the_best_model_is_kept_and_of_equals_the_later(tmp_path):
    class Numbered(Line):
        def compute_loss(self, batch):
            with torch.no_grad():
                self.weight.fill_(self.updates + 1)
            return super().compute_loss(batch) | {"loss": (self.weight - self.weight.item())}

    evaluation = Evaluation(Scores(1.0, 7.0, 7.0), every=16, folder=tmp_path / "model")
    notes = fit(online(total_steps=48), evaluation, model=Numbered())
    steps = [step for step, _ in notes.of("eval/return")]
    assert steps == [16, 32, 48]
    assert evaluation.best == {"step": 48, "return": 7.0}
    saved = read_saved(tmp_path / "model")[1]
    # Of update 10, at step 48: set to 10 and moved by the rate times a gradient of 1.
    assert saved["weight"].item() == pytest.approx(10.0 - 0.1)


def test_any_score_is_better_than_nan(tmp_path):
    evaluation = Evaluation(Scores(math.nan, 3.0, math.nan), every=16, folder=tmp_path / "model")
    fit(online(total_steps=48), evaluation)
    assert evaluation.best == {"step": 32, "return": 3.0}


def test_the_best_score_survives_a_resume():
    evaluation, again = (Evaluation(Scores(), every=20) for _ in range(2))
    evaluation.best, evaluation._next, evaluation._evaluated = {"step": 40, "return": 7.0}, 60, 9
    again.load_state_dict(evaluation.state_dict())
    assert again.best == evaluation.best and again._next == 60
    assert again.state_dict() == evaluation.state_dict()


def test_a_resume_puts_the_best_model_back_that_it_was_saved_with(tmp_path):
    """A later one may have been written between the checkpoint and the kill."""
    kept = Evaluation(Scores(1.0, 7.0), every=30, folder=tmp_path / "model")
    fit(online(), kept)
    state = kept.state_dict()
    best = read_saved(tmp_path / "model")[1]
    (tmp_path / "model" / "model.safetensors").write_bytes(b"of another model")
    again = Evaluation(Scores(5.0), every=1000, folder=tmp_path / "model")
    again.load_state_dict(state)
    fit(online(), again)
    assert again.best == kept.best
    assert read_saved(tmp_path / "model")[1]["weight"] == best["weight"]


@pytest.mark.parametrize("options", [{"every": 0}, {"every": 20, "folder": None}])
def test_a_resumed_run_that_keeps_no_best_model_ends_with_its_last(tmp_path, options):
    kept = Evaluation(Scores(1.0, 7.0), every=30, folder=tmp_path / "model")
    fit(online(), kept)
    again = Evaluation(Scores(), **{"folder": tmp_path / "model", **options})
    again.load_state_dict(kept.state_dict())
    assert again.best is None


def test_an_evaluation_that_was_due_when_the_run_stopped_is_made_up_for():
    """It stopped while collecting: past the mark, before the next update."""
    due = Evaluation(Scores(), every=20)
    again = Evaluation(Scores(1.0, 2.0, 3.0, 4.0), every=20)
    again.load_state_dict({**due.state_dict(), "next": 4})
    notes = fit(online(), again)
    assert [step for step, _ in notes.of("eval/return")] == [12, 20, 40, 60]


def test_a_resumed_run_may_evaluate_at_other_steps():
    notes = fit(online(), changed := Evaluation(Scores(1.0, 2.0), every=30))
    again = Evaluation(Scores(*range(9)), every=12)
    again.load_state_dict({**changed.state_dict(), "next": 1000})
    notes = fit(online(), again)
    assert [step for step, _ in notes.of("eval/return")] == [12, 24, 36, 48, 60]


# ---- pictures ------------------------------------------------------------------------------------

TINY = dict(units=8, depth=2, deter=16, hidden=8, classes=4, stoch=2, imag_length=2)


def dreamer():
    torch.manual_seed(0)
    return create_world_model("dreamerv3:size1m", (2,), 1, replay_context=False, **TINY)


class Stop(Callback):
    """Ends training as EarlyStopping does."""

    def __init__(self, after):
        self.after = after

    def on_train_batch_end(self, trainer, pl_module, *args):
        trainer.should_stop = trainer.should_stop or pl_module.updates == self.after


def test_a_resumed_run_keeps_the_interval_of_its_pictures():
    data, first, again = offline(40), OpenLoop(), OpenLoop()
    trainer = SimpleNamespace(datamodule=data)
    first.on_train_start(trainer, None)
    assert first.state_dict() == {"interval": 4, "total": 40, "done": 0}
    again.load_state_dict({"interval": 3, "total": 40, "done": 0})
    again.on_train_start(trainer, None)
    assert again.state_dict()["interval"] == 3
    again.load_state_dict({"interval": 3, "total": 30, "done": 0})  # it is longer now
    again.on_train_start(trainer, None)
    assert again.state_dict()["interval"] == 4
    with pytest.raises(ValueError, match="every is 'often'; expected a number of updates, auto"):
        OpenLoop(every="often")


def pictured(*args, **kwargs):
    """The steps of the pictures of observations that a fit logs."""
    pictures = fit(*args, model=dreamer(), **kwargs).pictures
    return [step for step, name, _ in pictures if name == "imagination/open_loop"]


def test_pictures_are_drawn_every_so_many_updates():
    notes = fit(offline(9), OpenLoop(every=3, context=2), model=dreamer())
    names = ("imagination/open_loop", "imagination/open_loop_rewards")
    assert [(step, name) for step, name, _ in notes.pictures] == [
        (step, name) for step in (3, 6, 9) for name in names
    ]
    # One more at the end, also of a run that is shorter than the interval.
    for every, steps in ((4, [4, 8, 9]), (100, [9]), ("auto", list(range(1, 10)))):
        assert pictured(offline(9), OpenLoop(every=every, context=2)) == steps
    assert pictured(offline(57), OpenLoop(context=2)) == [*range(5, 56, 5), 57]
    assert pictured(offline(9), OpenLoop(every=0)) == []
    assert pictured(offline(9), OpenLoop(5, 2), Stop(after=7)) == [5, 7]
    # The replay has 31 rows: longer than batches of 4, and shorter than this context.
    for context in (4, 50):
        assert pictured(offline(9), OpenLoop(every=3, context=context)) == [3, 6, 9]


def test_a_model_that_cannot_be_pictured_is_reported_once_and_trained(caplog):
    caplog.set_level(logging.INFO)
    model = dreamer()
    model.decode = lambda state: {"reward": state.features[:, :1]}
    notes = fit(offline(6), OpenLoop(every=2, context=2), model=model)
    assert [name for _, name, _ in notes.pictures] == ["imagination/open_loop_rewards"] * 3
    assert caplog.text.count("DreamerV3 decodes no 'obs', so no observations are pictured") == 1
    model = dreamer()
    model.decode = lambda state: 1 / 0
    assert fit(offline(6), OpenLoop(every=2, context=2), model=model).pictures == []
    text = "DreamerV3 cannot be pictured (ZeroDivisionError: division by zero); the run continues"
    assert caplog.text.count(text) == 1


def test_looking_does_not_change_what_is_learned():
    model, watched = dreamer(), dreamer()
    torch.manual_seed(1)
    fit(offline(6), model=model)
    torch.manual_seed(1)
    fit(offline(6), OpenLoop(every=1, context=2), model=watched)
    for name, value in model.state_dict().items():
        assert torch.equal(value, watched.state_dict()[name]), name


# ---- progress ------------------------------------------------------------------------------------


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(time, "monotonic", lambda: clock.now)
    return clock


def started(data):
    bar = Progress()
    trainer = SimpleNamespace(is_global_zero=True, datamodule=data)
    bar.on_train_start(trainer, None)
    return bar


def test_no_time_is_left_once_the_steps_exceed_their_total(clock, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 1e9)
    data = online(total_steps=9)
    bar = started(data)
    data.collector.ticks = 5  # both environments step at once
    clock.now += 1000.0
    assert bar.line(data).startswith("env steps 10/9 |")
    assert bar.line(data).endswith("| 0m00s left")
    clock.now += 100.0
    assert [bar.line(data) for _ in range(3)][-1].endswith("| 0 env steps/s | 0m00s left")
    bar.teardown(None, None, "fit")


def test_the_line_tells_position_speed_and_time_left(clock, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 1e9)
    data = online(total_steps=10_000)
    bar = started(data)
    assert "env steps 0/10,000 | updates 0 | return (last 20) none yet" in bar.line(data)
    assert "unknown time left" in bar.line(data)
    data.collector.ticks, data.collector.returns, data.updates = 1250, [100, 146.912], 1200
    clock.now += 50.0
    expected = "env steps 2,500/10,000 | updates 1,200 | return (last 2) 123.5 | 50 env steps/s"
    assert bar.line(data) == f"{expected} | 2m30s left"
    # A line every 20 seconds, at a fifth of the speed: only the last minute counts.
    rates = []
    for _ in range(5):
        clock.now, data.collector.ticks = clock.now + 20.0, data.collector.ticks + 100
        rates.append(bar.line(data).split(" | ")[-2:])
    assert rates[-1] == ["10 env steps/s", f"{(10_000 - 3500) // 600}m50s left"]
    assert rates[0][0] == "39 env steps/s" and rates[-2][0] == "10 env steps/s"
    clock.now, data.collector.ticks = clock.now + 20_000.0, data.collector.ticks + 200
    assert bar.line(data).endswith("| 0.02 env steps/s | 84h43m left")
    bar.teardown(None, None, "fit")


def test_offline_it_counts_updates(clock, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 1e9)
    data = offline(400)
    bar = started(data)
    data.updates = 100
    clock.now += 4.0
    assert bar.line(data).startswith("updates 100/400 |")
    assert bar.line(data).endswith("| 25 updates/s | 0m12s left")
    bar.teardown(None, None, "fit")


class Slow(Line):
    """One long update."""

    def compute_loss(self, batch):
        time.sleep(0.3 * (self.updates == 2))
        return super().compute_loss(batch)


def test_lines_appear_by_themselves_where_there_is_no_terminal(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.05)
    fit(online(), Progress(), model=Slow())
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) >= 3  # within the long update alone
    assert all(line.startswith("env steps ") for line in lines)
    time.sleep(0.2)
    assert capsys.readouterr().out == ""  # and end with the run


def test_there_is_a_line_at_least_every_30_seconds():
    assert progress.LOG_INTERVAL <= 30


def test_in_a_terminal_there_is_a_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)

    class Slower(Line):
        def compute_loss(self, batch):
            time.sleep(0.7 * (self.updates == 5))
            return super().compute_loss(batch)

    fit(online(), Progress(), model=Slower())
    shown = capsys.readouterr()
    assert "env steps" not in shown.out
    assert "/60 [" in shown.err and "return (last " in shown.err


SCORES = {"return": 12.25, "return_std": 3.0, "length": 20.0}


def test_every_evaluation_is_printed(capsys):
    values = iter([SCORES | {"success": 0.5}, SCORES | {"return": -1.5}, SCORES])
    fit(online(), Evaluation(lambda: next(values), every=20), MetricsWriter())
    assert capsys.readouterr().out.splitlines() == [
        "evaluation at env step 20: return 12.25 ± 3, length 20, success 0.50 (best so far)",
        "evaluation at env step 40: return -1.5 ± 3, length 20 (best so far: 12.25)",
        "evaluation at env step 60: return 12.25 ± 3, length 20 (best so far)",
    ]
    fit(offline(4), Evaluation(lambda: SCORES, every=2), MetricsWriter())
    assert "evaluation at update 2: " in capsys.readouterr().out


def test_a_printed_evaluation_does_not_break_the_bar(capsys, monkeypatch):
    monkeypatch.setattr("sys.stderr.isatty", lambda: True, raising=False)
    fit(online(), Progress(), Evaluation(lambda: SCORES, every=20), model=Slow())
    shown = capsys.readouterr()
    assert len(shown.out.splitlines()) == 3
    assert all(line.startswith("evaluation at env step ") for line in shown.out.splitlines())
    assert "/60 [" in shown.err and "\n" not in shown.err.split("/60 [")[1].rstrip()


def test_lines_end_with_an_error_too(capsys, monkeypatch):
    monkeypatch.setattr(progress, "LOG_INTERVAL", 0.02)
    with pytest.raises(RuntimeError, match="stop"):
        fit(online(), Progress(), model=Breaks(RuntimeError("stop")))
    capsys.readouterr()
    time.sleep(0.1)
    assert capsys.readouterr().out == ""
