"""docs/tour.md: its reading list names files of that length, its picture the order of hooks."""

import re
from pathlib import Path

from hydra import compose, initialize_config_dir
from lightning.pytorch.trainer import call

from tests.test_run import SHORT, TINY_MODEL
from worldloom.presets import config_dir
from worldloom.run import train

ROOT = Path(__file__).resolve().parent.parent
TOUR = (ROOT / "docs" / "tour.md").read_text()
PICTURE = (ROOT / "docs" / "images" / "tour.svg").read_text()
# What Lightning calls through these functions of lightning.pytorch.trainer.call.
CALLERS = {
    "callbacks": "_call_callback_hooks",
    "module": "_call_lightning_module_hook",
    "data": "_call_lightning_datamodule_hook",
}
# Names in the picture that are called in another way, or on resume only.
ELSEWHERE = {"module.training_step", "module.backward", "data.update_replay"}
ELSEWHERE |= {"module.on_load_checkpoint", "data.load_state_dict", "callbacks.load_state_dict"}


def test_the_reading_list_has_the_lengths_of_the_files():
    rows = re.findall(r"^\| `([\w/]+\.py)` \| (\d+) \|", TOUR, re.MULTILINE)
    assert len(rows) > 10
    lengths = {name: len((ROOT / name).read_text().splitlines()) for name, _ in rows}
    assert not [(name, n, lengths[name]) for name, n in rows if abs(int(n) - lengths[name]) > 20]


def test_files_that_the_tour_names_exist():
    names = {name.rstrip("/") for name in re.findall(r"`([\w/]+(?:\.py|/))`", TOUR)}
    assert len(names) > 20
    folders = [ROOT, ROOT / "worldloom", *(ROOT / "worldloom").glob("*/")]
    folders += [ROOT / "worldloom" / "models" / family for family in ("tdmpc2", "dreamerv3")]
    written = {"model", "checkpoints/replay"}  # in the folder of a run
    assert not [n for n in names - written if not any((f / n).exists() for f in folders)]


def test_the_picture_has_the_order_of_hooks(tmp_path, monkeypatch):
    """In the picture every hook is named once, so its order is that of the first calls of a run."""
    calls = []

    def record(part, caller):
        original = getattr(call, caller)

        def recorded(trainer, hook, *args, **kwargs):
            calls.append(f"{part}.{hook}")
            return original(trainer, hook, *args, **kwargs)

        monkeypatch.setattr(call, caller, recorded)

    for part, caller in CALLERS.items():
        record(part, caller)
    words = ["~experiment", "model=dreamerv3_size1m", *TINY_MODEL, *SHORT, "evaluation.every=0"]
    with initialize_config_dir(str(config_dir()), version_base="1.3"):
        train(compose("config", [*words, "env=cartpole", f"folder={tmp_path}"]))
    drawn = re.findall(r"\b((?:callbacks|module|data)\.(?!py)\w+)<", PICTURE)
    drawn = [name for name in drawn if name not in ELSEWHERE]
    assert len(drawn) >= 14
    assert drawn == [name for name in dict.fromkeys(calls) if name in drawn]
