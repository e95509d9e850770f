"""What docs/build.py changes in pages, and that zensical rejects broken links."""

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("latex2mathml", reason="needs the extra docs")

from docs import build

ROOT = build.ROOT
PAGE = ROOT / "docs" / "page.md"


def test_a_comment_includes_a_file():
    text = build.include_files(
        PAGE, "a\n\n<!-- include: ../examples/act.py -->\n\nb `<!-- include: c -->`\n"
    )
    code = (ROOT / "examples" / "act.py").read_text().rstrip()
    assert text == f"a\n\n```python\n{code}\n```\n\nb `<!-- include: c -->`\n"


def test_names_of_the_api_become_references():
    line = "- [`worldloom.load_run`](../../worldloom/app/saved_run.py)\n"
    assert build.include_files(ROOT / "docs" / "api" / "a.md", line) == "::: worldloom.load_run\n\n"
    assert build.include_files(PAGE, line) == line


def test_formulas_become_mathml_outside_of_code():
    text = build.convert_math(
        "$x_1$ costs $5 and `$y$`\n\n```math\n\\sum_i x\n```\n\n```bash\n$A $B\n```\n"
    )
    assert text.count("<math") == 2 and "<msub>" in text and 'display="block"' in text
    assert "costs $5 and `$y$`" in text and text.endswith("```bash\n$A $B\n```\n")


def test_a_link_to_code_leads_to_the_line_of_the_definition():
    linked = set()
    text = "[`Decoder.loss`](../worldloom/models/dreamerv3/networks.py)"
    text += " [b](../conf/config.yaml) [c](x.md)"
    text = build.link_code(PAGE, text, linked)
    path = ROOT / "worldloom" / "models" / "dreamerv3" / "networks.py"
    line = int(text.partition("networks.py.md#__codelineno-0-")[2].partition(")")[0])
    assert path.read_text().splitlines()[line - 1].strip().startswith("def loss(")
    assert "[b](../conf/config.yaml.md) [c](x.md)" in text
    assert linked == {path, ROOT / "conf" / "config.yaml"}


def test_a_link_that_shows_a_file_name_shows_the_title():
    text = build.name_pages(
        PAGE, "[models.md](models.md#presets) [docs/models.md](models.md) [x](models.md)"
    )
    assert text == "[Models](models.md#presets) [Models](models.md) [x](models.md)"


@pytest.mark.slow
@pytest.mark.skipif(not importlib.util.find_spec("zensical"), reason="needs the extra docs")
@pytest.mark.parametrize(
    ("link", "code"), [("b.md#there", 0), ("b.md#nowhere", 1), ("missing.md", 1)]
)
def test_a_broken_link_is_an_error(link, code, tmp_path):
    (tmp_path / "pages").mkdir()
    (tmp_path / "pages" / "index.md").write_text(f"# A\n\n[a link]({link})\n")
    (tmp_path / "pages" / "b.md").write_text("# B\n\n## There\n")
    (tmp_path / "mkdocs.yml").write_text("site_name: a\ndocs_dir: pages\nsite_dir: out\n")
    zensical = Path(sys.executable).with_name("zensical")
    command = [zensical, "build", "--strict"]
    assert subprocess.run(command, cwd=tmp_path, capture_output=True).returncode == code


def test_names_in_docstrings_become_a_list():
    pytest.importorskip("griffe")
    from docs.docstrings import list_names

    text = "Do it.\n\na: one\n    more\nb, c: two\n\nArgs:\n    d: three\n\nIt does: this."
    listed = "Do it.\n\n- `a`: one\n  more\n- `b, c`: two\n\nArgs:\n    d: three\n\nIt does: this."
    assert list_names(text) == listed
