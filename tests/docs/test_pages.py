"""The pages of the documentation: generated ones are current, and each is reachable."""

import ast
import importlib
import re
from pathlib import Path

import pytest

import worldloom.datasets
import worldloom.training
from docs import settings
from tests.docs.blocks import PAGES, ROOT


def test_the_reference_of_all_settings_is_current():
    message = "docs/settings.md is not current; run: python docs/settings.py"
    assert settings.PAGE.read_text() == settings.format_page(), message


def test_every_key_of_a_section_has_a_meaning():
    text = settings.PAGE.read_text()
    for section in ("training", "evaluation", "checkpoint", "data", "env"):
        rows = re.findall(rf"^\| `{section}\.\w+` \| `[^`]*` \| [^|]* \| (.*) \|$", text, re.M)
        assert rows and all(rows), section


def test_every_page_is_in_the_navigation_once():
    navigation = (ROOT / "mkdocs.yml").read_text().partition("\nnav:")[2]
    listed = re.findall(r"- (?:[^:\n]+: )?(\S+\.md)$", navigation, re.MULTILINE)
    pages = [path.relative_to(ROOT).as_posix() for path in PAGES]
    assert sorted(path for path in listed if path.startswith(("README", "docs/"))) == sorted(pages)
    assert all((ROOT / path).is_file() for path in listed)


def find(body, name):
    """Return the definition of NAME, or of CLASS.NAME, in a syntax tree."""
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.ClassDef
        node = next((n for n in body if isinstance(n, kinds) and n.name == part), None)
        body = node.body if node else []
    return node


API = [page for page in PAGES if page.parent.name == "api"]


def test_the_api_reference_lists_every_public_name_and_its_file():
    listed = {}
    for page in API:
        for name, file in re.findall(r"^- \[`(\S+)`\]\((\S+)\)$", page.read_text(), re.M):
            listed[name] = (page.parent / file).resolve()
    for module in (worldloom, worldloom.training, worldloom.datasets):
        names = {f"{module.__name__}.{name}" for name in module.__all__}
        assert names <= listed.keys(), names - listed.keys()
    for name, file in listed.items():
        module, _, attribute = name.rpartition(".")
        found = getattr(importlib.import_module(module), attribute)
        assert file == Path(importlib.import_module(found.__module__).__file__), name


@pytest.mark.parametrize("page", sorted({*PAGES} - {*API}), ids=lambda page: page.name)
def test_functions_that_a_page_links_are_defined_in_the_linked_file(page):
    links = re.findall(r"\[`([\w.]+)`\]\(([^)#]+\.py)\)", page.read_text())
    trees = {file: ast.parse((page.parent / file).read_text()).body for _, file in links}
    missing = [
        (name, file)
        for name, file in links
        if not file.endswith(name) and find(trees[file], name) is None
    ]
    assert not missing
    if page.name == "losses.md":
        assert len(links) > 30


def test_every_loss_term_has_its_weight_and_name_in_the_page_of_losses():
    from worldloom.models.dreamerv3.losses import NAMES
    from worldloom.presets import load_preset

    text = (ROOT / "docs" / "losses.md").read_text()
    for preset in ("dreamerv3_size1m", "r2dreamer_size1m", "infonce_size1m"):
        for name, scale in load_preset(preset)["loss_scales"].items():
            assert f"`{name}` {scale:g}" in text.replace(".0 |", " |").replace("1.0", "1"), name
    assert [name for name in NAMES.values() if f"`loss/{name}`" not in text] == []
    tdmpc2 = load_preset("tdmpc2_1m")
    for name in ("consistency", "reward", "value", "termination"):
        assert f"`{name}_coef` {tdmpc2[f'{name}_coef']:g}" in text.replace("1.0", "1")
        assert f"`loss/{name}_loss`" in text
