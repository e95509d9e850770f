"""The text of `worldloom run --help`, made from the files in conf/."""

import re

from worldloom.errors import list_names
from worldloom.presets import choice_files, config_dir

COLUMNS = 100
USAGE = """usage: worldloom run [GROUP=CHOICE ...] [SECTION.KEY=VALUE ...]

Trains a model and writes everything to runs/NAME/DATE. A group selects a file of conf/GROUP:

{groups}

examples:
{examples}

--cfg job     print the configuration with all its values, do not train
--help all    print Hydra's help with all choices of all groups
Read docs/configuration.md for all settings, and docs/runs.md for what a run writes."""


def describe_run() -> str:
    """Return the usage of `worldloom run`: its groups with their choices, and examples."""
    text = (config_dir() / "config.yaml").read_text()
    groups = re.findall(r"^  - (\w+): [^#]+# (.+)$", text, re.MULTILINE)
    return USAGE.format(
        groups="\n".join(_describe(*group) for group in sorted(groups)),
        examples="\n".join(re.findall("^#(  worldloom run.*)$", text, re.MULTILINE)),
    )


def _describe(group: str, phrase: str) -> str:
    """Return a line about a group, with as many of its choices as fit on it."""
    choices = list_choices(group)
    lines = [f"  {group:<12}{phrase}: {list_names(choices, most)}" for most in range(9, 0, -1)]
    return next((line for line in lines if len(line) <= COLUMNS), lines[-1])


def list_choices(group: str) -> list[str]:
    """Return the choices of a group, without files that only others build on; [] if unknown."""
    options = [name for name in choice_files(group) if not name.endswith("_base")]
    return options + ["default"] * (group in ("training", "evaluation", "search"))
