"""ReplayBuffer, with rows that say where they come from: obs = (env, episode, step, row)."""

import copy
import io
import subprocess
import sys
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import worldloom.training
from worldloom.protocol import ReplayField
from worldloom.training import ReplayBuffer


class Recorder:
    """Feed a buffer row by row as a collector does, and remember all that was ever written."""

    def __init__(self, buffer: ReplayBuffer, seed: int = 0, end: float = 0.2, abandon: float = 0.0):
        self.buffer, self.end, self.abandon = buffer, end, abandon
        self.rng = np.random.default_rng(seed)
        self.log: list[list[dict]] = [[] for _ in range(buffer.num_envs)]

    def row(self, env: int) -> dict:
        before = self.log[env][-1] if self.log[env] else None
        first = before is None or before["is_last"] or self.rng.random() < self.abandon
        episode, step = before["obs"][1:3] if before else (-1, 0)
        episode, step = (episode + 1, 0) if first else (episode, step + 1)
        last = not first and self.rng.random() < self.end
        return {
            "obs": np.array([env, episode, step, len(self.log[env])], np.float32),
            "actions": self.rng.normal(size=2).astype(np.float32),
            "rewards": np.float32(self.rng.normal()),
            "is_first": first,
            "is_last": last,
            "is_terminal": last and self.rng.random() < 0.5,
        }

    def step(self, count: int = 1) -> None:
        for _ in range(count):
            rows = [self.row(env) for env in range(self.buffer.num_envs)]
            for log, row in zip(self.log, rows, strict=True):
                log.append(row)
            self.buffer.add(**{key: np.stack([r[key] for r in rows]) for key in rows[0]})

    def expected(self, env: int, start: int, length: int) -> dict[str, np.ndarray]:
        rows = self.log[env][start : start + length]
        out = {key: np.stack([r[key] for r in rows]) for key in rows[0]}
        abandoned = out["is_first"][1:] & ~out["is_last"][:-1]
        out["is_last"][:-1] |= abandoned
        out["actions"][:-1][abandoned] = 0.0
        return out


def episode(steps: int, number: int = 0, env: int = 0) -> dict:
    obs = [[env, number, t, t] for t in range(steps + 1)]
    actions = np.linspace(-1, 1, 2 * steps).reshape(steps, 2)
    return {"obs": np.array(obs, float), "actions": actions, "rewards": np.arange(steps) + 1.0}


def ends(steps: int) -> np.ndarray:
    return np.arange(steps) == steps - 1


# ---- what comes out is what went in ----------------------------------------------------------


@settings(max_examples=60, deadline=None)
@given(
    num_envs=st.integers(1, 3),
    rows=st.integers(4, 25),
    steps=st.integers(4, 70),
    length=st.integers(1, 4),
    abandon=st.sampled_from([0.0, 0.15]),
    seed=st.integers(0, 99),
)
def test_samples_are_stored_rows_and_never_cross_the_write_head(
    num_envs, rows, steps, length, abandon, seed
):
    buffer = ReplayBuffer(rows * num_envs, num_envs=num_envs, seed=seed)
    recorder = Recorder(buffer, seed, abandon=abandon)
    recorder.step(steps)
    assert len(buffer) == num_envs * min(rows, steps)
    batch = buffer.sample(16, length)
    for i, (env, start) in enumerate(batch["index"].tolist()):
        assert max(0, steps - rows) <= start <= steps - length
        for key, value in recorder.expected(env, start, length).items():
            np.testing.assert_array_equal(batch[key][i].numpy(), value, err_msg=key)


