"""Folders that go away during a run, disks that stay full, and checkpoints that are all damaged."""

import re
import shutil
from pathlib import Path

import pytest

from tests.app.test_claims import TINY, state

LOSES = """
import os, shutil
from lightning import Callback
from worldloom.training import checkpoints

class Loses(Callback):
    "Takes the folder of the run away after an update, and returns it before another one."

    def __init__(self, folder, way, until=10**9):
        self.folder, self.way, self.until = folder, way, until
        checkpoints.RETRY_SECONDS, checkpoints.LAST_TRIES, checkpoints.LAST_PAUSE = 0.0, 2, 0.0

    def on_train_batch_end(self, trainer, module, *args):
        if module.updates == 4:
            if self.way == "moved":
                os.rename(self.folder, self.folder + "-moved")
            elif self.way in ("deleted", "replaced"):
                while os.path.exists(self.folder):  # other threads write into it
                    shutil.rmtree(self.folder, ignore_errors=True)
                if self.way == "replaced":
                    os.mkdir(self.folder)
            else:
                os.chmod(self.folder + "/checkpoints", 0o555)
        if module.updates == self.until and self.way == "moved":
            os.rename(self.folder + "-moved", self.folder)
"""


def words(tmp_path, *more):
    (tmp_path / "my_code.py").write_text(LOSES)
    own = "+callbacks.loses._target_=my_code.Loses", "+callbacks.loses.folder=run"
    return [*TINY, *own, "checkpoint.every=2updates", "training.log_every=1", "folder=run", *more]


@pytest.mark.slow
def test_a_folder_that_comes_back_costs_nothing(commands, tmp_path):
    more = "+callbacks.loses.way=moved", "+callbacks.loses.until=8"
    done = commands.good(words(tmp_path, *more), tmp_path)
    said = done["out"] + done["err"]
    assert said.count("checkpoint could not be written") == 1
    assert said.count("metrics.csv cannot be written now") == 1
    assert "was moved or deleted" in said and "can be written again" in said
    assert (tmp_path / "run" / "scores.yaml").exists()
    rows = (tmp_path / "run" / "metrics.csv").read_text().splitlines()
    assert len(rows) > 8 and not (tmp_path / "run-moved").exists()


WAYS = {
    "moved": "run's folder was moved or deleted",
    "deleted": "run's folder was moved or deleted",
    "replaced": "run's folder was moved or deleted",
    "locked": "Permission denied",
}


SLOW = [pytest.param(way, marks=pytest.mark.slow) for way in ("moved", "replaced", "locked")]


@pytest.mark.parametrize("way", ["deleted", *SLOW])
def test_the_final_state_is_kept_elsewhere(commands, tmp_path, way):
    more = f"+callbacks.loses.way={way}"
    done = commands.run(words(tmp_path, more), tmp_path, unprivileged=way == "locked")
    said = done["out"] + done["err"]
    assert done["code"] == 1 and "Traceback" not in said, said
    assert said.count("checkpoint could not be written") == 1 and WAYS[way] in said
    error = next(line for line in said.splitlines() if line.startswith("error: "))
    assert f"{tmp_path}/run/checkpoints/last.ckpt could not be written" in error
    kept = Path(re.search(r"kept in (\S+\.ckpt):", error)[1])
    try:
        score = [f"checkpoint={kept}", "env.id=CartPole-v1", "episodes=1"]
        done = commands.good(score, tmp_path, module="worldloom.eval")
        assert done["out"].startswith("return ")
    finally:
        shutil.rmtree(kept.parent)
    if way in ("deleted", "moved"):  # and is not made again
        assert not (tmp_path / "run").exists()


@pytest.mark.parametrize("given", [True, False])
def test_auto_leaves_a_run_without_checkpoints_alone(commands, tmp_path, given):
    own = [*TINY, "checkpoint.every=2updates", *["folder=run"] * given]
    commands.good([*own, "+trainer.max_steps=6"], tmp_path)
    folder = tmp_path / "run" if given else next((tmp_path / "runs").glob("*/*"))
    (folder / "checkpoints" / "last.ckpt").write_bytes(b"")
    checkpoint = folder / "checkpoints" / "previous.ckpt"
    checkpoint.write_bytes(checkpoint.read_bytes()[:-500])
    before = state(folder)
    again = [*own, "+trainer.max_steps=6", "resume=auto"]
    done = commands.good(again, tmp_path)
    assert f"skipped {folder.relative_to(tmp_path)}: " in done["out"]
    assert "last.ckpt is not a complete checkpoint" in done["out"]
    assert ("its folder is run-2; run stays as it is" in done["out"]) == given
    assert state(folder) == before
    folders = {path.parent for path in tmp_path.rglob("checkpoints")}
    (new,) = folders - {folder}
    done = commands.run(again, tmp_path)  # continues the new one
    assert f"continuing {new.relative_to(tmp_path)}" in done["out"]
    assert "already has 6 updates" in done["err"]
    assert state(folder) == before
