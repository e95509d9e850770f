"""Random histories of a replay in files, with kills and both checkpoints, against a plain dict.

The dict holds the true values of every row. A checkpoint is (state, copy of the dict); after a kill
a new replay is made in the same folder and loads the last checkpoint or the one before.
"""

import copy
import io
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from worldloom.files import atomic_write
from worldloom.protocol import ReplayField
from worldloom.training import ReplayBuffer

ROWS, ENVS = 26, 2  # blocks of 6 rows
FIELDS = {
    "deter": ReplayField((300,), torch.float16),  # large: in files if storage is "memmap"
    "stoch": ReplayField((2, 2), torch.uint8),
    "mean": ReplayField((260,), torch.float32, every_row=True),
    "count": ReplayField((1,), torch.float32, every_row=True),
}


class Crash(BaseException):
    """Stands for a kill while files are written."""


class History:
    """A replay and the truth: {(stream, row): {field: value}}."""

    def __init__(self, folder: Path, seed: int, storage: str) -> None:
        self.folder, self.rng, self.storage = folder, np.random.default_rng(seed), storage
        self.truth: dict[tuple[int, int], dict[str, np.ndarray]] = {}
        self.written = [0] * ENVS
        self.begun = None
        self.saved: list = []  # the last two finished checkpoints
        self.open()
        self.begin()
        self.finish()

    def open(self) -> None:
        self.replay = ReplayBuffer(
            *(ROWS * ENVS, (3, 14, 14), 2),
            num_envs=ENVS,
            fields=FIELDS,
            storage=self.storage,
            folder=self.folder,
        )

    def values(self, lead: tuple[int, ...]) -> dict[str, np.ndarray]:
        return {
            "deter": self.rng.normal(size=(*lead, 300)).astype(np.float16),
            "stoch": self.rng.integers(0, 9, (*lead, 2, 2), np.uint8),
            "mean": self.rng.normal(size=(*lead, 260)).astype(np.float32),
            "count": self.rng.normal(size=(*lead, 1)).astype(np.float32),
        }

    def add(self) -> None:
        obs = self.rng.integers(0, 256, (ENVS, 3, 14, 14), np.uint8)
        rewards, no = self.rng.normal(size=ENVS).astype(np.float32), np.zeros(ENVS, bool)
        first, values = np.array(self.written) == 0, self.values((ENVS,))
        self.replay.add(obs, np.zeros((ENVS, 2)), rewards, first, no, no, fields=values)
        for env in range(ENVS):
            row = {"obs": obs[env], "rewards": rewards[env]}
            row |= {name: x[env] for name, x in values.items()}
            self.truth[env, self.written[env]] = row
            self.written[env] += 1

    def rewrite(self, count: int) -> None:
        length = int(self.rng.integers(1, 9))
        if min(self.written) < length:
            return
        index = torch.stack(
            [
                torch.from_numpy(self.rng.integers(0, ENVS, count)),
                torch.from_numpy(self.rng.integers(0, min(self.written) - length + 1, count)),
            ],
            1,
        )
        rows = int(self.rng.integers(1, length + 1))
        values = self.values((count, rows))
        for name in self.rng.permutation(list(values))[: int(self.rng.integers(0, 3))]:
            del values[name]
        # Where sequences overlap, numpy keeps the last value that is written to a row.
        self.replay.write_fields(index, values, length)
        for sequence, (env, start) in enumerate(index.tolist()):
            for nth in range(rows):
                row = self.truth.get((env, start + length - rows + nth))
                if row is not None and start + length - rows + nth >= self.written[env] - ROWS:
                    row |= {name: x[sequence, nth] for name, x in values.items()}

    def begin(self) -> None:
        """Make a state; the dict is copied at the same moment."""
        state = copy.deepcopy(self.replay.state_dict())
        self.begun = state, copy.deepcopy(self.truth), list(self.written)

    def finish(self) -> None:
        if self.begun is None:
            return
        state, *rest = self.begun
        self.replay.finish(state)
        file = io.BytesIO()
        torch.save(state, file)
        file.seek(0)
        self.saved = [*self.saved[-1:], (torch.load(file, weights_only=True), *rest)]
        self.begun = None
        self.replay.keep({name for saved in self.saved for name in saved[0]["files"]})

    def kill(self, which: int, monkeypatch, after: int | None = None) -> None:
        """Drop the replay, in the middle of `finish` if `after` is given; resume a checkpoint."""
        if after is not None and self.begun is not None:
            left = [after]

            def write(path, sync=True):
                left[0] -= 1
                if left[0] < 0:
                    raise Crash
                return atomic_write(path, sync=sync)

            monkeypatch.setattr("worldloom.replay.block_files.atomic_write", write)
            try:
                self.replay.finish(self.begun[0])
            except Crash:
                pass
            finally:
                monkeypatch.undo()
        (self.folder / ".0-000000-rows.bin.0123abcd.tmp").write_bytes(b"half")
        state, truth, written = self.saved[-1 - min(which, len(self.saved) - 1)]
        self.open()
        assert self.replay.damaged(state) == []
        self.replay.load_state_dict(state)
        self.truth, self.written = copy.deepcopy(truth), list(written)
        self.begun, self.saved = None, [(state, truth, written)]

    def check(self) -> None:
        """Compare every stored row with the dict."""
        assert len(self.replay) == sum(min(n, ROWS) for n in self.written)
        if not len(self.replay):
            return
        batch = self.replay.sample(150, 1)
        for at, key in enumerate(map(tuple, batch["index"].tolist())):
            row = self.truth[key]
            got = {"obs": batch["obs"][at, 0], "rewards": batch["rewards"][at, 0]}
            got |= {name: batch["context"][name][at] for name in ("deter", "stoch")}
            got |= {name: batch["stored"][name][at, 0] for name in ("mean", "count")}
            for name, value in got.items():
                assert np.array_equal(value, row[name].astype(value.numpy().dtype)), (key, name)


STEPS = st.lists(
    st.one_of(
        st.tuples(st.just("add"), st.integers(1, 15)),
        st.tuples(st.just("rewrite"), st.integers(1, 6)),
        st.just(("begin", 0)),
        st.just(("finish", 0)),
        st.tuples(st.just("kill"), st.integers(0, 1)),
        st.tuples(st.just("kill in finish"), st.integers(0, 9)),
    ),
    min_size=10,
    max_size=60,
)


@settings(max_examples=50, deadline=None)
@given(steps=STEPS, seed=st.integers(0, 10**6), storage=st.sampled_from(["ram", "memmap"]))
def test_every_resume_has_the_rows_of_its_checkpoint(tmp_path_factory, steps, seed, storage):
    history = History(tmp_path_factory.mktemp("replay"), seed, storage)
    with pytest.MonkeyPatch.context() as monkeypatch:
        for what, value in [*steps, ("kill", 1), ("add", 9), ("begin", 0), ("finish", 0)]:
            if what == "add":
                for _ in range(value):
                    history.add()
            elif what == "rewrite":
                history.rewrite(value)
            elif what == "begin":
                history.begin()
            elif what == "finish":
                history.finish()
            else:
                in_finish = what == "kill in finish"
                which = seed % 2 if in_finish else value
                history.kill(which, monkeypatch, value if in_finish else None)
            history.check()
        history.kill(0, monkeypatch)
        history.check()
