"""Real runs of the command with TD-MPC2, small ones."""

import re

import pytest
import torch
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from tests.test_run import metrics, without_clocks
from worldloom import create_world_model

TINY = [
    *("~experiment", "model=tdmpc2_1m", "threads=1", "name=td"),
    *("model.enc_dim=8", "model.mlp_dim=8", "model.latent_dim=16", "model.num_bins=11"),
    *("model.num_samples=12", "model.num_elites=3", "model.num_pi_trajs=3", "model.iterations=2"),
    *("training.batch_size=8", "training.prefill=60", "training.random_steps=60"),
    *("training.seed_episodes=0", "training.total_steps=100", "training.log_every=10"),
    *("evaluation.episodes=2", "evaluation.every=50", "evaluation.episodes_during=2"),
    *("callbacks.open_loop.every=20", "env.time_limit=30"),
]


@pytest.fixture(scope="module")
def finished(commands, tmp_path_factory):
    """One run on CartPole, which is discrete and terminates: (its folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    done = commands.good(TINY, cwd)
    (folder,) = (cwd / "runs" / "td").iterdir()
    return folder, done["out"]


def test_one_update_follows_each_decision_and_each_of_the_prefill(finished):
    folder, _ = finished
    step, updates = (int(metrics(folder)[-1][name]) for name in ("step", "updates"))
    assert step >= 100 and updates == step


def test_metrics_have_the_names_of_the_family(finished):
    folder, _ = finished
    names = {name for row in metrics(folder) for name, value in row.items() if value}
    losses = ("consistency", "reward", "value", "termination", "policy")
    assert {f"loss/{name}_loss" for name in losses} <= names
    assert {"loss/loss", "stats/policy_entropy", "stats/policy_scale", "final/return"} <= names
    assert not any("reconstruction" in name for name in names)


def test_terminations_switched_the_head_on(finished):
    folder, _ = finished
    model = create_world_model(folder)
    assert model.build_config["arguments"]["episodic"] == "auto" and bool(model.terminates)
    assert model.discounts == (0.95,)  # from 30 decisions: 5 / 6 is below the least


def test_the_saved_model_plans(finished):
    folder, _ = finished
    model = create_world_model(folder).eval()
    action, state = model.policy(model.encode(torch.zeros(3, 4)), deterministic=True)
    assert action.sum(-1).tolist() == [1, 1, 1] and state.extras["plan"].shape == (3, 3, 2)


def test_the_same_seed_gives_the_same_metrics(finished, commands, tmp_path):
    folder, _ = finished
    commands.good([*TINY, "hydra.run.dir=again"], tmp_path)
    assert without_clocks(tmp_path / "again") == without_clocks(folder)


@pytest.mark.slow
def test_scoring_a_run_gives_its_final_score(finished, commands, tmp_path):
    folder, printed = finished
    final = re.search(r"final return (\S+) ± (\S+) \(2 episodes\)", printed)
    words = [f"checkpoint={folder}", "episodes=2", "num_envs=10"]
    scored = commands.good(words, tmp_path, module="worldloom.eval")
    assert f"return {float(final[1]):.1f}"[:-1] in scored["out"]


def test_a_run_begins_with_what_another_has_learned(finished, commands, tmp_path):
    """Here to continuous actions and another observation: what does not fit is said."""
    folder, _ = finished
    words = [*TINY, "env.id=Pendulum-v1", f"init_from={folder}", "hydra.run.dir=new"]
    lines = commands.good(words, tmp_path)["out"].splitlines()
    (head,) = [line for line in lines if "tensors copied" in line]
    taken, total = map(int, re.fullmatch(r"(\d+) of (\d+) tensors copied:", head).groups())
    assert 0 < taken < total
    first = "skipped encoder.vector.layers.0.linear.weight: (8, 4) in the file, (8, 3) in the model"
    assert any(first in line for line in lines)
    assert create_world_model(tmp_path / "new").obs_shape == (3,)


@pytest.mark.slow
def test_a_decoder_lets_one_look_at_the_imagination(commands, tmp_path):
    done = commands.good([*TINY, "model.decoder=true", "hydra.run.dir=run"], tmp_path)
    names = {name for row in metrics(tmp_path / "run") for name, value in row.items() if value}
    assert "loss/reconstruction_loss" in names and "final return" in done["out"]
    events = EventAccumulator(str(tmp_path / "run"), {"images": 0}).Reload()
    # Longer than the slices that are trained on, for it is read from the replay.
    assert len(events.Images("imagination/open_loop")) == 5
