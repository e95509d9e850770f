"""Code blocks of Markdown pages, and the commands in them."""

import re
import shlex
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


@dataclass(frozen=True)
class Block:
    """A fenced block: its page, the number of its first line of code, its language and its text."""

    page: Path
    line: int
    language: str
    text: str

    @property
    def place(self) -> str:
        return f"{self.page.relative_to(ROOT).as_posix()}:{self.line}"


@dataclass(frozen=True)
class Command:
    """A command of a block: the variables that are set for it, and its words."""

    block: Block
    variables: dict[str, str]
    words: tuple[str, ...]

    @property
    def text(self) -> str:
        return " ".join(self.words)

    @property
    def module(self) -> str:
        """Return worldloom.NAME for a command of worldloom, by either name; else ""."""
        program, *rest = self.words
        if program == "worldloom":
            return f"worldloom.{rest[0]}" if rest else "worldloom"
        return rest[1] if program == "python" and rest[0] == "-m" else ""

    @property
    def arguments(self) -> list[str]:
        """Return the arguments of a command of worldloom."""
        return [*self.words[2 if self.words[0] == "worldloom" else 3 :]]


def read_blocks(page: Path) -> list[Block]:
    """Return the fenced blocks of a page."""
    text, blocks = page.read_text(), []
    for found in re.finditer(r"^([ ]*)```(\S*)[^\n]*\n(.*?)^\1```[ ]*$", text, re.DOTALL | re.M):
        indent, language, code = found.groups()
        line = text.count("\n", 0, found.start()) + 2
        code = re.sub(rf"^{indent}", "", code, flags=re.M)
        blocks.append(Block(page, line, language, code))
    return blocks


def read_commands(block: Block) -> list[Command]:
    """Return the commands of a block of bash; of a script only those of worldloom."""
    commands = []
    for line in block.text.replace("\\\n", " ").splitlines():
        if block.text.startswith("#!") and "worldloom" not in line:
            continue
        words = shlex.split(line, comments=True)
        while words:
            end = words.index("&&") if "&&" in words else len(words)
            commands.append(_read_command(block, words[:end]))
            words = words[end + 1 :]
    return commands


def _read_command(block: Block, words: list[str]) -> Command:
    variables = {}
    while re.match(r"[A-Z_]+=", words[0]):
        name, _, variables[name] = words.pop(0).partition("=")
    return Command(block, variables, tuple(words))


def read_inline_commands(page: Path) -> list[Command]:
    """Return the complete `worldloom run` commands in the text of a page."""
    text = re.sub(r"^[ ]*```.*?^[ ]*```", "", page.read_text(), flags=re.DOTALL | re.M)
    found = re.findall(r"`((?:python -m worldloom\.run|worldloom run) [^`]+)`", text)
    whole = [line for line in found if not re.search(r"\.\.\.|…|\b[A-Z]{3,}\b", line)]
    return [
        command
        for line in whole
        for command in read_commands(Block(page, 0, "bash", line.replace("\n", " ")))
    ]