@settings(max_examples=60, deadline=None)
@given(steps=st.integers(6, 90), length=st.integers(1, 6), seed=st.integers(0, 99))
def test_within_episodes_only_and_all_of_them(steps, length, seed):
    buffer = ReplayBuffer(60, num_envs=2, seed=seed)
    recorder = Recorder(buffer, seed, end=0.3, abandon=0.1)
    recorder.step(steps)
    numbers = [[int(row["obs"][1]) for row in log] for log in recorder.log]
    possible = {
        (env, s)
        for env in range(2)
        for s in range(max(0, steps - 30), steps - length + 1)
        if numbers[env][s] == numbers[env][s + length - 1]
    }
    assert buffer.can_sample(length, across_episodes=False) == bool(possible)
    if not possible:
        with pytest.raises(ValueError, match="longest stored episode has"):
            buffer.sample(4, length, across_episodes=False)
        return
    index = buffer.sample(1500, length, across_episodes=False)["index"]
    # A start is missed with probability (1 - 1/60)^1500 = 1e-11 at most.
    assert {tuple(i) for i in index.tolist()} == possible


def chi_square(index: torch.Tensor, positions: int) -> float:
    counts = np.unique(index.numpy(), axis=0, return_counts=True)[1]
    assert len(counts) == positions
    expected = len(index) / positions
    return float(((counts - expected) ** 2 / expected).sum())


@pytest.mark.parametrize("across", [True, False])
def test_start_positions_are_uniform(across):
    buffer = ReplayBuffer(60, num_envs=2, seed=3)
    for number, steps in enumerate([5, 11, 2, 1, 7]):  # 6 + 12 + 3 + 2 + 8 = 31 rows, 30 fit
        buffer.add_episode(**episode(steps, number), env=0)
    buffer.add_episode(**episode(6), env=1)
    # Sequences of 4: 27 starts in env 0 and 4 in env 1; inside episodes 2 + 9 + 0 + 0 + 5 and 4.
    positions = 31 if across else 20
    index = buffer.sample(40_000, 4, across_episodes=across)["index"]
    # Chi-square with k degrees of freedom has mean k and variance 2k: five sigma above.
    k = positions - 1
    assert chi_square(index, positions) < k + 5 * (2 * k) ** 0.5


def test_uniform_where_nearly_every_sequence_crosses():
    buffer = ReplayBuffer(1000, seed=1)
    for number in range(300):
        buffer.add_episode(**episode(1, number))
    buffer.add_episode(**episode(12))
    index = buffer.sample(3000, 11, across_episodes=False)["index"]
    assert chi_square(index, 3) < 2 + 5 * 4**0.5


def test_ring_keeps_exactly_the_newest_rows():
    buffer = ReplayBuffer(10)
    recorder = Recorder(buffer)
    for step in range(1, 40):
        recorder.step()
        assert len(buffer) == min(step, 10)
        starts = set(buffer.sample(300, 1)["index"][:, 1].tolist())
        assert starts == set(range(max(0, step - 10), step))


def test_capacity_is_shared_by_streams_and_may_be_given_in_bytes():
    buffer = ReplayBuffer(103, num_envs=10)
    assert (buffer.rows, buffer.capacity) == (10, 100)
    # 4 + 2 + 1 floats, three flags and the episode's number.
    assert buffer.bytes_per_step == 4 * 7 + 3 + 8
    assert ReplayBuffer("0.5MB").capacity == 500_000 // 39
    assert ReplayBuffer("1MiB").capacity == 2**20 // 39
    assert ReplayBuffer(1e3).capacity == 1000


def test_num_episodes_counts_those_with_a_row_left():
    buffer = ReplayBuffer(12, num_envs=2)
    assert buffer.num_episodes == 0
    buffer.add_episode(**episode(1), env=0)
    buffer.add_episode(**episode(2), env=0)
    buffer.add_episode(**episode(1), env=1)
    assert buffer.num_episodes == 3
    buffer.add_episode(**episode(2), env=0)  # 2 + 3 + 3 rows in 6 slots: the first is gone
    assert buffer.num_episodes == 3


def test_abandoned_episode_gets_is_last_in_the_batch():
    buffer = ReplayBuffer(10)
    for first in (True, False, True, False):
        flag = np.array([first])
        no = np.array([False])
        buffer.add(np.zeros((1, 4)), np.zeros((1, 2)), np.zeros(1), flag, no, no)
    batch = buffer.sample(1, 4)
    assert batch["is_last"].tolist() == [[False, True, False, False]]
    assert not batch["is_terminal"].any()


