import logging

import pytest


@pytest.fixture(autouse=True)
def logging_as_before(monkeypatch):
    """Restore logging after a test: Hydra with disabled logging disables all loggers."""
    known = logging.root.manager.loggerDict.values()
    disabled = {logger: logger.disabled for logger in known if isinstance(logger, logging.Logger)}
    level = logging.root.level
    monkeypatch.setattr(logging, "raiseExceptions", True)
    yield
    logging.captureWarnings(False)
    logging.root.setLevel(level)
    for logger, before in disabled.items():
        logger.disabled = before
