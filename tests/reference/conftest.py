"""One thread for small tensors, and a report of what was compared with the reference."""

from collections.abc import Iterator

import pytest
import torch

from tests.reference import reference_format


@pytest.fixture(scope="session", autouse=True)
def one_thread() -> Iterator[None]:
    """Small tensors are slower on several threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Say how many arrays were compared in which folder, and which were not."""
    compared, left_out = reference_format.COMPARED, reference_format.LEFT_OUT
    if compared:
        terminalreporter.write_line(
            f"reference {reference_format.ROOT}: {sum(compared.values())} arrays compared, "
            f"{len(compared)} times a file"
        )
    if reference_format.MISSING:
        terminalreporter.write_line(
            f"reference: not in this folder: {', '.join(sorted(reference_format.MISSING))}"
        )
    for title, names in left_out.items():
        terminalreporter.write_line(f"reference {title}: not compared: {', '.join(names)}")
