"""Real runs of the command, small ones: what they write, print and repeat."""

import csv
import itertools
import os
import re
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from omegaconf import OmegaConf
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from worldloom import create_world_model, planning
from worldloom.glossary import format_glossary
from worldloom.run import report
from worldloom.training.metrics import COUNTERS

TINY_MODEL = [f"model.{name}={size}" for name, size in dict(deter=32, hidden=8, units=8).items()]
TINY_MODEL += ["model.classes=4", "model.stoch=4", "model.imag_length=5"]
SHORT = [
    "threads=1",
    "env.num_envs=4",
    "training.total_steps=400",
    "training.batch_size=4",
    "training.sequence_length=8",
    "training.train_ratio=4",
    "training.log_every=10",
    "evaluation.episodes=3",
    "evaluation.episodes_during=2",
    "evaluation.every=200",
    "callbacks.open_loop.every=10",
]
TINY = ["experiment=cartpole", "env=gymnasium", *TINY_MODEL, *SHORT]
BRIEF = [*TINY, "training.total_steps=160", "evaluation.every=70", "evaluation.episodes=2"]


def python(*words, cwd):
    """Train as a user would, in an interpreter started from another folder."""
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "default"}
    command = [sys.executable, "-m", "worldloom.run", *map(str, words)]
    done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
    assert done.returncode == 0, f"{done.stdout}\n{done.stderr}"
    return done


def metrics(folder):
    with (folder / "metrics.csv").open(newline="") as file:
        return list(csv.DictReader(file))


def curve(folder, name):
    return [(int(row["step"]), float(row[name])) for row in metrics(folder) if row.get(name)]


CLOCKS = ("fps/", "timings/", "seconds")


def updates(folder):
    """Environment steps and updates at every point of the loss."""
    return [(int(r["step"]), int(r["updates"])) for r in metrics(folder) if r["loss/loss"]]


def without_clocks(folder):
    """All of metrics.csv but the columns that depend on the wall clock."""
    return [{k: v for k, v in row.items() if not k.startswith(CLOCKS)} for row in metrics(folder)]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """One run, from a folder that is not the checkout: (its folder, what it printed)."""
    cwd = tmp_path_factory.mktemp("elsewhere")
    done = python(*TINY, cwd=cwd)
    (folder,) = (cwd / "runs" / "cartpole").iterdir()
    return folder, done


@pytest.fixture(scope="module")
def sweep(commands, tmp_path_factory):
    """A shorter run with the seeds 0 and 1: the folder of the sweep."""
    cwd = tmp_path_factory.mktemp("sweep")
    commands.good(["-m", *BRIEF, "seed=0,1", "sweep=both"], cwd)
    return cwd / "runs" / "sweeps" / "both"


# ---- what a run leaves ---------------------------------------------------------------------------


