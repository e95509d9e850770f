"""Run folders in tmp_path."""

import pytest

from tests.run_folders import write_run


@pytest.fixture
def make_run(tmp_path):
    """Write a run folder in tmp_path: NAME, and the arguments of `write_run`."""

    def make(name, *overrides, **content):
        return write_run(tmp_path / name, *overrides, **content)

    return make
