"""Write docs/settings.md: every group, choice and key, from conf/ and the settings classes.

`python docs/settings.py`; tests/docs/test_settings.py fails if the page is not current.
"""

import dataclasses
import re
import types
import typing
from pathlib import Path
from typing import Any

from worldloom.app.search_config import SearchConfig
from worldloom.app.validation import SECTIONS, RunConfig
from worldloom.presets import choice_files
from worldloom.training.config import EnvConfig

PAGE = Path(__file__).with_name("settings.md")
CONF = PAGE.parent.parent / "conf"
INTRODUCTION = """# All settings

Written by `python docs/settings.py` from `conf/` and the settings classes; do not edit it by hand.
[configuration.md](configuration.md) explains overrides, implicit rules and protocols.

`group=choice` selects a choice; `section.key=value` sets a key. `???` has to be set, and
`${other.key}` has the value of another key. `python -m worldloom.run --cfg job` prints the values
that a command line results in.
"""
# Groups in the order of the page: title, and what precedes the table of choices.
GROUPS = {
    "env": "Where the agent acts. [environments.md](environments.md) describes the suites.",
    "data": "Where training data comes from ([offline-data.md](offline-data.md)).",
    "model": "A preset, or `custom` ([models.md](models.md)). `model=dreamerv3:size1m`, as in "
    "Python, is `model=dreamerv3_size1m`.",
    "trainer": "Device, precision and number of processes: the arguments of `lightning.Trainer`.",
    "optimizer": "Chosen by the preset of the model.",
    "planner": "Acts for a model that has no policy.",
    "logger": "Where metrics are written ([logging.md](logging.md)).",
    "callbacks": "Parts of a run; others are added with `+callbacks.NAME._target_=...`.",
    "search": "With `-m`: settings of a search ([searches.md](searches.md)).",
    "experiment": "A recipe for one environment, or a published "
    "[protocol](configuration.md#protocols).",
}
# Files with the defaults of a group, and those with the hyperparameters of the families.
BASES = {"env": "suite_base.yaml", "data": "online.yaml"}
MODELS = ("dreamerv3_base", "r2dreamer_base", "infonce_base", "dreamerpro_base", "tdmpc2_base")
# Keys of groups that a class describes.
CLASSES: dict[str, type] = {**SECTIONS, "env": EnvConfig, "search": SearchConfig}
KINDS = {int: "integer", float: "number", str: "text", bool: "true or false", dict: "mapping"}
LINE = re.compile(r"^( *)([\w]+):(?: +(?!#)(.*?))??(?: +# +(.*))?$")


@dataclasses.dataclass
class Segment:
    """Rows [key, default, meaning] of a file, and the comment above them."""

    comment: str = ""
    rows: list[list[str]] = dataclasses.field(default_factory=list)


def read_description(path: Path) -> str:
    """Return the comment at the start of a file, up to an example on a line of its own."""
    lines = [line for line in path.read_text().splitlines() if "@package" not in line]
    found = []
    for line in lines:
        if not line.startswith("# ") or line.startswith("# python -m"):
            break
        found.append(line[2:])
    return " ".join(found).rstrip(":.")