def test_the_action_of_an_abandoned_last_row_led_nowhere_and_is_zero():
    buffer = ReplayBuffer(12)
    no = np.array([False])
    for t, first in enumerate((True, False, True, False)):
        actions = np.full((1, 2), t + 1.0)
        buffer.add(np.zeros((1, 4)), actions, np.zeros(1), np.array([first]), no, no)
    batch = buffer.sample(1, 4)
    assert batch["actions"][0, :, 0].tolist() == [1.0, 0.0, 3.0, 4.0]
    assert [buffer.newest(n)["actions"][0, 0, 0].item() for n in (4, 3, 2)] == [1.0, 0.0, 3.0]


# ---- add_episode --------------------------------------------------------------------------------


def test_episode_layout_with_final_observation():
    buffer = ReplayBuffer(10)
    given_ = episode(3)
    buffer.add_episode(**given_, dones=ends(3))
    batch = buffer.sample(1, 4)
    np.testing.assert_array_equal(batch["obs"][0], given_["obs"])
    np.testing.assert_array_equal(batch["actions"][0, :3], given_["actions"].astype(np.float32))
    assert batch["actions"][0, 3].tolist() == [0, 0]
    assert batch["rewards"].tolist() == [[0, 1, 2, 3]]
    assert batch["is_first"].tolist() == [[True, False, False, False]]
    assert batch["is_last"].tolist() == batch["is_terminal"].tolist()
    assert batch["is_last"].tolist() == [[False, False, False, True]]
    assert batch["obs"].dtype == batch["rewards"].dtype == batch["actions"].dtype == torch.float32


@pytest.mark.parametrize(
    ("flags", "terminal"),
    [
        ({}, False),
        ({"dones": ends(3)}, True),
        ({"dones": np.zeros(3)}, False),
        ({"dones": torch.tensor([0, 0, 1])}, True),
        ({"terminations": ends(3)}, True),
        ({"truncations": ends(3)}, False),
        ({"terminations": np.zeros(3, bool), "truncations": ends(3)}, False),
        ({"terminations": ends(3), "truncations": ends(3)}, True),
    ],
)
def test_only_termination_is_terminal(flags, terminal):
    buffer = ReplayBuffer(10)
    buffer.add_episode(**episode(3), **flags)
    batch = buffer.sample(1, 4)
    assert batch["is_last"][0].tolist() == [False, False, False, True]
    assert batch["is_terminal"][0].tolist() == [False, False, False, terminal]


def test_episode_without_final_observation_loses_its_last_step_and_warns_once():
    buffer = ReplayBuffer(20)
    short = episode(3)
    short["obs"] = short["obs"][:3]
    with pytest.warns(UserWarning, match=r"as many observations as actions \(3\).*give 4 obs"):
        buffer.add_episode(**short, dones=ends(3))
    batch = buffer.sample(1, 3)
    assert batch["rewards"].tolist() == [[0, 1, 2]]
    assert batch["actions"][0, 2].tolist() == [0, 0]
    assert batch["is_last"].tolist() == [[False, False, True]]
    assert not batch["is_terminal"].any()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        buffer.add_episode(**short)


def test_episode_longer_than_the_ring_leaves_its_newest_rows():
    buffer = ReplayBuffer(6)
    buffer.add_episode(**episode(3))
    buffer.add_episode(**episode(14), dones=ends(14))  # rows 4 to 18
    batch = buffer.sample(1, 6, across_episodes=False)
    assert batch["index"].tolist() == [[0, 13]]
    assert batch["obs"][0, :, 2].tolist() == [9, 10, 11, 12, 13, 14]


