"""Every command and snippet of README.md and docs/ works; rules.py lists what is not executed."""

import importlib
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest
from hydra._internal.core_plugins.basic_sweeper import BasicSweeper

from tests.docs.blocks import PAGES, ROOT, Command, read_blocks, read_commands, read_inline_commands
from tests.docs.rules import (
    COMPOSED,
    FEW,
    GIVEN,
    LEFT_OUT,
    MY_PKG,
    NOT_RUN,
    RUNS,
    SHORT,
    SIZES,
    SMALLER,
)
from tests.run_folders import write_run
from worldloom.app.compose import LAUNCHERS, SWEEPS, Overrides, compose_config
from worldloom.app.search_space import parse_space
from worldloom.app.sweep_names import parse_overrides
from worldloom.app.validation import validate_config
from worldloom.presets import extra_dirs
from worldloom.records import import_target

LANGUAGES = {"python", "bash", "yaml", "text", "math", "mermaid"}
RUN = "worldloom.run"
# The end of a message about a package that only an extra installs.
EXTRA = re.compile(r"pip install ['\"]?(?:worldloom|gymnasium)\[[\w-]+\]")
# Pages whose commands are all executed also without the slow tests.
FIRST = ("README.md", "quick-start.md")


def named(page):
    return page.relative_to(ROOT).as_posix()


def find_rule(text, table):
    """Return the first pattern of a table that the text begins with, or None."""
    return next((pattern for pattern in table if re.match(pattern, text)), None)


@pytest.fixture(scope="session")
def prepare(commands, tmp_path_factory):
    """Train a run that pages name, in a few seconds and once; return its folder."""
    place = tmp_path_factory.mktemp("prepared")
    (place / "my_pkg").mkdir()
    (place / "my_pkg" / "__init__.py").write_text(MY_PKG)

    def train(name):
        if not (place / name).exists():
            words = [*RUNS[name], *SHORT, *SIZES["DreamerV3"], f"folder={name}"]
            commands.good(words, place, path=place)
        return place / name

    return train


class Page:
    """Executes the blocks of a page in order, in a folder with the runs that the page names.

    trains: execute all commands, `worldloom run` with few steps. Otherwise `worldloom run` is
        composed, and other commands are executed on the pages `FIRST` only.
    """

    def __init__(self, page, folder, commands, trains):
        self.page, self.folder, self.commands, self.trains = page, folder, commands, trains
        self.names = {"__name__": "page"}
        self.missing = []  # what the commands need that were left out
        exec(GIVEN.get(named(page), ""), self.names)

    def execute(self, block):
        """Execute a block, or check what can be checked."""
        assert block.language in LANGUAGES, (
            f"{block.place}: the block is tagged {block.language!r}; write ```bash for commands, "
            f"```text for output, or one of {sorted(LANGUAGES)}"
        )
        if block.language == "python":
            self.execute_python(block)
        elif block.language == "bash":
            if block.text.startswith("#!"):
                subprocess.run(["bash", "-n"], input=block.text, text=True, check=True)
            for command in read_commands(block):
                self.execute_command(command)
        elif block.language == "text":  # output may print commands
            for line in re.findall(r"^(?:python -m )?worldloom[. ]run .*$", block.text, re.M):
                words = line.replace("worldloom run", RUN).split()
                compose(words[words.index(RUN) + 1 :])

    def execute_python(self, block):
        """Execute Python in the namespace of the page; `# FILE.py` in front makes a file."""
        if file := re.match(r"# (\w+(?:/\w+)?\.py)\n", block.text):
            path = self.folder / file[1]
            path.parent.mkdir(exist_ok=True)
            path.write_text((MY_PKG if file[1].startswith("my_pkg/") else "") + block.text)
            forget(path.parent.name if "/" in file[1] else path.stem)
        lines = reduce_numbers(block.text).splitlines()
        for i, line in enumerate(lines):
            needs_run = not self.trains and re.search(r"\bRUN\b", line)
            lines[i] = "" if needs_run or find_rule(line, LEFT_OUT) else line
        source = "\n" * (block.line - 1) + "\n".join(lines)
        exec(compile(source, named(self.page), "exec"), self.names)

    def execute_command(self, command):
        """Execute a command, or compose it."""
        if find_rule(command.text, NOT_RUN):
            return
        if command.words[0] in ("mkdir", "cp"):
            subprocess.run(command.words, cwd=self.folder, check=True)
            return
        module, words = command.module, command.arguments
        if command.words[0] in ("torchrun", "srun"):
            at = command.words.index(RUN)
            module, words = RUN, [*command.words[at + 1 :]]
        place = f"{command.block.place}: {command.text}"
        assert module.startswith("worldloom") and find_spec(module), f"{place} is in no table"
        resumes = any(re.match("resume=(?!auto)", word) for word in words)
        if module != RUN or resumes or {"--help", "--cfg"} & {*words}:
            if self.trains or self.page.name in FIRST:
                self.run(module, words, place)
            return
        try:
            cfg = compose(words)
        except ValueError as error:
            self.fail(f"{place}\n{error}")
            return
        if self.trains and not find_rule(command.text, COMPOSED):
            self.run(RUN, [*map(reduce_numbers, words), *shorten(cfg, words)], place)
        elif SWEEPS & {*words}:
            name = Overrides(tuple(words)).with_implied().value("sweep")
            target = self.folder / "runs" / "sweeps" / name
            shutil.copytree(self.folder / "runs" / "dmc", target, dirs_exist_ok=True)

    def run(self, module, words, place):
        words = [*words, *FEW.get(module, [])] if "--help" not in words else words
        done = self.commands.run(words, self.folder, module=module, path=self.folder)
        if done["code"]:
            self.fail(f"{place}\n{done['out']}{done['err']}")
        written = re.findall(r"all results are in (\S+)", done["out"])
        if written:
            (self.folder / "RUN").unlink(missing_ok=True)
            (self.folder / "RUN").symlink_to(self.folder / written[-1])

    def fail(self, message):
        """Fail, unless a package is missing that an extra installs."""
        if found := EXTRA.search(message):
            self.missing.append(found[0])
        else:
            pytest.fail(message)


