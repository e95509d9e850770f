"""Folders of episodes: what is read from them, and what is said about broken ones."""

import os
import stat
import zipfile
from pathlib import Path

import numpy as np
import pytest
from gymnasium import spaces

from worldloom.datasets import Episode, open_dataset
from worldloom.datasets.writer import FolderWriter
from worldloom.envs.spaces import ActionSpec, ObsSpec


def arrays(steps=4, seed=0, **changes):
    """An episode with vectors and continuous actions, in our layout; None leaves a key out."""
    rng = np.random.default_rng(seed)
    made = {
        "obs": rng.normal(size=(steps + 1, 3)).astype(np.float32),
        "actions": rng.uniform(-1, 1, (steps, 2)).astype(np.float32),
        "rewards": rng.normal(size=steps).astype(np.float32),
        "terminated": True,
        "truncated": False,
    }
    return {name: x for name, x in (made | changes).items() if x is not None}


def save(folder, *episodes):
    folder.mkdir(exist_ok=True)
    for number, episode in enumerate(episodes):
        np.savez(folder / f"{number:03}.npz", **episode)
    return folder


# ---- what is read --------------------------------------------------------------------------------


def test_a_users_own_folder_needs_nothing_but_the_episodes(tmp_path):
    first, second = arrays(4), arrays(6, seed=1, terminated=False, truncated=True, success=True)
    data = open_dataset(save(tmp_path, first, second))
    assert data.obs.shape == (3,) and data.actions.action_dim == 2 and not data.actions.discrete
    assert data.lengths == [4, 6] and len(data) == 2 and data.steps == 10 and data.env is None
    one, two = data
    assert (one.obs == first["obs"]).all() and (one.actions == first["actions"]).all()
    assert (two.rewards == second["rewards"]).all() and two.rewards.dtype == np.float32
    assert (one.terminated, one.truncated, one.success) == (True, False, None)
    assert (two.terminated, two.truncated, two.success) == (False, True, True)
    assert [episode.source for episode in data] == [str(tmp_path / f"00{i}.npz") for i in (0, 1)]


def test_a_single_file_is_a_data_set_too(tmp_path):
    save(tmp_path, arrays())
    assert len(list(open_dataset(tmp_path / "000.npz"))) == 1


def test_episodes_are_read_one_at_a_time(tmp_path):
    save(tmp_path, arrays(), arrays(rewards=np.float32([0, np.nan, 0, 0])))
    episodes = iter(open_dataset(tmp_path))
    assert next(episodes).terminated  # the second one is not looked at yet
    with pytest.raises(ValueError, match=r"001.npz: rewards holds nan"):
        next(episodes)


def test_dicts_of_images_and_vectors(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 3, 16, 32), np.uint8)
    parts = {"obs/cam": image, "obs/arm/joints": np.arange(10.0).reshape(5, 2)}
    data = open_dataset(save(tmp_path, arrays(obs=None, **parts)))
    assert data.obs.shape == {"cam": (3, 16, 32), "arm/joints": (2,)}
    (episode,) = data
    assert episode.obs["cam"].dtype == np.uint8 and (episode.obs["cam"] == image).all()
    assert episode.obs["arm/joints"].dtype == np.float32


def test_images_with_channels_last_are_turned(tmp_path):
    image = np.random.default_rng(0).integers(0, 256, (5, 16, 32, 3), np.uint8)
    data = open_dataset(save(tmp_path, arrays(obs=image)))
    assert data.obs.shape == (3, 16, 32)
    assert (next(iter(data)).obs[:, 1] == image[..., 1]).all()


def test_integers_are_choices_and_the_largest_of_all_files_counts(tmp_path):
    save(tmp_path, arrays(actions=np.array([0, 1, 0, 1])), arrays(actions=np.array([0, 3, 1, 0])))
    data = open_dataset(tmp_path)
    assert data.actions.discrete and data.actions.action_dim == 4
    assert next(iter(data)).actions.tolist() == np.eye(4)[[0, 1, 0, 1]].tolist()


def test_several_groups_of_choices(tmp_path):
    groups = np.array([[0, 2], [1, 0], [0, 0], [1, 1]])
    data = open_dataset(save(tmp_path, arrays(actions=groups)))
    assert data.actions.action_dim == (2, 3)
    assert next(iter(data)).actions[0].tolist() == [1, 0, 0, 0, 1]


def test_dataset_yaml_says_how_many_choices_there_are(tmp_path):
    save(tmp_path, arrays(actions=np.array([0, 1, 0, 1])))
    (tmp_path / "dataset.yaml").write_text("format: 1\naction_dim: 5\nenv: {_target_: x, id: y}\n")
    data = open_dataset(tmp_path)
    assert data.actions.action_dim == 5 and data.env == {"_target_": "x", "id": "y"}