def read_segments(path: Path) -> list[Segment]:
    """Return the keys of a file with their comments, without those that start with _."""
    lines = path.read_text().splitlines()
    while lines and lines[0].startswith("#"):
        lines.pop(0)
    segments, parents, in_list, trailing = [Segment()], [], False, False
    for line in lines:
        if line.startswith("# ") or not line:
            if segments[-1].rows:
                segments.append(Segment())
            segments[-1].comment = f"{segments[-1].comment} {line[2:]}".strip()
            continue
        if line.strip().startswith("# ") and trailing:
            segments[-1].rows[-1][2] += f" {line.strip()[2:]}"
            continue
        found = LINE.match(line)
        if found is None or (in_list and found[1]):  # an item of the defaults list
            continue
        indent, key, value, meaning = found.groups()
        in_list, trailing = key == "defaults", False
        parents = [*parents[: len(indent) // 2], key]
        if key == "hydra":
            in_list = True
        if in_list or (any(name.startswith("_") for name in parents) and value != "???"):
            continue
        if value or meaning:
            segments[-1].rows.append([".".join(parents), value or "", meaning or ""])
            trailing = bool(meaning)
    return [segment for segment in segments if segment.rows]


def describe_kind(annotation: Any) -> str:
    """Return the values that an annotation allows, in words."""
    if typing.get_origin(annotation) in (typing.Union, types.UnionType):
        return ", ".join(filter(None, map(describe_kind, typing.get_args(annotation))))
    if annotation is type(None):
        return "null"
    return KINDS.get(typing.get_origin(annotation) or annotation, "")


def read_meanings(cls: type) -> dict[str, str]:
    """Return the meaning of each attribute in the docstring of a class."""
    text = str(cls.__doc__).partition("Attributes:")[2]
    found = re.findall(r"^ {8}(\w+): (.+(?:\n {12}.+)*)", text, re.MULTILINE)
    return {
        name: " ".join(meaning.replace("None", "null").split()).rstrip(".")
        for name, meaning in found
    }


def format_value(value: Any) -> str:
    """Return a default as a user would write it."""
    words = {None: "null", True: "true", False: "false"}
    if value is None or isinstance(value, bool):
        return words[value]
    return f"{value:g}" if isinstance(value, float) else str(value)


def table(head: str, rows: list[list[str]]) -> str:
    """Return a Markdown table; head: titles separated by commas, with ` in front of code."""
    titles = head.split(",")
    lines = [" | ".join(title.strip("`") for title in titles), " | ".join(["---"] * len(titles))]
    for row in rows:
        cells = [cell.replace("|", "\\|") for cell in row]
        pairs = zip(titles, cells, strict=True)
        lines.append(" | ".join(f"`{cell}`" if t[0] == "`" and cell else cell for t, cell in pairs))
    return "\n".join(f"| {line} |" for line in lines)


def describe_class(section: str, cls: type, defaults: dict[str, str]) -> str:
    """Return the table of a settings class; defaults: those of conf/, which precede the class's."""
    hints, meanings, rows = typing.get_type_hints(cls), read_meanings(cls), []
    for field in dataclasses.fields(cls):
        given = field.default_factory() if callable(field.default_factory) else field.default
        default = defaults.get(field.name, format_value(given))
        rows.append(
            [
                f"{section}.{field.name}",
                default,
                describe_kind(hints[field.name]),
                meanings[field.name],
            ]
        )
    return table("`key,`default,values,meaning", rows)


def describe_file(group: str, name: str, path: Path) -> list[str]:
    """Return the section about a choice, or nothing if it has no keys."""
    family = name.removesuffix("_base")
    title = f"`{group}={name}`" if family == name else f"Presets of `{family}`"
    parts = [f"### {title}", read_description(path) + "."]
    for segment in read_segments(path):
        comment = segment.comment and segment.comment.rstrip(".:") + "."
        rows = [[f"{group}.{key}", *rest] for key, *rest in segment.rows]
        parts += [comment] * bool(comment) + [table("`key,`default,meaning", rows)]
    return parts if len(parts) > 2 else []


def describe_group(group: str) -> list[str]:
    """Return the section about a group: its choices and keys."""
    files = {name: path for name, path in choice_files(group).items() if not name.endswith("_base")}
    rows = [[f"{group}={name}", read_description(path)] for name, path in files.items()]
    parts = [f"## `{group}`", GROUPS.get(group, "")]
    if group in CLASSES:
        base = BASES.get(group)
        segments = read_segments(CONF / group / base) if base else []
        defaults = {key: value for segment in segments for key, value, _ in segment.rows}
        parts.append(describe_class(group, CLASSES[group], defaults))
    if rows:
        parts.append(table("`choice,meaning", rows))
    if group == "model":  # the presets set sizes only
        files = {name: CONF / "model" / f"{name}.yaml" for name in MODELS}
    for name, path in files.items():
        if group not in ("experiment", "search") and path.name != BASES.get(group):
            parts += describe_file(group, name, path)
    return parts


def describe_run() -> list[str]:
    """Return the section about the keys that belong to no group."""
    hints = typing.get_type_hints(RunConfig)
    rows = [row for segment in read_segments(CONF / "config.yaml") for row in segment.rows]
    cells = [
        [key, value, describe_kind(hints[key]), meaning]
        for key, value, meaning in rows
        if key in hints
    ]
    return ["## The run", "Keys without a section.", table("`key,`default,values,meaning", cells)]


def format_page() -> str:
    """Return the page."""
    parts = [INTRODUCTION.strip(), *describe_run()]
    parts += ["## `checkpoint`", describe_class("checkpoint", SECTIONS["checkpoint"], {})]
    for group in ("training", "evaluation", *GROUPS):
        parts += describe_group(group)
    return "\n\n".join(part for part in parts if part) + "\n"


if __name__ == "__main__":
    PAGE.write_text(format_page())
