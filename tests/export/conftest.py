"""Run folders without training, whose models have random weights in every layer."""

import functools

import pytest
import torch

from tests.run_folders import write_run
from worldloom.app.compose import Overrides
from worldloom.app.task import Task, open_saved_run
from worldloom.saving import save_model

# Sizes of models that act, and are traced, in little time.
DREAMER_SIZES = {"units": 16, "deter": 32, "hidden": 16, "stoch": 8, "classes": 4, "blocks": 4}
DREAMER_SIZES |= {"depth": 4}
TDMPC2_SIZES = {"latent_dim": 32, "mlp_dim": 16, "enc_dim": 16, "num_bins": 21, "num_q": 3}
TDMPC2_SIZES |= {"horizon": 2, "iterations": 2, "num_samples": 12, "num_elites": 6}
TDMPC2_SIZES |= {"num_pi_trajs": 2}
DREAMER = ("model=dreamerv3_tiny", *(f"model.{key}={x}" for key, x in DREAMER_SIZES.items()))
TDMPC2 = ("model=tdmpc2_tiny", *(f"model.{key}={x}" for key, x in TDMPC2_SIZES.items()))
CARTPOLE = ("env=gymnasium", "env.id=CartPole-v1")
PENDULUM = ("env=gymnasium", "env.id=Pendulum-v1")


def disturb(model):
    """Add noise to all weights: new models predict zero rewards and values, so all plans tie."""
    with torch.random.fork_rng(), torch.no_grad():
        torch.manual_seed(1)
        for weight in model.parameters():
            weight.add_(0.2 * torch.randn_like(weight))


@pytest.fixture(scope="session")
def make_run(tmp_path_factory):
    """Write the folder of a run without training, once for all tests."""

    @functools.cache
    def make(*words):
        folder = tmp_path_factory.mktemp("runs") / "run"
        write_run(folder, *words, "threads=1", scores={"step": 50, "final/return": 3.0})
        config, section = open_saved_run(folder, Overrides(()))
        task = Task.from_config(section, collects=False)
        with torch.random.fork_rng():
            torch.manual_seed(0)
            model = task.build_model(config["model"])
        disturb(model)
        save_model(model, folder / "model")
        return folder

    return make
