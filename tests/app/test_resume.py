"""Which run `resume=…` continues, and what it may change; without training."""

import os
import subprocess
import sys
import time

import pytest
import yaml
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from worldloom.app import resume
from worldloom.app.compose import Overrides, compose_config
from worldloom.app.run_dir import (
    CONFIG,
    SCORES,
    claim_folder,
    clear_start,
    read_config,
    write_config,
)
from worldloom.app.saved_config import resolve_config
from worldloom.files import write_text

WORDS = ["env=gymnasium", "env.id=Pendulum-v1", "model=dreamerv3_size1m", "name=mine"]


def overrides(*args):
    return Overrides(args)


def arguments(args, folder):
    """The arguments with which Hydra runs a command line with resume=…."""
    return resume.resume_arguments(Overrides(tuple(args)), folder)


def begun(folder, *words):
    """Leave what a run leaves that was killed at some time after its start."""
    (folder / "checkpoints").mkdir(parents=True)
    cfg = compose_config(*overrides(*WORDS, *words).with_implied())
    cfg.folder = str(folder)
    write_config(folder, resolve_config(cfg).saved)
    return folder


@pytest.fixture
def run(tmp_path):
    return begun(tmp_path / "runs" / "mine" / "first")


def scratch(tmp_path):
    (tmp_path / "scratch").mkdir(exist_ok=True)
    return tmp_path / "scratch"


def resumed(words, tmp_path):
    """The configuration that Hydra makes of a command line with resume=…."""
    words = arguments(words, scratch(tmp_path))
    assert words[:4] == ("--config-path", str(scratch(tmp_path)), "--config-name", "config")
    with initialize_config_dir(version_base="1.3", config_dir=words[1]):
        cfg = compose(config_name="config", overrides=list(words[4:]), return_hydra_config=True)
    OmegaConf.set_struct(cfg, False)
    assert cfg.pop("hydra").run.dir == cfg.folder == cfg.resume
    return cfg


# ---- the configuration ---------------------------------------------------------------------------


def test_a_run_is_resumed_with_the_configuration_that_it_has(run, tmp_path):
    cfg = resumed([f"resume={run}"], tmp_path)
    assert cfg.folder == str(run)
    assert resume.comparable(resolve_config(cfg).saved) == resume.comparable(read_config(run))


@pytest.mark.parametrize("inside", ["checkpoints", "checkpoints/last.ckpt", "config.yaml", "model"])
def test_what_lies_in_its_folder_names_it_too(run, tmp_path, inside):
    assert resumed([f"resume={run / inside}"], tmp_path).folder == str(run)


def test_overrides_win_and_what_is_computed_from_them_follows(run, tmp_path):
    words = [f"resume={run}", "training.learning_rate=1e-3", "threads=2", "env.timeout=5"]
    cfg = resumed(words, tmp_path)
    assert cfg.training.learning_rate == cfg.optimizer.lr == 1e-3
    assert (cfg.threads, cfg.env.timeout) == (2, 5)
    lines = resume.require_changeable(read_config(run), resolve_config(cfg).saved)
    assert sorted(line.split(": ")[0] for line in lines) == [
        *("env.timeout", "threads", "training.learning_rate")
    ]


def test_what_a_resolver_found_is_written_down(tmp_path, monkeypatch):
    """A file that names resolvers is not taken back; nor need they find the same again."""
    monkeypatch.setenv("CORES", "3")
    run = begun(tmp_path / "run", "name=${oc.env:CORES}")
    monkeypatch.delenv("CORES")
    assert resumed([f"resume={run}"], tmp_path).name == "3"


def test_another_trainer_can_be_chosen(run, tmp_path):
    cfg = resumed([f"resume={run}", "trainer=gpu", "trainer.devices=2"], tmp_path)
    assert cfg.trainer.accelerator == "gpu" and cfg.trainer.devices == 2
    assert cfg.trainer.gradient_clip_val == cfg.training.grad_clip


@pytest.mark.parametrize(
    "word", ["model=tdmpc2_1m", "env=crafter", "data=offline", "optimizer=adam"]
)
def test_another_model_or_environment_cannot(run, tmp_path, word):
    with pytest.raises(ValueError, match=f"keeps its {word.split('=')[0]}.*init_from="):
        arguments([f"resume={run}", word], scratch(tmp_path))


