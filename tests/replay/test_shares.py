"""Replays of several processes that share a folder, against a dict of all rows of all streams."""

from itertools import pairwise

import numpy as np
import pytest
import torch

from tests.replay.test_files import LATENTS, ROWS, SHAPES, latents, make, rows, through_file
from worldloom.replay.shares import assign_episodes, cut_streams, place_episodes
from worldloom.training import ReplayBuffer

STREAMS = 4


class Replays:
    """W replays with 4 / W streams each, and the truth about every stored row."""

    def __init__(self, folder, storage, rng):
        self.folder, self.storage, self.rng = folder, storage, rng
        self.truth = [{} for _ in range(STREAMS)]  # of each stream, {row: {field: value}}
        self.began = [0] * STREAMS
        self.open(1)

    def open(self, size):
        self.size, self.each = size, STREAMS // size
        self.replays = [
            make(self.folder, self.storage, self.each, share=(rank, size)) for rank in range(size)
        ]

    def add(self):
        """Add a row to every stream."""
        row = len(self.truth[0])
        first = self.rng.random(STREAMS) < (0.2 if row else 1)
        given = rows(self.rng, (STREAMS,)) | {"fields": latents(self.rng, (STREAMS,))}
        flags = {"is_first": first, "is_last": first & False, "is_terminal": first & False}
        given |= flags
        for rank, replay in enumerate(self.replays):
            replay.add(**cut_streams([tensors(given)], *self.range(rank)))
        for stream in range(STREAMS):
            if first[stream]:
                self.began[stream] = row
            values = cut_streams([tensors(given)], stream, stream + 1)
            self.truth[stream][row] = {**values.pop("obs"), **values.pop("fields"), **values}
            self.truth[stream][row]["episode"] = torch.tensor([self.began[stream]])

    def range(self, rank):
        return rank * self.each, (rank + 1) * self.each

    def rewrite(self):
        """Sample from every replay, part of it from the online queue, and rewrite the latents."""
        for rank, replay in enumerate(self.replays):
            index = replay.sample(3, 4)["index"]
            values = latents(self.rng, (3, 2))
            replay.write_fields(index, values, 4)
            for (env, start), nth in zip(index.tolist(), range(3), strict=True):
                for at in range(2):
                    known = self.truth[rank * self.each + env][start + 2 + at]
                    known |= {name: torch.tensor(x[nth, at][None]) for name, x in values.items()}

    def save(self):
        states = []
        for replay in self.replays:
            state = replay.state_dict()
            replay.finish(state)
            states.append(through_file(state))
        return states

    def resume(self, states, size):
        """Continue with another number of replays."""
        queues = np.concatenate([replay._sampler.queue_position for replay in self.replays])
        self.open(size)
        for rank, replay in enumerate(self.replays):
            rng = np.random.default_rng(rank).bit_generator.state
            replay.load_state_dict({"shares": states, "rng": rng})
            assert (
                replay._sampler.queue_position.tolist() == queues[slice(*self.range(rank))].tolist()
            )
            assert replay._sampler.rng.bit_generator.state == rng

    def check(self):
        """Every stored row is the one that was added, with the latents written last."""
        written = len(self.truth[0])
        number = np.arange(max(0, written - ROWS), written)
        for stream, truth in enumerate(self.truth):
            rank, env = divmod(stream, self.each)
            store = self.replays[rank]._store
            assert store.written[env] == written and not store.lost
            place = np.array([env]), number[:1]
            for name in store.fields:
                found = store.take(name, *place, store.slots(*place, len(number)))[0]
                key = name.split("'")[1] if "[" in name else name
                expected = np.concatenate([truth[row][key].numpy() for row in number.tolist()])
                assert found.dtype == expected.dtype and (found == expected).all()


def tensors(tree):
    if isinstance(tree, dict):
        return {key: tensors(value) for key, value in tree.items()}
    return torch.from_numpy(np.asarray(tree))


@pytest.mark.parametrize("storage", ["ram", "memmap"])
@pytest.mark.parametrize("sizes", [(1, 2, 1), (2, 4, 2, 1), (4, 1, 4)])
def test_other_numbers_of_replays_have_the_same_rows(tmp_path, storage, sizes):
    both = Replays(tmp_path, storage, np.random.default_rng(sum(sizes)))
    both.open(sizes[0])
    for _, after in pairwise((*sizes, sizes[-1])):
        for nth in range(23):
            both.add()
            if nth % 4 == 3:
                both.rewrite()
        both.check()
        old = both.save()
        began = list(both.began)
        both.add()  # lost with the processes, as after a kill
        for truth in both.truth:
            truth.popitem()
        both.began = began
        both.resume(old, after)
        both.check()
        # The files of the checkpoint remain until the next one, whatever each replay deletes.
        files = {name: crc for state in old for name, crc in state["files"].items()}
        for replay in both.replays:
            replay.keep(files)
        new = both.save()
        for replay in both.replays:
            replay.keep({name for state in new for name in state["files"]})
            assert all(replay.damaged(state) == [] for state in (*old, *new))
            replay.keep(())
        assert {f.name for f in tmp_path.iterdir()} <= {n for state in new for n in state["files"]}


