"""Mistakes of `python -m worldloom.eval`; tests/test_run.py scores real runs with it."""

import sys

import pytest

from worldloom import eval as evaluation


@pytest.fixture
def command(monkeypatch, capsys):
    def call(*arguments):
        monkeypatch.setattr(sys, "argv", ["eval.py", *map(str, arguments)])
        with pytest.raises(SystemExit) as stopped:
            evaluation.main()
        return stopped.value.code, *capsys.readouterr()

    return call


@pytest.fixture
def run(tmp_path):
    """A folder that looks like a run without a model."""
    (tmp_path / "config.yaml").write_text(
        "seed: 0\nthreads: 1\nplanner: {_target_: worldloom.planning.CEM}\n"
        "model: {_target_: worldloom.models.dreamerv3.DreamerV3}\n"
        "env: {_target_: worldloom.envs.gymnasium.make_env, id: CartPole-v1, num_envs: 2,"
        " workers: 0, size: null, pixels: false, repeat: 1, time_limit: null}\n"
    )
    return tmp_path


def test_without_arguments_it_tells_how_to_use_it(command):
    code, out, _ = command()
    assert code == 2 and "usage: python -m worldloom.eval checkpoint=<run folder>" in out
    assert command("--help")[0] == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["episodes=3"], "no run was named; add checkpoint=<run folder>"),
        (["checkpoint=no/such/run"], "no/such/run holds no config.yaml; expected a folder that"),
        (["checkpoint=RUN", "episode=3"], "unknown key 'episode' (did you mean 'episodes'?)"),
        (["checkpoint=RUN", "zzz"], "unknown key 'zzz'"),
        (["checkpoint=RUN", "episodes=0"], "episodes is 0; expected at least 1"),
        (["checkpoint=RUN", "episodes=few"], "Value 'few' of type 'str' could not be converted"),
        (["checkpoint=RUN", "num_envs=-1"], "num_envs is -1; expected at least 1"),
        (["checkpoint=RUN", "env.idd=Pendulum-v1"], "key 'env.idd' (did you mean 'env.id'?)"),
        (["checkpoint=RUN", "env=Pendulum-v1"], "unknown env 'Pendulum-v1'; choices: "),
        (["checkpoint=RUN", "env.id=Nothing-v0"], "There is no environment 'Nothing-v0'"),
        (["checkpoint=RUN"], "RUN holds no model.safetensors; expected a folder written by"),
        (["checkpoint=RUN/model"], "no file or folder 'RUN/model'"),
        (["checkpoint=RUN/checkpoints/last.ckpt"], "no file or folder 'RUN/checkpoints/last.ckpt'"),
    ],
)
def test_a_mistake_ends_in_one_line(command, run, arguments, message):
    code, out, err = command(*[a.replace("RUN", str(run)) for a in arguments])
    assert code == 1 and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and message.replace("RUN", str(run)) in line
