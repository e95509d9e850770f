"""What an import must not bring with it: the behaviour behind fast starts, not the seconds."""

import subprocess
import sys

import pytest

HEAVY = ["lightning", "hydra", "gymnasium", "tensorboard", "matplotlib", "torch._dynamo"]


def loaded_by(statement, packages=HEAVY):
    """Which of the packages a fresh interpreter has after a statement."""
    code = f"import sys; {statement}; print(*[n for n in {packages} if n in sys.modules])"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    return set(run.stdout.split())


@pytest.fixture(scope="module")
def loaded_by_torch():
    return loaded_by("import torch")


@pytest.mark.parametrize(
    "statement",
    [
        "import worldloom",
        "from worldloom import create_world_model, check_world_model, list_models, LatentState",
        "import worldloom.planning",
    ],
)
def test_models_and_planners_need_no_framework(statement, loaded_by_torch):
    assert loaded_by(statement) <= loaded_by_torch


def test_environments_start_without_torch():
    """Each worker process of a vector environment imports this, and nothing else of worldloom."""
    assert (
        loaded_by("import worldloom.envs.suites.gymnasium", ["torch", "lightning", "hydra"])
        == set()
    )


def test_help_and_wrong_arguments_are_answered_without_torch():
    assert loaded_by("import worldloom.run", ["torch", "lightning"]) == set()
