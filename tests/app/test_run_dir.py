"""The folder of a run: its format, and links in it that point to a user's other files."""

import csv
import os
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest
import yaml

from worldloom import eval as evaluation
from worldloom import run as training
from worldloom.app.resume import require_changeable
from worldloom.app.run_dir import (
    CONFIG,
    FORMAT,
    claim_folder,
    read_config,
    reject_links,
    remove_start,
    write_config,
)
from worldloom.app.saved_config import resolve_config

MINIMAL = {"env": {}, "model": {}, "planner": {}, "threads": 1}
# Every file that a run writes, and the temporary names of earlier versions.
NAMES = [
    *("config.yaml", ".config.yaml", "metrics.csv", "metrics.tmp", "worldloom.log", ".lock"),
    *("scores.yaml", ".scores.yaml", ".probe", "events.out.tfevents.1.host.2.0"),
    *(".hydra", ".hydra/config.yaml", ".hydra/overrides.yaml", "checkpoints", "checkpoints/replay"),
    *("checkpoints/last.ckpt", "checkpoints/last.tmp", "model", "model/config.yaml"),
    *("model/.config.yaml", "model/model.safetensors", "a/b/c/anything"),
]


def link(folder, name, target):
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.symlink_to(target)


@pytest.fixture
def precious(tmp_path):
    """A file and a folder of the user, outside of any run."""
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / ".bashrc").write_text("precious")
    return tmp_path / "home"


def require_untouched(precious):
    assert [path.name for path in precious.iterdir()] == [".bashrc"]
    assert (precious / ".bashrc").read_text() == "precious"


@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("target", [".bashrc", "", "missing"])
def test_links_to_the_outside_are_rejected(tmp_path, precious, name, target):
    folder = tmp_path / "run"
    link(folder, name, precious / target)
    with pytest.raises(ValueError, match=r"is a link to .*home.*replace the link"):
        reject_links(folder)
    with pytest.raises(ValueError, match="is a link to"), claim_folder(folder, resumes=True):
        pass
    require_untouched(precious)


def test_relative_and_chained_links_are_rejected_too(tmp_path, precious):
    folder = tmp_path / "run"
    link(folder, "a/metrics.csv", "../../home/.bashrc")
    with pytest.raises(ValueError, match="is a link to"):
        reject_links(folder)
    (folder / "a" / "metrics.csv").unlink()
    (tmp_path / "other").symlink_to(precious)
    link(folder, "a/metrics.csv", tmp_path / "other" / ".bashrc")
    with pytest.raises(ValueError, match="is a link to"):
        reject_links(folder)


def test_a_file_with_a_name_outside_is_rejected(tmp_path, precious):
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "best.ckpt").write_bytes(b"1")
    os.link(folder / "best.ckpt", folder / "last.ckpt")  # as checkpoints are kept
    reject_links(folder)
    os.link(precious / ".bashrc", folder / "metrics.csv")
    with pytest.raises(ValueError, match=r"metrics.csv has another name outside .* use a copy: cp"):
        reject_links(folder)
    with pytest.raises(ValueError, match="another name"), claim_folder(folder, resumes=True):
        pass
    shutil.copytree(folder, tmp_path / "copy")
    reject_links(tmp_path / "copy")
    require_untouched(precious)


def test_a_pipe_is_rejected(tmp_path):
    os.mkfifo(tmp_path / "worldloom.log")
    with pytest.raises(ValueError, match="neither a file nor a folder"):
        reject_links(tmp_path)


def test_links_within_the_folder_and_to_the_folder_are_fine(tmp_path):
    (tmp_path / "run").mkdir()
    write_config(tmp_path / "run", MINIMAL)
    link(tmp_path / "run", "latest", "config.yaml")
    (tmp_path / "alias").symlink_to(tmp_path / "run")
    reject_links(tmp_path / "alias")
    assert read_config(tmp_path / "alias") == MINIMAL
    reject_links(tmp_path / "missing")


