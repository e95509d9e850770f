"""Videos of evaluations, of a model that knows the rewards of its environment exactly."""

import logging
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import worldloom.envs.contract as contract
from tests.rank_processes import run_ranks
from worldloom.acting import Actor
from worldloom.app.evaluator import Evaluator
from worldloom.app.task import Task
from worldloom.app.videos import MOST_IMAGES, ForecastingActor, RecordedEpisode, Videos, draw_video
from worldloom.envs.reward_panel import HEIGHT, RewardPanel
from worldloom.protocol import LatentState, Trajectory
from worldloom.ranks import Ranks

# The processes that render import the environments, and "tests" may be another package there.
sys.path.append(str(Path(__file__).parent))
SECTION = {"_target_": "clocks.make_clock", "num_envs": 2, "workers": 0}
SETTINGS = {"num_envs": 3, "seed": 11, "deterministic": False, "max_steps": 100, "episodes": 4}


class Oracle(torch.nn.Module):
    """Reads the time from the observation; acts at random."""

    def __init__(self, broken=False):
        super().__init__()
        self.broken = broken

    def encode(self, obs):
        time = obs.float().flatten(1)[:, :1] / (10 if obs.ndim == 4 else 1)
        return LatentState(time)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def imagine(self, initial_state, actions):
        if self.broken:
            raise RuntimeError("cannot imagine")
        torch.rand(3)  # as a model that samples its states
        rewards = (initial_state.features + actions[0])[None]
        return Trajectory([initial_state], rewards, torch.ones_like(rewards))

    def policy(self, state, deterministic=False):
        return 2 * torch.rand(len(state), 1) - 1


class Trainer:
    """What a logger of a trainer receives."""

    def __init__(self):
        self.loggers, self.received = [self], {}

    def log_picture(self, name, picture, step):
        self.received[name, step] = picture


@pytest.fixture(autouse=True)
def reports(monkeypatch):
    """Nothing was reported before."""
    monkeypatch.setattr(contract, "_reported", set())


def make(folder, mode="auto", broken=False, ranks=None, settings=None, **section):
    """Return an evaluator and its videos."""
    env = {**SECTION, **section}
    settings = {**SETTINGS, **(settings or {}), "videos": mode}
    plain = {"env": env, "training": {"total_steps": 100}, "evaluation": settings}
    task = Task.from_config(env)
    videos = Videos(task, plain, folder, ranks or Ranks())
    return Evaluator(task, Actor(Oracle(broken)), settings, ranks, videos=videos), videos


def film(evaluator, videos, step=0):
    """Evaluate, and return the scores, what was recorded, and what was logged."""
    trainer = Trainer()
    videos.start(step, every=0)
    scores = evaluator(4)
    recorded = videos.recorder.episodes if videos.recorder else None
    videos.finish(trainer, "eval", step)
    return scores, recorded, trainer.received


def test_an_episode_is_recorded_with_the_rewards_that_were_predicted_for_it(tmp_path):
    _, (episode,), _ = film(*make(tmp_path))
    assert episode.seed == 11 and 4 <= len(episode.rewards) <= 8
    expected = [t + float(action[0]) for t, action in enumerate(episode.actions)]
    assert episode.rewards == pytest.approx(expected, abs=1e-5)
    assert episode.predicted == pytest.approx(expected, abs=1e-5)
    assert episode.shown == list(range(len(expected) + 1))
    assert [int(image[0, 0, 0]) for image in episode.images] == [10 * t for t in episode.shown]


def test_the_video_shows_every_step_with_its_rewards(tmp_path):
    _, (episode,), received = film(*make(tmp_path), step=70)
    ((name, step), video), count = *received.items(), len(episode.rewards)
    assert (name, step) == ("eval/video", 70)
    assert video.shape == (count + 1, 256 + HEIGHT, 256, 3) and video.dtype == np.uint8
    assert video[:, 0, 0, 0].tolist() == [10 * t for t in range(count + 1)]
    panel = RewardPanel(count)
    for t in range(count):
        panel.add(episode.rewards[t], episode.predicted[t])
    assert (video[-1, 256:] == panel.draw(np.zeros((256, 256, 3), np.uint8))[256:]).all()
    with Image.open(tmp_path / "videos" / "eval_video_000000000070.gif") as file:
        assert file.n_frames == count + 1 and file.size == (256, 256 + HEIGHT)


@pytest.mark.parametrize("mode", ["auto", True])
def test_scores_and_random_numbers_are_the_same_without_a_video(mode, tmp_path):
    torch.manual_seed(3)
    scores, recorded, _ = film(*make(tmp_path, mode))
    after = torch.rand(4)
    torch.manual_seed(3)
    plain, nothing, received = film(*make(tmp_path, False))
    assert scores == plain and (after == torch.rand(4)).all()
    assert recorded and nothing is None and received == {}


@pytest.mark.parametrize("workers", [0, 2])
def test_any_environment_is_rendered_in_a_process_of_its_own(workers, tmp_path):
    evaluator, videos = make(tmp_path, True, sees="vector", workers=workers)
    _, (episode,), received = film(evaluator, videos)
    (video,), count = received.values(), len(episode.rewards)
    assert video.shape == (count + 1, 256 + HEIGHT, 512, 3) and episode.images == []
    assert video[:, 0, 0, 1].tolist() == [10 * t for t in range(count + 1)]


def test_nothing_is_rendered_unless_it_is_asked_for(tmp_path):
    assert film(*make(tmp_path, "auto", sees="vector"))[1:] == (None, {})


