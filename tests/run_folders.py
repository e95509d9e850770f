"""Run folders without training, written by the writers of real runs."""

import functools
from pathlib import Path
from tempfile import TemporaryDirectory

from omegaconf import OmegaConf

from worldloom.app.compose import Overrides, compose_config
from worldloom.app.run_dir import CONFIG, SCORES, write_config
from worldloom.app.saved_config import resolve_config
from worldloom.files import write_text
from worldloom.training.loggers import MetricsCSV


@functools.cache
def compose_text(overrides):
    """Return the text of config.yaml, which takes a second to compose."""
    cfg = compose_config(*Overrides(overrides).with_implied())
    cfg.folder = "unknown"
    with TemporaryDirectory() as folder:
        write_config(Path(folder), resolve_config(cfg).saved)
        return Path(folder, CONFIG).read_text()


def write_run(folder, *overrides, seed=0, rows=(), scores=None, log=None):
    """Write a run folder: its overrides, metrics by step, final scores and log."""
    folder.mkdir(parents=True)
    text = compose_text(overrides).replace("folder: unknown", f"folder: {folder}")
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
