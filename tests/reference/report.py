"""pytest plugin: report how many recorded arrays were compared, over all test processes."""

from typing import Any

import pytest

COMPARED: dict[str, int] = {}  # {file and precision: number of arrays}
LEFT_OUT: dict[str, list[str]] = {}  # {file and precision: arrays that no test compares}
NOISE: dict[str, list[str]] = {}  # {file and precision: arrays with one element of pure noise}
MISSING: dict[str, None] = {}  # files that tests looked for in vain
FOLDER: dict[str, None] = {}  # the folder of the recorded arrays
TABLES = (COMPARED, LEFT_OUT, NOISE, MISSING, FOLDER)


def pytest_sessionfinish(session: pytest.Session) -> None:
    """Send the tables to the controlling process, if pytest-xdist started this one."""
    if hasattr(session.config, "workeroutput"):
        session.config.workeroutput["reference"] = TABLES


@pytest.hookimpl(optionalhook=True)
def pytest_testnodedown(node: Any, error: object) -> None:
    """Add the tables of a process that pytest-xdist started and that has ended normally."""
    theirs = getattr(node, "workeroutput", {}).get("reference", TABLES)
    for table, added in zip(TABLES, theirs, strict=True):
        table.update(added)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print how many arrays were compared in which folder, and which were not."""
    if COMPARED:
        terminalreporter.write_line(
            f"reference {', '.join(FOLDER)}: {sum(COMPARED.values())} arrays compared, "
            f"{len(COMPARED)} times a file"
        )
    if MISSING:
        terminalreporter.write_line(f"reference: not in this folder: {', '.join(sorted(MISSING))}")
    for title, names in LEFT_OUT.items():
        more = f" and {len(names) - 5} more" if len(names) > 5 else ""
        said = f"not compared: {', '.join(names[:5])}{more}"
        terminalreporter.write_line(f"reference {title}: {said}")
    for title, names in NOISE.items():
        terminalreporter.write_line(
            f"reference {title}: one element is rounding noise in {', '.join(names)}"
        )
