"""Official weights through the public factory: params.npz, checkpoints, and files to refuse."""

import os
import pickle
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.reference.dreamerv3_format import (
    Agent,
    official_state,
)
from tests.reference.reference_format import (
    ROOT,
    agent_folders,
    load,
)
from worldloom import create_world_model
from worldloom.models.dreamerv3 import DreamerV3

CHECKPOINTS = [
    folder
    for folder in agent_folders("dreamerv3")
    if (ROOT / folder / "official_ckpt" / "agent.pkl").is_file()
]


def create(agent: Agent, path: Path, **spaces: Any) -> DreamerV3:
    """Load weights with what they do not say: spaces, the split of the latents, flags."""
    arguments = agent.arguments
    spaces = {k: arguments[k] for k in ("obs_shape", "action_dim")} | spaces
    options = {k: arguments[k] for k in ("stoch", "absolute", "retnorm", "valnorm", "advnorm")}
    return create_world_model(path, **spaces, **options)


def assert_holds(model: DreamerV3, arrays: Mapping[str, np.ndarray], keys: dict[str, str]) -> None:
    """Assert that the model has exactly the arrays, under other keys of its spaces."""
    state = official_state(model)
    for ours, theirs in keys.items():
        state = {
            k.replace(f"pol/head/{ours}/", f"pol/head/{theirs}/").replace(
                f"dec/vec/{ours}/", f"dec/vec/{theirs}/"
            ): v
            for k, v in state.items()
        }
    wanted = {k: v for k, v in arrays.items() if not k.startswith("opt/")}
    assert set(wanted) - set(state) == set()
    assert {k for k in state if k not in wanted} <= {"slowval_count/value"}
    for name, value in wanted.items():
        np.testing.assert_array_equal(state[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize("folder", agent_folders("dreamerv3"))
def test_reference_params_load(folder: str) -> None:
    agent = Agent(folder)
    model = create(agent, ROOT / folder / "params.npz")
    assert_holds(model, agent.params, {})
    assert model.discrete == agent.arguments["discrete"]
    arguments = model.build_config["arguments"]
    assert (arguments["obs_classes"] or {}) == (agent.arguments["obs_classes"] or {})


@pytest.mark.parametrize("folder", agent_folders("dreamerv3"))
def test_reference_params_load_with_bare_spaces(folder: str) -> None:
    agent = Agent(folder)
    if len(agent.obs_space) > 1 or len(agent.act_space) > 1:
        pytest.skip(f"{folder} has several observations or actions, which need names")
    ((obs, shape),) = agent.arguments["obs_shape"].items()
    ((act, count),) = agent.arguments["action_dim"].items()
    path = ROOT / folder / "params.npz"
    model = create(agent, path, obs_shape=shape, action_dim=count)
    assert_holds(model, agent.params, {"obs": obs, "action": act})


@pytest.mark.parametrize("folder", CHECKPOINTS)
def test_reference_checkpoint_loads(folder: str, tmp_path: Path) -> None:
    agent = Agent(folder)
    source = ROOT / folder / "official_ckpt"
    recorded = load(folder, "train.npz")
    prefix = "out/final/state/"
    arrays = {k.removeprefix(prefix): v for k, v in recorded.items() if k.startswith(prefix)}
    # As the official training lays it out: ckpt/latest names the newest folder.
    newest = tmp_path / "ckpt" / "20260102T030405F678901-000000004"
    shutil.copytree(source, newest)
    (tmp_path / "ckpt" / "latest").write_text(newest.name + "\n")
    for path in (source, source / "agent.pkl", newest, tmp_path / "ckpt"):
        assert_holds(create(agent, path), arrays, {})


@pytest.mark.parametrize("folder", agent_folders("dreamerv3")[:1])
@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_reference_lacking_array_is_named(folder: str, suffix: str, tmp_path: Path) -> None:
    agent = Agent(folder)
    for name in ("val/mlp/norm0/scale", "dyn/dynin2/bias", "rew/head/logits/kernel"):
        arrays = {k: v for k, v in agent.params.items() if k != name}
        path = write(arrays, tmp_path / f"weights{suffix}")
        with pytest.raises(ValueError, match=name):
            create(agent, path)


@pytest.mark.parametrize("folder", agent_folders("dreamerv3")[:1])
@pytest.mark.parametrize("suffix", [".npz", ".pkl"])
def test_reference_wrong_shape_is_named(folder: str, suffix: str, tmp_path: Path) -> None:
    agent = Agent(folder)
    for name in ("con/head/logit/bias", "dyn/dynin2/kernel", "dyn/obs0norm/scale"):
        wrong = np.zeros((*agent.params[name].shape[:-1], 77), np.float32)
        path = write({**agent.params, name: wrong}, tmp_path / f"weights{suffix}")
        with pytest.raises(ValueError, match=name) as caught:
            create(agent, path)
        assert str(wrong.shape) in str(caught.value)


@pytest.mark.parametrize("folder", agent_folders("dreamerv3")[:1])
def test_reference_wrong_space_is_named(folder: str) -> None:
    agent = Agent(folder)
    actions = {k: n + 1 for k, n in agent.arguments["action_dim"].items()}
    with pytest.raises(ValueError, match="dyn/dynin2/kernel"):
        create(agent, ROOT / folder / "params.npz", action_dim=actions)


class RunsCode:
    """Pickles as a call of any function."""

    def __init__(self, function: Any, *arguments: Any) -> None:
        self.call = function, arguments

    def __reduce__(self) -> Any:
        return self.call


@pytest.mark.parametrize("place", ["whole file", "params", "an array", "counters"])
@pytest.mark.parametrize("function", [os.mkdir, os.system, exec, pickle.loads])
def test_reference_hostile_pickle_is_refused(place: str, function: Any, tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    argument = {
        os.mkdir: str(trace),
        os.system: f"touch {trace}",
        exec: f"import os; os.mkdir({str(trace)!r})",
        pickle.loads: pickle.dumps(RunsCode(os.mkdir, str(trace))),
    }[function]
    attack = RunsCode(function, argument)
    arrays: dict[str, Any] = {"dyn/dyngru/kernel": np.zeros((2, 2, 6), np.float32)}
    content: Any = {
        "whole file": attack,
        "params": {"params": attack, "counters": {}},
        "an array": {"params": {**arrays, "attack": attack}, "counters": {}},
        "counters": {"params": arrays, "counters": attack},
    }[place]
    path = tmp_path / "agent.pkl"
    path.write_bytes(pickle.dumps(content))
    with pytest.raises(ValueError, match=r"agent\.pkl.*nothing in it was executed"):
        create_world_model(path, obs_shape=(3,), action_dim=2)
    assert not trace.exists()
    pickle.loads(path.read_bytes())  # the attack would have worked
    assert trace.exists()


def test_reference_npz_with_objects_is_refused(tmp_path: Path) -> None:
    trace = tmp_path / "trace"
    objects = np.array([RunsCode(os.mkdir, str(trace))], dtype=object)
    np.savez(tmp_path / "params.npz", **{"dyn/dyngru/kernel": objects})
    with pytest.raises(ValueError, match=r"params\.npz"):
        create_world_model(tmp_path / "params.npz", obs_shape=(3,), action_dim=2)
    assert not trace.exists()


def write(arrays: Mapping[str, np.ndarray], path: Path) -> Path:
    """Write arrays as params.npz or as agent.pkl."""
    if path.suffix == ".npz":
        np.savez(path, **arrays)
    else:
        path.write_bytes(pickle.dumps({"params": dict(arrays), "counters": {}}))
    return path
