"""Data sets of Minari, made on the spot in both of its formats."""

import json
import shutil
import warnings

import numpy as np
import pytest
from gymnasium import spaces

from worldloom.datasets import open_dataset
from worldloom.envs.spaces import ActionSpec, ObsSpec

minari = pytest.importorskip("minari", reason="needs the extra offline")
BOX = spaces.Box(np.float32([-2, 0]), np.float32([2, 1]))
VECTOR = spaces.Box(-9, 9, (3,))
IMAGE = spaces.Box(0, 255, (16, 32, 3), np.uint8)
GOAL = spaces.Dict(image=IMAGE, state=spaces.Dict(now=VECTOR, mode=spaces.Discrete(3)))


@pytest.fixture(params=["hdf5", "arrow"])
def make(request, tmp_path, monkeypatch):
    """Return a function that writes a data set and returns its folder."""
    packages = {"hdf5": "h5py", "arrow": "pyarrow"}
    pytest.importorskip(packages[request.param], reason="needs the extra offline")
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(tmp_path))

    def write(episodes, observation_space, action_space, name="own/thing-v0"):
        buffers = [minari.data_collector.EpisodeBuffer(**episode) for episode in episodes]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about an author and a licence that are not given
            minari.create_dataset_from_buffers(
                name,
                buffers,
                observation_space=observation_space,
                action_space=action_space,
                data_format=request.param,
                jpeg_encoding=False,
            )
        return tmp_path / name

    return write


def episode(steps, obs_space, action_space, seed=0, terminated=True):
    """Random observations and actions; a nested dict of arrays for dict spaces."""
    obs_space.seed(seed)
    action_space.seed(seed)
    ends = np.arange(steps) == steps - 1
    return {
        "observations": stack([obs_space.sample() for _ in range(steps + 1)]),
        "actions": np.stack([action_space.sample() for _ in range(steps)]),
        "rewards": list(np.arange(steps) + 100.0 * seed),
        "terminations": list(ends & terminated),
        "truncations": list(ends & (not terminated)),
    }


def stack(samples):
    if isinstance(samples[0], dict):
        return {key: stack([sample[key] for sample in samples]) for key in samples[0]}
    return np.stack(samples)


def test_continuous_actions_come_in_a_models_units(make):
    made = [episode(4, VECTOR, BOX), episode(6, VECTOR, BOX, seed=1, terminated=False)]
    data = open_dataset(make(made, VECTOR, BOX))
    assert data.obs.shape == (3,) and data.actions.action_dim == 2 and not data.actions.discrete
    assert data.lengths == [4, 6] and data.steps == 10
    for read, wrote in zip(data, made, strict=True):
        assert (read.obs == wrote["observations"]).all() and read.obs.dtype == np.float32
        assert read.rewards.tolist() == wrote["rewards"]
        assert read.actions == pytest.approx(wrote["actions"] / [2, 0.5] - [0, 1], abs=1e-6)
    assert [(e.terminated, e.truncated) for e in data] == [(True, False), (False, True)]


def test_dicts_images_and_choices(make):
    space = spaces.Discrete(4, start=1)
    made = [episode(3, GOAL, space), episode(2, GOAL, space, seed=1)]
    data = open_dataset(make(made, GOAL, space))
    shapes = {"image": (3, 16, 32), "state/now": (3,), "state/mode": (3,)}
    assert data.obs.shape == shapes and data.actions.action_dim == 4
    for read, wrote in zip(data, made, strict=True):
        assert (read.obs["image"] == np.moveaxis(wrote["observations"]["image"], -1, 1)).all()
        assert read.obs["image"].dtype == np.uint8
        state = wrote["observations"]["state"]
        assert (read.obs["state/now"] == state["now"]).all()
        assert (read.obs["state/mode"].argmax(1) == state["mode"]).all()
        assert (read.actions.argmax(1) == wrote["actions"] - 1).all()


def test_by_its_id_its_folder_or_the_one_inside(make):
    folder = make([episode(3, VECTOR, BOX)], VECTOR, BOX)
    for path in ("own/thing-v0", folder, folder / "data"):
        assert len(list(open_dataset(path))) == 1


