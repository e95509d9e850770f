"""Run folders without training, and the contents of the pages written for them."""

import base64
import functools
import io
import json
import math
import re
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image

from tests.browser import Browser, find_chromium
from worldloom.app.command_line import split_settings
from worldloom.app.compose import Overrides, compose_config
from worldloom.app.run_dir import write_config, write_scores
from worldloom.app.saved_config import resolve_config
from worldloom.app.task import Task, open_saved_run
from worldloom.saving import save_model
from worldloom.training.loggers import MetricsCSV
from worldloom.view.__main__ import ViewConfig
from worldloom.view.playback import write_page

HERE = Path(__file__).parent
BALL = ("env._target_=scenes.Ball", "threads=1")
DRIFT = ("model=custom", "model._target_=scenes.Drift")
TDMPC2 = ("model=tdmpc2_tiny", "model.decoder=true", "model.iterations=2")
TDMPC2 += ("model.num_samples=16", "model.num_elites=8", "model.num_pi_trajs=2")


@pytest.fixture(scope="session", autouse=True)
def scenes():
    """Let tests and configurations import scenes.py."""
    sys.path.insert(0, str(HERE))
    yield
    sys.path.remove(str(HERE))


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Write the folder of a run with the initial weights of its model, once for all tests."""

    @functools.cache
    def make(*words):
        folder = tmp_path_factory.mktemp("runs") / "run"
        folder.mkdir()
        cfg = compose_config(*Overrides(words).with_implied())
        cfg.folder = str(folder)
        config = resolve_config(cfg)
        write_config(folder, config.saved)
        task = Task.from_config(config.plain["env"], collects=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            save_model(task.build_model(config.plain["model"]), folder / "model")
        logger = MetricsCSV(folder)
        for step in range(10, 60, 10):
            counters = {"env_steps": step, "frames": step, "updates": step, "episodes": step}
            row = {f"counters/{name}": n for name, n in counters.items()}
            row |= {"counters/restarts": 0, "counters/seconds": step, "episode/return": step / 2}
            logger.log_metrics(row, step)
        write_scores(folder, {"final/return": 3.0, "final/return_std": 0.5}, 50)
        return folder

    return make


@pytest.fixture(scope="session")
def view():
    """Write the page of a run as the command does; return its path, its data and the printed."""

    def call(folder, *words, **settings):
        config, section = open_saved_run(folder, split_settings(Overrides(words))[1])
        known = {"seed": config["evaluation"]["seed"], **settings}
        device = torch.device("cpu")
        printed = write_page(folder, config, section, ViewConfig(**known), device)
        file = Path(settings.get("out") or folder / "playback.html")
        return SimpleNamespace(file=file, printed=printed, **read_data(file))

    return call


@pytest.fixture(scope="session")
def browser():
    if find_chromium() is None:
        pytest.skip("needs Chromium")
    with Browser() as browser:
        yield browser


def read_data(file):
    """Return the data in a page, with arrays and pictures decoded."""
    text = re.search(r'<script type="application/json" id="data">(.*?)</script>', file.read_text())
    return decode(json.loads(text[1]))


def decode(tree):
    if isinstance(tree, list):
        return [decode(item) for item in tree]
    if not isinstance(tree, dict):
        return tree
    if "bits" in tree:
        return decode_array(tree)
    if "sheets" in tree:
        return decode_images(tree)
    return {key: decode(value) for key, value in tree.items()}


def decode_array(packed):
    codes = np.frombuffer(base64.b64decode(packed["data"]), f"<u{packed['bits'] // 8}")
    low, high = np.array(packed["low"]), np.array(packed["high"])
    top = 2 ** packed["bits"] - 2
    rows = codes.reshape(-1, len(low)).astype(float)
    values = np.where(rows > top, np.nan, low + rows / top * (high - low))
    return values.reshape(packed["shape"])


def decode_images(packed):
    width, height, columns = packed["width"], packed["height"], packed["columns"]
    images = []
    for sheet in packed["sheets"]:
        data = base64.b64decode(sheet.partition("base64,")[2])
        whole = np.asarray(Image.open(io.BytesIO(data)).convert("RGB"))
        assert whole.shape[1] == columns * width
        for place in range(columns * whole.shape[0] // height):
            y, x = place // columns * height, place % columns * width
            images.append(whole[y : y + height, x : x + width])
    count, lines = packed["count"], packed["lines"]
    assert len(packed["sheets"]) == math.ceil(count / (columns * lines))
    return np.stack(images[:count])