def test_a_run_folder_holds_everything(finished):
    folder, _ = finished
    assert re.fullmatch(r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d", folder.name)
    whole = {"config.yaml", "metrics.csv", "checkpoints", "model", "scores.yaml"}
    assert whole <= set(os.listdir(folder))
    assert sorted(os.listdir(folder / "checkpoints")) == ["last.ckpt", "previous.ckpt", "replay"]
    assert sorted(os.listdir(folder / "model")) == ["config.yaml", "model.safetensors"]
    assert not list(folder.parent.parent.parent.glob("lightning_logs"))
    assert ".hydra" not in os.listdir(folder)


def test_the_log_holds_what_the_terminal_showed(finished):
    folder, done = finished
    assert (folder / "worldloom.log").read_text() == done.stdout


def test_the_composed_configuration_is_written(finished):
    folder, _ = finished
    config = OmegaConf.load(folder / "config.yaml")
    assert config.training.total_steps == 400 and config.model.units == 8
    assert config.folder == str(folder) and config.optimizer.lr == config.training.learning_rate


NAMES = [
    *("loss/loss", "loss/kl_loss", "loss/reconstruction_loss", "loss/reward_loss"),
    *("loss/continue_loss", "loss/policy_loss", "loss/value_loss", "loss/replay_value_loss"),
    *("stats/grad_norm", "episode/return", "episode/length", "eval/return", "eval/return_std"),
    *("eval/length", "final/return", "final/return_std", "final/length", "fps/env", "fps/train"),
    *("replay/size", "replay/ratio"),
    *("timings/update", "timings/collect", "timings/sample", "timings/loss", "timings/backward"),
    *("timings/optimizer", "timings/check", "timings/log", "timings/other"),
    *(f"imagination/obs_error{kind}/1" for kind in ("", "_no_change", "_mean")),
    *(f"imagination/{name}" for name in ("reward_error", "continue_error", "value_error", "kl")),
    *("imagination/unused_classes", "imagination/decision_loss"),
]


@pytest.mark.parametrize("name", NAMES)
def test_metrics_have_the_names_of_the_design(finished, name):
    folder, _ = finished
    points = curve(folder, name)
    assert points and [step for step, _ in points] == sorted(step for step, _ in points)
    assert all(0 < step <= 403 for step, _ in points)  # 4 environments step at once


def test_every_row_has_the_counters(finished):
    folder, _ = finished
    rows = metrics(folder)
    assert list(rows[0])[:7] == ["step", *COUNTERS]
    for row in rows:
        assert row["step"] == row["env_steps"] == row["frames"] and row["restarts"] == "0"
    for name in ("loss/loss", "episode/return", "eval/return"):
        points = [[float(row[key]) for key in COUNTERS] for row in rows if row[name]]
        assert all(a <= b for x, y in itertools.pairwise(points) for a, b in zip(x, y, strict=True))
    ends = [row for row in rows if row["episode/return"]]
    assert [int(row["episodes"]) for row in ends] == list(range(1, len(ends) + 1))
    assert float(rows[0]["seconds"]) > 0
    assert [row["final/return"] != "" for row in rows] == [False] * (len(rows) - 1) + [True]


def test_the_train_ratio_is_exact(finished):
    """Replayed steps never exceed, nor lag by a batch, 4 for each env step since prefill."""
    folder, _ = finished
    counts, size = dict(updates(folder)), dict(curve(folder, "replay/size"))
    ended = [step for step, _ in curve(folder, "episode/return")]
    ratio = dict(curve(folder, "replay/ratio"))
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    prefill, replayed_before = checkpoint["ReplayDataModule"]["origin"]
    # 4 streams with a sequence of 8 and a row of context each, of which resets are no steps.
    assert 32 <= prefill <= 36 and replayed_before == 0
    for step, count in counts.items():
        replayed = 32 * count
        # A flush follows an update, so the newest tick may be followed by more updates.
        owed = 4 * (step - prefill)
        assert owed - 32 * 2 < replayed <= owed
        assert ratio[step] == pytest.approx(replayed / (step - prefill))
        # Every row is a step or an episode's last one.
        assert step <= size[step] <= step + sum(end <= step for end in ended) + 4
    for row in metrics(folder):  # written later, with the updates at the episode's end
        if row["episode/return"]:
            due = [max(0, 4 * (int(row["step"]) - tick - prefill) // 32) for tick in (4, 0)]
            assert due[0] <= int(row["updates"]) <= due[1]
    last = max(counts)
    assert counts[last] == 4 * (last - prefill) // 32


def test_training_metrics_are_flushed_every_log_every_updates(finished):
    counts = [count for _, count in updates(finished[0])]
    assert counts[:-1] == [10 * k for k in range(1, len(counts))]
    assert counts[-2] < counts[-1] <= counts[-2] + 10


def test_episodes_of_cartpole_are_as_long_as_their_return(finished):
    assert curve(finished[0], "episode/return") == curve(finished[0], "episode/length")


HPARAMS = {"task", "model", "seed", "learning_rate", "train_ratio", "total_steps", "batch_size"}
HPARAMS |= {"sequence_length", "num_envs", "parameters"}


def read_hparams(board):
    """What the HPARAMS tab of TensorBoard shows of a run, by name."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = board.summary_metadata["_hparams_/session_start_info"].plugin_data
    return dict(HParamsPluginData.FromString(about.content).session_start_info.hparams)


def read_experiment(board):
    """The names that the HPARAMS tab has columns for."""
    from tensorboard.plugins.hparams.plugin_data_pb2 import HParamsPluginData

    about = board.summary_metadata["_hparams_/experiment"].plugin_data
    return HParamsPluginData.FromString(about.content).experiment


def test_points_are_logged_in_the_order_of_their_steps(finished):
    """TensorBoard connects points in the order in which they are logged."""
    steps = [int(row["step"]) for row in metrics(finished[0])]
    assert steps == sorted(steps)


def test_tensorboard_shows_the_same_and_pictures_and_settings(finished):
    folder, done = finished
    board = EventAccumulator(str(folder), {"scalars": 0, "images": 0, "tensors": 0})
    board.Reload()
    assert {*NAMES, *(f"counters/{x}" for x in COUNTERS)} <= set(board.Tags()["scalars"])
    for name in ("loss/loss", "episode/return"):
        events = [(e.step, e.value) for e in board.Scalars(name)]
        expected = curve(folder, name)
        assert [step for step, _ in events] == [step for step, _ in expected]
        values = [value for _, value in expected]  # TensorBoard keeps them in single precision
        assert [value for _, value in events] == pytest.approx(values, rel=1e-6)
    last = updates(folder)[-1][1]  # every 10 updates, and of the final model
    assert len(board.Images("imagination/open_loop")) == last // 10 + (last % 10 > 0)
    settings = read_hparams(board)
    assert settings.keys() == HPARAMS and settings["total_steps"].number_value == 400
    printed = done.stdout.partition(" parameters on ")[0].rpartition(" ")[2]
    assert settings["parameters"].number_value == int(printed.replace(",", ""))
    texts = ("config", "glossary")
    config, glossary = (
        board.Tensors(f"{name}/text_summary")[0].tensor_proto.string_val[0].decode()
        for name in texts
    )
    assert "total_steps: 400" in config and glossary == format_glossary()


def test_evaluations_are_printed_when_they_happen(finished):
    folder, done = finished
    rows = [row for row in metrics(folder) if row["eval/return"]]
    best, expected = float("-inf"), []
    for row in rows:
        mean, std, length = (float(row[f"eval/{x}"]) for x in ("return", "return_std", "length"))
        so_far = "best so far" if mean >= best else f"best so far: {best:.4g}"
        best = max(best, mean)
        scores = f"return {mean:.4g} ± {std:.4g}, length {length:.4g} ({so_far})"
        expected.append(f"evaluation at env step {int(row['step']):,}: {scores}")
    assert len(rows) >= 2
    lines = done.stdout.splitlines()
    assert [line for line in lines if line.startswith("evaluation ")] == expected


def test_the_checkpoint_holds_the_whole_run_and_no_code(finished):
    folder, _ = finished
    checkpoint = torch.load(folder / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["updates"] == updates(folder)[-1][1]
    assert checkpoint["ReplayDataModule"]["collector"]["env_steps"] >= 400
    assert checkpoint["optimizer_states"] and checkpoint["hyper_parameters"]["run"]["seed"] == 0
    model = create_world_model(folder / "checkpoints" / "last.ckpt")
    assert torch.equal(model.rssm.gru.weight, checkpoint["state_dict"]["model.rssm.gru.weight"])


def test_the_saved_model_acts(finished):
    model = create_world_model(finished[0])
    assert (model.obs_shape, model.action_dim, model.discrete) == ((4,), 2, True)
    action = model.policy(model.encode(torch.zeros(3, 4)), deterministic=True)
    assert action.shape == (3, 2) and (action.sum(-1) == 1).all()


def test_the_training_time_of_all_sessions_is_reported(tmp_path, capsys):
    """`seconds` of the module goes on after a resume."""
    plain = {"model": {}, "planner": {}, "env": {}}
    run = SimpleNamespace(config=SimpleNamespace(plain=plain), folder=tmp_path)
    run.evaluation, run.module = SimpleNamespace(best=None), SimpleNamespace(seconds=5400.0)
    report(run, {})
    assert "\ntrained in 90.0 minutes\n" in capsys.readouterr().out


def test_it_ends_with_what_came_out_and_what_to_do_with_it(finished):
    folder, done = finished
    head, tail = done.stdout.split("\n\n")
    assert re.search(r"DreamerV3 with [\d,]+ parameters on cpu, 1 threads", head)
    assert re.search(r"obs +\(4,\) +vector encoder", head)
    assert "actions: 2 (one-hot choices)" in head
    lines = tail.splitlines()
    (step, mean), (_, std) = (curve(folder, f"final/{x}")[-1] for x in ("return", "return_std"))
    assert step >= 400
    assert lines[0].startswith(f"final return {mean:.1f} ± {std:.1f} (3 episodes)")
    minutes = float(re.fullmatch(r"trained in (\d+\.\d) minutes", lines[1])[1])
    assert minutes == pytest.approx(float(metrics(folder)[-1]["seconds"]) / 60, abs=0.1)
    assert lines[2:] == [
        f"results:     {folder}",
        f"watch it:    tensorboard --logdir {folder}",
        f"score it:    python -m worldloom.eval checkpoint={folder}",
        f"act with it: import worldloom; run = worldloom.load_run('{folder}'); "
        "agent = run.agent(); env = run.make_env()",
    ]


def test_it_says_nothing_on_stderr(finished):
    """No warnings and no adverts."""
    assert finished[1].stderr == ""


# ---- the same again ------------------------------------------------------------------------------


def test_the_same_seed_gives_the_same_metrics(sweep, commands, tmp_path):
    commands.good([*BRIEF, "hydra.run.dir=r"], tmp_path)
    assert without_clocks(sweep / "seed0") == without_clocks(tmp_path / "r")


def test_environments_in_processes_give_the_same_metrics(finished, commands, tmp_path):
    done = commands.good([*TINY, "env.workers=2", "hydra.run.dir=r"], tmp_path)
    assert "environments: 4 in 2 processes" in done["out"]
    assert without_clocks(tmp_path / "r") == without_clocks(finished[0])


def test_collecting_beside_the_updates_collects_and_trains_as_much(finished, commands, tmp_path):
    commands.good([*TINY, "data.overlap=true", "hydra.run.dir=r"], tmp_path)
    last = metrics(tmp_path / "r")[-1]
    # Other episodes than without, so the last tick may end a step earlier or later.
    assert 400 <= int(last["frames"]) < 404
    assert abs(int(last["updates"]) - updates(finished[0])[-1][1]) <= 1


def test_another_seed_gives_others(sweep):
    zero, one = sweep / "seed0", sweep / "seed1"
    for name in ("loss/loss", "episode/return"):
        assert curve(zero, name) != curve(one, name)
    weights = [create_world_model(run).rssm.gru.weight for run in (zero, one)]
    assert not torch.equal(*weights)


def test_a_sweep_makes_a_whole_run_of_each_job(sweep):
    for job, seed in (("seed0", 0), ("seed1", 1)):
        assert OmegaConf.load(sweep / job / "config.yaml").seed == seed
        assert (sweep / job / "model" / "model.safetensors").is_file()
        assert len(curve(sweep / job, "eval/return")) >= 2


def test_tensorboard_shows_what_the_runs_of_a_sweep_differ_in(sweep):
    board = EventAccumulator(str(sweep / "seed1")).Reload()
    settings = read_hparams(board)
    assert settings.keys() == HPARAMS and settings["seed"].number_value == 1
    assert next(iter(read_experiment(board).hparam_infos)).name == "seed"
    assert "final/return" in board.Tags()["scalars"]


# ---- python -m worldloom.eval --------------------------------------------------------------------


@pytest.fixture
def score(monkeypatch, capsys):
    """Run the evaluation command in this process and return what it printed."""
    from worldloom import eval as evaluation

    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *arguments])
        evaluation.main()
        return capsys.readouterr().out

    return call


def scores(printed):
    match = re.match(
        r"return (\S+) ± (\S+) over (\d+) episodes \((policy mode|sampled actions), seed (\d+)\), "
        r"mean length (\S+)\n",
        printed,
    )
    assert match, printed
    return match


def test_scoring_a_run_gives_its_final_score(finished, commands, tmp_path):
    folder, _ = finished
    words = [f"checkpoint={folder}", "episodes=3"]
    match = scores(commands.good(words, tmp_path, module="worldloom.eval")["out"])
    final = {
        name: curve(folder, f"final/{name}")[-1][1] for name in ("return", "return_std", "length")
    }
    assert match[1] == f"{final['return']:.2f}" and match[2] == f"{final['return_std']:.2f}"
    assert match[6] == f"{final['length']:.1f}"
    assert (match[3], match[4], match[5]) == ("3", "policy mode", "1000003")
    shown = match.string[match.end() :].splitlines()
    assert shown[0] == "predictions in these episodes (docs/inspecting.md):"
    starts = ["steps ahead", "observation error", "error of no change", "error of the mean"]
    starts += ["rewards: ", "ends of episodes: ", "values: ", "latents: ", "decisions: "]
    assert [line[: len(start)] for line, start in zip(shown[1:], starts, strict=True)] == starts
    fidelity = curve(folder, "imagination/decision_loss")[-1][1]
    assert shown[-1].startswith(f"decisions: {fidelity:.3g} of return lost (at random: ")


def test_scoring_otherwise(finished, score):
    folder, _ = finished
    arguments = [
        f"checkpoint={folder}/checkpoints/last.ckpt",
        "episodes=4",
        "seed=7",
        "deterministic=false",
        "env.time_limit=5",
    ]
    expected = "return 5.00 ± 0.00 over 4 episodes (sampled actions, seed 7), mean length 5.0\n"
    assert score(*arguments, "decisions=0").startswith(expected)


# ---- models and environments of one's own --------------------------------------------------------

MODEL = """
import torch
from torch import nn
from torch.nn import functional as F
from worldloom import LatentState, Trajectory


class MyModel(nn.Module):
    def __init__(self, obs_shape, action_dim, discrete, hidden=16):
        super().__init__()
        self.config = {"hidden": hidden}
        self.encoder = nn.Linear(obs_shape[0], hidden)
        self.dynamics = nn.Linear(hidden + action_dim, hidden)
        self.heads = nn.Linear(hidden, obs_shape[0] + 2)

    def encode(self, obs):
        code = self.encoder(obs).tanh()
        return LatentState(code, None, code)

    def predict(self, state, action):
        code = self.dynamics(torch.cat([state.features, action], -1)).tanh()
        return LatentState(code, None, code)

    def observe(self, state, action, obs):
        return self.encode(obs)

    def decode(self, state):
        out = self.heads(state.features)
        return {"obs": out[..., 2:], "reward": out[..., :1], "continue": out[..., 1:2].sigmoid()}

    def imagine(self, initial_state, actions):
        states = [initial_state]
        for action in actions:
            states.append(self.predict(states[-1], action))
        heads = self.decode(LatentState.stack(states[1:]))
        return Trajectory(states, heads["reward"], heads["continue"])

    def compute_loss(self, batch):
        after = self.predict(self.encode(batch["obs"][:, :-1]), batch["actions"][:, :-1])
        heads = self.decode(after)
        kept = ~batch["is_first"][:, 1:]
        obs = (heads["obs"] - batch["obs"][:, 1:]).square().mean(-1)
        reward = (heads["reward"].squeeze(-1) - batch["rewards"][:, 1:]).square()
        ends = batch["is_terminal"][:, 1:].float()
        going_on = F.binary_cross_entropy(heads["continue"].squeeze(-1), 1 - ends, reduction="none")
        terms = {"obs_loss": obs, "reward_loss": reward, "continue_loss": going_on}
        means = {name: (term * kept).mean() for name, term in terms.items()}
        return {"loss": sum(means.values()), **{k: v.detach() for k, v in means.items()}}
"""

ENV = '''
import gymnasium as gym
import numpy as np


class Thermostat(gym.Env):
    """Keep a temperature at zero; a picture shows it and a vector holds it."""

    action_space = gym.spaces.Box(np.float32([-2.0, 0.0]), np.float32([2.0, 1.0]))
    observation_space = gym.spaces.Dict(
        view=gym.spaces.Box(0, 255, (16, 32, 3), np.uint8),
        sensors=gym.spaces.Dict(now=gym.spaces.Box(-9, 9, (2,)), mode=gym.spaces.Discrete(3)),
    )

    def __init__(self, level):
        self.level = level

    def observe(self):
        view = np.full((16, 32, 3), np.clip(128 + 20 * self.now, 0, 255), np.uint8)
        now = np.float32([self.now, self.age / 10])
        return {"view": view, "sensors": {"now": now, "mode": self.age % 3}}

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.now, self.age = float(self.np_random.uniform(-self.level, self.level)), 0
        return self.observe(), {}

    def step(self, action):
        assert self.action_space.contains(action)
        self.now, self.age = self.now + 0.5 * float(action[0]), self.age + 1
        done = self.age >= 10
        info = {"success": abs(self.now) < 1} if done else {}
        return self.observe(), -abs(self.now), False, done, info


def make_env(level=1):
    return Thermostat(level)
'''


@pytest.fixture
def package(tmp_path, monkeypatch):
    """A folder of a user's own modules, outside worldloom."""
    folder = tmp_path / "somewhere"
    (folder / "mypkg").mkdir(parents=True)
    (folder / "mypkg" / "__init__.py").write_text(MODEL)
    (folder / "my_envs.py").write_text(ENV)
    monkeypatch.syspath_prepend(folder)
    return folder


def test_a_model_of_ones_own_is_trained_and_planned_with(package, commands, tmp_path, score):
    """Thirty lines outside the package; nothing else is changed."""
    own = ["model=custom", "model._target_=mypkg.MyModel", "+model.hidden=32"]
    own += ["training.warmup=0", "training.learning_rate=0.01"]  # to learn within 46 updates
    words = [*own, *SHORT, "env.time_limit=40", "hydra.run.dir=r"]
    commands.good(words, tmp_path, path=package)
    folder = tmp_path / "r"
    losses = [value for _, value in curve(folder, "loss/loss")]
    assert losses[-1] < 0.8 * losses[0]  # it learns
    for name in ("obs_loss", "reward_loss", "continue_loss"):
        assert len(curve(folder, f"loss/{name}")) == len(losses)
    assert curve(folder, "eval/return")
    with pytest.raises(ValueError, match=r"names the model 'mypkg.MyModel', which is not part of"):
        create_world_model(folder)
    with pytest.raises(SystemExit):  # nor does a command take it from a file
        score(f"checkpoint={folder}")
    trusted = "model._target_=mypkg.MyModel"
    match = scores(score(f"checkpoint={folder}", "episodes=3", trusted))
    assert match[1] == f"{curve(folder, 'final/return')[-1][1]:.2f}"

    model = create_world_model(folder, allow=("mypkg.MyModel",))
    assert model.encoder.out_features == 32
    planner = planning.CEM(model, 2, discrete=True, horizon=3, num_samples=16, num_elites=4)
    action, plan = planner(model.encode(torch.zeros(5, 4)))
    assert action.shape == (5, 2) and (action.sum(-1) == 1).all() and plan.shape == (5, 3, 2)


PROBES = """
import numpy as np
import torch
from worldloom.models.dreamerv3 import DreamerV3


class Probed(DreamerV3):
    def __init__(self, *args, bad="", **kwargs):
        super().__init__(*args, **kwargs)
        self.bad, self.calls = bad, 0

    def compute_loss(self, batch):
        self.calls += 1
        result = super().compute_loss(batch)
        numbers = {"float": 0.1, "int": 7, "numpy": np.float32(0.5), "mine_loss": 3.0}
        numbers["grad_norm"] = torch.tensor([2.0])
        numbers |= {"even": 100.0} if self.calls % 2 == 0 else {"odd_loss": torch.tensor(1.0)}
        bad = {"tensor": {"probe": torch.zeros(3, 4)}, "text": {"probe": "high"}}
        bad |= {"none": {"probe": None}, "name": {5: torch.zeros(())}, "": {}}
        result = dict(reversed((result | numbers | bad.get(self.bad, {})).items()))
        if self.bad == "tuple":
            return result["loss"], result
        if self.bad == "lost":
            del result["loss"]
        return result
"""


@pytest.fixture
def probed(package):
    (package / "probes.py").write_text(PROBES)
    words = [*TINY, "model._target_=probes.Probed", "+model.bad=''", "hydra.run.dir=r"]
    return words, package


def test_everything_that_compute_loss_returns_is_logged(probed, commands, tmp_path):
    words, path = probed
    commands.good([*words, "training.total_steps=240"], tmp_path, path=path)
    folder = tmp_path / "r"
    expected = {"stats/float": 0.1, "stats/int": 7, "stats/numpy": 0.5, "loss/mine_loss": 3}
    expected |= {"stats/grad_norm": 2, "stats/even": 100, "loss/odd_loss": 1}
    for name, value in expected.items():
        values = {value for _, value in curve(folder, name)}
        assert values == {value}, name
    assert updates(folder)[-1][1] >= 20 and curve(folder, "loss/kl_loss")


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        ("tensor", "compute_loss returned 'probe', Tensor of shape [3, 4] and type torch.float32"),
        ("text", "compute_loss returned 'probe', a str (high); expected a scalar: a number, or a"),
        ("none", "compute_loss returned 'probe', None; expected a scalar"),
        ("name", "compute_loss returned the name 5; expected a string"),
        ("tuple", "compute_loss returned a tuple "),
        ("lost", "expected a dict with 'loss', the scalar to minimise"),
    ],
)
def test_what_is_no_scalar_stops_the_run_at_the_first_update(
    probed, commands, tmp_path, bad, message
):
    words, path = probed
    done = commands.run([*words, f"model.bad={bad}"], tmp_path, path=path)
    assert done["code"] == 1 and "Traceback" not in done["out"] + done["err"]
    (line,) = [line for line in done["err"].splitlines() if line]
    assert line.startswith("error: ") and message in line
    checkpoint = torch.load(tmp_path / "r" / "checkpoints" / "last.ckpt", weights_only=True)
    assert checkpoint["updates"] == 0


def test_an_environment_of_ones_own(package, commands, tmp_path, score):
    """Images, vectors and choices in nested dicts, actions with bounds, success at the end."""
    own = ["env._target_=my_envs.make_env", "+env.level=3"]
    tiny = [*TINY_MODEL, "model.depth=2", "training.total_steps=200", "evaluation.every=100"]
    commands.good([*own, *SHORT, *tiny, "hydra.run.dir=r"], tmp_path, path=package)
    folder = tmp_path / "r"
    lengths = {value for _, value in curve(folder, "episode/length")}
    assert lengths == {10.0}
    assert {value for _, value in curve(folder, "eval/success")} <= {0.0, 1 / 3, 0.5, 2 / 3, 1.0}
    assert curve(folder, "loss/reconstruction_loss/sensors/now")
    board = EventAccumulator(str(folder), {"images": 0})
    board.Reload()
    shapes = {"view", "sensors/now", "sensors/mode"}
    pictures = {f"imagination/open_loop/{key}" for key in shapes}
    assert {name for name in board.Tags()["images"] if "open_loop/" in name} == pictures
    assert "imagination/open_loop_2/sensors/now" in board.Tags()["images"]
    model = create_world_model(folder)
    assert model.obs_shape == {"view": (3, 16, 32), "sensors/now": (2,), "sensors/mode": (3,)}
    printed = score(f"checkpoint={folder}", "episodes=2", "env._target_=my_envs.make_env")
    assert re.search(r"return -?[\d.]+ ± .* over 2 episodes .*success [01]\.\d\d", printed)
