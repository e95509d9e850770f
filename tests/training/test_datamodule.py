"""ReplayDataModule, fed by a collector that counts: obs = (env, episode, step, row)."""

import copy
import io
import math
import threading

import lightning
import numpy as np
import pytest
import torch

from worldloom.protocol import ReplayField
from worldloom.ranks import Ranks
from worldloom.training import ReplayBuffer, ReplayDataModule

LATENTS = {"deter": ReplayField((1,))}


class FakeCollector:
    """Episodes of nine steps, random actions, and a state that can be saved."""

    episodes = 0
    finished = ()
    ranks = Ranks()

    def __init__(self, buffer: ReplayBuffer, seed: int = 0, length: int = 9) -> None:
        self.buffer, self.num_envs, self.length = buffer, buffer.num_envs, length
        self.env_steps = self.ticks = 0
        self.generator = torch.Generator().manual_seed(seed)

    def step(self, stop: bool = False) -> bool:
        envs, step = self.num_envs, self.ticks % (self.length + 1)
        obs = torch.tensor([[env, self.ticks // 10, step, self.ticks] for env in range(envs)])
        actions = torch.rand(envs, 2, generator=self.generator)
        flag = [torch.full((envs,), step == s) for s in (0, self.length, self.length)]
        latents = {"deter": obs[:, 3:]} if self.buffer.context_rows else None
        self.buffer.add(obs.float(), actions, actions[:, 0], *flag, latents)
        self.ticks += 1
        self.env_steps += envs * (step > 0)
        return stop

    def close(self) -> None:
        self.closed = True

    def state_dict(self) -> dict:
        counts = {"ticks": self.ticks, "env_steps": self.env_steps}
        return counts | {"generator": self.generator.get_state()}

    def load_state_dict(self, state: dict) -> None:
        self.ticks, self.env_steps = state["ticks"], state["env_steps"]
        self.generator.set_state(state["generator"])


def online(
    num_envs=2, latents=None, length=9, seed=0, capacity=4000, queue=True, buffer=(), **changes
):
    options = {"num_envs": num_envs, "fields": latents, "online_queue": queue, "seed": seed}
    buffer = ReplayBuffer(capacity, **options, **dict(buffer))
    settings = {"batch_size": 4, "sequence_length": 6, "train_ratio": 8.0, "total_steps": 300}
    return ReplayDataModule(buffer, FakeCollector(buffer, length=length), **(settings | changes))


def pretend_to_train(data: ReplayDataModule, batch: dict) -> None:
    """Return latents as a model with replay fields does: here they depend on the context."""
    rows = batch["rewards"].shape[1]
    new = batch["context"]["deter"] * 0.5 + batch["rewards"].mean()
    data.store_fields(batch, {"deter": new[:, None].repeat(1, rows - 1, 1)})


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


# ---- the train ratio ----------------------------------------------------------------------------


@pytest.mark.parametrize("ratio", [0.7, 8.0, 100.0])
def test_batches_never_outrun_the_ratio_and_never_lag_a_tick(ratio):
    data = online(train_ratio=ratio, total_steps=400, prefill=50)
    start, batch_steps = None, 4 * 6
    for _ in data.train_dataloader():
        start = start or next(n for n in range(50, 60) if n % 2 == 0)
        owed = (data.env_steps - start) * ratio
        assert data.updates * batch_steps <= owed
        # One tick earlier this batch was not owed yet, or is one of a tick's many.
        assert data.updates * batch_steps > owed - 2 * ratio - batch_steps
    assert data.replayed_steps == data.updates * batch_steps
    assert 400 <= data.env_steps < 404
    assert data.updates == math.floor((data.env_steps - start) * ratio / batch_steps)
    assert data.replay_ratio == pytest.approx(data.replayed_steps / (data.env_steps - start))


def test_prefill_is_a_batch_of_steps_by_default():
    data = online()
    assert data.replay_ratio == 0.0
    next(iter(data.train_dataloader()))
    # 24 steps to fill, and 24 replayed steps at ratio 8 are owed after 3 more: two ticks of two.
    assert data.env_steps == 24 + 4


def test_pretraining_owes_the_steps_of_the_prefill_too():
    data = online(train_ratio=8.0, prefill=48, pretrain=True)
    stream = iter(data.train_dataloader())
    for batches in range(1, 17):  # 48 steps at ratio 8, in batches of 24 steps
        next(stream)
        assert (data.env_steps, data.updates) == (48, batches)
    next(stream)
    assert data.env_steps == 48 + 4


def test_no_ratio_means_one_update_per_environment_step():
    data = online(train_ratio=None, prefill=24, total_steps=124)
    assert data.train_ratio == 4 * 6
    list(data.train_dataloader())
    assert data.updates == data.env_steps - 24


def test_collects_until_a_sequence_fits_even_without_prefill():
    data = online(prefill=0, sequence_length=20, batch_size=1)
    batch = next(iter(data.train_dataloader()))
    assert batch["obs"].shape == (1, 20, 4)


def test_offline_yields_as_many_batches_as_asked():
    data = online()
    for _ in range(30):
        data.collector.step()
    offline = ReplayDataModule(data.buffer, batch_size=2, sequence_length=5, total_steps=7)
    batches = list(offline.train_dataloader())
    assert (len(batches), offline.updates, offline.env_steps) == (7, 7, 0)
    assert offline.replay_ratio == 0.0
    assert batches[0]["obs"].shape == (2, 5, 4)
    assert list(offline.train_dataloader()) == []


def test_across_episodes_false_reaches_the_buffer():
    data = online(across_episodes=False, queue=False)
    for batch in data.train_dataloader():
        assert not batch["is_first"][:, 1:].any()
    assert data.updates > 50


# ---- latents ------------------------------------------------------------------------------------


def test_latents_of_the_batch_that_was_moved_come_back():
    data = online(latents=LATENTS)
    stream = iter(data.train_dataloader())
    batch = next(stream)
    assert batch["obs"].shape == (4, 7, 4)  # a row of context in front of six
    torch.testing.assert_close(batch["context"]["deter"], batch["obs"][:, 0, 3:])
    moved = data.transfer_batch_to_device(batch, torch.device("cpu"), 0)
    assert moved is not batch and moved["context"] is not batch["context"]
    data.store_fields(moved, {"deter": torch.full((4, 6, 1), -1.0)})
    written = {(env, row + t) for env, row in moved["index"].tolist() for t in range(1, 7)}
    next(stream)
    seen = data.buffer.sample(3000, 1)
    for (env, row), deter in zip(seen["index"].tolist(), seen["context"]["deter"], strict=True):
        assert deter.item() == (-1 if (env, row) in written else row)


def test_latents_come_back_without_a_trainer():
    data = online(latents=LATENTS)
    stream = iter(data.train_dataloader())
    data.store_fields(next(stream), {"deter": torch.full((4, 6, 1), -1.0)})
    next(stream)
    assert data.buffer.sample(500, 1)["context"]["deter"].min() == -1


# ---- collecting while the trainer works ---------------------------------------------------------


class Waiting(FakeCollector):
    """Step only while the trainer holds a batch, once it was held for the first time."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.held = threading.Event()
        self.held.set()
        self.threads = set()

    def step(self, stop=False):
        assert self.held.wait(10), "collected while the replay was in use"
        self.threads.add(threading.current_thread())
        super().step()


def overlapped(sync=lambda: None, collector=Waiting, **changes):
    buffer = ReplayBuffer(4000, num_envs=2, online_queue=True)
    settings = {"batch_size": 4, "sequence_length": 6, "train_ratio": 8.0, "total_steps": 300}
    return ReplayDataModule(
        buffer, collector(buffer), sync_acting_copy=sync, **(settings | changes)
    )


def test_overlapped_collecting_happens_while_a_batch_is_held_and_not_else():
    data, refreshed = overlapped(lambda: refreshed.append(data.updates)), []
    collector = data.collector
    for _ in data.train_dataloader():
        collector.held.set()
        data.update_replay()  # what a callback calls that looks at the replay
        collector.held.clear()
        if data.env_steps >= data.total_steps:
            collector.held.set()
    assert collector.threads - {threading.current_thread()}
    assert refreshed == [0, *range(1, data.updates + 1)]  # before all, and before each


def test_overlapped_collecting_keeps_the_ratio_and_the_total():
    plain, data = online(), overlapped()
    for one in (plain, data):
        for _ in one.train_dataloader():
            owed = (one.env_steps - one._origin[0]) * one.train_ratio
            assert one.replayed_steps <= owed
    assert (data.updates, data.env_steps) == (plain.updates, plain.env_steps)


def test_a_mistake_of_the_collector_shows_in_the_trainer():
    class Broken(FakeCollector):
        def step(self, stop=False):
            if self.env_steps > 30:
                raise RuntimeError("the robot fell off the table")
            super().step()

    with pytest.raises(RuntimeError, match="fell off the table"):
        list(overlapped(collector=Broken).train_dataloader())


def test_a_checkpoint_waits_for_what_is_being_collected():
    data = overlapped()
    stream = iter(data.train_dataloader())
    next(stream)
    data.update_replay()
    data.collector.held.clear()
    next(stream)  # collecting for the third batch now waits
    threading.Timer(0.2, data.collector.held.set).start()
    before = data.env_steps
    assert data.state_dict()["collector"]["env_steps"] == data.env_steps > before


def test_closing_waits_and_closes_the_environments():
    for data in (online(), overlapped()):
        next(iter(data.train_dataloader()))
        data.close()
        assert data.collector.closed


# ---- resume -------------------------------------------------------------------------------------


FINISHED = {"finished_episodes": True}
SLICES = {"across_episodes": False, "queue": False}
BY_EPISODE = SLICES | {"buffer": {"draw_by": "episode"}}
LOOPS = [
    {"prefill_counts": "starts", "count_resets": True},
    {"prefill_counts": "starts", "pretrain": True},
    {"buffer": FINISHED},
    SLICES | {"buffer": FINISHED},
    BY_EPISODE,
    BY_EPISODE | {"buffer": {"draw_by": "episode"} | FINISHED, "count_resets": True},
]


CASES = [(latents, {}, stop) for latents in (None, LATENTS) for stop in (1, 20, 55)]


@pytest.mark.parametrize(
    ("latents", "loop", "stop_after"), CASES + [(LATENTS, loop, 20) for loop in LOOPS], ids=str
)
def test_resume_equals_uninterrupted(latents, loop, stop_after):
    def run(data: ReplayDataModule, stop: int | None = None) -> list[dict]:
        seen = []
        for batch in data.train_dataloader():
            if latents:
                pretend_to_train(data, batch)
            seen.append(copy.deepcopy(batch) | {"env_steps": data.env_steps})
            if len(seen) == stop:
                break
        return seen

    settings = {"latents": latents, "capacity": 160} | loop
    whole = run(online(**settings))
    first = online(**settings)
    head = run(first, stop_after)
    second = online(**settings, seed=5)
    second.load_state_dict(through_file(first.state_dict()))
    tail = run(second)
    assert len(whole) == len(head) + len(tail) > 60
    for a, b in zip(whole, head + tail, strict=True):
        assert a["env_steps"] == b["env_steps"]
        for key in ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal", "index"):
            assert torch.equal(a[key], b[key]), key
        if latents:
            assert torch.equal(a["context"]["deter"], b["context"]["deter"])


def test_resume_before_training_started_goes_on_filling():
    first, second = online(prefill=100), online(prefill=100, seed=1)
    for _ in range(20):
        first.collector.step()
    second.load_state_dict(through_file(first.state_dict()))
    next(iter(second.train_dataloader()))
    assert second.env_steps == 100 + 4


def test_changed_ratio_or_batch_size_owes_no_burst():
    first = online()
    for _ in range(10):
        next(iter(first.train_dataloader()))
    second = online(train_ratio=80.0, batch_size=1)
    second.load_state_dict(through_file(first.state_dict()))
    before = second.env_steps
    stream = iter(second.train_dataloader())
    next(stream)
    assert 0 < second.env_steps - before <= 2
    assert second.replayed_steps == first.replayed_steps + 6
    third = online(batch_size=2)
    third.load_state_dict(through_file(first.state_dict()))
    next(iter(third.train_dataloader()))
    assert third.replayed_steps == first.replayed_steps + 12


# ---- under Lightning ----------------------------------------------------------------------------


class Module(lightning.LightningModule):
    """Learn a number from every batch, so that the weight tells which batches were seen."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.drawn = []

    def training_step(self, batch: dict) -> torch.Tensor:
        self.drawn.append(self.trainer.datamodule.updates)
        pretend_to_train(self.trainer.datamodule, batch)
        return (self.weight - batch["rewards"].mean() - batch["context"]["deter"].mean()) ** 2

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.1)


def trainer(max_steps: int) -> lightning.Trainer:
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    return lightning.Trainer(
        max_steps=max_steps, max_epochs=-1, accelerator="cpu", enable_checkpointing=False, **quiet
    )


@pytest.mark.filterwarnings(
    "ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers"
)
def test_under_lightning_resume_is_exact_and_the_run_ends_by_itself(tmp_path):
    module, data = Module(), online(latents=LATENTS)
    trainer(-1).fit(module, data)
    assert module.drawn == list(range(1, data.updates + 1))  # nothing is drawn ahead
    assert data.env_steps >= 300

    part = trainer(30)
    part.fit(Module(), online(latents=LATENTS))
    assert part.datamodule.updates == 30
    part.save_checkpoint(tmp_path / "part.ckpt")
    again, rest = Module(), online(latents=LATENTS, seed=7)
    trainer(-1).fit(again, rest, ckpt_path=tmp_path / "part.ckpt")
    assert again.drawn == list(range(31, data.updates + 1))
    assert torch.equal(again.weight, module.weight)


# ---- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"batch_size": 0}, "batch_size is 0; expected at least 1"),
        ({"sequence_length": 0}, "sequence_length is 0; expected at least 1"),
        ({"train_ratio": 0.0}, "train_ratio is 0.0; expected a number above 0"),
        ({"prefill": 500}, "start after 500 environment steps but total_steps is 300; raise"),
        ({"prefill": 0, "sequence_length": 200}, "start after 400 environment steps but"),
        ({"prefill_counts": "rows"}, "prefill_counts is 'rows'; expected steps or starts"),
        (
            {"prefill_counts": "starts", "prefill": 290},
            "start after 300 environment steps but total_steps is 300; raise",
        ),
    ],
)
def test_bad_settings(changes, message):
    with pytest.raises(ValueError, match=message):
        online(**changes)