def test_so_does_the_environment(tmp_path):
    save(tmp_path, arrays(actions=np.array([0, 1, 0, 1])))
    obs = ObsSpec.from_space(spaces.Box(-9, 9, (3,)))
    actions = ActionSpec.from_space(spaces.Discrete(6, start=2))
    data = open_dataset(tmp_path, obs, actions)
    assert data.actions.action_dim == 6
    assert next(iter(data)).actions[1].tolist() == [0, 1, 0, 0, 0, 0]  # counted from 0


def test_keys_that_the_environment_drops_are_not_read(tmp_path):
    parts = {"obs/a": np.zeros((5, 2)), "obs/b": np.full((5, 3), "text")}
    save(tmp_path, arrays(obs=None, **parts))
    (tmp_path / "dataset.yaml").write_text("format: 1\nobs_shape: {a: [2], b: [3]}\n")
    space = spaces.Dict(a=spaces.Box(-9, 9, (2,)), b=spaces.Box(-9, 9, (3,)))
    actions = ActionSpec.from_space(spaces.Box(-2, 2, (2,)))
    data = open_dataset(tmp_path, ObsSpec.from_space(space, keep="a"), actions)
    assert data.obs.shape == {"a": (2,)} and set(next(iter(data)).obs) == {"a"}


def test_the_order_of_keys_does_not_matter(tmp_path):
    save(tmp_path, arrays(obs=None, **{f"obs/{key}": np.zeros((5, 2)) for key in "ba"}))
    space = spaces.Dict(a=spaces.Box(-9, 9, (2,)), b=spaces.Box(-9, 9, (2,)))
    actions = ActionSpec.from_space(spaces.Box(-2, 2, (2,)))
    assert len(open_dataset(tmp_path, ObsSpec.from_space(space), actions)) == 1


def test_without_a_final_observation(tmp_path):
    (episode,) = open_dataset(save(tmp_path, arrays(obs=np.zeros((4, 3)))))
    assert len(episode.obs) == len(episode.actions) == 4


# ---- what is written -----------------------------------------------------------------------------

BOX = ObsSpec.from_space(spaces.Box(-9, 9, (3,)))
TWO = ActionSpec.from_space(spaces.MultiDiscrete([2, 3]))


def episode(steps=4, **changes):
    choices = model_choices(np.tile([[1, 2], [0, 1]], (steps, 1))[:steps])
    obs, rewards = np.ones((steps + 1, 3), np.float32), np.ones(steps, np.float32)
    values = dict(source="", obs=obs, actions=choices, rewards=rewards)
    return Episode(**(values | dict(terminated=False, truncated=True, success=False) | changes))


def model_choices(choices):
    return TWO.encode(choices)


def test_what_was_written_is_read_again(tmp_path):
    writer = FolderWriter(tmp_path / "new" / "one", BOX, TWO, {"_target_": "a.b", "level": 3})
    file = writer.add(episode(5))
    with np.load(file) as stored:
        assert stored["actions"].tolist() == [[1, 2], [0, 1]] * 2 + [[1, 2]]
        assert set(stored.files) == {*arrays(), "success"}
    writer.add(episode(2, success=None))
    data = writer.finish()
    assert data.lengths == [5, 2] and data.actions.action_dim == (2, 3)
    assert data.env == {"_target_": "a.b", "level": 3}
    for read, written in zip(data, (episode(5), episode(2, success=None)), strict=True):
        assert (read.actions == written.actions).all() and (read.obs == written.obs).all()
        assert (read.terminated, read.truncated) == (False, True)
        assert read.success is written.success
    about = (file.parent / "dataset.yaml").read_text()
    assert about.endswith("\nformat: 1\n")
    assert "episodes: 2\nsteps: 7\n" in about and "obs_shape:\n- 3\n" in about


def test_files_are_not_compressed(tmp_path):
    file = FolderWriter(tmp_path, BOX, TWO).add(episode())
    kinds = {member.compress_type for member in zipfile.ZipFile(file).infolist()}
    assert kinds == {zipfile.ZIP_STORED}


def test_two_writers_never_take_the_same_name(tmp_path):
    writers = [FolderWriter(tmp_path, BOX, TWO) for _ in range(2)]
    for steps in (1, 2, 3):
        for writer in writers:
            writer.add(episode(steps))
    assert writers[0].finish().lengths == [1, 1, 2, 2, 3, 3]