def test_dict_observations_and_images():
    shapes = {"camera": (3, 6, 5), "arm": (4,)}
    buffer = ReplayBuffer(20, shapes, 2)
    camera = np.random.default_rng(0).integers(0, 256, (5, 3, 6, 5), np.uint8)
    arm = torch.arange(20.0).reshape(5, 4)
    data = episode(4) | {"obs": {"arm": arm, "camera": camera}}
    buffer.add_episode(**data)
    obs = buffer.sample(2, 5)["obs"]
    assert {key: (tuple(x.shape), x.dtype) for key, x in obs.items()} == {
        "camera": ((2, 5, 3, 6, 5), torch.uint8),
        "arm": ((2, 5, 4), torch.float32),
    }
    np.testing.assert_array_equal(obs["camera"][1], camera)
    assert torch.equal(obs["arm"][0], arm)
    floats = ReplayBuffer(20, (3, 2, 2), obs_dtypes="float32")
    floats.add_episode(**(episode(1) | {"obs": np.full((2, 3, 2, 2), 0.5)}))
    assert floats.sample(1, 1)["obs"].unique().item() == 0.5


# ---- online queue -------------------------------------------------------------------------------


def test_online_serves_every_stretch_once_oldest_first():
    buffer = ReplayBuffer(200, num_envs=2, online_queue=True)
    recorder = Recorder(buffer)
    served = []
    for _ in range(12):
        recorder.step(5)
        waiting = sum(len(log) // 4 for log in recorder.log) - len(served)
        index = buffer.sample(3, 4)["index"].tolist()
        served += [tuple(pair) for pair in index[: min(3, waiting)]]
    served += [tuple(pair) for pair in buffer.sample(1, 4)["index"].tolist()]
    # 60 rows, 37 samples: all 15 stretches of both streams, in the order of their rows.
    assert served == [(env, row) for row in range(0, 60, 4) for env in (0, 1)]
    recorder.step(3)  # no further stretch is whole, so the next draw is as without a queue
    plain = copy.deepcopy(buffer)
    plain.online_queue = False
    assert torch.equal(buffer.sample(30, 4)["index"], plain.sample(30, 4)["index"])


def test_online_pointer_moves_on_when_the_ring_overtakes_it():
    buffer = ReplayBuffer(10, online_queue=True)
    Recorder(buffer).step(25)
    index = buffer.sample(8, 4)["index"]
    assert index[:2].tolist() == [[0, 15], [0, 19]]
    assert index[2:, 1].min() >= 15 and index[2:, 1].max() <= 21


def test_the_queue_waits_for_episodes_to_finish():
    buffer = ReplayBuffer(200, online_queue=True, finished_episodes=True)
    buffer.add_episode(**episode(8))  # rows 0 to 8
    no = np.array([False])
    row = {"obs": np.zeros((1, 4)), "actions": np.zeros((1, 2)), "rewards": np.zeros(1)}
    for t in range(11):
        buffer.add(**row, is_first=np.array([t == 0]), is_last=no, is_terminal=no)
    starts = buffer.sample(4, 4)["index"][:, 1]
    assert starts[:2].tolist() == [0, 4] and starts.max() <= 5
    buffer.add(**row, is_first=no, is_last=~no, is_terminal=no)
    assert buffer.sample(4, 4)["index"][:3, 1].tolist() == [8, 12, 16]


# ---- draws by episode, and of finished episodes only --------------------------------------------


def drawable(recorder, length, rows, finished):
    """Return the starts in each episode with `length` rows or more, {(env, episode): starts}."""
    found = {}
    for env, log in enumerate(recorder.log):
        numbers = [int(row["obs"][1]) for row in log]
        end = len(log)
        if finished and not log[-1]["is_last"]:
            end = numbers.index(numbers[-1])
        for start in range(max(0, len(log) - rows), end - length + 1):
            if numbers[start] == numbers[start + length - 1]:
                found.setdefault((env, numbers[start]), []).append(start)
    return found


@settings(max_examples=60, deadline=None)
@given(
    steps=st.lists(st.integers(0, 40), min_size=1, max_size=6),
    length=st.integers(1, 6),
    finished=st.booleans(),
    by_episode=st.booleans(),
    rows=st.integers(12, 60),
    seed=st.integers(0, 99),
)
def test_draws_are_from_the_allowed_episodes_and_from_all(
    steps, length, finished, by_episode, rows, seed
):
    """Rows are added between draws, so the list of episodes is continued and its ring overtaken."""
    options = {"draw_by": "episode" if by_episode else "start", "finished_episodes": finished}
    buffer = ReplayBuffer(2 * rows, num_envs=2, seed=seed, **options)
    recorder = Recorder(buffer, seed, end=0.2, abandon=0.05)
    recorder.step()
    for count in steps:
        recorder.step(count)
        expected = drawable(recorder, length, rows, finished)
        assert buffer.can_sample(length, across_episodes=False) == bool(expected)
        if not expected:
            with pytest.raises(
                ValueError, match=r"(replay holds|episodes in the replay have|episode has) \d+ "
            ):
                buffer.sample(2, length, across_episodes=False)
            continue
        index = buffer.sample(1500, length, across_episodes=False)["index"].tolist()
        episodes = {(env, start): (env, n) for (env, n), x in expected.items() for start in x}
        drawn = {tuple(pair) for pair in index}
        assert drawn <= episodes.keys()
        # One of at most 120 starts or episodes is missed with probability (1 - 1/120)^1500 = 4e-6.
        # By episode, a start in a long one is rarer.
        assert {episodes[start] for start in drawn} == expected.keys()
        assert by_episode or drawn == episodes.keys()
        again = ReplayBuffer(2 * rows, num_envs=2, seed=seed + 1, **options)
        again.load_state_dict(copy.deepcopy(buffer.state_dict()))
        pair = [x.sample(50, length, across_episodes=False)["index"] for x in (buffer, again)]
        assert torch.equal(*pair)


def test_episodes_are_drawn_uniformly_and_then_the_starts_in_each():
    buffer = ReplayBuffer(200, num_envs=2, draw_by="episode", seed=2)
    for number, steps in enumerate([5, 30, 2, 9]):  # starts: 3, 28, none and 7
        buffer.add_episode(**episode(steps, number), env=0)
    buffer.add_episode(**episode(4), env=1)  # 2
    index = buffer.sample(40_000, 4, across_episodes=False)["index"].numpy()
    for env, start, count in [(0, 0, 3), (0, 6, 28), (0, 40, 7), (1, 0, 2)]:
        inside = (index[:, 0] == env) & (index[:, 1] >= start) & (index[:, 1] < start + count)
        assert abs(inside.mean() - 1 / 4) < 0.011  # five standard deviations
        assert chi_square(torch.from_numpy(index[inside]), count) < count + 5 * (2 * count) ** 0.5


def test_many_short_episodes_and_then_a_long_one():
    """The list grows, and then its oldest episodes expire without new ones."""
    buffer = ReplayBuffer(3000, draw_by="episode")
    for number in range(700):
        buffer.add_episode(**episode(3, number))
        if number % 50 == 0:
            buffer.sample(1, 4, across_episodes=False)
    buffer.add_episode(**episode(2900))
    starts = buffer.sample(20_000, 4, across_episodes=False)["index"][:, 1]
    # 99 rows are left of the short episodes: 24 of them with four rows.
    assert abs((starts < 2800).float().mean() - 24 / 25) < 0.007


@pytest.mark.parametrize(
    ("options", "across", "message"),
    [
        ({"draw_by": "length"}, False, "draw_by is 'length'; expected start or episode"),
        ({"draw_by": "episode"}, True, "across_episodes is true; set data.across_episodes=false"),
        ({"draw_by": "episode", "online_queue": True}, False, "set data.online_queue=false or"),
        ({"online_queue": True}, False, "set data.online_queue=false or"),
    ],
)
def test_ways_of_drawing_that_exclude_each_other(options, across, message):
    with pytest.raises(ValueError, match=message):
        buffer = ReplayBuffer(100, **options)
        buffer.add_episode(**episode(8))
        buffer.sample(1, 4, across_episodes=across)


# ---- latents ------------------------------------------------------------------------------------

LATENTS = {"deter": ReplayField((3,), torch.float16), "stoch": ReplayField((2, 2), torch.uint8)}


def latent_rows(rows: np.ndarray) -> dict[str, torch.Tensor]:
    deter = torch.as_tensor(rows, dtype=torch.float32)[..., None].expand(*rows.shape, 3)
    return {"deter": deter, "stoch": torch.full((*rows.shape, 2, 2), 0.9999999)}


def test_context_is_row_zero_and_written_latents_come_back():
    buffer = ReplayBuffer(40, num_envs=2, fields=LATENTS)
    zero, no = np.zeros(2), np.zeros(2, bool)
    for t in range(10):
        state = latent_rows(np.full(2, t)) if t else None
        obs, first = np.full((2, 4), t), np.full(2, t == 0)
        buffer.add(obs, np.zeros((2, 2)), zero, first, no, no, state)
    batch = buffer.sample(64, 5)
    start = batch["index"][:, 1]
    assert {k: (tuple(x.shape), x.dtype) for k, x in batch["context"].items()} == {
        "deter": ((64, 3), torch.float32),
        "stoch": ((64, 2, 2), torch.float32),
    }
    assert torch.equal(batch["context"]["deter"][:, 0], start.float())
    # 0.9999999 is a one-hot's one with a rounding error and must not be cut to 0; row 0 had None.
    assert torch.equal(batch["context"]["stoch"][:, 0, 0], (start > 0).float())

    first = batch["index"][:1]
    rows = first[:, 1:].numpy() + np.arange(1, 5)
    buffer.write_fields(first, latent_rows(rows + 100), 5)
    every = buffer.sample(2000, 1)
    env, row = every["index"].T
    touched = (env == first[0, 0]) & (row > first[0, 1]) & (row <= first[0, 1] + 4)
    assert torch.equal(every["context"]["deter"][:, 2], row.float() + 100 * touched)


def test_latents_of_overwritten_rows_are_not_written():
    buffer = ReplayBuffer(8, fields=LATENTS)
    buffer.add_episode(**episode(7))
    index = buffer.sample(1, 8)["index"]
    buffer.add_episode(**episode(4))  # rows 8 to 12 overwrite rows 0 to 4
    buffer.write_fields(index, latent_rows(np.arange(1, 8)[None]), 8)
    batch = buffer.sample(500, 1)
    row = batch["index"][:, 1]
    assert torch.equal(batch["context"]["deter"][:, 0], torch.where(row < 8, row, 0).float())


# ---- saving -------------------------------------------------------------------------------------


def through_file(state: dict) -> dict:
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


@pytest.mark.parametrize("steps", [9, 50])
def test_loaded_buffer_continues_identically(steps):
    def make(seed):
        return ReplayBuffer(60, num_envs=3, online_queue=True, fields=LATENTS, seed=seed)

    buffer, other = make(0), make(1)
    recorder = Recorder(buffer, end=0.1)
    recorder.step(steps)
    buffer.sample(5, 4)
    other.load_state_dict(through_file(buffer.state_dict()))
    twin = copy.copy(recorder)
    twin.buffer, twin.log, twin.rng = (
        other,
        copy.deepcopy(recorder.log),
        copy.deepcopy(recorder.rng),
    )
    for _ in range(30):
        recorder.step()
        twin.step()
        a, b = buffer.sample(6, 4), other.sample(6, 4)
        for key in ("obs", "actions", "rewards", "is_first", "is_last", "is_terminal", "index"):
            assert torch.equal(a[key], b[key]), key
        assert torch.equal(a["context"]["deter"], b["context"]["deter"])
    assert (len(other), other.num_episodes) == (len(buffer), buffer.num_episodes)


def test_only_the_filled_part_is_saved():
    buffer = ReplayBuffer(100_000, (3, 16, 16), num_envs=2)
    file = io.BytesIO()
    data = episode(9) | {"obs": np.zeros((10, 3, 16, 16), np.uint8)}
    buffer.add_episode(**data, env=1)
    torch.save(buffer.state_dict(), file)
    assert file.tell() < 10 * buffer.bytes_per_step + 20_000  # the rest: names and file structure


def test_state_of_another_layout_is_refused():
    state = ReplayBuffer(100).state_dict()
    with pytest.raises(ValueError, match="saved replay has capacity 100 but this one 50; resume"):
        ReplayBuffer(50).load_state_dict(state)
    with pytest.raises(ValueError, match=r"has obs float32\(4,\) but this one float32\(5,\)"):
        ReplayBuffer(100, (5,)).load_state_dict(state)


# ---- messages -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (
            {"capacity": 0},
            "capacity 0 is less than one step for each of 1 env.*raise data.cap",
        ),
        ({"capacity": -5}, "capacity -5 is less than one step"),
        ({"capacity": 3, "num_envs": 4}, "capacity 3 is less than one step for each of 4 envs"),
        ({"capacity": "lots"}, "capacity is 'lots'; set data.capacity to steps such as 100000"),
        ({"action_dim": 0}, "action_dim is 0; expected at least 1"),
        ({"num_envs": 0}, "num_envs is 0; expected at least 1"),
    ],
)
def test_bad_constructor_arguments(arguments, message):
    with pytest.raises(ValueError, match=message):
        ReplayBuffer(**arguments)


