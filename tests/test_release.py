"""What a release states in several places is the same everywhere."""

import csv
import re
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.version import Version

from experiments.install import extras as installs
from worldloom import __version__

ROOT = Path(__file__).resolve().parent.parent
INSTALLATION = (ROOT / "docs" / "installation.md").read_text()


@pytest.fixture(scope="module")
def project():
    tomllib = pytest.importorskip("tomllib", reason="needs Python 3.11")
    return tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def table_after(heading):
    """Return the rows of the first table below a heading, without its head; cells without marks."""
    text = INSTALLATION.partition(f"\n## {heading}\n")[2]
    lines = re.search(r"(?:^\|.*\n)+", text, re.MULTILINE)[0].splitlines()[2:]
    return [[cell.strip(" `") for cell in line.strip("|").split("|")] for line in lines]


def test_the_version_and_its_date_are_the_same_everywhere():
    text = (ROOT / "CHANGELOG.md").read_text()
    newest = re.search(r"^## (\d\S*) \((\d{4}-\d\d-\d\d)\)$", text, re.MULTILINE)
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text())
    assert newest.groups() == (__version__, citation["date-released"])
    assert citation["version"] == __version__ and citation["license"] == "Apache-2.0"


def test_the_page_lists_the_python_versions_of_the_metadata(project):
    declared = [
        name.rpartition(" ")[2] for name in project["classifiers"] if re.search(r":: 3\.\d+$", name)
    ]
    listed = [row[0] for row in table_after("Python and torch") if row[2].startswith("passed")]
    assert list(dict.fromkeys(listed)) == declared
    assert project["requires-python"] == f">={declared[0]}"


def test_torch_may_be_every_tested_release_but_no_later_one(project):
    (torch,) = [r for r in map(Requirement, project["dependencies"]) if r.name == "torch"]
    tested = {Version(row[1].partition("+")[0]) for row in table_after("Python and torch")}
    assert all(version in torch.specifier for version in tested)
    major, minor, *_ = max(tested).release
    assert f"{major}.{minor + 1}.0" not in torch.specifier


def test_every_extra_has_a_check_and_a_row(project):
    extras = set(project["optional-dependencies"])
    assert {*installs.CHECKS, *installs.GROUPS} - {"all"} == extras
    assert set(installs.GROUPS["suites"]) == set(
        re.search(r"\[(.*)\]", project["optional-dependencies"]["suites"][0])[1].split(",")
    )
    assert {row[0] for row in table_after("Extras")} == extras


def test_the_page_has_the_recorded_versions_of_each_extra():
    with (ROOT / "experiments" / "install" / "extras.csv").open() as file:
        recorded = {row["extra"]: row for row in csv.DictReader(file)}
    assert recorded and {row["result"] for row in recorded.values()} == {"passed"}
    for extra, _, alone, _ in table_after("Extras"):
        if extra in installs.CHECKS:
            assert alone == (recorded[extra]["packages"] if extra in recorded else "not tried")
