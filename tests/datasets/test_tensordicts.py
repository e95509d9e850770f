"""Files in the layout of TD-MPC2's multi-task datasets, written here as the package does it."""

import sys
import types

import numpy as np
import pytest
import torch

from tests.app.several_tasks import EPISODES, ROWS, write_mt
from worldloom.app.filling import fill_buffer
from worldloom.datasets import open_dataset
from worldloom.datasets.tensordicts import open_tensordicts
from worldloom.training import ReplayBuffer


def test_a_row_holds_what_led_to_it_and_tasks_are_one_hot(tmp_path):
    written = write_mt(tmp_path / "a.pt", first=0)
    more = write_mt(tmp_path / "b.pt", first=3)
    dataset = open_dataset(tmp_path)
    assert dataset.obs.shape == {"obs": (4,), "task": (2,)} and dataset.actions.action_dim == 3
    assert dataset.lengths == [ROWS - 1] * 2 * EPISODES and dataset.action_dims == [1, 3]
    everything = [*zip(*written, strict=True), *zip(*more, strict=True)]
    for episode, (obs, action, reward, task) in zip(dataset, everything, strict=True):
        np.testing.assert_array_equal(episode.obs["obs"], obs)
        np.testing.assert_array_equal(episode.obs["task"], np.eye(2)[task])
        np.testing.assert_array_equal(episode.actions, action[1:])
        np.testing.assert_array_equal(episode.rewards, reward[1:])
        assert not episode.terminated and episode.truncated


def test_rows_of_the_replay_are_the_official_transitions(tmp_path):
    obs, action, reward, task = write_mt(tmp_path / "a.pt", first=0)
    dataset = open_dataset(tmp_path / "a.pt")
    buffer = ReplayBuffer(100, dataset.obs.shape, dataset.actions.width, seed=0)
    fill_buffer(buffer, dataset)
    seen = set()
    for _ in range(20):
        batch = buffer.sample(4, 3, across_episodes=False)
        for row in range(4):
            start = int(batch["index"][row, 1])
            episode, t = divmod(start, ROWS)
            seen.add((episode, t))
            assert (
                t + 3 <= ROWS and batch["obs"]["task"][row].argmax(-1).unique() == task[episode, 0]
            )
            # The official update uses obs[:], action[1:] and reward[1:] of a slice.
            assert torch.equal(batch["obs"]["obs"][row], obs[episode, t : t + 3])
            assert torch.equal(batch["actions"][row, :-1], action[episode, t + 1 : t + 3])
            assert torch.equal(batch["rewards"][row, 1:], reward[episode, t + 1 : t + 3])
    assert len(seen) == EPISODES * (ROWS - 2)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"action": None}, "has no action; expected the layout of TD-MPC2's datasets"),
        ({"task": torch.zeros(EPISODES, ROWS - 1, dtype=torch.int64)}, "task has shape"),
        ({"task": torch.arange(EPISODES * ROWS).view(EPISODES, ROWS)}, "task changes in episode 0"),
        ({"task": torch.full((EPISODES, ROWS), -1)}, r"task has int64 from -1; expected 0, 1, 2"),
        ({"obs": torch.zeros(EPISODES, ROWS)}, r"obs has shape \(3, 6\) and reward \(3, 6\)"),
        ({"obs": {"deep": torch.zeros(1)}}, "cannot be read"),
        ({"reward": torch.full((EPISODES, ROWS), torch.nan)}, "rewards holds nan at index"),
        ({"action": torch.full((EPISODES, ROWS, 3), 7.0)}, "outside the action space"),
    ],
)
def test_wrong_files_are_one_line(tmp_path, change, message):
    write_mt(tmp_path / "a.pt", first=0, **change)
    with pytest.raises(ValueError, match=message) as raised:
        list(open_dataset(tmp_path))
    assert "\n" not in str(raised.value) and "a.pt" in str(raised.value)


class Evil:
    def __reduce__(self):
        return exec, ("import pathlib; pathlib.Path('executed').touch()",)


def test_nothing_but_tensors_is_unpickled(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    write_mt(tmp_path / "a.pt", first=0, other=Evil())
    torch.save(Evil(), tmp_path / "b.pt")
    for name in ("a.pt", "b.pt"):
        with pytest.raises(ValueError, match="cannot be read"):
            open_tensordicts(tmp_path / name)
    assert not (tmp_path / "executed").exists()


def test_a_real_class_of_that_name_is_not_used(tmp_path, monkeypatch):
    write_mt(tmp_path / "a.pt", first=0)
    fake = types.ModuleType("tensordict.tensordict")
    fake.TensorDict = Evil
    monkeypatch.setitem(sys.modules, "tensordict.tensordict", fake)
    assert len(open_dataset(tmp_path)) == EPISODES
