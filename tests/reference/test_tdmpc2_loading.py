"""Official TD-MPC2 checkpoints through the public factory, in the present and the older layout."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tests.reference.reference_format import (
    ROOT,
    agent_folders,
    array,
    load,
)
from tests.reference.tdmpc2_format import FAMILY, Agent, official_state
from worldloom import create_world_model
from worldloom.models.tdmpc2 import TDMPC2
from worldloom.models.tdmpc2.official import read_arrays

CHECKPOINTS = [
    path.relative_to(ROOT).as_posix()
    for folder in agent_folders(FAMILY)
    for path in sorted((ROOT / folder).glob("agent*.pt"))
]
# What the shapes of the weights say; the log deviations and masks are in the present layout only.
INFERRED = ("enc_dim", "mlp_dim", "latent_dim", "num_enc_layers", "num_channels", "num_q")
INFERRED += ("num_bins", "task_dim", "episodic")
IN_PRESENT_LAYOUT = ("log_std_min", "log_std_max", "action_dims")


def test_tdmpc2_checkpoints_are_there() -> None:
    """Finding nothing must not pass."""
    assert CHECKPOINTS, f"no agent*.pt in {ROOT / FAMILY}"


def create(agent: Agent, path: Path, **spaces: Any) -> TDMPC2:
    """Load weights with what they do not say."""
    inferred = INFERRED
    if "log_std_min" in read_arrays(path):
        inferred += IN_PRESENT_LAYOUT
    options = {k: v for k, v in agent.arguments.items() if k not in inferred}
    return create_world_model(path, **{**options, **spaces})


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_tdmpc2_checkpoint_loads(file: str) -> None:
    path = ROOT / file
    agent = Agent(Path(file).parent.as_posix())
    model = create(agent, path)
    state = official_state(model)
    assert set(state) == set(agent.params)
    for name, value in agent.params.items():
        np.testing.assert_array_equal(state[name].numpy(), value.numpy(), err_msg=name)
    unseen = traceless(agent)
    arguments = model.build_config["arguments"]
    assert arguments.pop("loss_scales") == {} and arguments.pop("obs_order") is None
    assert {k: v for k, v in arguments.items() if k not in unseen} == {
        k: v for k, v in agent.arguments.items() if k not in unseen
    }


def traceless(agent: Agent) -> tuple[str, ...]:
    """Name the hyperparameters without effect, of an encoder that the agent does not have."""
    if agent.config["obs"] == "rgb":
        return ("enc_dim", "num_enc_layers")
    if agent.config["num_enc_layers"] == 1:  # the same network as with two
        return ("num_channels", "num_enc_layers")
    return ("num_channels",)


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_tdmpc2_checkpoint_acts_as_the_arrays_do(file: str) -> None:
    """Both layouts compute what params.npz does, and so what the other tests compare."""
    agent = Agent(Path(file).parent.as_posix())
    arrays = load(agent.folder, "funcs.npz")
    obs = agent.observation(arrays["in/obs"], torch.float32)
    task = array(arrays["in/task"]) if "in/task" in arrays else None
    outputs = []
    for model in (agent.build("float32"), create(agent, ROOT / file)):
        torch.manual_seed(0)
        state = model.encode(obs, task)
        action, state = model.policy(state)
        outputs.append(
            [action, state.features, *model.decode(model.predict(state, action)).values()]
        )
    for ours, theirs in zip(*outputs, strict=True):
        assert ours.equal(theirs)


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_tdmpc2_lacking_tensor_is_named(file: str, tmp_path: Path) -> None:
    agent, content = read(file)
    name = next(k for k in content["model"] if k.startswith("_pi.1"))
    del content["model"][name]
    torch.save(content, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=name):
        create(agent, tmp_path / "agent.pt")


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_tdmpc2_wrong_shape_is_named(file: str, tmp_path: Path) -> None:
    agent, content = read(file)
    name = "_reward.1.bias"
    content["model"][name] = torch.zeros(77)
    torch.save(content, tmp_path / "agent.pt")
    with pytest.raises(ValueError, match=name) as caught:
        create(agent, tmp_path / "agent.pt")
    assert "(77,)" in str(caught.value)


@pytest.mark.parametrize("file", CHECKPOINTS)
def test_tdmpc2_wrong_action_width_is_named(file: str) -> None:
    agent = Agent(Path(file).parent.as_posix())
    with pytest.raises(ValueError, match="action_dim"):
        create(agent, ROOT / file, action_dim=agent.arguments["action_dim"] + 1)


def read(file: str) -> tuple[Agent, dict[str, Any]]:
    """Return the agent of a checkpoint and its content."""
    content = torch.load(ROOT / file, weights_only=True)
    return Agent(Path(file).parent.as_posix()), content
