"""The documentation points at things that exist, and its commands name existing choices."""

import importlib.util
import re
from pathlib import Path

import pytest

from worldloom.__main__ import COMMANDS

ROOT = Path(__file__).resolve().parent.parent
DOCS = sorted((ROOT / "docs").rglob("*.md"))
PAGES = [
    ROOT / "README.md",
    ROOT / "CHANGELOG.md",
    *DOCS,
    *sorted((ROOT / "experiments").rglob("README.md")),
]


def named(page):
    return page.relative_to(ROOT).as_posix()


def mentions(pattern):
    """Return every (page, match) of a pattern in the documentation."""
    return [
        (named(page), match) for page in PAGES for match in re.findall(pattern, page.read_text())
    ]


def anchors(page):
    """Return the anchors that GitHub makes from the headings of a page."""
    headings = re.findall(r"^#+ (.+)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_links_lead_somewhere(page):
    broken = []
    for link in re.findall(r"\]\(([^)]+)\)", page.read_text()):
        file, _, anchor = link.partition("#")
        target = page.parent / file if file else page
        if "://" in link:
            continue
        if not target.exists() or (anchor and anchor not in anchors(target)):
            broken.append(link)
    assert not broken


def test_readme_is_short_and_links_every_page_of_docs():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 120
    assert [named(page) for page in DOCS if f"({named(page)}" not in text] == []


def test_every_recorded_result_has_its_page():
    folders = [f for f in (ROOT / "experiments").iterdir() if f.is_dir() and f.name[0] != "_"]
    assert not [f.name for f in folders if not (f / "README.md").is_file()]


def test_commands_exist():
    found = mentions(r"python -m (worldloom[\w.]*)")
    assert len(found) > 20
    assert not [(page, name) for page, name in found if importlib.util.find_spec(name) is None]
    short = mentions(r"[`(]worldloom ([a-z]+)")
    assert short
    assert not [(page, name) for page, name in short if name not in COMMANDS]


def test_scripts_exist():
    found = mentions(r"python ((?:experiments|tests)/[\w/]+\.py)")
    assert not [(page, name) for page, name in found if not (ROOT / name).is_file()]


@pytest.mark.parametrize("group", ["experiment", "env", "data", "trainer", "optimizer", "planner"])
def test_choices_exist(group):
    found = mentions(rf"(?<![\w.]){group}=([\w,/]+)")
    assert found
    assert not [
        (page, name)
        for page, names in found
        for name in names.split(",")
        if not (ROOT / "conf" / group / f"{name}.yaml").is_file()
    ]


def test_models_exist():
    # `python -m worldloom.run` takes files of conf/model; Python and bench take family:size too.
    found = mentions(r"(?<![\w.])model=([\w:,-]+)")
    assert len(found) > 10
    assert not [
        (page, name)
        for page, names in found
        for name in names.split(",")
        if not (ROOT / "conf" / "model" / f"{name.replace(':', '_')}.yaml").is_file()
    ]


def test_overrides_exist():
    """Every env.KEY=, training.KEY= and so on occurs in conf/ or in a settings class."""
    sources = [*(ROOT / "conf").rglob("*.yaml"), *(ROOT / "worldloom").rglob("*.py")]
    text = "\n".join(path.read_text() for path in sources)
    found = mentions(r"(?<![\w.+_])(?:env|training|data|evaluation|checkpoint)\.([a-z_]+)[=`]")
    assert len(found) > 30
    assert not [
        (page, key)
        for page, key in found
        if page != "CHANGELOG.md"  # which names keys of the past
        and not key.startswith("_")
        and not re.search(rf"^\s*{key}:", text, re.MULTILINE)
    ]