def reduce_numbers(text):
    """Return a text with the smaller numbers of `SMALLER`."""
    for number, smaller in SMALLER.items():
        text = text.replace(number, smaller)
    return text


def compose(words):
    """Compose and validate a command line as `worldloom run` does; return its first job.

    Of a sweep, the first and the last job are composed.
    """
    folders = [words[words.index("--config-dir") + 1]] if "--config-dir" in words else []
    overrides = Overrides(tuple(words)).with_implied()
    args = [word for word in overrides if word not in (*SWEEPS, "--config-dir", *folders)]
    known = LAUNCHERS[overrides.value("hydra/launcher") or "processes"]
    for arg in overrides.select(r"hydra\.launcher\."):
        assert arg.partition("=")[0].removeprefix("hydra.launcher.") in known, arg
    jobs = [args]
    if SWEEPS & {*words}:
        jobs = BasicSweeper.split_arguments(parse_overrides(args), None)[0]
    extra_dirs[:] = map(Path, folders)
    try:
        first, *_ = [compose_job(job) for job in (jobs[0], jobs[-1])[: len(jobs)]]
        return first
    finally:
        extra_dirs.clear()


def compose_job(args):
    """Compose and validate the configuration of one job."""
    cfg = compose_config(*[arg for arg in args if not re.match(r"hydra[./]", arg)])
    cfg.folder = "unknown"
    if cfg.get("search"):
        parse_space(cfg.search.space)
        del cfg["search"]
    validate_config(cfg, {}, devices=False)
    return cfg


def shorten(cfg, words):
    """Return the overrides that make a run short."""
    target = import_target(cfg.model._target_)
    family = next((c.__name__ for c in target.__mro__ if c.__name__ in SIZES), None)
    short = [*SHORT, *SIZES.get(family, [])]
    if cfg.data.get("path"):
        short = [word for word in short if not word.startswith("env.")]
        short += ["training.total_steps=4", "evaluation.every=0"]
    if any("search" in word for word in words):
        short += ["search.trials=2"]
    return short


def forget(package):
    """Remove a package from the imported modules, because another page has another one."""
    for name in [name for name in sys.modules if name.split(".")[0] == package]:
        del sys.modules[name]
    importlib.invalidate_caches()


@pytest.fixture(params=["composed", pytest.param("trained", marks=pytest.mark.slow)])
def open_page(request, commands, prepare, tmp_path, monkeypatch):
    """Open a page in a folder with the runs that it names, a package, and the examples."""

    def open_in_folder(page):
        text = page.read_text()
        for name in filter(text.__contains__, RUNS):
            shutil.copytree(prepare(name), tmp_path / name)
        write_runs(tmp_path / "runs" / "dmc")
        for name in ("a", "b", "cartpole"):
            if not (tmp_path / "runs" / name).exists():
                shutil.copytree(tmp_path / "runs" / "dmc", tmp_path / "runs" / name)
        return Page(page, tmp_path, commands, request.param == "trained")

    (tmp_path / "my_pkg").mkdir()
    (tmp_path / "my_pkg" / "__init__.py").write_text(MY_PKG)
    (tmp_path / "examples").symlink_to(ROOT / "examples")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)
    yield open_in_folder
    for path in tmp_path.iterdir():
        forget(path.stem)


def write_runs(folder):
    """Write runs of two models with two seeds, without training."""
    for model in ("dreamerv3_size1m", "tdmpc2_1m"):
        for seed in range(2):
            rows = [(step, {"eval/return": step / 100 + seed}) for step in (100, 30_000, 60_000)]
            scores = {"step": 60_000, "final/return": 600.0 + seed}
            words = (f"model={model}", "env=dmc", "env.task=walker-walk")
            write_run(folder / f"{model}-{seed}", *words, seed=seed, rows=rows, scores=scores)


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_every_block_works(page, open_page):
    opened = open_page(page)
    for block in read_blocks(page):
        opened.execute(block)
    if opened.missing:
        pytest.skip(f"some commands need {', '.join(sorted({*opened.missing}))}")


@pytest.mark.parametrize("page", PAGES, ids=named)
def test_commands_in_sentences_compose(page, open_page):
    for command in read_inline_commands(page):
        try:
            compose(command.arguments)
        except ValueError as error:
            pytest.fail(f"{named(page)}: {command.text}\n{error}")


def test_every_rule_is_needed():
    lines, code = [], []
    for page in PAGES:
        for block in read_blocks(page):
            if block.language == "bash":
                lines += [command.text for command in read_commands(block)]
            elif block.language == "python":
                code += block.text.splitlines()
    tables = [(NOT_RUN, lines), (COMPOSED, lines), (LEFT_OUT, code)]
    unused = [
        pattern
        for table, texts in tables
        for pattern in table
        if not any(re.match(pattern, text) for text in texts)
    ]
    assert not unused and {*GIVEN} <= {named(page) for page in PAGES}


def test_commands_are_read_as_bash_reads_them():
    command = Command(None, {}, ("python", "-m", "worldloom.eval", "checkpoint=r"))
    assert (command.module, command.arguments) == ("worldloom.eval", ["checkpoint=r"])
    command = Command(None, {}, ("worldloom", "eval", "checkpoint=r"))
    assert (command.module, command.arguments) == ("worldloom.eval", ["checkpoint=r"])
