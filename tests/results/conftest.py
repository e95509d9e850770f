"""Run folders without training, written by the writers of real runs."""

import pytest
from omegaconf import OmegaConf

from worldloom.app.compose import Overrides, compose_config
from worldloom.app.run_dir import CONFIG, SCORES, write_config
from worldloom.app.saved_config import resolve_config
from worldloom.files import write_text
from worldloom.training.loggers import MetricsCSV


@pytest.fixture(scope="session")
def composed(tmp_path_factory):
    """The text of config.yaml, written once per set of overrides, which takes a second."""
    held = {}

    def compose(overrides):
        if overrides not in held:
            cfg = compose_config(*Overrides(overrides).with_implied())
            cfg.folder = "unknown"
            folder = tmp_path_factory.mktemp("composed")
            write_config(folder, resolve_config(cfg).saved)
            held[overrides] = (folder / CONFIG).read_text()
        return held[overrides]

    return compose


@pytest.fixture
def make_run(tmp_path, composed):
    """Write a run folder in tmp_path: its overrides, metrics by step, final scores and log."""

    def make(name, *overrides, seed=0, rows=(), scores=None, log=None):
        folder = tmp_path / name
        folder.mkdir(parents=True)
        text = composed(overrides).replace("folder: unknown", f"folder: {folder}")
        (folder / CONFIG).write_text(text.replace("\nseed: 0\n", f"\nseed: {seed}\n"))
        logger = MetricsCSV(folder)
        for step, metrics in rows:
            counters = {"env_steps": step, "frames": 2 * step, "updates": step // 2}
            counters |= {"episodes": 1, "restarts": 0, "seconds": step * 3.6}
            logger.log_metrics({f"counters/{k}": v for k, v in counters.items()} | metrics, step)
        if scores is not None:
            write_text(folder / SCORES, OmegaConf.to_yaml(OmegaConf.create(scores)))
        if log is not None:
            (folder / "worldloom.log").write_text(log)
        return folder

    return make
