"""Recording episodes: the files hold what the environments did, and nothing is overwritten."""

import sys
from typing import ClassVar

import gymnasium as gym
import numpy as np
import pytest
from gymnasium import spaces
from omegaconf import OmegaConf

from worldloom import collect as collecting
from worldloom import create_world_model
from worldloom.app.compose import Overrides, compose_env
from worldloom.app.filling import fill_buffer
from worldloom.app.run_dir import FORMAT
from worldloom.collect import CollectConfig, collect
from worldloom.datasets import open_dataset
from worldloom.envs.spaces import ActionSpec, ObsSpec
from worldloom.training import ReplayBuffer
from worldloom.trees import flatten_tree

ACTIONS = {
    "box": spaces.Box(np.float32([-2, 0]), np.float32([2, 1])),
    "discrete": spaces.Discrete(3, start=1),
    "groups": spaces.MultiDiscrete([2, 3]),
    "binary": spaces.MultiBinary(2),
}


class Script(gym.Env):
    """Copy k's episode e lasts 2 + (k + e) % 4 steps; observations and rewards tell where it is.

    Even episodes terminate, odd ones are cut off. Everything is noted in `log`, keyed by (k, e).
    """

    log: ClassVar[dict] = {}
    made = 0

    def __init__(self, action="box", dicts=False, own=False):
        self.action_space = ACTIONS[action]
        vector = spaces.Box(-1e6, 1e6, (3,))
        image = spaces.Box(0, 255, (16, 16, 3), np.uint8)
        inner = spaces.Dict(where=vector, mode=spaces.Discrete(5))
        self.observation_space = spaces.Dict(cam=image, inner=inner) if dicts else vector
        self.dicts = dicts
        self.copy, self.episode = Script.made, -1
        Script.made += 1

    def observe(self):
        where = np.float32([self.copy, self.episode, self.t])
        if not self.dicts:
            return where
        image = np.full((16, 16, 3), 10 * self.episode + self.t, np.uint8)
        return {"cam": image, "inner": {"where": where, "mode": self.t % 5}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.episode, self.t = self.episode + 1, 0
        key = (self.copy, self.episode)
        note = {"obs": [self.observe()], "actions": [], "rewards": [], "seed": seed}
        self.note = Script.log[key] = note
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.t += 1
        reward = 100.0 * self.copy + 10 * self.episode + self.t
        done = self.t == 2 + (self.copy + self.episode) % 4
        terminated = done and self.episode % 2 == 0
        self.note["obs"].append(self.observe())
        self.note["actions"].append(action)
        self.note["rewards"].append(reward)
        self.note |= {"terminated": terminated, "truncated": done and not terminated}
        info = {"success": self.copy == 1} if done else {}
        return self.observe(), reward, terminated, done and not terminated, info


gym.register("Test/Script-v0", Script)
SCRIPT = ["env=gymnasium", "env.id=Test/Script-v0", "env.workers=0"]


@pytest.fixture(autouse=True)
def fresh():
    Script.log, Script.made = {}, -1  # the first copy is only looked at


def record(out, *env, **settings):
    settings = dict(policy="random", episodes=7, num_envs=3, out=str(out)) | settings
    return collect(CollectConfig(**settings), [*SCRIPT, *env])


def where(episode):
    """(copy, episode) from an episode's first observation."""
    obs = episode.obs["inner/where"] if isinstance(episode.obs, dict) else episode.obs
    return tuple(int(x) for x in obs[0, :2])


@pytest.mark.parametrize("action", ACTIONS)
@pytest.mark.parametrize("dicts", [False, True])
def test_the_files_hold_what_the_environments_did(tmp_path, action, dicts):
    record(tmp_path, f"+env.action={action}", f"+env.dicts={dicts}")
    env = Script(action, dicts)
    obs_spec = ObsSpec.from_space(env.observation_space)
    action_spec = ActionSpec.from_space(env.action_space)
    data = open_dataset(tmp_path, obs_spec, action_spec)
    # Each environment its own share: seven episodes on three are three, two and two.
    assert {where(e) for e in data} == {(0, 0), (0, 1), (0, 2), (1, 0), (1, 1), (2, 0), (2, 1)}
    for episode in data:
        note = Script.log[where(episode)]
        steps = 2 + sum(where(episode)) % 4
        assert len(episode.rewards) == steps and len(note["rewards"]) == steps
        assert episode.rewards.tolist() == note["rewards"]
        assert episode.terminated is note["terminated"]
        assert episode.truncated is note["truncated"]
        assert episode.success is (where(episode)[0] == 1)
        stacked = [flatten_tree(obs) for obs in note["obs"]]
        arrays = {k: np.stack([o[k] for o in stacked]) for k in stacked[0]}
        seen = obs_spec.encode(arrays.get("", arrays))
        read = episode.obs if dicts else {"": episode.obs}
        for key, array in (seen if dicts else {"": seen}).items():
            assert read[key].dtype == array.dtype and (read[key] == array).all()
        done = np.stack(note["actions"])
        assert (episode.actions == action_spec.encode(done)).all()


def test_dataset_yaml_and_what_is_printed(tmp_path):
    printed = record(tmp_path / "data", "env.time_limit=9", "+env.action=groups")
    about = OmegaConf.load(tmp_path / "data" / "dataset.yaml")
    assert about.format == 1 and about.obs_shape == [3]
    assert about.action_dim == [2, 3] and about.discrete is True
    assert about.env.id == "Test/Script-v0" and about.env.time_limit == 9
    steps = sum(len(e.rewards) for e in open_dataset(tmp_path / "data"))
    assert (about.episodes, about.steps) == (7, steps)
    returns = [e.rewards.sum() for e in open_dataset(tmp_path / "data")]
    head, held, then = printed.splitlines()
    assert head == f"return {np.mean(returns):.2f} ± {np.std(returns):.2f} over 7 new episodes"
    assert held == f"{tmp_path / 'data'}: 7 episodes, {steps} steps, 0.0 MB"
    path = f"data.path={tmp_path / 'data'}"
    run = "train on it: python -m worldloom.run data=offline"
    assert then == f"{run} {path} model=dreamerv3_size1m training.total_steps=20000"


def test_an_environment_that_data_may_not_choose_is_named_in_the_command(tmp_path):
    words = ["env=custom", f"env._target_={__name__}.Script", "+env.action=discrete"]
    printed = collect(CollectConfig("random", 1, str(tmp_path)), [*words, "env.workers=0"])
    command = printed.partition("worldloom.run ")[2].split()
    assert command[4:6] == words[:2] and "++env.action=discrete" in command
    # They name the same environment again.
    again = collect(CollectConfig("random", 1, str(tmp_path), append=True), command[4:])
    assert "2 episodes" in again


def test_nothing_is_overwritten(tmp_path):
    record(tmp_path, episodes=2)
    before = {file.name: file.read_bytes() for file in tmp_path.glob("*.npz")}
    with pytest.raises(ValueError, match=r"already contains 2 episodes; .* or add append=true"):
        record(tmp_path, episodes=2)
    Script.made = -1
    printed = record(tmp_path, episodes=3, append=True)
    assert "over 3 new episodes" in printed and ": 5 episodes" in printed
    after = {file.name: file.read_bytes() for file in tmp_path.glob("*.npz")}
    assert len(after) == 5 and before.items() <= after.items()
    # The seed counts on: the same one would record the same episodes again.
    seeds = [note["seed"] for note in Script.log.values()]
    assert {2, 3, 4} <= set(seeds) and not {0, 1} & set(seeds)


def test_episodes_of_another_environment_stay_out(tmp_path):
    record(tmp_path, episodes=1)
    key = "env.action_repeat"
    match = f"contains episodes of {{'{key}': 1}}, not {{'{key}': 2}}; choose another folder"
    with pytest.raises(ValueError, match=match):
        record(tmp_path, "env.action_repeat=2", append=True)
    record(tmp_path, "env.num_envs=9", append=True, episodes=1)  # how it is run does not matter


def test_seeds_reproduce_and_differ(tmp_path):
    pendulum = ["env=gymnasium", "env.id=Pendulum-v1", "env.time_limit=5"]

    def episodes(name, seed):
        collect(CollectConfig("random", 2, str(tmp_path / name), seed=seed), pendulum)
        return [(e.obs.tolist(), e.actions.tolist()) for e in open_dataset(tmp_path / name)]

    assert episodes("a", 0) == episodes("b", 0) != episodes("c", 1)


def test_progress_is_told_now_and_then(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(collecting, "LOG_INTERVAL", 0.0)
    record(tmp_path, num_envs=1, episodes=1)
    first, last = capsys.readouterr().out.splitlines()
    assert first.startswith("episodes 0/1 | steps 1 | ") and first.endswith(
        "| last return none yet"
    )
    assert last.startswith("episodes 1/1 | steps 2 | ") and last.endswith("| last return 3")


# ---- the policy of a run -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A folder that looks like a finished run: an untrained model and its configuration."""
    folder = tmp_path_factory.mktemp("run")
    sizes = dict(deter=32, hidden=8, units=8, classes=4, stoch=4)
    model = create_world_model("dreamerv3:size1m", (4,), 2, True, **sizes)
    model.save_pretrained(folder / "model")
    (folder / "config.yaml").write_text(
        f"format: {FORMAT}\n"
        "threads: 1\nplanner: {_target_: worldloom.planning.CEM}\n"
        "model: {_target_: worldloom.models.dreamerv3.DreamerV3}\n"
        "env: {_target_: worldloom.envs.suites.gymnasium.make_env, id: CartPole-v1, num_envs: 2,"
        " workers: 0, time_limit: 30}\n"
    )
    return folder


def lengths(folder):
    return [len(e.rewards) for e in open_dataset(folder)]


def test_a_runs_policy_acts_in_its_own_environment(run, tmp_path):
    for name in "ab":
        collect(CollectConfig(str(run), 3, str(tmp_path / name)), [])
    first, again = (open_dataset(tmp_path / name) for name in "ab")
    assert first.obs.shape == (4,) and first.actions.action_dim == 2 and len(first) == 3
    assert first.env["id"] == "CartPole-v1" and max(first.lengths) <= 30
    assert [e.actions.tolist() for e in first] == [e.actions.tolist() for e in again]


def test_its_environment_may_be_changed(run, tmp_path):
    collect(CollectConfig(str(run / "model"), 2, str(tmp_path / "a")), ["env.time_limit=5"])
    assert lengths(tmp_path / "a") == [5, 5]
    config = {"obs": {"keep": None, "image": None}, "id": "x"}
    wanted = {"obs": {"keep": None, "image": "a"}, "id": "x", "level": 2}
    assert compose_env(Overrides(("env.obs.image=a", "+env.level=2")), config) == wanted
    with pytest.raises(ValueError, match=r"'env.obs.kep' \(did you mean 'env.obs.keep'\?\)"):
        compose_env(Overrides(("env.obs.kep=a",)), config)
    other = ["env=gymnasium", "env.id=CartPole-v1", "env.time_limit=6"]
    collect(CollectConfig(str(run), 2, str(tmp_path / "b"), num_envs=1), other)
    assert lengths(tmp_path / "b") == [6, 6]


def test_samples_or_the_mode(run, tmp_path):
    for deterministic in (True, False):
        out = str(tmp_path / str(deterministic))
        collect(CollectConfig(str(run), 2, out, deterministic=deterministic), [])
    sampled = np.concatenate([e.actions for e in open_dataset(tmp_path / "False")])
    # An untrained policy is close to even, and its mode close to constant.
    assert 0 < sampled[:, 0].mean() < 1
    modes = open_dataset(tmp_path / "True")
    assert lengths(tmp_path / "True") != lengths(tmp_path / "False") and len(modes) == 2


def test_a_model_made_for_something_else_is_refused(run, tmp_path):
    with pytest.raises(ValueError, match=r"has obs_shape \(4,\), but the environment \(3,\)"):
        collect(CollectConfig(str(run), 1, str(tmp_path / "x")), SCRIPT)
    assert not (tmp_path / "x").exists()


# ---- what a replay makes of it -------------------------------------------------------------------


@pytest.mark.parametrize("action", ["box", "discrete", "groups"])
def test_a_replay_holds_the_same_rows(tmp_path, action):
    record(tmp_path, f"+env.action={action}", "+env.dicts=true")
    data = open_dataset(tmp_path)
    spec = ActionSpec.from_space(ACTIONS[action])
    buffer = ReplayBuffer(data.steps + len(data), data.obs.shape, spec.width)
    assert fill_buffer(buffer, data).startswith(
        f"data: 7 episodes of {tmp_path}, {len(buffer)} rows, "
    )
    rows = {key: value for key, value in buffer.newest(10**6).items() if key != "index"}
    where = rows["obs"]["inner/where"][0].int().tolist()
    assert len(where) == data.steps + len(data) and len({tuple(row) for row in where}) == len(where)
    for at, (copy, episode, t) in enumerate(where):
        note = Script.log[copy, episode]
        last = t == len(note["actions"])
        action = np.zeros(spec.width) if last else spec.encode(note["actions"][t][None])[0]
        reward = note["rewards"][t - 1] if t else 0.0
        image = np.moveaxis(note["obs"][t]["cam"], -1, 0)
        assert (rows["obs"]["cam"][0, at].numpy() == image).all()
        assert rows["obs"]["inner/mode"][0, at].argmax() == t % 5
        assert (rows["actions"][0, at].numpy() == action).all()
        assert rows["rewards"][0, at] == reward
        flags = [bool(rows[name][0, at]) for name in ("is_first", "is_last", "is_terminal")]
        assert flags == [t == 0, last, last and note["terminated"]]


# ---- mistakes ------------------------------------------------------------------------------------

MISTAKES = {
    "policy=random episodes=1 out=OUT": "no environment was named; add env=gymnasium env.id=",
    "env=cartpole policy=random out=OUT": "episodes is not set; add episodes=…",
    "env=cartpole episodes=1 out=OUT": "policy is not set; add policy=…",
    "env=cartpole policy=random episodes=0 out=OUT": "episodes is 0; expected at least 1",
    "env=cartpole policy=random episodes=1 out=OUT num_envs=0": "num_envs is 0; expected at lea",
    "env=cartpole policy=random episodes=few out=OUT": "episodes is 'few'; expected a whole",
    "env=cartpole policy=random episode=1 out=OUT": "'episode' (did you mean 'episodes'?)",
    "env=cartpol policy=random episodes=1 out=OUT": "env 'cartpol' (did you mean 'cartpole'?)",
    "env=cartpole env.idd=1 policy=random episodes=1 out=OUT": "'env.idd' (did you mean 'env.id'",
    "env=custom policy=random episodes=1 out=OUT": "env._target_ is not set; add env._target_=…",
    "env=none policy=random episodes=1 out=OUT": "there is no environment; name one: env=gymn",
    "policy=zzz episodes=1 out=OUT": "policy is 'zzz'; expected random, or the folder of a run",
    "policy=RUN episodes=1 out=OUT env.idd=3": "unknown key 'env.idd' (did you mean 'env.id'?)",
    "env=cartpole policy=random episodes=1 out=FILE": "is a file; expected a folder",
}


@pytest.mark.parametrize("words", MISTAKES)
def test_a_mistake_ends_in_one_line(run, tmp_path, monkeypatch, capsys, words):
    (tmp_path / "file").touch()
    replaced = {"OUT": tmp_path / "out", "RUN": run, "FILE": tmp_path / "file"}
    arguments = words
    for name, path in replaced.items():
        arguments = arguments.replace(name, str(path))
    monkeypatch.setattr(sys, "argv", ["collect.py", *arguments.split()])
    with pytest.raises(SystemExit) as stopped:
        collecting.main()
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert stopped.value.code == 1 and out == ""
    assert line.startswith("error: ") and MISTAKES[words] in line
    assert not (tmp_path / "out").exists()


def test_without_arguments_it_tells_how_to_use_it(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["collect.py"])
    with pytest.raises(SystemExit, match="2"):
        collecting.main()
    assert "usage: worldloom collect env=" in capsys.readouterr().out


def test_the_command_records(tmp_path, monkeypatch, capsys):
    words = ["env=cartpole", "env.time_limit=6", "policy=random", "episodes=2", "seed=3"]
    monkeypatch.setattr(sys, "argv", ["collect.py", *words, f"out={tmp_path}"])
    collecting.main()
    assert f"{tmp_path}: 2 episodes" in capsys.readouterr().out
    assert lengths(tmp_path) == [3, 3]  # every action is done twice