COMMANDS = {
    "a new run": (training, ["hydra.run.dir=RUN"]),
    "a run in another folder": (training, ["folder=RUN", "threads=1"]),
    "a sweep": (training, ["-m", "seed=0,1", "hydra.sweep.dir=RUN"]),
    "resume": (training, ["resume=RUN"]),
    "eval": (evaluation, ["checkpoint=RUN"]),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_commands_reject_links_before_they_write(tmp_path, precious, monkeypatch, capsys, command):
    module, arguments = COMMANDS[command]
    folder = tmp_path / "run"
    folder.mkdir()
    if command in ("resume", "eval"):
        write_config(folder, MINIMAL)
    for name in ("worldloom.log", ".hydra", "0", "metrics.csv"):
        link(folder, name, precious / (".bashrc" if "." in name[1:] else ""))
    before = sorted(os.listdir(folder))
    arguments = [argument.replace("RUN", str(folder)) for argument in arguments]
    monkeypatch.setattr(sys, "argv", ["command", *arguments])
    with pytest.raises(SystemExit, match="1"):
        module.main()
    assert "is a link to" in capsys.readouterr().err
    require_untouched(precious)
    assert sorted(os.listdir(folder)) == before


# ---- runs that fail at their start ---------------------------------------------------------------

SMALL = ["model=dreamerv3_tiny", "env.id=CartPole-v1", "env.workers=0", "training.total_steps=600"]
FAILS = """from lightning.pytorch.callbacks import Callback
class Fails(Callback):
    def setup(self, *_, **__):
        raise RuntimeError("no luck")
"""


@pytest.mark.parametrize("key", ["folder", "hydra.run.dir"])
@pytest.mark.parametrize(
    ("mistake", "message"),
    [
        ("+callbacks.r._target_=lightning.pytorch.callbacks.RichProgressBar", "RichProgressBar"),
        ("+callbacks.r._target_=fails.Fails", "no luck"),
        ("training.batch_size=0", "expected at least 1"),
    ],
)
def test_a_run_that_fails_at_its_start_leaves_nothing(commands, tmp_path, key, mistake, message):
    (tmp_path / "fails.py").write_text(FAILS)
    words = [*SMALL, f"{key}={tmp_path}/a/b", mistake]
    done = commands.run(words, tmp_path)
    assert done["code"] == 1 and message in done["err"]
    assert not (tmp_path / "a").exists() and not (tmp_path / "runs").exists()


def test_files_that_were_in_the_folder_stay(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "metrics.csv").write_text("mine")
    with claim_folder(tmp_path, resumes=False) as is_new:
        write_config(tmp_path, MINIMAL)
        remove_start(tmp_path, is_new)
    assert {path.name for path in tmp_path.iterdir()} == {"notes.txt", "metrics.csv", ".lock"}


def test_a_rejected_batch_keeps_its_run(tmp_path):
    folder = tmp_path / "run"
    with claim_folder(folder, resumes=False) as is_new:
        write_config(folder, MINIMAL)
        (folder / "checkpoints").mkdir()
        (folder / "checkpoints" / "nonfinite.pt").touch()
        remove_start(folder, is_new)
    assert (folder / CONFIG).exists()


# ---- the format ----------------------------------------------------------------------------------


def test_a_configuration_records_its_format(tmp_path):
    write_config(tmp_path, MINIMAL)
    assert yaml.safe_load((tmp_path / CONFIG).read_text())["format"] == FORMAT
    assert read_config(tmp_path) == MINIMAL


@pytest.mark.parametrize(
    ("recorded", "message"),
    [
        ({}, r"written by worldloom 0\.1\.0 before format versions were recorded.*train again"),
        ({"format": 99}, r"a newer worldloom \(format 99\).*reads format 2; update worldloom"),
        ({"format": "x"}, r"an earlier worldloom \(format 'x'\)"),
    ],
)
def test_another_format_is_rejected_with_its_version(tmp_path, recorded, message):
    (tmp_path / CONFIG).write_text(yaml.safe_dump({**MINIMAL, **recorded}))
    with pytest.raises(ValueError, match=message):
        read_config(tmp_path)


# ---- a run written by an earlier version of worldloom --------------------------------------------

# Of format 2; run this file as a program, after a change that cannot read it, to write it again
# under a new format.
FIXTURE = Path(__file__).resolve().parent.parent / "fixtures" / "run"
WROTE_IT = """name=tiny threads=1 env.num_envs=2 env.workers=0 env.time_limit=20
    data.capacity=100000 training.total_steps=40 training.batch_size=2 training.sequence_length=4
    training.train_ratio=4 evaluation.episodes=2 evaluation.every=0 model.units=4 model.deter=8
    model.hidden=4
    model.classes=2 model.stoch=2 model.depth=4 model.imag_length=3 model.reward_head.bins=5
    model.critic.bins=5 model.reward_head.layers=1 model.actor.layers=1 model.critic.layers=1
    model.encoder.layers=1 model.decoder.layers=1 training.anneal=0
    hydra.run.dir=runs/tiny/fixture"""


@pytest.fixture
def saved_run(tmp_path):
    return shutil.copytree(FIXTURE, tmp_path / "saved")


def test_a_saved_run_is_evaluated_as_at_its_end(saved_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["eval.py", f"checkpoint={saved_run}"])
    evaluation.main()
    scores = yaml.safe_load((FIXTURE / "scores.yaml").read_text())
    mean, std = scores["final/return"], scores["final/return_std"]
    assert capsys.readouterr().out.startswith(f"return {mean:.2f} ± {std:.2f} over 2 episodes")


def test_a_saved_run_that_is_finished_is_recognised_on_resume(saved_run, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["run.py", f"resume={saved_run}"])
    training.main()
    out = capsys.readouterr().out
    assert f"{saved_run} is finished: 40 steps" in out
    assert f"resume={saved_run} training.total_steps=80" in out


def test_a_saved_run_is_resumed_with_its_configuration(saved_run, monkeypatch):
    started = []
    monkeypatch.setattr(training, "train", lambda cfg: started.append(cfg) or {})
    quiet = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]
    arguments = [f"resume={saved_run}", "training.total_steps=80", *quiet]
    monkeypatch.setattr(sys, "argv", ["run.py", *arguments])
    training.main()
    (cfg,) = started
    assert cfg.training.total_steps == 80 and cfg.model.units == 4 and cfg.name == "tiny"
    assert cfg.folder == cfg.resume == str(saved_run)
    lines = require_changeable(read_config(saved_run), resolve_config(cfg).saved)
    assert lines == ["training.total_steps: 40 -> 80"]


