"""Damaged files, each read by a real command: one line that names the file, or a run that goes on.

A command that goes on has to say which file it leaves out, and to return what it returns without
the damage. Every case is a fork of its own (tests/forked_commands.py) with a damaged copy.
"""

import shutil
import struct
import zipfile
import zlib
from pathlib import Path

import numpy as np
import pytest

from worldloom.app.sweep_folder import SweepFolder

TRAINING = [
    *("model=dreamerv3_size1m", "env=cartpole", "~experiment", "threads=1", "env.workers=0"),
    *("env.num_envs=2", "env.time_limit=30", "model.deter=16", "model.units=8", "model.hidden=8"),
    *("model.classes=4", "model.stoch=4", "training.batch_size=2", "training.sequence_length=4"),
    *("training.train_ratio=8", "optimizer.warmup=1", "training.log_every=2"),
    *("evaluation.every=0", "evaluation.episodes=2", "callbacks.open_loop.every=0"),
    *("data.capacity=1000", "checkpoint.every=4updates", "training.total_steps=30"),
]
OFFLINE = [
    *("data=offline", "model=dreamerv3_size1m", "env=none", "threads=1", "model.deter=16"),
    *("model.units=8", "model.hidden=8", "model.classes=4", "model.stoch=4"),
    *("training.batch_size=2", "training.sequence_length=4", "training.total_steps=4"),
    *("optimizer.warmup=1", "callbacks.open_loop.every=0", "folder=new"),
]


def cut(file, part):
    """Leave the first part of a file."""
    data = file.read_bytes()
    file.write_bytes(data[: max(1, min(len(data) - 1, int(len(data) * part)))])


def flip(file, part):
    """Change the highest bit of one byte: no longer UTF-8 in a text, another number elsewhere."""
    data = bytearray(file.read_bytes())
    start, size = 0, len(data)
    if zipfile.is_zipfile(file):  # in its largest record: other bytes may be padding
        with zipfile.ZipFile(file) as opened:
            record = max(opened.infolist(), key=lambda info: info.file_size)
        name, extra = struct.unpack_from("<HH", data, record.header_offset + 26)
        start, size = record.header_offset + 30 + name + extra, record.compress_size
    data[start + int(size * part)] ^= 0x80
    file.write_bytes(data)


def folder(file):
    """Put a folder in the place of a file."""
    file.unlink()
    file.mkdir()


def picture(file):
    """Put a PNG in the place of a file."""
    parts = [
        (b"IHDR", struct.pack(">IIBBBBB", 8, 8, 8, 2, 0, 0, 0)),
        (b"IDAT", zlib.compress(bytes(8 * 25))),
        (b"IEND", b""),
    ]
    chunks = (
        struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))
        for name, data in parts
    )
    file.write_bytes(b"\x89PNG\r\n\x1a\n" + b"".join(chunks))


def arrays(file):
    """Put arrays of another program in the place of a file."""
    with file.open("wb") as opened:
        np.savez(opened, something=np.zeros(3))


def version(file):
    """Let a file be written by a newer version."""
    text = file.read_text()
    assert "\nformat: " in text
    file.write_text(text[: text.index("\nformat: ")] + "\nformat: 99\n")


