"""The command `worldloom`: what it runs, lists and prints, with the script that pip installs."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl

from worldloom import __main__ as cli
from worldloom import __version__, list_models, run
from worldloom.app.help import describe_run
from worldloom.presets import config_dir

ROOT = Path(__file__).resolve().parent.parent


@pytest.fixture(scope="module")
def script(tmp_path_factory):
    """The folder of the script `worldloom`, as pip writes it from pyproject.toml."""
    folder = tmp_path_factory.mktemp("bin")
    text = (ROOT / "pyproject.toml").read_text()
    module, function = re.search(r'^worldloom = "([\w.]+):(\w+)"$', text, re.MULTILINE).groups()
    path = folder / "worldloom"
    path.write_text(
        f"#!{sys.executable}\nimport sys\nfrom {module} import {function}\n"
        f"if __name__ == '__main__':\n    sys.exit({function}())\n"
    )
    path.chmod(0o755)
    return folder


@pytest.fixture(scope="module")
def shell(script):
    """Run lines of bash, in which `worldloom` is the script: (exit code, stdout, stderr)."""
    env = {**os.environ, "PATH": f"{script}:{os.environ['PATH']}", "PYTHONPATH": str(ROOT)}
    env.pop("HYDRA_FULL_ERROR", None)

    def call(lines, cwd):
        command = ["bash", "--norc", "-c", lines]
        done = subprocess.run(command, cwd=cwd, env=env, capture_output=True, text=True)
        return done.returncode, done.stdout, done.stderr

    return call


def test_the_script_lists_its_commands_and_explains_what_is_none(shell, tmp_path):
    lines = "worldloom --help && worldloom --version && worldloom trai"
    code, out, err = shell(lines, tmp_path)
    assert code == 2 and out == f"{cli.USAGE}\nworldloom {__version__}\n"
    assert err.startswith("error: unknown command 'trai' (did you mean 'run'?)")
    assert len(err.splitlines()) == 1


@pytest.mark.parametrize("line", ["run --cfg job -p training", "run training.batch_size=0", "eval"])
def test_a_command_is_the_same_by_all_names(shell, tmp_path, line):
    ways = ("worldloom ", "python -m worldloom ", "python -m worldloom.")
    first, *others = [shell(way + line, tmp_path) for way in ways]
    assert first[1] + first[2]
    assert others == [first, first]


def test_modules_in_the_current_folder_can_be_named(shell, tmp_path):
    """As with `python -m worldloom.check`, which always searches the current folder."""
    text = "from worldloom.envs.suites.catch import Catch\n\ndef make_env():\n    return Catch()\n"
    (tmp_path / "found_here.py").write_text(text)
    (tmp_path / "gymnasium.py").write_text("raise SystemExit('shadows an installed package')")
    line = "worldloom check env._target_=found_here.make_env steps=20 2>&1"
    code, out, _ = shell(line, tmp_path)
    assert code == 0 and "no problems found" in out, out


# runpy's warning; here, unlike in a command, the modules may have been imported.
@pytest.mark.filterwarnings("ignore:.*prior to execution of 'worldloom")
def test_every_command_has_a_module_with_usage_and_version(monkeypatch, capsys):
    for name in cli.COMMANDS:
        for argument, expected in (
            ("--help", "usage: "),
            ("--version", f"worldloom {__version__}"),
        ):
            monkeypatch.setattr(sys, "argv", ["worldloom", name, argument])
            with pytest.raises(SystemExit) as stopped:
                cli.main()
            assert not stopped.value.code and expected in capsys.readouterr().out
        assert f"  {name}" in cli.USAGE


def test_nothing_heavy_is_imported_for_help():
    code = (
        "import sys; from worldloom.__main__ import main; sys.argv = ['worldloom', '--help']\n"
        "try: main()\nexcept SystemExit: pass\n"
        "print([n for n in ('torch', 'numpy', 'hydra', 'omegaconf') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


def test_the_help_of_run_fits_on_a_screen_and_names_every_group():
    text = describe_run()
    assert len(text.splitlines()) <= 40 and max(map(len, text.splitlines())) <= 100
    groups = {folder.name for folder in config_dir().iterdir() if folder.is_dir()}
    listed = text.partition("examples:")[0]
    described = dict(re.findall(r"^  (\w+) +([^:]+): \S", listed, re.MULTILINE))
    assert described.keys() == groups and all(described.values())
    examples = text.partition("examples:")[2].partition("\n\n")[0].strip().splitlines()
    assert len(examples) == 9


@pytest.mark.filterwarnings("ignore:.*prior to execution of 'worldloom")
def test_help_all_is_hydras(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["worldloom", "run", "--help", "all"])
    with pytest.raises(SystemExit) as stopped:
        cli.main()
    out = capsys.readouterr().out
    assert not stopped.value.code and "tdmpc2_cup_catch" in out and "total_steps: 4000" in out


@pytest.mark.filterwarnings("ignore:.*prior to execution of 'worldloom")
@pytest.mark.parametrize(
    ("mode", "times"), [([], 1), (["hydra.mode=RUN"], 2), (["+hydra={mode: RUN}"], 2)]
)
def test_a_run_composes_its_configuration_once(monkeypatch, capsys, tmp_path, mode, times):
    """Hydra would do it twice, to read its mode; it still does where the user sets that."""
    composed = []
    load = ConfigLoaderImpl.load_configuration

    def count(*args, **kwargs):
        composed.append(1)
        return load(*args, **kwargs)

    monkeypatch.setattr(ConfigLoaderImpl, "load_configuration", count)
    monkeypatch.setattr(sys, "argv", ["run", "training.batch_size=2.5", "folder=r", *mode])
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit):
        run.main()
    assert "training.batch_size is 2.5" in capsys.readouterr().err
    assert len(composed) == times


def test_models_are_a_table(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["worldloom", "models"])
    cli.main()
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 110
    rows = {line.split()[0]: line for line in lines if line and line[0] != " "}
    models = list_models(verbose=True)
    for name, model in models.items():
        assert f" {model['parameters']:,} " in rows[name]
        assert all(alias in rows[name] for alias in model["aliases"])


COMPLETIONS = {
    "worldloom ev": "eval",
    "worldloom run trainer=g": "trainer=gpu",
    "worldloom run model=tdmpc2_5m training.batch_s": "training.batch_size=",
    "worldloom run env=dmc env.ta": "env.task=",
    "worldloom run experi": "experiment=",
    "worldloom run experiment=dreamerv3/dmc_": "experiment=dreamerv3/dmc_proprio "
    "experiment=dreamerv3/dmc_vision",
    "worldloom run experiment=tdmpc2/dmc_pixels env.tas": "env.task=",
}


def test_bash_completes_commands_groups_and_keys(shell, tmp_path):
    """The function that bash calls, called as bash does when the user presses the tab key."""
    script = ['eval "$(worldloom run -sc install=bash)"; complete -p worldloom']
    for line in COMPLETIONS:
        words = line.split()
        script.append(
            f"COMP_LINE='{line}' COMP_POINT={len(line)} COMP_CWORD={len(words) - 1}; "
            "COMPREPLY=(); hydra_bash_completion; echo ${COMPREPLY[@]}"
        )
    code, out, err = shell("\n".join(script), tmp_path)
    assert (code, err) == (0, "")
    rule, *replies = out.splitlines()
    assert rule.endswith("-F hydra_bash_completion worldloom")
    assert replies == list(COMPLETIONS.values())


WAYS = ["worldloom run", "python -m worldloom.run", "python -m worldloom.collect a=1"]


@pytest.mark.parametrize("way", WAYS)
def test_ctrl_c_at_the_start_is_one_line(script, tmp_path, way):
    """In the middle of the imports: the signal comes once torch is being imported."""
    (tmp_path / "torch").mkdir()
    (tmp_path / "torch" / "__init__.py").write_text(
        "import os, signal\n"
        "try:\n    os.kill(os.getpid(), signal.SIGINT)\n    [None for _ in range(9)]\n"
        "except BaseException:\n    pass  # as some packages do\n"
        "raise AssertionError('not stopped')\n"
    )
    env = {**os.environ, "PATH": f"{script}:{os.environ['PATH']}"}
    env["PYTHONPATH"] = f"{tmp_path}:{ROOT}"
    done = subprocess.run(way.split(), cwd=tmp_path, env=env, capture_output=True, text=True)
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "stopped by SIGINT\n")
    assert [path.name for path in tmp_path.iterdir()] == ["torch"]


# ---- behind `| head` -----------------------------------------------------------------------------


@pytest.mark.parametrize("line", ["models", "doctor", "--help", "run --help", "eval --help"])
def test_a_command_ends_silently_if_nobody_reads_it(shell, tmp_path, line):
    _, out, err = shell(f"worldloom {line} | sleep 0; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert (out, err) == ("0\n", "")


def test_a_run_goes_on_if_nobody_reads_it(shell, tmp_path):
    words = "model=dreamerv3_tiny env.id=CartPole-v1 env.workers=0 training.total_steps=300"
    words += " evaluation.episodes=1 hydra.run.dir=run"
    _, out, err = shell(f"worldloom run {words} | sleep 0; echo ${{PIPESTATUS[0]}}", tmp_path)
    assert out == "0\n" and "Broken" not in err
    assert (tmp_path / "run" / "scores.yaml").exists()
    assert "final return" in (tmp_path / "run" / "worldloom.log").read_text()