def test_a_number_that_someone_is_writing_is_left_to_them(tmp_path):
    (tmp_path / ".000000.tmp").touch()
    assert FolderWriter(tmp_path, BOX, TWO).add(episode()).name == "000001.npz"


def test_links_are_never_followed(tmp_path):
    precious = tmp_path / "precious"
    precious.write_text("mine")
    folder = tmp_path / "data"
    folder.mkdir()
    for name in (".000000.tmp", "dataset.yaml", ".dataset.yaml.tmp"):
        (folder / name).symlink_to(precious)
    assert FolderWriter(folder, BOX, TWO).add(episode()).name == "000001.npz"
    assert precious.read_text() == "mine" and not (folder / "dataset.yaml").is_symlink()


def test_files_follow_the_umask(tmp_path):
    before = os.umask(0o027)
    try:
        FolderWriter(tmp_path, BOX, TWO).add(episode())
    finally:
        os.umask(before)
    assert {stat.S_IMODE(file.stat().st_mode) for file in tmp_path.iterdir()} == {0o640}


def test_a_write_that_breaks_off_leaves_nothing(tmp_path, monkeypatch):
    writer = FolderWriter(tmp_path, BOX, TWO)

    def break_off(file, **arrays):
        file.write(b"PK")
        raise KeyboardInterrupt

    monkeypatch.setattr(np, "savez", break_off)
    with pytest.raises(KeyboardInterrupt):
        writer.add(episode())
    assert [file.name for file in tmp_path.iterdir()] == ["dataset.yaml"]


def test_episodes_of_another_kind_stay_out(tmp_path):
    FolderWriter(tmp_path, BOX, TWO).add(episode())
    with pytest.raises(ValueError, match=r"has observations \(3,\) and \(2, 3\) choices, but the"):
        FolderWriter(tmp_path, BOX, ActionSpec.from_space(spaces.Discrete(2)))


# ---- what is wrong with a folder -----------------------------------------------------------------

BROKEN = {
    "obs": [
        (None, r"has no array obs, only actions, rewards, terminated, truncated; see world"),
        (np.zeros((3, 3)), r"001.npz: obs has 3 rows for 4 actions; expected 5, the last one"),
        (np.zeros((5, 2)), r"obs has shape \(5, 2\), .*expected \(3,\), as in 000.npz"),
        (np.full((5, 3), np.inf), r"001.npz: obs holds inf at index \[0, 0\]; expected finite"),
        (np.full((5, 3), 1e300), r"obs holds 1e\+300 at index \[0, 0\]"),
        (np.full((5, 3), "a"), r"obs is <U1 of shape \(5, 3\); expected an array of numbers"),
    ],
    "actions": [
        (None, "001.npz has no array actions, only"),
        (np.zeros((4, 3)), r"have shape \(4, 3\); expected \[N, \*\(2,\)\]"),
        (np.full((4, 2), 1.5), r"001.npz: The action \[1.5, 1.5\] at index 0 is outside.*middle"),
        (np.zeros((4, 2), int), r"actions are int64; expected numbers in \[-1, 1\], as in 000.npz"),
        (np.zeros((0, 2)), "001.npz has no actions; expected at least one step"),
        (np.float64(1), r"actions is float64 of shape \(\)"),
    ],
    "rewards": [
        (None, "001.npz has no array rewards, only"),
        (np.zeros(5), r"rewards has shape \(5,\); expected \(4,\), one for each action"),
        (np.float32([0, 0, np.nan, 0]), r"001.npz: rewards holds nan at index \[2\]"),
        (np.full(4, None), r"001.npz cannot be read \(Object arrays cannot be loaded"),
    ],
    "terminated": [
        (None, "001.npz has no array terminated; add terminated=True"),
        (np.zeros(4, bool), r"terminated has shape \(4,\); expected a single bool"),
    ],
}


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [(name, *case) for name, cases in BROKEN.items() for case in cases],
)
def test_a_wrong_array_is_named_with_its_file(tmp_path, name, value, message):
    save(tmp_path, arrays(), arrays(**{name: value}))
    with pytest.raises(ValueError, match=message):
        list(open_dataset(tmp_path))


def test_files_that_are_no_episodes(tmp_path):
    save(tmp_path, arrays())
    whole = (tmp_path / "000.npz").read_bytes()
    file = tmp_path / "001.npz"
    for content, message in [
        (whole[:-30], r"001.npz cannot be read \(it is a truncated zip file\); expected arrays"),
        (b"hello", r"001.npz cannot be read \(it is not a zip file\); expected"),
        (b"", "it is not a zip file"),
        (whole[:60] + bytes(40) + whole[100:], r"001.npz cannot be read \("),
    ]:
        file.write_bytes(content)
        with pytest.raises(ValueError, match=message):
            list(open_dataset(tmp_path))


