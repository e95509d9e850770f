"""One thread per test process, and the fixtures that several folders use."""

import logging
import os
import signal
import sys
import time

import pytest

from tests.forked_commands import Commands

pytest_plugins = ["tests.reference.report"]

# pytest-xdist starts one process per core. Set before torch is imported; the commands that tests
# start inherit it.
os.environ.setdefault("OMP_NUM_THREADS", "1")

# A shell lets jobs in the background ignore Ctrl-C, and nohup SIGHUP; tests send both to commands.
signal.signal(signal.SIGINT, signal.default_int_handler)
signal.signal(signal.SIGHUP, signal.SIG_DFL)


def pytest_addoption(parser):
    """Add the time limit of CI."""
    parser.addoption("--until", type=float, help="Unix time after which no further test starts")


def pytest_runtest_setup(item):
    """Skip a test if its time is over."""
    until = item.config.getoption("until")
    if until is not None and time.time() > until:
        pytest.skip("no time left")


def pytest_configure():
    """Keep absl, which dm_control imports, from closing pytest's stderr.

    absl closes the stream that was stderr when absl was imported, unless that is sys.__stderr__.
    """
    try:
        from absl import logging
    except ImportError:
        return
    logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture(autouse=True)
def logging_as_at_the_start(monkeypatch):
    """Undo what Hydra does to logging in tests that call it in this process, in any fixture."""
    logging.root.setLevel(logging.WARNING)
    monkeypatch.setattr(logging, "raiseExceptions", True)
    known = logging.root.manager.loggerDict.values()
    disabled = {logger: logger.disabled for logger in known if isinstance(logger, logging.Logger)}
    yield
    logging.captureWarnings(False)
    for logger, before in disabled.items():
        logger.disabled = before


@pytest.fixture(scope="session")
def commands():
    """Run commands of worldloom without starting an interpreter for each."""
    with Commands() as commands:
        yield commands


@pytest.fixture
def renderer(monkeypatch):
    """Choose a renderer for one test; skip the test if no renderer works."""
    from worldloom.envs.renderer import RendererError, use_renderer

    pytest.importorskip("mujoco", reason="needs one of the extras mujoco, dmc, metaworld, robotics")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))  # undone after the test
    try:
        use_renderer("mujoco")
    except RendererError as error:
        pytest.skip(str(error))
