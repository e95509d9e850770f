"""What the documents point at is there."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "experiments").rglob("README.md"))]


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    links = re.findall(r"\]\(([^)#]+)\)", page.read_text())
    broken = [link for link in links if "://" not in link and not (page.parent / link).exists()]
    assert not broken


def test_every_recorded_result_has_its_page():
    folders = [f for f in (ROOT / "experiments").iterdir() if f.is_dir() and f.name[0] != "_"]
    assert not [f.name for f in folders if not (f / "README.md").is_file()]


def test_recipes_named_in_the_documents_exist():
    for page in PAGES:
        for name in re.findall(r"experiment=(\w+)", page.read_text()):
            assert (ROOT / "conf" / "experiment" / f"{name}.yaml").is_file(), (page, name)
