"""Rules of the code layout: imports point downwards, and files are small and well named.

The sources are parsed, not imported. Each test lists all offenders.
"""

import ast
import re
from pathlib import Path

PACKAGE = Path(__file__).resolve().parent.parent / "worldloom"
FILES = sorted(PACKAGE.rglob("*.py"))

# Bottom to top. A file may import from its own entry and from those on earlier lines, at the top of
# the file or inside a function. An entry is a module, a subpackage, or a command in a subpackage.
LAYERS = [
    {"errors", "starting", "trees", "timing", "memory", "glossary"},
    {"files"},
    {"protocol", "devices", "ranks"},
    {"cuda_graphs"},
    {"random_batches"},
    {"nn"},
    {"records"},
    {"presets", "saving"},
    {"planning"},
    {"models"},
    {"factory"},
    {"envs"},
    {"datasets"},
    {"acting"},
    {"agent"},
    {"replay"},
    {"model_scores"},
    {"training"},
    {"check"},
    {"app"},
    {"results"},
    {"sweep"},
    {
        *("run", "eval", "collect", "diagnose", "doctor", "bench", "plot", "view"),
        *(
            "export",
            "export.__main__",
            "view.__main__",
            "bench.__main__",
            "check.__main__",
            "models.__main__",
        ),
    },
    {"__main__"},
]
LEVEL = {name: level for level, names in enumerate(LAYERS) for name in names}
# Files that collect public names, and `python -m worldloom.envs.check`, which forwards to check.
EXEMPT = {"__init__.py", "envs/check.py"}

# Where the large frameworks may be imported. Everything else works without them.
ALLOWED = {
    "lightning": ("training/", "app/", "run.py"),
    "hydra": ("app/", "run.py"),
}


def name_of(path):
    return path.relative_to(PACKAGE).as_posix()


def entry_of(path):
    parts = path.relative_to(PACKAGE).with_suffix("").parts
    return ".".join(parts) if parts[-1] == "__main__" else parts[0]


def imports(path):
    """Return every module that a file imports, at its top or in a function, as dotted names."""
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


def functions(path):
    tree = ast.parse(path.read_text())
    return [n for n in ast.walk(tree) if isinstance(n, ast.FunctionDef | ast.AsyncFunctionDef)]


def test_the_sources_are_found():
    assert len(FILES) > 50
    assert entries_used(PACKAGE / "planning.py") >= {"nn", "protocol"}


def test_every_entry_has_a_layer():
    assert not [name_of(p) for p in FILES if name_of(p) not in EXEMPT and entry_of(p) not in LEVEL]


def test_imports_point_downwards():
    assert not [
        f"{name_of(path)} imports worldloom.{used}"
        for path in FILES
        if name_of(path) not in EXEMPT
        for used in sorted(entries_used(path) - {entry_of(path), entry_of(path).split(".")[0]})
        if LEVEL.get(used, len(LAYERS)) >= LEVEL[entry_of(path)]
    ]


def test_frameworks_stay_where_they_belong():
    assert not [
        f"{name_of(path)} imports {framework}"
        for framework, places in ALLOWED.items()
        for path in FILES
        if framework in roots(path) and not name_of(path).startswith(places)
    ]


def test_nothing_outside_the_package_is_imported():
    # One name for Lightning: mixing both packages breaks isinstance checks between them.
    outside = {"experiments", "tests", "pytorch_lightning"}
    assert not [name_of(path) for path in FILES if roots(path) & outside]


def test_environments_and_datasets_need_no_torch():
    assert not [
        name_of(path)
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] in ("envs", "datasets") and "torch" in roots(path)
    ]


def test_training_and_app_import_no_model():
    layers = ("training", "replay", "app")
    assert not [
        name_of(path)
        for path in FILES
        if path.relative_to(PACKAGE).parts[0] in layers and "models" in entries_used(path)
    ]


def test_model_families_are_independent():
    families = {folder.name for folder in (PACKAGE / "models").iterdir() if folder.is_dir()}
    assert {"dreamerv3", "tdmpc2"} <= families
    assert not [
        f"{name_of(path)} imports {name}"
        for path in (PACKAGE / "models").glob("*/*.py")
        for name in imports(path)
        for family in families - {path.parent.name}
        if name.startswith(f"worldloom.models.{family}")
    ]


# Calls that read what others may have written or quote printed commands -> where they may be.
GATES = {
    r"\btorch\.load\(": ("files.py", "check/saving.py"),
    r"\bnp\.load\(|format\.read_array\(": ("files.py",),
    r"\byaml\.(load|parse)\(": ("files.py", "results/runs.py"),
    r"OmegaConf\.load\(": ("presets.py", "app/validation.py"),  # of conf/
    r"\bpickle\.loads?\(": ("app/launch.py", "envs/process.py"),  # of worldloom's own processes
    r"\bshlex\b": ("errors.py",),
}


def test_files_of_others_are_read_and_commands_quoted_in_one_place():
    assert not [
        f"{name_of(path)} has {pattern}"
        for pattern, places in GATES.items()
        for path in FILES
        if name_of(path) not in places and re.search(pattern, path.read_text())
    ]


def test_files_and_functions_are_small():
    long = [
        f"{name_of(p)}: {n} lines" for p in FILES if (n := len(p.read_text().splitlines())) > 400
    ]
    long += [
        f"{name_of(path)}:{node.lineno} {node.name}: {length} lines"
        for path in FILES
        for node in functions(path)
        if (length := node.end_lineno - node.lineno + 1) > 60
    ]
    assert not long


def test_files_are_named_after_their_idea():
    vague = {"utils", "util", "helpers", "common", "misc", "tools"}
    assert not [name_of(path) for path in FILES if path.stem in vague]