DAMAGES = {
    "empty": lambda file: file.write_bytes(b""),
    "first byte": lambda file: cut(file, 0.0),
    "half": lambda file: cut(file, 0.5),
    "cut end": lambda file: cut(file, 0.98),
    "last byte": lambda file: cut(file, 1.0),
    "flip": lambda file: flip(file, 0.6),
    "flip early": lambda file: flip(file, 0.1),
    "folder": folder,
    "text": lambda file: file.write_text("Dear diary, this is not what you expected.\n"),
    "picture": picture,
    "arrays": arrays,
    "missing": Path.unlink,
    "unreadable": lambda file: file.chmod(0),
    "version": version,
}
ALL = [name for name in DAMAGES if name not in ("version", "last byte")]
FEW = ["empty", "cut end", "folder", "unreadable"]
BYTES = [*ALL, "last byte"]  # of a file whose last byte counts
YAML = [*ALL, "version"]
AGAIN = "run resume=X"
GO_ON = "run resume=X trainer.max_steps=-1"
EVAL = "eval checkpoint=X num_envs=1"
COLLECT = "collect policy=X episodes=1 out=o"
INIT = "run @TRAINING init_from=X folder=new"
TRAIN = "run @OFFLINE data.path=X"
# (file, command, damages, what happens): "error" is one line that names the file; any other text is
# in the warning of a command that goes on, with the file.
TABLE = [
    ("finished/config.yaml", EVAL, YAML, "error"),
    ("finished/config.yaml", COLLECT, FEW, "error"),
    ("finished/config.yaml", AGAIN, [*FEW, "version"], "error"),
    ("finished/config.yaml", "sweep X", [*FEW, "half", "picture"], "is damaged and left out"),
    ("finished/scores.yaml", AGAIN, [x for x in BYTES if x != "missing"], "error"),
    ("finished/scores.yaml", "sweep X", FEW, "is damaged and left out"),
    ("finished/metrics.csv", "sweep X", [*FEW[:1], "flip", *FEW[2:]], "is damaged and left out"),
    ("finished/metrics.csv", "sweep X", ["text", "picture", "arrays"], "is damaged and left out"),
    ("finished/metrics.csv", "plot X", ["flip"], "is damaged and left out"),
    ("finished/model/config.yaml", EVAL, YAML, "error"),
    ("finished/model/config.yaml", INIT, FEW, "error"),
    ("finished/model/model.safetensors", EVAL, BYTES, "error"),
    ("finished/model/model.safetensors", COLLECT, FEW, "error"),
    ("finished/model/model.safetensors", INIT, [*FEW, "flip"], "error"),
    ("stopped/config.yaml", GO_ON, FEW, "error"),
    ("stopped/metrics.csv", GO_ON, ["empty", "flip", "folder", "text", "picture"], "is damaged"),
    ("stopped/metrics.csv", GO_ON, ["half", "missing"], "rows fewer than when this run was saved"),
    ("stopped/checkpoints/last.ckpt", GO_ON, BYTES, "continuing from the previous checkpoint"),
    ("stopped/checkpoints/last.ckpt", EVAL, BYTES, "error"),
    ("stopped/checkpoints/last.ckpt", COLLECT, FEW, "error"),
    ("stopped/checkpoints/last.ckpt", INIT, [*FEW, "flip"], "error"),
    ("stopped/checkpoints/previous.ckpt", GO_ON, FEW, ""),
    ("stopped/worldloom.log", GO_ON, ["folder", "picture"], ""),
    ("stopped/.lock", GO_ON, ["text", "missing"], ""),
    ("stopped/.lock", GO_ON, ["folder"], "error"),
    ("data/000001.npz", TRAIN, [x for x in BYTES if x != "missing"], "error"),
    ("data/dataset.yaml", TRAIN, ["cut end", "flip", "picture", "unreadable", "version"], "error"),
    (
        "sweep/sweep.yaml",
        "sweep X",
        ["empty", "half", "folder", "text", "unreadable"],
        "is damaged",
    ),
    ("sweep/sweep.yaml", "run -m seed=1,2 folder=X", [x for x in YAML if x != "missing"], "error"),
    ("failed/checkpoints/nonfinite.ckpt", "diagnose X/checkpoints/nonfinite.ckpt", BYTES, "error"),
]
CASES = [
    (file, command, damage, result)
    for file, command, damages, result in TABLE
    for damage in dict.fromkeys(damages)
]
QUICK = {  # in the default tests, one of each kind of file
    ("finished/config.yaml", EVAL, "cut end"),
    ("finished/scores.yaml", AGAIN, "last byte"),
    ("finished/metrics.csv", "sweep X", "picture"),
    ("finished/model/model.safetensors", EVAL, "flip"),
    ("finished/model/config.yaml", EVAL, "half"),
    ("stopped/metrics.csv", GO_ON, "flip"),
    ("stopped/checkpoints/last.ckpt", EVAL, "flip"),
    ("data/000001.npz", TRAIN, "flip"),
}
PARAMETERS = [
    pytest.param(
        *case, marks=[] if case[:3] in QUICK else pytest.mark.slow, id=f"{case[0]}-{case[2]}-{n}"
    )
    for n, case in enumerate(CASES)
]


@pytest.fixture(scope="module")
def files(commands, tmp_path_factory):
    """A finished run, a stopped one, one with a NaN, a dataset and a sweep."""
    here = tmp_path_factory.mktemp("files")
    commands.good([*TRAINING, "folder=finished"], here)
    commands.good([*TRAINING, "+trainer.max_steps=16", "folder=stopped"], here)
    env = ["env=gymnasium", "env.id=CartPole-v1", "policy=random", "episodes=3", "out=data"]
    commands.good(env, here, module="worldloom.collect")
    words = [*TRAINING, "training.learning_rate=1e30", "training.train_ratio=64", "folder=failed"]
    assert commands.run(words, here)["code"] == 1
    sweep = SweepFolder(here / "sweep", ["seed"], {})
    sweep.path.mkdir()
    for seed in (1, 2):
        shutil.copytree(here / "finished", sweep.path / f"seed{seed}")
        sweep.update(f"seed{seed}", differs={"seed": seed}, state="finished")
    return here


def call(commands, line, cwd, **options):
    module, *words = line.replace("X", "copy").split()
    lists = {"@TRAINING": TRAINING, "@OFFLINE": OFFLINE}
    words = [part for word in words for part in lists.get(word, [word])]
    return commands.run(words, cwd, module=f"worldloom.{module}", **options)


@pytest.fixture(scope="module")
def intact(commands, files, tmp_path_factory):
    """Return what a command prints last for an intact folder, once."""
    known = {}

    def get(source, line):
        if (source, line) not in known:
            here = tmp_path_factory.mktemp("intact")
            shutil.copytree(files / source, here / "copy")
            known[source, line] = result(call(commands, line, here), here)
        return known[source, line]

    return get


def result(done, here):
    """The scores of a run, or what another command printed."""
    assert done["code"] == 0, done
    scores = here / "copy" / "scores.yaml"
    if "@" in done["out"] or not scores.is_file():
        return [line for line in done["out"].splitlines() if line.startswith("return")]
    return scores.read_text()


@pytest.mark.parametrize(("file", "line", "damage", "expected"), PARAMETERS)
def test_a_damaged_file(commands, files, intact, tmp_path, file, line, damage, expected):
    source, _, name = file.partition("/")
    shutil.copytree(files / source, tmp_path / "copy")
    DAMAGES[damage](tmp_path / "copy" / name)
    done = call(commands, line, tmp_path, unprivileged=damage == "unreadable")
    said = done["out"] + done["err"]
    assert "Traceback" not in said and "Errno" not in said.replace("[Errno", ""), said
    if expected == "error":
        (told,) = done["err"].splitlines()
        assert done["code"] == 1 and told.startswith("error: "), said
        shown = told.replace(str(tmp_path) + "/", "")
        last = name.rpartition("/")[2]
        assert "copy" in shown and last in shown, told
        return
    assert done["code"] == 0, said
    warned = [text for text in said.splitlines() if expected in text and "copy" in text]
    assert warned, said
    if line in (AGAIN, GO_ON):
        assert result(done, tmp_path) == intact(source, line)