def test_the_checkpoint_of_a_saved_run_is_resumed(saved_run, commands, tmp_path):
    """Its replay, optimiser, collector, random states and metrics are read; it trains on."""
    before = (FIXTURE / "metrics.csv").read_text().splitlines()
    done = commands.good([f"resume={saved_run}", "training.total_steps=80"], tmp_path)
    assert done["err"] == "" and "WARNING" not in done["out"]
    header, *rows = csv.reader((saved_run / "metrics.csv").read_text().splitlines())
    kept = [dict(zip(before[0].split(","), line.split(","), strict=True)) for line in before[1:-1]]
    after = [dict(zip(header, row, strict=True)) for row in rows]
    assert [{k: v for k, v in new.items() if v} for new in after[: len(kept)]] == [
        {k: v for k, v in old.items() if v} for old in kept
    ]
    updates = [int(row["updates"]) for row in after]
    assert len(after) > len(kept) and updates == sorted(updates) and updates[-1] > updates[0]
    assert yaml.safe_load((saved_run / "scores.yaml").read_text())["step"] == 80


if __name__ == "__main__":
    sys.argv[1:] = WROTE_IT.split()
    with TemporaryDirectory() as scratch:
        os.chdir(scratch)
        training.main()
        shutil.rmtree(FIXTURE, ignore_errors=True)
        unused = shutil.ignore_patterns(
            "events*", ".*", "*.log", "hparams.yaml", "previous.ckpt", "replay"
        )
        shutil.copytree("runs/tiny/fixture", FIXTURE, ignore=unused)