def test_rows_of_a_lost_block_are_lost_for_whoever_has_the_stream(tmp_path):
    both = Replays(tmp_path, "ram", np.random.default_rng(0))
    both.open(2)
    for _ in range(25):
        both.add()
    states = both.save()
    (tmp_path / "3-000001-rows.bin").write_bytes(b"")
    assert [replay.damaged(state) for replay, state in zip(both.replays, states, strict=True)] == [
        [],
        ["3-000001-rows.bin"],
    ]
    both.resume(states, 4)
    assert [replay._store.lost for replay in both.replays] == [set(), set(), set(), {(0, 1)}]
    both.resume(both.save(), 1)
    assert [replay._store.lost for replay in both.replays] == [{(3, 1)}]


# ---- episodes of a dataset -----------------------------------------------------------------------


def test_episodes_are_shared_equally_by_their_rows():
    counts = np.random.default_rng(0).integers(1, 100, 500).tolist()
    for size in (1, 2, 4, 7):
        chosen = np.array(assign_episodes(counts, size))
        sums = [np.array(counts)[chosen == rank].sum() for rank in range(size)]
        assert sum(sums) == sum(counts) and max(sums) - min(sums) <= 100
    assert assign_episodes([5, 1, 1, 1, 9], 2) == [0, 1, 1, 1, 1]


def test_every_row_of_an_episode_has_one_new_place():
    counts = [3, 5, 2, 4]
    seen = [place_episodes(counts, (rank, 2), 3) for rank in range(2)]
    for places in zip(*seen, strict=True):
        assert (np.sum([place >= 0 for place in places], 0) == 1).all()
    for rank, places in enumerate(seen):
        new = np.sort(np.concatenate(places))
        own = sum(n for n, at in zip(counts, assign_episodes(counts, 2), strict=True) if at == rank)
        assert new[new >= 0].tolist() == list(range(own))


COUNTS = [7, 12, 30, 9, 5, 21, 8, 11]  # rows of the episodes of a dataset


def open_frozen(folder, storage, size, seed=3):
    """Fill replays with a dataset whose observations tell the episode and the row."""
    replays = []
    for rank in range(size):
        own = [n for n, at in enumerate(assign_episodes(COUNTS, size)) if at == rank]
        capacity = sum(COUNTS[n] for n in own)
        replay = make_frozen(folder, storage, capacity, (rank, size))
        for nth in own:
            steps = COUNTS[nth] - 1
            given = rows(np.random.default_rng(nth), (steps + 1,))
            given["obs"]["joints"][:] = np.stack(
                [np.full(steps + 1, nth), *[np.arange(steps + 1)] * 2], 1
            )
            replay.add_episode(given["obs"], given["actions"][:steps], given["rewards"][:steps])
        replay.freeze(COUNTS)
        replays.append(replay)
    return replays


def make_frozen(folder, storage, capacity, share):
    options = {"fields": LATENTS, "storage": storage, "folder": folder, "share": share}
    return ReplayBuffer(capacity, SHAPES, 2, **options)


def stored_latents(replays):
    """Return {(episode, row): the latents' bytes}."""
    found = {}
    for replay in replays:
        place = np.array([0]), np.array([0])
        slots = replay._store.slots(*place, int(replay._store.written[0]))
        taken = {name: replay._store.take(name, *place, slots)[0] for name in replay._store.fields}
        for at, (episode, row, _) in enumerate(taken["obs['joints']"].tolist()):
            values = [taken[f"fields['{name}']"][at].tobytes() for name in ("deter", "stoch")]
            assert (episode, row) not in found
            found[episode, row] = b"".join(values)
    return found


@pytest.mark.parametrize("storage", ["ram", "memmap"])
@pytest.mark.parametrize("sizes", [(1, 2, 4, 1), (3, 2, 3)])
def test_latents_follow_the_episodes_of_a_dataset(tmp_path, storage, sizes):
    rng = np.random.default_rng(0)
    replays, states = open_frozen(tmp_path, storage, sizes[0]), None
    for after in (*sizes[1:], sizes[0]):
        for replay in replays:
            for _ in range(4):
                replay.write_fields(replay.sample(4, 4)["index"], latents(rng, (4, 3)), 4)
        known = stored_latents(replays)
        assert len(known) == sum(COUNTS) and len(set(known.values())) > 20
        states = []
        for replay in replays:
            state = replay.state_dict()
            replay.finish(state)
            states.append(through_file(state))
        replays = open_frozen(tmp_path, storage, after)
        for rank, replay in enumerate(replays):
            rng_state = np.random.default_rng(rank).bit_generator.state
            replay.load_state_dict({"shares": states, "rng": rng_state})
            replay.keep(name for state in states for name in state["files"])
        assert stored_latents(replays) == known


def test_another_dataset_is_rejected_with_another_number_too(tmp_path):
    replays = open_frozen(tmp_path, "ram", 2)
    states = []
    for replay in replays:
        state = replay.state_dict()
        replay.finish(state)
        states.append(state)
    rng = np.random.default_rng(0).bit_generator.state
    alone = make_frozen(tmp_path, "ram", 40, (0, 1))
    given = rows(np.random.default_rng(0), (40,))
    alone.add_episode(given["obs"], given["actions"][:39], given["rewards"][:39])
    alone.freeze([40])
    with pytest.raises(ValueError, match="the dataset has changed since"):
        alone.load_state_dict({"shares": states, "rng": rng})