def test_it_fits_the_environment_or_is_refused(make):
    folder = make([episode(3, VECTOR, BOX)], VECTOR, BOX)
    obs, actions = ObsSpec.from_space(VECTOR), ActionSpec.from_space(BOX)
    assert len(open_dataset(folder, obs, actions)) == 1
    other = ActionSpec.from_space(spaces.Box(-1, 1, (2,)))
    with pytest.raises(ValueError, match=r"are in Box\(\[-2.*of the environment in Box\(-1.0, 1"):
        open_dataset(folder, obs, other)
    four = ObsSpec.from_space(spaces.Box(-9, 9, (4,)))
    with pytest.raises(ValueError, match=r"observations has shape \(4, 3\), .*expected \(4,\), as"):
        list(open_dataset(folder, four, actions))
    with pytest.raises(ValueError, match=r"has .* 2 continuous actions, but .* 2 choices; choose"):
        open_dataset(folder, obs, ActionSpec.from_space(spaces.Discrete(2)))


def test_the_environment_says_what_models_see(make):
    made = episode(3, GOAL, BOX)
    obs = ObsSpec.from_space(GOAL, keep="state/.*")
    data = open_dataset(make([made], GOAL, BOX), obs, ActionSpec.from_space(BOX))
    (read,) = data
    assert data.obs.shape == {"state/now": (3,), "state/mode": (3,)} and set(read.obs) == {
        "state/now",
        "state/mode",
    }


def test_broken_ones(make):
    wrong = episode(3, VECTOR, BOX)
    wrong["rewards"][1] = np.nan
    folder = make([episode(3, VECTOR, BOX), wrong], VECTOR, BOX)
    with pytest.raises(ValueError, match=r"thing-v0, episode 1: rewards holds nan at index \[1\]"):
        list(open_dataset(folder))
    about = folder / "data" / "metadata.json"
    text = json.loads(about.read_text())
    about.write_text(json.dumps({k: v for k, v in text.items() if k != "action_space"}))
    with pytest.raises(ValueError, match=r"metadata.json has no action_space; create"):
        open_dataset(folder)
    about.write_text("{")
    with pytest.raises(ValueError, match=r"metadata.json is not valid JSON"):
        open_dataset(folder)


def test_actions_outside_the_space(make):
    wrong = episode(3, VECTOR, BOX)
    wrong["actions"][2, 1] = 1.5
    with pytest.raises(ValueError, match=r"episode 0: The action .*1.5\] at index 2 is outside"):
        list(open_dataset(make([wrong], VECTOR, BOX)))


def test_data_that_are_gone(make):
    folder = make([episode(3, VECTOR, BOX)], VECTOR, BOX)
    for path in (folder / "data").iterdir():
        if path.name != "metadata.json":
            shutil.rmtree(path) if path.is_dir() else path.unlink()
    with pytest.raises(ValueError, match=r"thing-v0 cannot be read by Minari"):
        list(open_dataset(folder))


def test_texts_can_be_left_out(make):
    space = spaces.Dict(mission=spaces.Text(9), now=VECTOR)
    recorded = episode(3, spaces.Dict(now=VECTOR), BOX)
    recorded["observations"]["mission"] = ["go", "to", "the", "door"]
    path = make([recorded], space, BOX)
    with pytest.raises(ValueError, match=r"'mission'.*env.obs.keep='now', or record the dataset"):
        open_dataset(path)
    data = open_dataset(path, choice={"keep": "now"})
    assert data.obs.shape == {"now": (3,)} and next(iter(data)).obs["now"].shape == (4, 3)


@pytest.mark.parametrize("text", ["3", "[]", "null", '"observation_space"'])
def test_metadata_of_another_kind(make, text):
    folder = make([episode(3, VECTOR, BOX)], VECTOR, BOX)
    (folder / "data" / "metadata.json").write_text(text)
    with pytest.raises(ValueError, match=r"metadata.json has no observation_space"):
        open_dataset(folder)


@pytest.mark.parametrize("change", [{"observation_space": 3}, {"action_space": {"type": "None"}}])
def test_spaces_that_minari_cannot_read(make, change):
    folder = make([episode(3, VECTOR, BOX)], VECTOR, BOX)
    about = folder / "data" / "metadata.json"
    about.write_text(json.dumps({**json.loads(about.read_text()), **change}))
    with pytest.raises(ValueError, match=r"thing-v0 cannot be read by Minari"):
        open_dataset(folder)


def test_damaged_data_name_the_dataset(make):
    folder = make([episode(3, VECTOR, BOX)], VECTOR, BOX)
    files = [path for path in (folder / "data").rglob("*") if path.is_file()]
    for file in files:
        if file.name == "metadata.json":
            continue
        content = file.read_bytes()
        for damaged in (b"", content[: len(content) // 2], b"no such format"):
            file.write_bytes(damaged)
            with pytest.raises(ValueError, match=r"thing-v0"):
                list(open_dataset(folder))
        file.write_bytes(content)