@pytest.mark.parametrize(
    "word",
    ["env.num_envs=9", "env.id=CartPole-v1", "seed=7", "data.capacity=9999", "model._target_=a.B"],
)
def test_what_a_run_cannot_change_is_named(run, tmp_path, word):
    cfg = resumed([f"resume={run}", word, "threads=2"], tmp_path)
    key, value = word.split("=")
    with pytest.raises(ValueError, match=f"cannot change {key} .*-> {value}.*init_from=") as error:
        resume.require_changeable(read_config(run), resolve_config(cfg).saved)
    assert "threads" not in str(error.value)


@pytest.mark.parametrize("word", ["folder=/tmp/other", "hydra.run.dir=/tmp/other"])
def test_a_resumed_run_stays_in_its_folder(run, tmp_path, word):
    with pytest.raises(ValueError, match=f"stays in its folder, but {word} was given"):
        arguments([f"resume={run}", word], scratch(tmp_path))


@pytest.mark.parametrize("word", ["-m", "--multirun"])
def test_a_sweep_is_not_resumed_as_one(run, tmp_path, word):
    with pytest.raises(ValueError, match="the same command again reads its finished runs"):
        arguments([word, f"resume={run}"], scratch(tmp_path))


def test_a_folder_without_a_run_names_one_nearby(run, tmp_path):
    with pytest.raises(ValueError, match=rf"no config.yaml.*such as {run}"):
        arguments([f"resume={run.parent / 'second'}"], scratch(tmp_path))


@pytest.mark.parametrize("text", ["", "- a\n- b", "{", "name: x", "\x00"])
def test_a_config_of_something_else_is_refused(run, tmp_path, text):
    (run / CONFIG).write_text(text)
    with pytest.raises(
        ValueError, match=r"config.yaml is (not valid YAML|not the configuration of a run)"
    ):
        arguments([f"resume={run}"], scratch(tmp_path))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("callbacks.more._target_", "os.system"),
        ("model._target_", "my_pkg.MyModel"),
        ("env._target_", "my_pkg.make_env"),
        ("env.id", "my_pkg:MyEnv-v0"),
        ("trainer._target_", "worldloom.run.sys.exit"),
        # What worldloom ships, where it does not belong: Hydra builds it at any depth.
        ("trainer.profiler._target_", "worldloom.envs.suites.gymnasium.make_env"),
        ("callbacks.more._target_", "lightning.Trainer"),
    ],
)
def test_code_that_a_config_names_is_not_run_unless_the_user_names_it_too(
    run, tmp_path, key, value
):
    config = OmegaConf.load(run / CONFIG)
    OmegaConf.update(config, key, value, force_add=True)
    (run / CONFIG).write_text(OmegaConf.to_yaml(config))
    with pytest.raises(ValueError, match=f"if you trust it, add: {key}={value}"):
        arguments([f"resume={run}"], scratch(tmp_path))
    trusted = [f"resume={run}", f"{key}={value}"] + ["env=custom"] * key.startswith("env._")
    assert OmegaConf.select(resumed(trusted, tmp_path), key) == value


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("name", "${oc.env:HOME}"),
        ("name", "${${init_from}:HOME}"),
        ("name", "${training[${folder}]}"),
        ("model._target_", "${name}"),
    ],
)
def test_nothing_is_put_together_that_could_not_be_judged(run, tmp_path, key, value):
    text = (run / CONFIG).read_text()
    config = OmegaConf.to_container(OmegaConf.create(text))
    section, _, name = key.rpartition(".")
    (config[section] if section else config)[name] = value
    (run / CONFIG).write_text(yaml.safe_dump(config))
    with pytest.raises(ValueError, match=f"{key} in .*config.yaml is .*expected a value"):
        arguments([f"resume={run}"], scratch(tmp_path))


def test_to_resume_nothing_is_a_new_run(tmp_path):
    for word in ("resume=null", "+resume=null"):
        words = arguments([*WORDS, word], scratch(tmp_path))
        assert words == overrides(*WORDS).with_implied().args


# ---- finished ------------------------------------------------------------------------------------


def test_a_finished_run_says_so_and_how_to_extend_it(run, tmp_path, capsys):
    write_text(run / SCORES, "step: 1000003\nfinal/return: 12.5\n")
    assert arguments([f"resume={run}"], scratch(tmp_path)) is None
    said = capsys.readouterr().out
    assert f"{run} is finished: 1,000,000 steps, return 12.5" in said
    command = said.splitlines()[-1].removeprefix("python -m worldloom.run ").split()
    assert resumed(command, tmp_path).training.total_steps == 2_000_000


# ---- a start that was cut short ----------------------------------------------------------------


