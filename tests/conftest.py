import sys


def pytest_configure():
    """Keep absl, which dm_control brings, from closing pytest's own stderr.

    It closes the stream that was stderr when it was imported, unless that is the real one.
    """
    try:
        from absl import logging
    except ImportError:
        return
    logging.get_absl_handler().python_handler.stream = sys.__stderr__
