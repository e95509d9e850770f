"""Training in several real processes: what they decide together, and what each does for itself."""

import re

import gymnasium
import lightning
import numpy as np
import pytest
import torch
from lightning.pytorch.strategies import DDPStrategy
from torch import nn

import worldloom.app.evaluator
from tests.rank_processes import run_ranks
from worldloom.acting import Actor, EvaluationStopped
from worldloom.app.evaluator import Evaluator
from worldloom.app.task import Task
from worldloom.envs.contract import EnvError
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.envs.vector import make_vector_env
from worldloom.protocol import LatentState, ReplayField
from worldloom.ranks import RankError, rank, seed_of_rank
from worldloom.training import Collector, ReplayBuffer, ReplayDataModule, WorldModelModule
from worldloom.training.callbacks import Evaluation, MetricsWriter
from worldloom.training.interruption import Interrupted, Paused

EPISODE = 7


class Walk(gymnasium.Env):
    """Observes (seed of the episode, step); truncated after 7 steps, or fails at a given step."""

    observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (2,), np.float32)
    action_space = gymnasium.spaces.Box(-1, 1, (1,), np.float32)
    spec = None

    def __init__(self, fails_at=-1):
        self.steps, self.fails_at = 0, fails_at

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.start, self.t = float(self.np_random.integers(1000)), 0
        return self._observe(), {}

    def step(self, action):
        self.t += 1
        self.steps += 1
        if self.steps == self.fails_at:
            raise OSError("the simulator is gone")
        return self._observe(), self.start, False, self.t == EPISODE, {}

    def _observe(self):
        return np.array([self.start, self.t], np.float32)


class Line(nn.Module):
    """A loss that depends on the batch and on noise; its stored field counts the trainings."""

    def __init__(self):
        super().__init__()
        self.replay_fields = {"count": ReplayField((1,), every_row=True)}
        torch.manual_seed(3)
        self.layer = nn.Linear(2, 1)
        self.seen = []
        self.bad_updates = ()

    def encode(self, obs):
        zeros = 0 * self.layer(obs)
        return LatentState(zeros, None, zeros)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def policy(self, state, deterministic=False):
        return torch.rand(len(state), 1) - 0.5 + 0 * state.deterministic

    def replay_values(self, state):
        return {"count": state.deterministic}

    def compute_loss(self, batch):
        self.seen.append(batch["obs"].sum().item())
        value = self.layer(batch["obs"] / 1000).mean()
        if len(self.seen) in self.bad_updates and rank() == 1:
            value = value * torch.nan
        size = torch.tensor(float(len(batch["obs"])))
        return {
            "loss": value**2 + 0.01 * torch.rand(()) * value,
            "rows": size,
            "rank": size * 0 + rank(),
        }


def make(fails_at=-1, overlap=False, num_envs=4, buffer=(), **changes):
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    envs = num_envs // size
    env = make_vector_env(lambda: Walk(fails_at), num_envs=envs)
    obs = ObsSpec.from_space(env.single_observation_space)
    actions = ActionSpec.from_space(env.single_action_space)
    model, seed = Line(), seed_of_rank(5)
    kept = {"num_envs": envs, "fields": model.replay_fields, "seed": seed, "online_queue": True}
    buffer = ReplayBuffer(4000, (2,), 1, **kept | dict(buffer))
    collector = Collector(
        env, Actor(model), buffer, obs_spec=obs, action_spec=actions, seed=seed, frames_per_step=2
    )
    options = {"batch_size": 4, "sequence_length": 5, "train_ratio": 2.0, "total_steps": 1000}
    if overlap:
        options["sync_acting_copy"] = lambda: None
    return model, ReplayDataModule(buffer, collector, **options | {"prefill": 60} | changes)


class Note(lightning.Callback):
    """Notes the counters of every update, and what the callbacks see."""

    def __init__(self):
        self.counters = []

    def on_train_batch_end(self, trainer, module, *args):
        data = trainer.datamodule
        self.counters.append((data.env_steps, data.updates, module.updates))


def fit(model, data, *callbacks, nonfinite="stop"):
    lightning.seed_everything(0, verbose=False)
    optimizer = lambda params: torch.optim.SGD(params, lr=0.1)  # noqa: E731
    module = WorldModelModule(model, optimizer, log_every=10, nonfinite=nonfinite)
    size = torch.distributed.get_world_size() if torch.distributed.is_initialized() else 1
    trainer = lightning.Trainer(
        accelerator="cpu",
        devices=size,
        strategy=DDPStrategy() if size > 1 else "auto",
        max_epochs=-1,
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=list(callbacks),
    )
    try:
        trainer.fit(module, data)
    finally:
        data.close()
    return trainer


