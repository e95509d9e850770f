"""The command `worldloom models`: all presets.

usage: worldloom models

Prints every preset with its number of parameters (for images of 3 x 64 x 64 and 6 continuous
actions), its aliases and a description. `model=NAME` of `worldloom run` and
`worldloom.create_world_model(NAME, ...)` take all of these names.
"""

import textwrap

from worldloom.app.command_line import run_command
from worldloom.app.compose import Overrides
from worldloom.factory import list_models

COLUMNS = 110


def models_command(overrides: Overrides) -> None:
    """Print a table of all presets."""
    if overrides.args:
        raise ValueError(f"cannot read {overrides.args[0]!r}; expected no arguments")
    models = list_models(verbose=True)
    assert isinstance(models, dict)
    rows = [("name", "parameters", "aliases", "description")]
    families = {}
    for name, model in models.items():
        count = f"{model['parameters']:,}"
        rows.append((name, count, ", ".join(model["aliases"]), model["description"]))
        families[name.partition(":")[0]] = model["observations"], model["actions"]
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    for name, count, alias, description in rows:
        start = f"{name:<{widths[0]}}  {count:>{widths[1]}}  {alias:<{widths[2]}}  "
        indent = " " * len(start)
        print(textwrap.fill(description, COLUMNS, initial_indent=start, subsequent_indent=indent))
    print()
    for family, (observations, actions) in families.items():
        print(f"{family}: observations: {observations}; actions: {actions}")


def main() -> None:
    """Run the command line."""
    run_command(str(__doc__), models_command, needs_arguments=False)


if __name__ == "__main__":
    main()
