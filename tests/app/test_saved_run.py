"""Acting with trained runs: runs of a user's package, trained, loaded, played and filmed."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from PIL import Image

import worldloom
from tests.app.own_package import write_package
from worldloom.envs.reward_panel import HEIGHT

SHORT = [
    "threads=1",
    "env.num_envs=2",
    "training.total_steps=60",
    "training.batch_size=2",
    "training.sequence_length=6",
    "training.train_ratio=1",
    "training.random_steps=0",
    "training.seed_episodes=0",
    "training.warmup=0",
    "evaluation.episodes=2",
    "evaluation.every=0",
]
DREAMER = ["model=dreamerv3_tiny", "model.deter=16", "model.hidden=8", "model.units=8"]
DREAMER += ["model.classes=4", "model.stoch=2", "model.depth=2", "model.imag_length=3"]
PLANNER = ["+planner.horizon=3", "+planner.num_samples=16", "+planner.num_elites=4"]
TDMPC = [
    "model=tdmpc2_tiny",
    "training.prefill=20",
    "model.num_samples=16",
    "model.num_elites=4",
    "model.num_pi_trajs=2",
]
OWN_ENV, OWN_MODEL = "env._target_=mine.envs.make_env", "model._target_=mine.models.Linear"
RUNS = {
    "dict": [*DREAMER, OWN_ENV, "+env.sees=dict", "env.action_repeat=2"],
    "image": [*DREAMER, OWN_ENV, "+env.sees=image", "+env.acts=choices", "env.frame_stack=2"],
    "planned": ["model=custom", OWN_MODEL, *PLANNER, OWN_ENV, "+env.acts=choice"],
    "tdmpc": [*TDMPC, OWN_ENV, "+env.acts=doubles", "env.time_limit=5"],
}
ALLOW = ("mine.envs.make_env", "mine.models.Linear")


@pytest.fixture(scope="module")
def package(tmp_path_factory):
    """The folder of a package outside the checkout."""
    folder = write_package(tmp_path_factory.mktemp("somewhere"))
    sys.path.insert(0, str(folder))
    yield folder
    sys.path.remove(str(folder))
    for name in [name for name in sys.modules if name.split(".")[0] == "mine"]:
        del sys.modules[name]


@pytest.fixture(scope="module")
def train(package, commands, tmp_path_factory):
    """Train a run of RUNS once; return its folder."""
    folders = {}

    def call(name):
        if name not in folders:
            cwd = tmp_path_factory.mktemp(name)
            words = [*RUNS[name], *SHORT, f"hydra.run.dir={cwd}/run"]
            done = commands.good(words, cwd, path=package)
            (cwd / "run" / "printed").write_text(done["out"])
            folders[name] = cwd / "run"
        return folders[name]

    return call


@pytest.fixture
def evaluate(package, commands, tmp_path):
    """Run the evaluation command of a run of RUNS; return what it printed."""

    def call(folder, *args, code=0):
        trust = [arg for arg in (OWN_ENV, OWN_MODEL) if arg in RUNS[folder.parent.name[:-1]]]
        words = [f"checkpoint={folder}", *trust, *args]
        done = commands.run(words, tmp_path, module="worldloom.eval", path=package)
        assert done["code"] == code, done
        return done["out"] if code == 0 else done["err"]

    return call


@pytest.mark.slow
def test_the_lines_that_a_run_prints_work_when_pasted(train, package, tmp_path):
    """Of a custom model in a custom environment, in a shell and an interpreter of their own."""
    printed = (train("planned") / "printed").read_text()
    lines = dict(re.findall(r"^([a-z ]+ it): +(.+)$", printed, re.MULTILINE))
    assert list(lines) == ["watch it", "score it", "act with it"]
    env = {**os.environ, "PYTHONPATH": f"{Path(worldloom.__file__).parents[1]}:{package}"}
    env["PATH"] = f"{Path(sys.executable).parent}:{env['PATH']}"
    options = {"cwd": tmp_path, "env": env, "capture_output": True, "text": True}
    done = subprocess.run(lines["score it"], shell=True, **options)
    final = re.search(r"^final return (\S+)", printed, re.MULTILINE)[1]
    assert f"{float(done.stdout.split()[1]):.1f}" == final, done.stderr
    code = f"{lines['act with it']}\nobs, _ = env.reset()\nprint(env.step(agent.act(obs))[1] > 0)"
    done = subprocess.run([sys.executable, "-c", code], **options)
    assert done.stdout == "True\n", done.stderr
    del options["capture_output"]
    words = shlex.split(lines["watch it"])
    with subprocess.Popen([*words, "--port=0"], stderr=subprocess.PIPE, **options) as board:
        shown = ""
        while "at http" not in shown and board.poll() is None:
            shown += board.stderr.readline()
        board.terminate()
    assert "at http" in shown


def play(env, agent, episodes, seed):
    """Return the return and the length of each episode, played as a user would."""
    results = []
    for episode in range(episodes):
        obs, _ = env.reset(seed=None if episode else seed)
        agent.reset()
        total, steps, ended = 0.0, 0, False
        while not ended:
            obs, reward, terminated, truncated, _ = env.step(agent.act(obs))
            total, steps, ended = total + reward, steps + 1, terminated or truncated
        results.append((total, steps))
    return results


@pytest.mark.parametrize("name", RUNS)
def test_an_agent_scores_what_the_evaluation_prints(name, train, evaluate):
    """Actions that are not exactly of the environment's space would end the test."""
    folder = train(name)
    printed = evaluate(folder, "num_envs=1", "episodes=20", "seed=5")
    run = worldloom.load_run(folder, allow=ALLOW)
    returns, lengths = zip(*play(run.make_env(), run.agent(seed=5), 20, 5), strict=True)
    expected = f"return {np.mean(returns):.2f} ± {np.std(returns):.2f} over 20 episodes "
    assert printed.startswith(expected), (expected, printed)
    assert f"mean length {np.mean(lengths):.1f}" in printed
    assert len(set(returns)) > 10


