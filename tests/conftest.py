import os
import sys

import pytest


def pytest_configure():
    """Keep absl, which dm_control brings, from closing pytest's own stderr.

    It closes the stream that was stderr when it was imported, unless that is the real one.
    """
    try:
        from absl import logging
    except ImportError:
        return
    logging.get_absl_handler().python_handler.stream = sys.__stderr__


@pytest.fixture
def renderer(monkeypatch):
    """Choose a renderer for this test alone; skip it where none works."""
    from worldloom.envs.renderer import RendererError, use_renderer

    pytest.importorskip("mujoco", reason="needs one of the extras mujoco, dmc, metaworld, robotics")
    monkeypatch.setenv("MUJOCO_GL", os.environ.get("MUJOCO_GL", ""))  # so that the choice is undone
    try:
        use_renderer("mujoco")
    except RendererError as error:
        pytest.skip(str(error))