def train(rank, overlap, loop=()):
    model, data = make(overlap=overlap, **dict(loop))
    note, writer = Note(), MetricsWriter()
    trainer = fit(model, data, note, writer)
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    collector = data.collector
    mine = [env.unwrapped.steps for env in collector.rows.env.envs]
    metrics = {k: float(v) for k, v in trainer.callback_metrics.items()}
    return {
        "weights": weights,
        "seen": model.seen,
        "counters": note.counters,
        "updates": data.updates,
        "env_steps": data.env_steps,
        "own_steps": sum(mine),
        "episodes": collector.episodes,
        "returns": collector.returns,
        "ratio": data.replay_ratio,
        "replayed": data.replayed_steps,
        "rows": len(data.buffer),
        "metrics": metrics,
    }


@pytest.mark.parametrize("overlap", [False, True])
def test_ranks_train_one_model_on_their_own_data_and_count_together(overlap):
    one, two = run_ranks(train, 2, overlap)
    assert torch.equal(one["weights"], two["weights"])
    assert len(one["seen"]) == one["updates"] == two["updates"] > 90
    assert all(a != b for a, b in zip(one["seen"], two["seen"], strict=True))
    for key in ("counters", "updates", "env_steps", "episodes", "returns", "ratio", "replayed"):
        assert one[key] == two[key], key
    # The counters are those of both, against the environments' own counts.
    assert one["own_steps"] + two["own_steps"] == one["env_steps"]
    assert one["episodes"] == 4 * (one["env_steps"] // 4 // EPISODE)
    assert 1000 <= one["env_steps"] < 1004
    # Ratio as in one process: replayed steps are those of the whole batch.
    assert one["replayed"] == 20 * one["updates"]
    assert 1.96 <= one["ratio"] <= 2.0
    # Metrics: means over both ranks, and sums of both replays.
    assert one["metrics"]["stats/rows"] == 2 and one["metrics"]["stats/rank"] == 0.5
    assert one["metrics"]["replay/size"] == one["rows"] + two["rows"]
    timed = ("timings/", "fps/", "seconds")
    known = {k: v for k, v in one["metrics"].items() if not k.startswith(timed)}
    assert known == {k: two["metrics"][k] for k in known}
    assert known["frames"] == 2 * known["env_steps"]


OFFICIAL_SLICES = {"online_queue": False, "draw_by": "episode", "finished_episodes": True}


@pytest.mark.parametrize(
    "loop",
    [
        {},
        {"prefill_counts": "starts", "count_resets": True, "total_steps": 300},
        {"across_episodes": False, "buffer": OFFICIAL_SLICES, "total_steps": 300},
    ],
    ids=str,
)
def test_one_process_counts_the_same(loop):
    (one,) = run_ranks(train, 1, False, loop)
    pair, _ = run_ranks(train, 2, False, loop)
    for key in ("updates", "env_steps", "episodes", "ratio", "replayed"):
        assert one[key] == pair[key], key
    assert one["counters"] == pair["counters"]


class Ask(lightning.Callback):
    """Asks one rank to stop at an update, as a signal does."""

    def __init__(self, at, request):
        self.at, self.request = at, request

    def on_train_start(self, trainer, module):
        data = trainer.datamodule
        begin, request = self.at, self.request

        def check():
            if data.updates >= begin and rank() == 1:
                raise request

        data.check_interruption = check


def stop(rank, request, overlap):
    model, data = make(overlap=overlap)
    try:
        fit(model, data, Ask(20, request))
    except BaseException as error:
        return type(error), str(error), data.updates, data.env_steps, data.stopping
    return "finished"


@pytest.mark.parametrize("overlap", [False, True])
@pytest.mark.parametrize("request_", [Interrupted(15), Paused("trainer.max_time=1")], ids=str)
def test_a_stop_that_one_rank_asks_for_stops_all_at_the_same_place(request_, overlap):
    one, two = run_ranks(stop, 2, request_, overlap)
    assert one == two
    assert one[:2] == (type(request_), str(request_))
    assert one[2] == 20 and one[4]


class StopOne(lightning.Callback):
    """Sets `trainer.should_stop` in one rank."""

    def on_train_batch_end(self, trainer, module, *args):
        trainer.should_stop = trainer.should_stop or (module.updates == 20 and rank() == 0)


def stop_early(rank):
    model, data = make()
    trainer = fit(model, data, StopOne())
    return data.updates, data.env_steps, trainer.should_stop


def test_a_callback_that_stops_one_rank_ends_all():
    one, two = run_ranks(stop_early, 2)
    assert one == two and one[0] == 20 and one[2]


def break_env(rank, overlap):
    model, data = make(fails_at=100 if rank == 1 else -1, overlap=overlap)
    try:
        fit(model, data)
    except Exception as error:
        return type(error), str(error), data.updates, data.env_steps, data.stopping
    return "finished"


@pytest.mark.parametrize("overlap", [False, True])
def test_an_environment_that_fails_in_one_rank_stops_all_in_a_complete_state(overlap):
    one, two = run_ranks(break_env, 2, overlap)
    said = "environment 0 raised OSError: the simulator is gone in step (test_ranks.py:"
    assert one[0] is RankError and one[1].startswith(f"rank 1 failed: {said}")
    assert two[0] is EnvError and two[1].startswith(said)
    assert one[2:] == two[2:] and one[4]


def spoil(rank, mode):
    model, data = make(total_steps=400)
    model.bad_updates = (5, 9)
    try:
        trainer = fit(model, data, nonfinite=mode)
    except (FloatingPointError, RankError) as error:
        return f"{type(error).__name__}: {error}", data.updates
    module = trainer.lightning_module
    weights = torch.cat([p.detach().flatten() for p in model.parameters()])
    return module.guard.skipped, module.updates, weights.tolist(), data.updates


def test_nan_in_one_rank_is_skipped_by_all():
    one, two = run_ranks(spoil, 2, "skip")
    assert one == two
    assert one[0] == 2 and one[1] == one[3] > 20 and np.isfinite(one[2]).all()


def test_nan_in_one_rank_stops_all_and_only_that_rank_explains_it():
    one, two = run_ranks(spoil, 2, "stop")
    assert one[0].startswith("RankError: NaN or infinity in rank 1 at update 5")
    assert two[0].startswith("FloatingPointError: the loss is not finite at update 5: loss")
    assert one[1] == two[1] == 5


def task():
    probe = make_vector_env(Walk, num_envs=1)
    obs = ObsSpec.from_space(probe.single_observation_space)
    actions = ActionSpec.from_space(probe.single_action_space)
    return Task(obs, actions, EPISODE, make_env=Walk, running={"num_envs": 2})


def score(rank, num_envs, episodes):
    settings = {"num_envs": num_envs, "episodes_during": 3, "seed": 11, "deterministic": True}
    settings["max_steps"] = 1000
    evaluator = Evaluator(task(), Actor(Line()), settings)
    evaluator.ranks.connect()
    return evaluator(episodes), evaluator.score_unfinished()


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num_envs, episodes", [(4, 10), (6, 6), (3, 7)])
def test_an_evaluation_in_several_ranks_runs_the_episodes_of_one_process(size, num_envs, episodes):
    (alone,) = run_ranks(score, 1, num_envs, episodes)
    for scores in run_ranks(score, size, num_envs, episodes):
        for ours, expected in zip(scores, alone, strict=True):
            assert ours == pytest.approx(expected, rel=1e-12)


def test_ranks_without_an_episode_take_part_in_an_evaluation():
    one, *others = run_ranks(score, 3, 1, 2)
    assert all(scores == one for scores in others) and one[0]["length"] == EPISODE


def stop_in_one(rank):
    """One rank asks to stop after some steps; the lines about the progress."""
    said, calls = [], []

    def stops():
        calls.append(rank)
        return rank == 1 and len(calls) > 5

    settings = {"num_envs": 2, "seed": 11, "deterministic": True, "max_steps": 1000}
    evaluator = Evaluator(task(), Actor(Line()), settings, stops=stops, say=said.append)
    evaluator.ranks.connect()
    worldloom.app.evaluator.LOG_INTERVAL = 0.0
    with pytest.raises(EvaluationStopped):
        evaluator(100)
    return len(calls), said


def test_a_rank_that_asks_to_stop_ends_an_evaluation_in_all():
    (one, lines), (two, none) = run_ranks(stop_in_one, 2)
    assert one == two == 6 and not none and len(lines) == 6
    assert re.match(r"evaluating: \d of 50 episodes \| 5 steps \|", lines[-1])


def keep_best(rank, folder):
    model, data = make(total_steps=300)
    settings = {"num_envs": 2, "episodes_during": 4, "seed": 11, "deterministic": True}
    settings["max_steps"] = 1000
    evaluator = Evaluator(task(), data.collector.actor, settings, data.ranks)
    evaluation = Evaluation(evaluator.score_unfinished, 100, folder)
    fit(model, data, evaluation)
    return evaluation.best, evaluation.evaluated, data.updates


def test_evaluations_are_due_at_the_same_update_in_all_ranks():
    one, two = run_ranks(keep_best, 2, None)
    assert one == two and one[1] == one[2]


def odd(rank):
    model, data = make(batch_size=5)
    with pytest.raises(ValueError, match=r"training.batch_size is 5, which 2 processes"):
        fit(model, data)
    return True


def test_a_batch_that_cannot_be_shared_is_rejected():
    assert run_ranks(odd, 2) == [True, True]