def test_episodes_too_short_to_train_on_are_reported_soon():
    data = online(length=3, across_episodes=False, queue=False, total_steps=10**6)
    with pytest.raises(
        ValueError, match="longest stored episode has 4 rows but a sequence needs 6"
    ):
        next(iter(data.train_dataloader()))
    assert data.env_steps < 60


def test_prefill_waits_for_a_finished_episode():
    data = online(length=200, buffer=FINISHED, total_steps=10**6)
    next(iter(data.train_dataloader()))
    assert data.env_steps == 404  # 24 would be enough otherwise
    endless = online(length=10**6, buffer=FINISHED)
    with pytest.raises(ValueError, match="finished episodes in the replay have 0 consecutive rows"):
        next(iter(endless.train_dataloader()))
    assert endless.env_steps == 300


def test_counting_resets_from_a_resume_on_owes_no_burst():
    first = online()
    for _ in range(10):
        next(iter(first.train_dataloader()))
    second = online(count_resets=True)
    second.load_state_dict(through_file(first.state_dict()))
    next(iter(second.train_dataloader()))
    assert second.env_steps - first.env_steps <= 4
    assert second.updates == first.updates + 1


def test_forecast_of_updates_with_resets_and_starts():
    """Before, during and after: one row in ten is that of a reset."""
    for loop in ({}, *LOOPS, LOOPS[0] | {"train_ratio": 100.0, "prefill": 100}):
        data = online(total_steps=900, **loop)
        forecasts = [data.expected_updates]
        for _ in data.train_dataloader():
            if data.updates in (1, 150):
                forecasts.append(data.expected_updates)
        for forecast, error in zip(forecasts, (0.12, 0.06, 0.02), strict=True):
            assert forecast == pytest.approx(data.updates, rel=error)


def test_offline_and_online_checkpoints_do_not_mix():
    data = online()
    offline = ReplayDataModule(data.buffer, batch_size=2, sequence_length=5, total_steps=7)
    with pytest.raises(
        ValueError, match="this run is offline but the checkpoint is from an online"
    ):
        offline.load_state_dict(data.state_dict())
    with pytest.raises(
        ValueError, match="this run is online but the checkpoint is from an offline"
    ):
        data.load_state_dict(offline.state_dict())


def test_device_gets_every_tensor():
    data = online(latents=LATENTS)
    batch = next(iter(data.train_dataloader()))
    moved = data.transfer_batch_to_device(
        batch | {"obs": {"a": batch["obs"]}}, torch.device("meta"), 0
    )
    assert moved["obs"]["a"].device.type == moved["context"]["deter"].device.type == "meta"
    assert np.all([x.device.type == "meta" for x in moved.values() if torch.is_tensor(x)])