@pytest.mark.parametrize(
    ("fault", "reason"),
    [
        ("raises", "no screen"),
        ("dies", "the process ended with exit code 3"),
        ("differs", "the replay of an episode differs from it at step 1; expected an environment"),
    ],
)
def test_a_renderer_that_fails_is_reported_once_and_ends_nothing(fault, reason, tmp_path, caplog):
    evaluator, videos = make(tmp_path, True, fault=fault)
    for _ in range(2):
        scores, _, received = film(evaluator, videos)
        assert received == {} and scores["length"] >= 4
    (line,) = [r.message for r in caplog.records if r.levelno == logging.WARNING]
    assert line.startswith("an evaluation has no video: ") and reason in line and "\n" not in line


def test_a_model_that_cannot_imagine_has_a_video_without_predictions(tmp_path, caplog):
    _, (episode,), received = film(*make(tmp_path, broken=True))
    assert np.isnan(episode.predicted).all() and len(episode.predicted) == len(episode.rewards)
    assert len(received) == 1
    line, other = [record.message for record in caplog.records]
    assert other.startswith("decisions are not scored: RuntimeError: cannot imagine")
    assert line.startswith("videos show no predicted rewards: RuntimeError: cannot imagine")


def test_a_full_disk_is_reported_and_the_loggers_have_the_video(tmp_path, caplog):
    _, _, received = film(*make(tmp_path / "gone"))
    assert list(received) == [("eval/video", 0)]
    assert "an evaluation has no video: FileNotFoundError" in caplog.text


@pytest.mark.parametrize("length", [2, 150, 151, 1000, 12_345])
def test_a_long_episode_keeps_few_images_and_its_last_one(length):
    episode = RecordedEpisode(0, 0)
    for step in range(length + 1):
        episode.rewards = [0.0] * step
        episode.look(np.full((1, 1, 3), step % 251, np.uint8), step == length)
    assert len(episode.images) <= MOST_IMAGES + 1
    *regular, last = episode.shown
    assert last == length and len(episode.images) == len(episode.shown)
    assert len(regular) >= min(length, MOST_IMAGES // 2 - 1)
    assert regular == list(range(0, length, episode.every))[: len(regular)]
    assert [int(image[0, 0, 0]) for image in episode.images] == [t % 251 for t in episode.shown]


def test_large_images_are_reduced():
    image = np.zeros((1000, 2000, 3), np.uint8)
    video = draw_video([(0, image), (1, image)], [1.0], [2.0])
    assert video.shape == (2, 256 + HEIGHT, 512, 3)


def test_about_ten_evaluations_of_a_run_are_shown(tmp_path):
    _, videos = make(tmp_path)  # of 100 steps
    for every, offset, expected in [(1, 0, 10), (3, 1, 10), (25, 3, 4), (10, 0, 10)]:
        due = []
        for step in range(every, 101, every):
            videos.start(step + offset, every)
            due.append(videos.due)
        assert expected - 1 <= sum(due) <= expected, every
    videos.start(0, every=0)
    assert videos.due


@pytest.mark.parametrize("mode", ["auto", False])
def test_decisions_are_scored_in_these_evaluations(tmp_path, mode):
    evaluator, videos = make(tmp_path, mode)  # of 100 steps
    found = []
    for step in (5, 10):
        videos.start(step, every=5)
        found.append({*evaluator(2)} & {"imagination/decision_loss"})
    assert found == [set(), {"imagination/decision_loss"}]
    evaluator.settings = {**evaluator.settings, "decisions": 0}
    assert "imagination/decision_loss" not in evaluator(2)


def test_every_task_of_several_has_a_video(tmp_path):
    target = {"_target_": SECTION["_target_"], "sees": "vector"}
    entries = [{**target, "name": "still"}, {**target, "name": "moving"}]
    env = {"_target_": "worldloom.envs.suites.multitask.make_env", "tasks": entries, "num_envs": 2}
    plain = {"env": env, "training": {"total_steps": 100}, "evaluation": {"videos": True}}
    task = Task.from_config({**env, "workers": 0})
    videos = Videos(task, plain, tmp_path, Ranks())

    class Several(Oracle):
        def encode(self, obs):
            return super().encode(obs["obs"])

    evaluator = Evaluator(task, Actor(Several()), SETTINGS, videos=videos)
    _, recorded, received = film(evaluator, videos)
    assert [name for name, _ in received] == ["eval/still/video", "eval/moving/video"]
    assert [episode.seed for episode in recorded] == [11, 12]
    for episode, video in zip(recorded, received.values(), strict=True):
        assert len(video) == len(episode.rewards) + 1
        assert episode.predicted == pytest.approx(episode.rewards, abs=1e-5)


def film_in_ranks(rank, folder):
    ranks = Ranks()
    ranks.connect()
    settings = {"num_envs": 2}
    _, recorded, received = film(*make(folder, ranks=ranks, settings=settings))
    return len(recorded), [*received]


@pytest.mark.slow
def test_the_first_rank_alone_shows_a_video(tmp_path):
    assert run_ranks(film_in_ranks, 2, tmp_path) == [(1, [("eval/video", 0)]), (0, [])]


def test_forecasts_use_the_state_and_the_action_before_the_step():
    actor = ForecastingActor(Actor(Oracle()), 1)
    obs = np.full((2, 1), [[3.0], [5.0]], np.float32)
    action, _ = actor(obs, np.ones(2, bool))
    assert actor.predicted.tolist() == pytest.approx([3 + float(action[0, 0])])