def test_an_array_saved_alone(tmp_path):
    with (tmp_path / "a.npz").open("wb") as file:
        np.save(file, np.zeros(3))
    with pytest.raises(ValueError, match=r"a.npz cannot be read \(it is not a zip file"):
        open_dataset(tmp_path)


def test_other_keys_of_a_dict(tmp_path):
    first, second = ({f"obs/{key}": np.zeros((5, 2)) for key in keys} for keys in ("ab", "ac"))
    save(tmp_path, arrays(obs=None, **first), arrays(obs=None, **second))
    with pytest.raises(ValueError, match=r"observations obs/a, obs/c; expected obs/a, obs/b"):
        list(open_dataset(tmp_path))


def test_pictures_of_floats(tmp_path):
    picture = np.zeros((5, 3, 16, 16), np.uint8)
    save(tmp_path, arrays(obs=picture), arrays(obs=picture / 255))
    with pytest.raises(ValueError, match=r"obs is float64; expected images as uint8"):
        list(open_dataset(tmp_path))
    with pytest.raises(ValueError, match=r"001.npz: The observation is a box of shape \(3, 16"):
        open_dataset(tmp_path / "001.npz")


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("action_dim: [2", r"dataset.yaml is not valid YAML \("),
        ("action_dim: many", "dataset.yaml has action_dim 'many'"),
        ("discrete: 2", "dataset.yaml has discrete 2"),
        ("obs_shape: [4]", r"has observations \(3,\), but obs_shape in .* is \[4\]; correct"),
        ("action_dim: [2, 3]", r"has action_dim \[2, 3\] but discrete is False"),
        ("action_dim: 3", r"000.npz: The actions have shape \(4, 2\); expected \[N, \*\(3,\)\]"),
        (
            "discrete: true\naction_dim: 2",
            "choices, which are integers, as in 000.npz and d",
        ),
    ],
)
def test_a_wrong_dataset_yaml(tmp_path, about, message):
    (save(tmp_path, arrays()) / "dataset.yaml").write_text(f"format: 1\n{about}")
    with pytest.raises(ValueError, match=message):
        list(open_dataset(tmp_path))


OLD = "before format versions were recorded, .* record the dataset again.* 'format: 1'"


@pytest.mark.parametrize(
    ("about", "message"),
    [
        ("action_dim: 2", OLD),
        ("- 1", OLD),
        ("format: 2", r"a newer worldloom \(format 2\).*update"),
    ],
)
def test_dataset_yaml_of_another_version(tmp_path, about, message):
    (save(tmp_path, arrays()) / "dataset.yaml").write_text(about)
    with pytest.raises(ValueError, match=message):
        open_dataset(tmp_path)


@pytest.mark.parametrize("value", ["${env.id}", "${oc.env:HOME}", "x${.y}"])
def test_dataset_yaml_is_never_resolved(tmp_path, value):
    text = f"format: 1\nenv: {{_target_: a.b, deep: [{{id: '{value}'}}]}}\n"
    (save(tmp_path, arrays()) / "dataset.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"dataset.yaml contains .* interpolations are not allow"):
        open_dataset(tmp_path)


def test_dataset_yaml_never_makes_objects(tmp_path):
    text = f"format: 1\nenv: !!python/object/apply:os.mkdir ['{tmp_path / 'made'}']\n"
    (save(tmp_path, arrays()) / "dataset.yaml").write_text(text)
    with pytest.raises(ValueError, match=r"dataset.yaml is not valid YAML \(line 2 has a tag"):
        open_dataset(tmp_path)
    assert not (tmp_path / "made").exists()


# ---- what stays readable -------------------------------------------------------------------------


def test_datasets_of_format_1_stay_readable():
    """The fixture: python -m worldloom.collect env=gymnasium env.id=CartPole-v1 env.time_limit=6

    policy=random episodes=2 out=tests/fixtures/dataset
    """
    data = open_dataset(Path(__file__).parents[1] / "fixtures" / "dataset")
    assert data.obs.shape == (4,) and data.actions.discrete and data.actions.action_dim == 2
    assert data.lengths == [6, 6] and data.env["id"] == "CartPole-v1"
    for episode in data:
        assert episode.obs.shape == (7, 4) and episode.obs.dtype == np.float32
        assert episode.actions.shape == (6, 2) and (episode.actions.sum(1) == 1).all()
        assert (episode.rewards == 1).all() and (episode.terminated, episode.truncated) == (0, 1)