def test_too_little_data():
    buffer = ReplayBuffer(100)
    with pytest.raises(ValueError, match=r"replay is empty; add episodes, .*training.prefill"):
        buffer.sample(1, 1)
    buffer.add_episode(**episode(2))
    message = (
        "replay holds 3 steps but a sequence needs 5; raise training.prefill to at least 5 "
        "or lower training.sequence_length"
    )
    with pytest.raises(ValueError, match=message):
        buffer.sample(1, 5)
    buffer.add_episode(**episode(2))
    message = (
        "longest stored episode has 3 rows but a sequence needs 5; lower training.sequence_length"
    )
    with pytest.raises(ValueError, match=message):
        buffer.sample(1, 5, across_episodes=False)
    small = ReplayBuffer(8, num_envs=2)
    Recorder(small).step(9)
    with pytest.raises(ValueError, match=r"4 steps per env .*raise data.capacity to at least 10"):
        small.sample(1, 5)


def test_bad_requests():
    buffer = ReplayBuffer(100, online_queue=True)
    buffer.add_episode(**episode(2))
    with pytest.raises(ValueError, match="batch_size is 0; expected at least 1"):
        buffer.sample(0, 1)
    with pytest.raises(ValueError, match="seq_len is -1; expected at least 1"):
        buffer.sample(1, -1)
    with pytest.raises(ValueError, match=r"set data.online_queue=false or data.across_episodes"):
        buffer.sample(1, 1, across_episodes=False)