@pytest.mark.parametrize("mode", [AutoresetMode.NEXT_STEP, AutoresetMode.SAME_STEP])
@pytest.mark.parametrize("name", RUNS)
def test_vector_environments(name, mode, train):
    """Each environment is played as it is alone; in SAME_STEP mode with as many draws."""
    run = worldloom.load_run(train(name), allow=ALLOW)
    envs = SyncVectorEnv([run.make_env] * 3, autoreset_mode=mode)
    agent = run.agent(deterministic=True)
    obs, _ = envs.reset(seed=7)
    is_first, ended = np.ones(3, bool), np.zeros(3, bool)
    episodes = np.zeros(3)
    for _ in range(25):
        actions = agent.act(obs, is_first)
        assert actions in envs.action_space
        obs, _, terminated, truncated, _ = envs.step(actions)
        before, ended = ended, terminated | truncated
        is_first = before if mode == AutoresetMode.NEXT_STEP else ended
        episodes += ended
    assert (episodes >= 2).all()


def test_the_environment_is_the_one_of_training(train):
    run = worldloom.load_run(train("dict"), allow=ALLOW)
    env = run.make_env()
    env.reset(seed=0)
    length, ended = 0, False
    while not ended:
        _, reward, _, ended, _ = env.step(np.float32([1, 1]))
        length += 1
        assert reward > 5  # two steps of the simulator
    assert length == -(-env.unwrapped.length // 2)  # repeated actions
    assert worldloom.load_run(train("image"), allow=ALLOW).make_env().reset()[0].shape[2] == 6
    limited = worldloom.load_run(train("tdmpc"), allow=ALLOW)
    assert max(n for _, n in play(limited.make_env(), limited.agent(), 8, 0)) == 5


def test_every_path_of_a_run_loads_it(train):
    folder = train("planned")
    paths = [folder, str(folder), folder / "model", folder / "checkpoints" / "last.ckpt"]
    weights = [worldloom.load_run(path, allow=ALLOW).model.head.weight for path in paths]
    assert all(torch.equal(weights[0], other) for other in weights)
    run = worldloom.load_run(folder, allow=ALLOW)
    assert run.model is run.model and not run.model.training
    assert run.config["model"]["_target_"] == "mine.models.Linear"


def test_an_unfinished_run_is_loaded_from_its_checkpoint(train, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(train("planned"), folder)
    shutil.rmtree(folder / "model")
    (folder / "scores.yaml").unlink()
    run = worldloom.load_run(folder, allow=ALLOW)
    assert play(run.make_env(), run.agent(), 1, 0)[0][1] >= 3


def test_third_party_code_has_to_be_allowed(train, tmp_path):
    folder = tmp_path / "copy"
    shutil.copytree(train("planned"), folder)
    text = (folder / "config.yaml").read_text()
    (folder / "config.yaml").write_text(text.replace("mine.", "evil."))
    whole = "pass allow=('evil.models.Linear', 'evil.envs.make_env')"
    for allow in ((), ("evil.models.Other",)):  # "cannot import" if anything was imported
        with pytest.raises(ValueError, match=re.escape(whole)):
            worldloom.load_run(folder, allow=allow)
    for allow in ("evil.models.Linear, evil.envs.make_env", "evil.models.LinearModel"):  # no parts
        with pytest.raises(ValueError, match=re.escape(whole)):
            worldloom.load_run(folder, allow=allow)
    with pytest.raises(ValueError, match=r"uses 'evil.models.Linear', and worldloom never"):
        worldloom.load_run(folder, allow=("evil.envs.make_env",))


def test_what_is_no_run_is_told(tmp_path):
    with pytest.raises(ValueError, match=r"contains no config.yaml; expected a folder written by"):
        worldloom.load_run(tmp_path / "nothing")


# ---- rendering and films -------------------------------------------------------------------------


def test_render_modes(train):
    run = worldloom.load_run(train("planned"), allow=ALLOW)
    env = run.make_env(render_mode="rgb_array")
    env.reset()
    assert env.render().shape == (80, 101, 3)
    assert run.make_env().render_mode is None
    fixture = Path(__file__).parents[1] / "fixtures" / "run"
    assert worldloom.load_run(fixture).make_env("rgb_array").render_mode == "rgb_array"


@pytest.fixture
def silent(train, tmp_path):
    """A run of an environment that takes no render_mode."""

    def call(name):
        folder = tmp_path / f"{name}0" / "run"
        shutil.copytree(train(name), folder)
        text = (folder / "config.yaml").read_text()
        (folder / "config.yaml").write_text(text.replace("envs.make_env", "envs.make_silent"))
        return folder

    return call


def test_an_environment_without_the_render_mode_says_so(silent):
    run = worldloom.load_run(silent("planned"), allow=("mine.envs.make_silent", ALLOW[1]))
    with pytest.raises(ValueError, match=r"expected a parameter render_mode of mine.envs.make_sil"):
        run.make_env(render_mode="rgb_array")


def read_film(file):
    """Return the images of a film and the seconds that one is shown."""
    if file.suffix == ".gif":
        images, seconds = [], 0.0
        with Image.open(file) as film:
            for index in range(film.n_frames):
                film.seek(index)
                images.append(np.asarray(film.convert("RGB")))
                seconds += film.info["duration"] / 1000
        return images, seconds
    av = pytest.importorskip("av")
    with av.open(file) as film:
        stream = film.streams.video[0]
        images = [frame.to_ndarray(format="rgb24") for frame in film.decode(stream)]
        return images, float(len(images) / stream.average_rate)


@pytest.mark.parametrize("suffix", ["gif", "mp4"])
def test_a_film_shows_the_evaluated_episodes_and_changes_no_score(
    suffix, train, evaluate, tmp_path
):
    if suffix == "mp4":
        pytest.importorskip("av")
    folder, file = train("planned"), tmp_path / "new" / f"film.{suffix}"
    args = ["episodes=5", "num_envs=2", "seed=3"]
    *lines, told = evaluate(folder, *args, f"video={file}").splitlines()
    assert lines == evaluate(folder, *args).splitlines()
    lengths = []
    env = worldloom.load_run(folder, allow=ALLOW).make_env()
    for episode in range(3):  # environment 0 plays episodes 0, 2 and 4
        env.reset(seed=None if episode else 3)
        lengths.append(env.unwrapped.length)
    wanted = sum(lengths) + 3
    assert told == f"{file}: 3 of 5 episodes, {wanted} images, 20 per second"
    images, seconds = read_film(file)
    assert seconds == pytest.approx(wanted / 20)
    if suffix == "mp4":  # a .gif joins equal images
        assert len(images) == wanted
        green = [i for i, image in enumerate(images) if image[9, 9, 1] > 128]
        assert green == [0, lengths[0] + 1, sum(lengths[:2]) + 2]  # first images of the episodes
    assert images[0].shape == (240 + HEIGHT, 303 - (suffix == "mp4"), 3)
    panel = images[1][240:].astype(int)  # the reward is blue, the prediction red
    assert (panel[..., 2] - panel[..., 0] > 60).any() and (panel[..., 0] - panel[..., 2] > 60).any()
    before = file.read_bytes()
    evaluate(folder, *args, "episodes=1", f"video={file}")
    assert file.read_bytes() != before  # replaced
    assert [path.name for path in file.parent.iterdir()] == [file.name]


def test_frames_per_second_count_actions(train, evaluate, tmp_path):
    told = evaluate(train("dict"), "episodes=1", f"video={tmp_path}/x.gif")
    assert "10 per second" in told


def test_an_observed_image_is_filmed_where_nothing_renders(silent, commands, package, tmp_path):
    folder = silent("image")
    words = [f"checkpoint={folder}", "env._target_=mine.envs.make_silent", "episodes=1"]
    words += [f"video={tmp_path}/x.gif"]
    commands.good(words, tmp_path, module="worldloom.eval", path=package)
    (first, *_), _ = read_film(tmp_path / "x.gif")
    assert first.shape == (256 + HEIGHT, 512, 3) and len(np.unique(first[:256])) == 1


def test_an_environment_that_shows_nothing_is_rejected(silent, commands, package, tmp_path):
    folder = silent("planned")
    words = [f"checkpoint={folder}", OWN_MODEL, "env._target_=mine.envs.make_silent"]
    words += [f"video={tmp_path}/x.gif"]
    done = commands.run(words, tmp_path, module="worldloom.eval", path=package)
    assert done["code"] == 1 and done["out"] == ""
    assert "cannot be filmed: its render_mode is None and it observes no image" in done["err"]
    assert len(done["err"].splitlines()) == 1 and not (tmp_path / "x.gif").exists()


@pytest.mark.parametrize("name", ["film.avi", "film", ".", "folder.mp4"])
def test_other_files_are_rejected(name, train, evaluate, tmp_path):
    (tmp_path / "folder.mp4").mkdir()
    error = evaluate(train("planned"), f"video={tmp_path / name}", code=1)
    assert "expected a file whose name ends in .mp4 or .gif" in error


def test_a_missing_encoder_is_told_before_anything_is_evaluated(monkeypatch, tmp_path):
    from worldloom.envs.film import open_film

    class NoAv:
        def find_spec(self, name, *_):
            if name == "av":
                raise ModuleNotFoundError("No module named 'av'", name="av")

    monkeypatch.delitem(sys.modules, "av", raising=False)
    monkeypatch.setattr(sys, "meta_path", [NoAv(), *sys.meta_path])
    with (
        pytest.raises(ImportError, match=r"pip install 'worldloom\[video\]'"),
        open_film(tmp_path / "x.mp4"),
    ):
        raise AssertionError
    assert list(tmp_path.iterdir()) == []


def test_a_failed_evaluation_leaves_no_film(tmp_path):
    from worldloom.envs.film import open_film

    (tmp_path / "x.gif").write_bytes(b"before")
    with pytest.raises(KeyboardInterrupt), open_film(tmp_path / "x.gif") as film:
        film.add(np.zeros((9, 9, 3), np.uint8))
        raise KeyboardInterrupt
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]


def test_a_film_ends_when_it_is_full(tmp_path, monkeypatch):
    from worldloom.envs import film as films

    monkeypatch.setattr(films._Gif, "max_frames", 4)
    env = SyncVectorEnv([lambda: gym.make("worldloom/Catch-v0", render_mode="rgb_array")])
    with films.open_film(tmp_path / "x.gif") as film:
        film.record(env, 2)
        env.reset()
        for _ in range(30):
            env.step(env.action_space.sample())
    assert (film.episodes, film.frames) == (1, 4)
    assert film.describe() == "4 images, 10 per second (the maximum length)"
