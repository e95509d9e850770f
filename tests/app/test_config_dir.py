"""Files of the user's own with --config-dir in every command, and models without a run."""

import shutil

import pytest

from tests.app.test_claims import TINY

FILES = {
    "env/mine.yaml": "defaults: [gymnasium, _self_]\nid: CartPole-v1\ntime_limit: 12\n",
    "model/dreamerv3_mine.yaml": "# A small one.\ndefaults: [dreamerv3_tiny, _self_]\nunits: 8\n",
    "logger/mine.yaml": "defaults: [default]\n",
    "env/folder/mine.yaml": "defaults: [mine, _self_]\ntime_limit: 14\n",
}


@pytest.fixture(scope="module")
def place(commands, tmp_path_factory):
    """A folder with a run that used its own environment, and with the files of --config-dir."""
    here = tmp_path_factory.mktemp("place")
    for name, text in FILES.items():
        (here / "conf" / name).parent.mkdir(parents=True, exist_ok=True)
        (here / "conf" / name).write_text(text)
    words = [word for word in TINY if not word.startswith(("model=", "env.id="))]
    words += ["--config-dir", "conf", "env=mine", "model=dreamerv3_mine", "logger=mine"]
    words += ["env.workers=0", "checkpoint.every=2updates"]
    commands.good([*words, "+trainer.max_steps=2", "folder=run"], here)
    done = commands.run([*words, "+trainer.max_steps=2", "folder=run", "resume=auto"], here)
    assert "continuing run" in done["out"] and "already has 2 updates" in done["err"], done
    shutil.copy(here / "run" / "checkpoints" / "last.ckpt", here / "lonely.ckpt")
    return here


LINES = {
    "check --config-dir conf env=mine steps=20": (0, "12"),
    "check env=mine --config-dir=conf steps=20": (0, "12"),
    "check --config-dir conf env=folder/mine steps=20": (0, "14"),
    "check env=folder/min --config-dir conf": (1, "(did you mean 'folder/mine'?)"),
    "collect -cd conf env=mine policy=random episodes=2 out=out": (0, "2 episodes"),
    "eval checkpoint=lonely.ckpt env=mine episodes=2 --config-dir conf": (0, "return "),
    "eval checkpoint=lonely.ckpt env.id=CartPole-v1 episodes=1": (0, "return "),
    "collect policy=lonely.ckpt env.id=CartPole-v1 episodes=1 out=out2": (0, "1 episodes"),
    "eval checkpoint=lonely.ckpt episodes=1": (1, "contains no config.yaml"),
    "eval checkpoint=lonely.ckpt env=min --config-dir conf": (1, "(did you mean 'mine'?)"),
    "check env=min --config-dir conf": (1, "(did you mean 'mine'?)"),
    "run env=min --config-dir conf": (1, "(did you mean 'mine'?)"),
    "run model=dreamerv3_min --config-dir conf": (1, "(did you mean 'dreamerv3_mine'?)"),
    "check env=mine": (1, "unknown env 'mine'"),
    "check env=mine --config-dir nothing": (1, "--config-dir is 'nothing'; expected a folder"),
    "run env=mine --config-dir": (1, "--config-dir is ''; expected a folder"),
    "sweep run --config-dir conf": (0, "CartPole-v1"),
    "models --config-dir conf": (0, "dreamerv3:mine"),
    "bench model=dreamerv3:mine --config-dir conf repeats=1 batch=2 length=4": (0, "update"),
}


@pytest.mark.parametrize("line", LINES)
def test_every_command_reads_it(commands, place, line):
    module, *words = line.split()
    module = {"check": "check.__main__"}.get(module, module)
    done = commands.run(words, place, module=f"worldloom.{module}")
    code, said = LINES[line]
    assert done["code"] == code and said in done["err" if code else "out"], done
    assert code == 0 or len(done["err"].splitlines()) == 1