def test_actions_of_a_policy_may_leave_the_box():
    buffer = ReplayBuffer(100)
    first, no = np.array([True]), np.array([False])
    buffer.add(np.zeros((1, 4)), np.full((1, 2), 7.0), np.zeros(1), first, no, no)
    assert buffer.sample(1, 1)["actions"].tolist() == [[[7, 7]]]


def test_import_needs_no_lightning():
    code = (
        "import sys, worldloom.training as t; t.ReplayBuffer; assert 'lightning' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
    with pytest.raises(AttributeError, match="no attribute 'Replay'; it has"):
        _ = worldloom.training.Replay


def test_the_newest_rows_are_read_without_drawing():
    buffer = ReplayBuffer(20, (1,), 1, num_envs=2, seed=3)
    row = np.arange(26)
    for t in row:
        first = np.array([t % 7 == 0] * 2)
        last = np.array([t % 7 == 6] * 2)
        buffer.add(np.full((2, 1), t), np.zeros((2, 1)), np.zeros(2), first, last, last)
    before = buffer.state_dict()["rng"]
    assert buffer.newest(4)["obs"].tolist() == [[[22], [23], [24], [25]]]
    assert buffer.newest(4)["is_first"].tolist() == [[False] * 4]
    newest = buffer.newest(100)  # the ring of each stream holds 10
    assert newest["obs"].flatten().tolist() == list(range(16, 26))
    assert newest["is_last"].flatten().tolist() == [t % 7 == 6 for t in range(16, 26)]
    assert buffer.state_dict()["rng"] == before
    assert ReplayBuffer(20, (1,), 1).newest(4)["obs"].shape == (1, 0, 1)


def test_the_newest_rows_of_several_streams_are_as_many():
    buffer = ReplayBuffer(60, (1,), 1, num_envs=3)
    no = np.zeros(3, bool)
    for t in range(26):
        first = np.full(3, t == 0)
        obs = np.array([[t], [100 + t], [200 + t]])
        buffer.add(obs, np.zeros((3, 1)), np.zeros(3), first, no, no)
    newest = buffer.newest(3, streams=(2, 0))
    assert newest["obs"].squeeze(-1).tolist() == [[223, 224, 225], [23, 24, 25]]
    assert buffer.newest(100, streams=range(3))["obs"].shape == (3, 20, 1)
    assert ReplayBuffer(20, (1,), 1, num_envs=2).newest(4, streams=(1, 0))["obs"].shape[:2] == (
        2,
        0,
    )


# ---- the fast ways give what the slow ones do ------------------------------------------------


@pytest.mark.parametrize("behind", [False, True])
def test_draws_pick_from_the_list_of_all_start_positions(behind):
    buffer = ReplayBuffer(60, num_envs=3, seed=5)
    Recorder(buffer).step(31)
    ends = [31, 31, 31]
    if behind:  # the streams no longer have the same number of rows
        buffer.add_episode(**episode(6), env=1)
        ends[1] += 7
    starts = [(env, row) for env in range(3) for row in range(ends[env] - 20, ends[env] - 4 + 1)]
    drawn = np.random.default_rng(5).integers(len(starts), size=50)
    assert buffer.sample(50, 4)["index"].tolist() == [list(starts[n]) for n in drawn]


@pytest.mark.parametrize("shape", [(3, 64, 64), (3, 65, 65)])  # bytes that eight divides, or not
def test_large_batches_are_the_stored_rows(shape):
    buffer = ReplayBuffer(80, shape, 2, num_envs=2)
    frames = np.random.default_rng(0).integers(0, 256, (2, 60, *shape), np.uint8)
    for env in range(2):
        buffer.add_episode(frames[env], np.zeros((59, 2)), np.zeros(59), env=env)
    batch = buffer.sample(16, 20)  # 3.9 MB, from rings whose first 20 rows were overwritten
    for obs, (env, start) in zip(batch["obs"], batch["index"].tolist(), strict=True):
        np.testing.assert_array_equal(obs, frames[env, start : start + 20])


def test_a_batch_stays_as_it_is_while_others_are_drawn_and_rows_added():
    buffer = ReplayBuffer(40, (3, 64, 64), 2)
    frames = np.random.default_rng(0).integers(0, 256, (31, 3, 64, 64), np.uint8)
    whole = {"obs": frames, "actions": np.ones((30, 2)), "rewards": np.arange(30)}
    buffer.add_episode(**whole)
    batches = [buffer.sample(8, 20) for _ in range(5)]
    copies = copy.deepcopy(batches)
    buffer.add_episode(**(whole | {"obs": 255 - frames}))
    batches += [buffer.sample(8, 20) for _ in range(5)]
    for batch, before in zip(batches, copies, strict=False):
        for key, value in before.items():
            assert torch.equal(batch[key], value), key
    memory = {x.untyped_storage().data_ptr() for batch in batches for x in batch.values()}
    assert len(memory) == len(batches) * len(batches[0])


def test_rows_may_be_tensors_lists_slices_and_other_dtypes():
    plain, odd = ReplayBuffer(9, num_envs=2), ReplayBuffer(9, num_envs=2)
    obs, yes, no = np.arange(8.0).reshape(2, 4), np.ones(2, bool), np.zeros(2, bool)
    actions = np.array([[0.5, 1], [-1, 0]], np.float32)
    rewards = np.array([1, 2], np.float32)
    plain.add(obs.astype(np.float32), actions, rewards, yes, no, no)
    spread = np.zeros((2, 4), np.float32)
    spread[:, ::2] = actions
    flags = np.zeros((2, 2), bool)
    odd.add(torch.tensor(obs), spread[:, ::2], [1, 2], [True, True], flags[:, 0], torch.tensor(no))
    for key, value in plain.newest(1).items():
        assert torch.equal(odd.newest(1)[key], value), key
