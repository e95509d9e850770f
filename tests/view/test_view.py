"""The command `worldloom view`: what it prints, writes and rejects."""

import shutil
import sys
from pathlib import Path

import numpy as np
import pytest

from tests.view.conftest import BALL, DRIFT, HERE, read_data
from worldloom import create_world_model
from worldloom.view import __main__ as view_module

RUN = Path(__file__).parent.parent / "fixtures" / "run"


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["view", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            view_module.main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def run(tmp_path):
    shutil.copytree(RUN, tmp_path / "run")
    return tmp_path / "run"


def test_a_run_of_dreamerv3_is_written_into_its_folder(commands, run):
    before = sorted(run.rglob("*"))
    done = commands.good(["run", "horizon=5"], run.parent, module="worldloom.view")
    file = run / "playback.html"
    assert done["out"].splitlines()[-1].startswith("run/playback.html: 0.")
    assert done["out"].rstrip().endswith(f"open it in a browser: {file.as_uri()}")
    assert sorted(run.rglob("*")) == sorted([*before, file])
    data = read_data(file)
    assert len(data["episodes"]) == 2 and data["run"]["title"] == "CartPole-v1, DreamerV3"
    facts = dict(data["run"]["facts"])
    assert facts["final return"] == "9.00 ± 0.00"
    weights = create_world_model(run).parameters()  # of which the slow critic is not trained
    assert facts["parameters"] == f"{sum(p.numel() for p in weights if p.requires_grad):,}"
    words = ["checkpoint=run", "num_envs=1", "episodes=2"]
    scored = commands.good(words, run.parent, module="worldloom.eval")["out"]
    returns = [episode["return"] for episode in data["episodes"]]
    assert scored.startswith(f"return {np.mean(returns):.2f} ± {np.std(returns):.2f} over 2 ")
    assert data["episodes"][0]["imagined"]["rewards"].shape == (5, 6)
    curves = {curve["name"]: curve["points"] for curve in data["run"]["curves"]}
    assert len(curves["training episodes"]) == 6 and curves["final model"] == [[40, 9]]


def test_settings_are_used(commands, run):
    words = ["run", "out=other.html", "episodes=1", "max_steps=3", "every=2", "seed=5"]
    printed = commands.good(words, run.parent, module="worldloom.view")["out"]
    assert "1 episode, 3 steps, imagined from every 2 steps" in printed
    assert not (run / "playback.html").exists()
    (episode,) = read_data(run.parent / "other.html")["episodes"]
    assert episode["imagined"]["rewards"].shape == (2, 51)


def test_a_custom_model_has_to_be_named(commands, make_run):
    folder = make_run(*BALL, *DRIFT)
    words = [folder, "episodes=1", "horizon=2", BALL[0]]
    failed = commands.run(words, folder, module="worldloom.view", path=HERE)
    assert failed["code"] == 1 and f"if you trust it, add: {DRIFT[1]}" in failed["err"]
    done = commands.good([*words, DRIFT[1]], folder, module="worldloom.view", path=HERE)
    assert str(folder / "playback.html") in done["out"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["horizon=3"], "no run was named; expected one: worldloom view <run folder>"),
        (["RUN", "OTHER"], "2 runs were named; expected one: worldloom view RUN"),
        (["no/such/run"], "no/such/run contains no config.yaml; expected a folder"),
        (["RUN", "env=none"], "was trained without an environment, so there are no episodes to"),
        (["RUN", "horizons=3"], "unknown key 'horizons' (did you mean 'horizon'?)"),
        (["RUN", "horizon=0"], "horizon is 0; expected at least 1"),
        (["RUN", "every=0"], "every is 0; expected at least 1"),
        (["RUN", "episodes=few"], "episodes is 'few'; expected a whole number"),
        (["RUN", "out=page.txt"], "out is 'page.txt'; expected a name that ends in .html"),
        (["RUN", "out=no/page.html"], "out is 'no/page.html'; expected a file in a folder that"),
        (["RUN", "device=gpu"], "device is 'gpu' (did you mean 'cuda'?)"),
        (["RUN", "env.idd=x"], "key 'env.idd' (did you mean 'env.id'?)"),
    ],
)
def test_a_mistake_ends_in_one_line(command, run, arguments, message):
    names = {"RUN": str(run), "OTHER": str(run.parent)}
    code, out, err = command(*[names.get(word, word) for word in arguments])
    assert code == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message.replace("RUN", str(run)) in line
    assert not (run / "playback.html").exists()


def test_an_offline_run_without_an_environment(command, run):
    config = run / "config.yaml"
    target = "_target_: worldloom.envs.suites.gymnasium.make_env"
    config.write_text(config.read_text().replace(target, "_target_: null"))
    code, _, err = command(run)
    assert code == 1 and "there are no episodes to play; name one" in err
