"""The examples of own models and losses, executed as they are written."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

FOLDER = Path(__file__).resolve().parents[2] / "examples"
PRINTED = {
    "own_model.py": [
        r"return \S+ ± \S+ over 2 episodes",
        r"loaded a EpsilonDreamer with epsilon=0.2\n$",
    ],
    "own_loss.py": [r"step 60: inverse_loss \d"],
}


@pytest.mark.slow
@pytest.mark.parametrize("name", PRINTED)
def test_an_example_runs_as_written(name, tmp_path):
    """From another folder, with worldloom from this checkout."""
    assert len((FOLDER / name).read_text().splitlines()) < 60
    env = {**os.environ, "PYTHONPATH": str(FOLDER.parent)}
    command = [sys.executable, str(FOLDER / name)]
    done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    for pattern in PRINTED[name]:
        assert re.search(pattern, done.stdout), done.stdout
