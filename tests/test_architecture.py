"""Hold the package to its plan: imports run one way, and every file is small and well named.

Only the sources are parsed; nothing of the package is imported here.
"""

import ast
from pathlib import Path

import pytest

PACKAGE = Path(__file__).resolve().parent.parent / "worldloom"
FILES = sorted(PACKAGE.rglob("*.py"))

# A file may import from its own entry and from those on lower lines, never sideways or upwards.
# An entry is a module or a subpackage of worldloom.
LAYERS = [
    {"protocol", "timing", "memory"},
    {"nn", "presets", "saving", "envs", "run_folder"},
    {"planning", "datasets"},
    {"models"},
    {"check", "factory"},
    {"transfer"},
    {"acting"},
    {"training", "task"},
    {"validation"},
    {"assembly", "cli", "config"},
    {"finished"},
    {"resume"},
    {"run", "eval", "bench", "collect", "envs.check", "diagnose"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}

# Where the heavy frameworks may be named. All else works in a notebook without them.
ALLOWED = {
    "lightning": {
        *(f"training/{name}.py" for name in ("data", "module", "callbacks", "logging", "progress")),
        "training/checkpoints.py",
        *("assembly.py", "run.py", "eval.py"),
    },
    "hydra": {"run.py", "eval.py", "config.py", "cli.py"},
}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def entry_of(path):
    if name_of(path) == "envs/check.py":
        return "envs.check"  # a command, which lies where it is looked for
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path):
    """Every module that a file imports, at its top or inside a function, as dotted names."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{name_of(path)}:{node.lineno} is a relative import"
            # `from worldloom import planning` names an entry, as `import worldloom.planning` does.
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def roots(path):
    return {name.split(".")[0] for name in imports(path)}


def entries_used(path):
    return {name.split(".")[1] for name in imports(path) if name.startswith("worldloom.")}


def test_there_is_something_to_test():
    assert len(FILES) > 10
    assert entries_used(PACKAGE / "planning.py") == {"nn", "protocol"}


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_imports_run_one_way(path):
    if path == PACKAGE / "__init__.py":
        return  # it gathers the public names
    entry = entry_of(path)
    assert entry in LEVEL, f"{entry} has no place in LAYERS of this test: give it one"
    for used in entries_used(path) - {entry}:
        assert used in LEVEL, f"{name_of(path)} imports {used} from worldloom itself"
        assert LEVEL[used] < LEVEL[entry], f"{name_of(path)} may not import worldloom.{used}"


@pytest.mark.parametrize("framework", ALLOWED)
@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_frameworks_stay_where_they_belong(path, framework):
    if name_of(path) not in ALLOWED[framework]:
        assert framework not in roots(path)


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_nobody_imports_what_stands_outside(path):
    # One name for Lightning: mixing both packages breaks isinstance checks between them.
    assert not roots(path) & {"experiments", "tests", "pytorch_lightning"}


@pytest.mark.parametrize(
    "path", sorted([*PACKAGE.glob("envs/**/*.py"), *PACKAGE.glob("datasets/*.py")]), ids=name_of
)
def test_environments_and_data_sets_need_no_torch(path):
    assert "torch" not in roots(path)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("training/**/*.py")), ids=name_of)
def test_training_knows_no_model_by_name(path):
    assert "models" not in entries_used(path)


@pytest.mark.parametrize("path", sorted(PACKAGE.glob("models/*/*.py")), ids=name_of)
def test_model_families_stand_alone(path):
    families = {name.split(".")[2] for name in imports(path) if name.startswith("worldloom.models")}
    others = {folder.name for folder in (PACKAGE / "models").iterdir() if folder.is_dir()}
    assert not families & (others - {path.parent.name})


@pytest.mark.parametrize("path", FILES, ids=name_of)
def test_files_are_small_and_named_after_their_idea(path):
    assert path.stem not in {"utils", "util", "helpers", "common", "misc", "tools"}
    assert len(path.read_text().splitlines()) < 450, "split it by ideas"
