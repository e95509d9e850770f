"""The reading list of docs/tour.md names files of about the length that it says."""

import re
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TOUR = (ROOT / "docs" / "tour.md").read_text()


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