def test_what_a_run_left_before_its_first_checkpoint_is_cleared(run):
    (run / "checkpoints" / "replay").mkdir()
    (run / "checkpoints" / "last.tmp").touch()
    (run / "metrics.csv").touch()
    clear_start(run)
    assert [path.name for path in run.iterdir()] == [CONFIG]


def test_but_not_checkpoints_of_another_kind(run):
    (run / "checkpoints" / "epoch=0-step=55.ckpt").touch()
    with pytest.raises(ValueError, match=r"contains epoch=0-step=55.ckpt, but neither last.ckpt"):
        clear_start(run)
    assert (run / "checkpoints" / "epoch=0-step=55.ckpt").exists()


# ---- resume=auto ---------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def auto(*words):
    return resume.find_unfinished(overrides(*WORDS, *words))[0]


def test_auto_finds_the_newest_unfinished_run_of_the_same_configuration(run, tmp_path, here):
    second = begun(run.parent / "second")
    other = begun(run.parent / "other", "seed=3")
    done = begun(run.parent / "done")
    write_text(done / SCORES, "step: 1\n")
    for age, folder in enumerate((done, other, second, run)):
        then = time.time() - age
        os.utime(folder / CONFIG, (then, then))
    assert auto().resolve() == second
    assert auto("seed=3").resolve() == other
    assert auto("seed=4") is None
    assert auto(f"hydra.run.dir={run}") == auto(f"folder={run}") == run
    cfg = resumed([*WORDS, "resume=auto"], tmp_path)
    assert cfg.folder == str(second) and cfg.env.id == "Pendulum-v1"


def test_auto_passes_by_what_it_cannot_read(run, here, capsys):
    broken = begun(run.parent / "broken")
    (broken / CONFIG).write_text("{")
    assert auto().resolve() == run
    assert "skipped runs/mine/broken" in capsys.readouterr().out


def test_auto_begins_a_new_run_where_there_is_none(run, tmp_path, here, capsys):
    words = arguments([*WORDS, "seed=4", "resume=auto"], scratch(tmp_path))
    assert words == overrides(*[*WORDS, "seed=4"]).with_implied().args
    assert "starting a new one" in capsys.readouterr().out


def test_a_restarted_slurm_job_continues_its_run(run, tmp_path, here, monkeypatch, capsys):
    same = overrides(*WORDS, f"folder={run}")
    assert same.with_restart() == same
    monkeypatch.setenv("SLURM_RESTART_COUNT", "1")
    again = same.with_restart()
    assert again.args == (*same.args, "resume=auto")
    for own in ("-m", "resume=null", f"resume={run}"):
        assert overrides(*WORDS, own).with_restart() == overrides(*WORDS, own)
    assert resumed(again.args, tmp_path).folder == str(run.resolve())
    write_text(run / SCORES, "step: 1\nfinal/return: 3.0\n")
    assert arguments(again.args, tmp_path) is None  # a finished run is not trained again
    out = capsys.readouterr().out
    assert out.count("SLURM has restarted this job") == 1
    assert out.count("resume=auto: continuing") == 1 and f"{run} is finished" in out


def test_auto_leaves_a_run_to_the_process_that_writes_it(run, here):
    with claim_folder(run, resumes=True):
        assert auto() is None
    assert auto().resolve() == run


# ---- one process per folder ----------------------------------------------------------------------

HOLD = """
import sys
from pathlib import Path
from worldloom.app.run_dir import claim_folder
with claim_folder(Path(sys.argv[1]), resumes=True):
    print("held", flush=True)
    sys.stdin.read()
"""


def test_a_second_process_is_refused_until_the_first_is_dead(run):
    command = [sys.executable, "-c", HOLD, str(run)]
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE}
    with subprocess.Popen(command, **pipes) as first:
        first.stdout.readline()
        said = r"written by another run.*hydra\.run\.dir="
        with pytest.raises(ValueError, match=said), claim_folder(run, resumes=True):
            pass
        first.kill()
        first.wait()
        with claim_folder(run, resumes=True):
            pass


def test_a_new_run_does_not_overwrite_one(run, tmp_path):
    (tmp_path / "killed" / "checkpoints" / "replay").mkdir(parents=True)
    with claim_folder(tmp_path / "killed", resumes=False):  # before it wrote its configuration
        clear_start(tmp_path / "killed")
    assert not (tmp_path / "killed" / "checkpoints").exists()
    said = rf"already contains a run.*resume={run}"
    with pytest.raises(ValueError, match=said), claim_folder(run, resumes=False):
        pass
    with claim_folder(tmp_path / "new", resumes=False):
        pass
