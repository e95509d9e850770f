"""Build the documentation site: `pip install -e '.[docs]' && python docs/build.py` writes site/.

The pages are README.md, docs/ and the READMEs of experiments/, which GitHub shows as they are. They
are copied to build/site, at the same paths, with four changes:

- `<!-- include: PATH -->` becomes a code block with the file, and in docs/api a list of names their
  reference, which mkdocstrings makes from docstrings;
- formulas, $...$ and blocks of the language math, become MathML, which browsers show without a
  script;
- a link to a file of code leads to a page with its lines; if its text is the name of a function or
  class, to the line of its definition.

zensical then builds the site (mkdocs.yml). A broken link or anchor is an error.
"""

import ast
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

from latex2mathml.converter import convert

ROOT = Path(__file__).resolve().parent.parent
STAGE = ROOT / "build" / "site"
CODE = {".py": "python", ".yaml": "yaml", ".sh": "bash"}
ASSETS = {".png", ".svg", ".css", ".csv", ".gif"}
# Blocks and spans of code, in which nothing is replaced; blocks of math are no code.
VERBATIM = re.compile(r"^[ ]*```(?!math).*?^[ ]*```[ ]*$|`[^`\n]+`", re.DOTALL | re.MULTILINE)


def list_pages() -> list[Path]:
    """Return the Markdown files of the site."""
    results = sorted((ROOT / "experiments").rglob("README.md"))
    named = [ROOT / "README.md", ROOT / "CHANGELOG.md"]
    return [*named, *sorted((ROOT / "docs").rglob("*.md")), *results]


def find_line(source: str, name: str) -> int | None:
    """Return the line of the definition of `function`, `Class` or `Class.method` in a source."""
    body = ast.parse(source).body
    found = None
    for part in name.split("."):
        kinds = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
        found = next((n for n in body if isinstance(n, kinds) and n.name == part), None)
        if found is None:
            return None
        body = found.body
    return found.lineno if found is not None else None


def include_files(page: Path, text: str) -> str:
    """Replace the comments that include files and references."""

    def include(match: re.Match[str]) -> str:
        path = page.parent / match[1]
        return f"```{CODE[path.suffix]}\n{path.read_text().rstrip()}\n```"

    text = re.sub(r"^<!-- include: (\S+) -->$", include, text, flags=re.MULTILINE)
    if page.parent.name != "api":
        return text
    return re.sub(r"^- \[`(\S+)`\]\(\S+\)$", r"::: \1\n", text, flags=re.MULTILINE)


def convert_math(text: str) -> str:
    """Replace formulas by MathML."""

    def block(match: re.Match[str]) -> str:
        formula = convert(" ".join(match[1].split()), display="block")
        return f'<div class="formula">{formula}</div>'

    def outside(part: str) -> str:
        formula = r"\$(?=\S)([^$\n]+?)(?<=\S)\$"
        return re.sub(formula, lambda m: f"<span>{convert(m[1])}</span>", part)

    text = re.sub(r"^```math\n(.*?)^```$", block, text, flags=re.DOTALL | re.MULTILINE)
    return replace_outside_code(text, outside)


def replace_outside_code(text: str, change: Callable[[str], str]) -> str:
    """Apply a change to the parts of a page that are no code."""
    parts, end = [], 0
    for code in VERBATIM.finditer(text):
        parts += [change(text[end : code.start()]), code[0]]
        end = code.end()
    return "".join([*parts, change(text[end:])])


def name_pages(page: Path, text: str) -> str:
    """Let links that show the file of a page show its title."""

    def title(match: re.Match[str]) -> str:
        label, file, anchor = match.groups(default="")
        path = page.parent / file
        if not (
            label.endswith(".md") and file.endswith(label.rpartition("/")[2]) and path.exists()
        ):
            return match[0]
        heading = re.search(r"^# (.+)$", path.read_text(), re.MULTILINE)
        return f"[{heading[1]}]({file}{anchor})" if heading else match[0]

    return re.sub(r"\[([^\]`]+)\]\(([^)#:\s]+\.md)(#[^)\s]*)?\)", title, text)


def link_code(page: Path, text: str, linked: set[Path]) -> str:
    """Let links to files of code lead to pages with their lines; add the files to `linked`."""

    def link(match: re.Match[str]) -> str:
        label, target = match.groups()
        path = (page.parent / target).resolve()
        if path.suffix not in CODE or not path.is_file():
            return match[0]
        linked.add(path)
        name = label.strip("`")
        line = find_line(path.read_text(), name) if path.suffix == ".py" else None
        anchor = f"#__codelineno-0-{line}" if line else ""
        return f"[{label}]({target}.md{anchor})"

    return re.sub(r"\[([^\]]+)\]\(([^)#:\s]+)\)", link, text)


def write_page(path: Path, text: str) -> None:
    """Write a page of the stage at the path that the file has in the repository."""
    target = STAGE / path.relative_to(ROOT)
    target.parent.mkdir(parents=True, exist_ok=True)
    target.write_text(text)


def stage() -> None:
    """Write all pages, and copy pictures and tables next to them."""
    shutil.rmtree(STAGE, ignore_errors=True)
    linked: set[Path] = set()
    for page in list_pages():
        text = convert_math(include_files(page, page.read_text()))
        write_page(page, link_code(page, name_pages(page, text), linked))
    for path in sorted(linked):
        name, language = path.relative_to(ROOT).as_posix(), CODE[path.suffix]
        head = f"---\nsearch:\n  exclude: true\n---\n\n# {name}\n\n"
        code = f'```{{.{language} linenums="1"}}\n{path.read_text().rstrip()}\n```\n'
        write_page(path.with_name(path.name + ".md"), head + code)
    for folder in ("docs", "experiments"):
        for path in (ROOT / folder).rglob("*"):
            if path.suffix in ASSETS:
                target = STAGE / path.relative_to(ROOT)
                target.parent.mkdir(parents=True, exist_ok=True)
                shutil.copy(path, target)


def main() -> None:
    """Build the site, or serve it with `--serve`; a warning is an error."""
    stage()
    command = ["serve"] if "--serve" in sys.argv else ["build", "--strict", "--clean"]
    zensical = Path(sys.executable).with_name("zensical")
    sys.exit(subprocess.run([zensical, *command], cwd=ROOT).returncode)


if __name__ == "__main__":
    main()
