"""What a user may type, and the one line that answers a mistake."""

import os
import subprocess
import sys

import pytest
from hydra.core.override_parser.overrides_parser import OverridesParser
from omegaconf import OmegaConf

from worldloom import run
from worldloom.app import command_line as cli
from worldloom.app.compose import Overrides, quote_value
from worldloom.presets import aliases, choice_files, load_preset, preset_names

BASIC = ["hydra/launcher=basic"]  # runs the jobs of a sweep in this process
QUIET = ["hydra/job_logging=disabled", "hydra/hydra_logging=disabled"]


@pytest.fixture
def command(monkeypatch, capsys, tmp_path):
    """Run the command in this process: (exit code, what it trained with, stdout, stderr)."""

    def call(*arguments, train=None):
        trained = []

        def pretend(cfg):
            trained.append(OmegaConf.create(OmegaConf.to_container(cfg, resolve=True)))
            return {"final/return": 1.0}

        folders = [f"hydra.run.dir={tmp_path}/run", f"hydra.sweep.dir={tmp_path}/sweep"]
        monkeypatch.setattr(sys, "argv", ["run.py", *arguments, *QUIET, *folders])
        monkeypatch.setattr(run, "train", train or pretend)
        code = 0
        try:
            run.main()
        except SystemExit as stopped:
            code = stopped.code
        return code, trained, *capsys.readouterr()

    return call


def in_a_process(*arguments):
    command = [sys.executable, "-m", "worldloom.run", *arguments]
    return subprocess.run(command, capture_output=True, text=True)


@pytest.mark.parametrize("text", ["läuft", "Grüße/an b", "日本", "runs/é.x", "Лес"])
def test_texts_in_any_language_need_no_quotes(command, text):
    code, trained, _, err = command(f"name={text}", f"env.id={text}")
    assert code == 0 and [(cfg.name, cfg.env.id) for cfg in trained] == [(text, text)], err
    assert Overrides((f"folder={text}",)).with_implied().value("hydra.run.dir") == text
    code, trained, _, err = command("-m", f"name={text},{text}2", "seed=0,1", *BASIC)
    assert code == 0 and [cfg.name for cfg in trained] == [text, text, f"{text}2", f"{text}2"], err


@pytest.mark.parametrize(
    "text",
    [*("läuft", "日本/x", "a b", "a=b", "it's", 'x"y', "C:\\d\\", ""), *("a,b", "[x]", "{x}", "{")],
)
def test_a_quoted_value_is_read_back_unchanged(text):
    (override,) = OverridesParser.create().parse_overrides([f"key={quote_value(text)}"])
    assert override.value() == text


# ---- mistakes that end before anything is built --------------------------------------------------

CALLBACK = "+callbacks.x._target_=lightning.pytorch.callbacks"
STRATEGY = "+trainer.strategy._target_=lightning.pytorch.strategies"
MISTAKES = {
    # misspelt keys
    "training.batchsize=3": "'training.batchsize' (did you mean 'training.batch_size'?)",
    "evaluation.episode=3": "'evaluation.episode' (did you mean 'evaluation.episodes'?)",
    "model.unitss=3": "unknown key 'model.unitss' (did you mean 'model.units'?); to add",
    "model.encoder.layer=3": "unknown key 'model.encoder.layer' (did you mean 'model.encoder.laye",
    "optimizer.lrr=1": "unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)",
    "trainer.devicess=1": "unknown key 'trainer.devicess' (did you mean 'trainer.devices'?)",
    "sed=1": "unknown key 'sed' (did you mean 'seed'?)",
    "trainin.batch_size=1": "unknown key 'trainin.batch_size'; write training.batch_size=1",
    "env.zzz=1": "unknown key 'env.zzz'; env has num_envs, workers",
    "+training.foo=3": "unknown key 'training.foo'; training has total_steps, batch_size",
    "+training.batchsize=3": "'training.batchsize' (did you mean 'training.batch_size'?)",
    "+model.unitss=3": "has no hyperparameter 'unitss' (did you mean 'units'?)",
    "~callbacks.openloop": "'callbacks.openloop' (did you mean 'callbacks.open_loop'?)",
    # wrong types
    "training.batch_size=abc": "training.batch_size is 'abc'; expected a whole number such as 16",
    "training.batch_size=2.5": "training.batch_size is 2.5; expected a whole number such as 16",
    "training.grad_clip=no": "training.grad_clip is 'no'; expected a number",
    "evaluation.deterministic=3.5": "deterministic is 3.5; expected true or false",
    "model.units=abc": "hyperparameter 'units' is 'abc'; expected int such as 64",
    "model.encoder.layers=abc": "hyperparameter 'encoder.layers' is 'abc'; expected int such as 3",
    "model.encoder=3": "hyperparameter 'encoder' is 3; expected a dict",
    "model.contdisc=3": "hyperparameter 'contdisc' is 3; expected bool",
    "seed=abc": "seed is 'abc'; expected a whole number",
    "seed=-1": "seed is -1; expected an integer from 0",
    "seed=null": "seed is null; expected a whole number",
    "threads=abc": "threads is 'abc'; expected a whole number, or null",
    # keys that have another name now
    "env.size=64": "unknown key 'env.size'; it was renamed: write env.image_size",
    "env.stack=3": "unknown key 'env.stack'; it was renamed: write env.frame_stack",
    "env.repeat=2": "unknown key 'env.repeat'; it was renamed: write env.action_repeat",
    "data.online=false": "unknown key 'data.online'; it was renamed: write data.online_queue",
    "+data.online=false": "unknown key 'data.online'; it was renamed: write data.online_queue",
    # impossible values
    "nonfinite=halt": "nonfinite is 'halt'; expected stop or skip",
    "training.batch_size=0": "training.batch_size is 0; expected at least 1",
    "training.sequence_length=1": "training.sequence_length is 1; expected at least 2",
    "training.learning_rate=-1": "training.learning_rate is -1; expected a finite number above 0",
    "evaluation.episodes=0": "evaluation.episodes is 0; expected at least 1",
    "model.stoch=0": "hyperparameter 'stoch' is 0; expected at least 1",
    "threads=0": "threads is 0; expected from 1 to 1024, or null for all cores",
    # arguments of the trainer with which a run would silently do something else
    "+trainer.accumulate_grad_batches=2": "accumulate_grad_batches is 2, which a run does not … "
    "use training.batch_size",
    "trainer.max_epochs=3": "trainer.max_epochs is 3 … use training.total_steps",
    "+trainer.limit_train_batches=1": "trainer.limit_train_batches is 1 … training.total_steps",
    "+trainer.overfit_batches=1": "trainer.overfit_batches is 1 … data=offline",
    "+trainer.fast_dev_run=true": "trainer.fast_dev_run is true … small training.total_steps",
    "+trainer.barebones=true": "trainer.barebones is true … logger.NAME=null",
    "trainer.val_check_interval=50": "trainer.val_check_interval is 50 … use evaluation.every",
    # strategies that divide the model, or start processes in another way
    "+trainer.strategy=fsdp": "trainer.strategy is fsdp, which a run … use trainer=ddp",
    "+trainer.strategy=deepspeed_stage_2": "strategy is deepspeed_stage_2 … use trainer=ddp",
    "+trainer.strategy=ddp_spawn": "trainer.strategy is ddp_spawn … use trainer=ddp",
    f"{STRATEGY}.ModelParallelStrategy": "strategies.ModelParallelStrategy … use trainer=ddp",
    f"{STRATEGY}.DeepSpeedStrategy": "strategies.DeepSpeedStrategy … use trainer=ddp",
    f"{STRATEGY}.DDPStrategy +trainer.strategy.start_method=spawn": "start_method is 'spawn'",
    "+trainer.sync_batchnorm=true trainer=cpu": "trainer.sync_batchnorm is true … only on GPUs",
    # callbacks that do not act in a run, or silently change it
    f"{CALLBACK}.Timer": "callbacks.x is Timer, which ends a run as finished; leave it out and use "
    "+trainer.max_time=DD:HH:MM:SS",
    f"{CALLBACK}.GradientAccumulationScheduler": "callbacks.x is GradientAccumulationScheduler, "
    "which makes fewer updates than the run counts … use training.batch_size",
    f"{CALLBACK}.StochasticWeightAveraging": "would never act … use evaluation.keep_best=true",
    f"{CALLBACK}.RichProgressBar": "use callbacks.progress",
    f"{CALLBACK}.TQDMProgressBar": "use callbacks.progress",
    f"{CALLBACK}.BatchSizeFinder": "cannot be undone … training.batch_size",
    f"{CALLBACK}.LearningRateFinder": "cannot be undone … training.learning_rate",
    "+trainer.logger=false": "trainer.logger is false … the logger section",
    # choices of groups
    "model=dreamerv3_size13m": "model 'dreamerv3_size13m' (did you mean 'dreamerv3_size1m'?)",
    "model=dreamer-smal": "unknown model 'dreamer-smal' (did you mean 'dreamer-small'?); choices: ",
    "experiment=cartpol": "unknown experiment 'cartpol' (did you mean 'cartpole'?)",
    "experiment=dreamerv3/dmc_vison": "(did you mean 'dreamerv3/dmc_vision'?); choices: cartpole",
    "experiment=dreamerv3_crafter": "(did you mean 'dreamerv3/crafter'?)",
    "experiment=dmc": "unknown experiment 'dmc'; write experiment=tdmpc2/dmc",
    "experiment=dreamerv3": "'dreamerv3'; write experiment=dreamerv3/atari or experiment=dreamer",
    "experiment=tdmpc2/dmc env.tsk=x": "unknown key 'env.tsk' (did you mean 'env.task'?)",
    "experiment=tdmpc2/dmc model=dreamer": "model is dreamer, but experiment=tdmpc2/dmc is a proto",
    "--configs crafter": "there is no option --configs; write experiment=dreamerv3/crafter",
    "trainer=tpu": "unknown trainer 'tpu' (did you mean 'gpu'?); choices: cpu, ddp, debug, gpu",
    "planner=foo": "unknown planner 'foo'; choices: cem, mppi",
    "experiment=null": "a group takes the name of a choice, such as trainer=gpu; only the",
    "modle=dreamer": "unknown key 'modle' (did you mean 'model'?)",
    # keys of other programs, and keys without their section
    "lr=1e-3": "unknown key 'lr'; write training.learning_rate=1e-3",
    "+lr=0.5": "unknown key 'lr'; write training.learning_rate=0.5",
    "learning_rate=3": "unknown key 'learning_rate'; write training.learning_rate=3",
    "total_steps=5": "unknown key 'total_steps'; write training.total_steps=5",
    "steps=5": "unknown key 'steps'; write training.total_steps=5",
    "batch_size=8": "unknown key 'batch_size'; write training.batch_size=8",
    "training.num_envs=8": "'training.num_envs'; write evaluation.num_envs=8 or env.num_envs=8",
    "epochs=3": "unknown key 'epochs'; write training.total_steps=…",
    "wandb=true": "unknown key 'wandb'; write logger=wandb",
    "device=cuda": "unknown key 'device'; write trainer=gpu",
    "gpus=2": "unknown key 'gpus'; write trainer=gpu trainer.devices=2",
    "precision=16": "unknown key 'precision'; write trainer.precision=bf16-mixed",
    # keys of other choices
    "env.game=pong": "unknown key 'env.game'; it belongs to env=atari: add it",
    "env.task=walker-walk": "it belongs to env=dmc, env=memory_maze, env=metaworld, env=minigrid: ",
    "data.path=x": "unknown key 'data.path'; it belongs to data=offline: add it",
    # environments and models as choices
    "env=my_pkg.Env": "unknown env 'my_pkg.Env'; … write env._target_=my_pkg.Env",
    "env=my_pkg:Env": "unknown env 'my_pkg:Env'; … write env._target_=my_pkg.Env",
    "env=my_pkg:Env-v0": "unknown env 'my_pkg:Env-v0'; write env=gymnasium env.id=my_pkg:Env-v0",
    "env=ALE/Pong-v5": "unknown env 'ALE/Pong-v5'; write env=gymnasium env.id=ALE/Pong-v5",
    "model=my_pkg.Mine": "'my_pkg.Mine'; … write model=custom model._target_=my_pkg.Mine",
    "model=dreamerv3": "unknown model 'dreamerv3'; add a size: model=dreamerv3:size1m, dreamerv3:",
    # other ways to write a setting
    "--seed 1": "there is no option --seed; write seed=1",
    "--seed=1": "there is no option --seed; write seed=1",
    "--batch-size 8": "there is no option --batch-size; write training.batch_size=8",
    "seed 1": "cannot read 'seed', because settings have no spaces; write seed=1",
    "seed = 1": "cannot read 'seed', because settings have no spaces; write seed=1",
    "checkpoint=runs/x": "to continue a run write resume=runs/x, to score it: worldloom eval check",
    "folder=": "folder is ''; expected a path",
    # what must be given
    "model=custom": "model._target_ is not set; add model._target_=my_pkg.MyClass",
    "env=custom": "env._target_ is not set; add env._target_=my_pkg.MyClass",
    "model=dreamerv3_base": "model.classes, model.depth, model.deter, model.hidden, model.units",
    # the shell
    "folder=a=b": "cannot read 'folder=a=b'; a value … needs quotes: 'folder=\"a=b\"'",
    "name=ü(b": "cannot read 'name=ü(b'; a value … needs quotes: 'name=\"ü(b\"'",
    "env.id=Lä,B": "cannot read 'env.id=Lä,B'; … needs quotes: 'env.id=\"Lä,B\"'",
    # numbers with which nothing can be computed
    "training.learning_rate=1e38": "training.learning_rate is 1e+38; expected … at most 1e30",
    "model.free_nats=-1e300": "model.free_nats is -1e+300; expected a number of at most 1e30",
    "optimizer.eps=1e300": "optimizer.eps is 1e+300; expected a number of at most 1e30",
    "training.total_steps=10000000000000000000": "expected an integer of at most 64 bits",
    "threads=5000": "threads is 5000; expected from 1 to 1024, or null for all cores",
    "foo": "cannot read 'foo'; expected GROUP=CHOICE or SECTION.KEY=VALUE",
}


@pytest.mark.parametrize("argument", MISTAKES)
def test_a_mistake_ends_in_one_line(command, argument, tmp_path):
    code, trained, out, err = command(*argument.split())
    assert code == 1 and trained == [] and out == ""
    (line,) = err.splitlines()
    assert line.startswith("error: ") and all(p in line for p in MISTAKES[argument].split(" … "))
    assert list(tmp_path.iterdir()) == []
    # Nothing is left behind that would change how the next error is shown.
    assert os.environ.get("HYDRA_FULL_ERROR") is None


def test_base_presets_are_no_choice_that_is_offered(command):
    *_, err = command("model=nothing")
    assert "dreamerv3_size12m" in err and "_base" not in err


def test_group_choices_on_the_line_count_when_keys_are_explained(command):
    *_, err = command("model=custom", "model._target_=my_pkg.M", "model.zzz=3")
    assert "unknown key 'model.zzz'; model has _target_; to add a key write +model.zzz=" in err


# ---- mistakes that show while building -----------------------------------------------------------

BUILDING = {
    "env.id=CartPol-v1": "There is no environment 'CartPol-v1' (Environment `CartPol` doesn't",
    "env.num_envs=0": "env.num_envs is 0; expected at least 1",
    "model.blocks=7": "blocks must divide both: change blocks or the layer sizes",
    "data.capacity=5GBB": "capacity is '5GBB'; set data.capacity to steps such as 100000",
    "training.total_steps=100": "training would start after 256 environment steps but total_steps",
    "+env.levl=3": "levl",
}


@pytest.mark.parametrize("argument", BUILDING)
def test_so_does_a_mistake_that_shows_while_building(command, argument):
    arguments = ["threads=1", argument]
    code, _, _, err = command(*arguments, train=TRAIN)
    assert code == 1
    (line,) = err.splitlines()
    assert line.startswith("error: ") and BUILDING[argument] in line


def test_flags_may_stand_between_overrides(command):
    code, trained, *_ = command(*BASIC, "seed=0,1", "-m", "training.batch_size=4")
    assert code == 0 and [cfg.seed for cfg in trained] == [0, 1]
    code, trained, out, _ = command("seed=7", "--cfg", "job", "-p", "seed", "name=x")
    assert (code, trained, out) == (0, [], "7\n")


@pytest.mark.parametrize("section", ["model", "env"])
def test_targets_that_cannot_be_imported(command, section):
    target = f"{section}._target_=no_such_pkg.Thing"
    code, _, _, err = command("threads=1", f"{section}=custom", target, train=TRAIN)
    assert code == 1
    (line,) = err.splitlines()
    assert "cannot import 'no_such_pkg.Thing': No module named 'no_such_pkg'; give the full" in line


TRAIN = run.train


def test_a_bug_of_ours_keeps_its_traceback(command):
    def broken(cfg):
        raise AssertionError("we are wrong")

    with pytest.raises(AssertionError, match="we are wrong"):
        command(train=broken)


# ---- what Hydra users expect ---------------------------------------------------------------------


def test_the_default_is_the_cartpole_recipe(command):
    code, (cfg,), *_ = command()
    assert code == 0
    assert cfg.name == "cartpole" and cfg.env.id == "CartPole-v1"
    assert cfg.folder.endswith("/run")


def test_without_an_experiment_the_official_defaults_are_left(command):
    _, (cfg,), *_ = command("~experiment")
    assert cfg.model == load_preset("dreamerv3:size12m")
    assert (cfg.training.batch_size, cfg.training.sequence_length) == (16, 64)
    assert (cfg.training.train_ratio, cfg.training.learning_rate) == (32.0, 4e-5)
    assert (cfg.optimizer.agc, cfg.optimizer.eps, cfg.optimizer.warmup) == (0.3, 1e-20, 1000)


@pytest.mark.parametrize("name", [*preset_names(), *aliases()])
def test_every_preset_is_the_same_on_the_command_line(command, name):
    _, (cfg,), *_ = command("~experiment", f"model={name.replace(':', '_')}")
    assert OmegaConf.to_container(cfg.model) == load_preset(name)


def test_a_family_brings_how_it_is_trained(command):
    """The official settings of TD-MPC2 come with its presets, the default recipe or not."""
    for model in ("tdmpc2_1m", "tdmpc", "tdmpc2_317m"):
        for more in ([], ["~experiment"]):
            _, (cfg,), *_ = command(f"model={model}", *more)
            training = cfg.training
            assert (training.batch_size, training.sequence_length) == (256, cfg.model.horizon + 1)
            assert (training.learning_rate, training.train_ratio) == (3e-4, None)
            assert (training.prefill, training.random_steps, training.seed_episodes) == (
                *(1000, 1000),
                5,
            )
            assert training.pretrain and cfg.data.across_episodes and not cfg.data.online_queue
            assert cfg.optimizer._target_ == "worldloom.training.optimizers.Adam"
            assert (cfg.optimizer.lr, cfg.optimizer.max_norm) == (3e-4, 20.0)
    # What is asked for on the line wins.
    _, (cfg,), *_ = command("model=tdmpc2_1m", "optimizer=laprop", "training.batch_size=8")
    assert cfg.optimizer._target_ == "worldloom.training.optimizers.LaProp"
    assert (cfg.training.batch_size, cfg.training.sequence_length) == (8, 4)


@pytest.mark.parametrize(
    "group",
    ["data", "trainer", "optimizer", "planner", "experiment", "training", "evaluation"],
)
def test_every_choice_of_every_group_composes(command, group, monkeypatch):
    monkeypatch.setattr("worldloom.devices.usable_devices", lambda: ["cpu", "cuda:0"])
    for name in choice_files(group):
        needs = ["data.path=x"] if name in ("offline", "tdmpc2/mt30") else []
        code, (cfg,), *_ = command(f"{group}={name}", *needs)
        assert code == 0 and not OmegaConf.missing_keys(cfg)


def test_values_are_set_added_and_removed(command):
    _, (cfg,), *_ = command(
        "training.batch_size=8",
        "training.train_ratio=64",
        "training.grad_clip=1",
        "model.encoder.layers=2",
        "+trainer.benchmark=true",
        "~callbacks.open_loop",
        "logger.csv=null",
    )
    assert cfg.training.batch_size == 8 and cfg.training.train_ratio == 64.0
    assert cfg.model.encoder.layers == 2 and cfg.trainer.benchmark is True
    assert cfg.trainer.gradient_clip_val == 1.0
    assert "open_loop" not in cfg.callbacks and cfg.logger.csv is None


AROUND = (
    *("num_envs", "workers", "timeout", "obs"),
    *("image_size", "pixels", "frame_stack", "action_repeat", "time_limit"),
)


@pytest.mark.parametrize(
    ("choice", "keys"),
    [
        (["model=custom", "model._target_=my_pkg.M"], {"_target_"}),
        (["env=custom", "env._target_=my_pkg.E"], {"_target_", *AROUND}),
        (["optimizer=adam"], {"_target_", "_partial_", "lr", "betas", "eps", "max_norm"}),
    ],
)
def test_a_recipe_does_not_reach_into_choices_that_are_not_its_own(command, choice, keys):
    """The default recipe's options of DreamerV3, gymnasium and LaProp would end these runs."""
    _, (cfg,), *_ = command(*choice)
    assert set(cfg[choice[0].split("=")[0]]) == keys


@pytest.mark.parametrize(
    ("words", "full"),
    [
        ("env._target_=a.b +env.level=3", "~experiment env=custom env._target_=a.b +env.level=3"),
        (
            "-m seed=0,1 env._target_=a.b",
            "-m seed=0,1 ~experiment env=custom env._target_=a.b sweep=a.b-seed",
        ),
        ("env=dmc env.task=a-b", "~experiment env=dmc env.task=a-b"),
        ("env=dmc experiment=cartpole", "env=dmc experiment=cartpole"),
        ("data=offline data.path=x", "~experiment data=offline data.path=x"),
        ("data=offline experiment=pendulum", "data=offline experiment=pendulum"),
        ("seed=3", "seed=3"),
        ("env.id=Pendulum-v1", "~experiment env.id=Pendulum-v1"),
        ("env.id=Pendulum-v1 experiment=cartpole", "env.id=Pendulum-v1 experiment=cartpole"),
        ("model=dreamerv3:size1m,TDMPC2:5m", "model=dreamerv3_size1m,tdmpc2_5m"),
        ("model=my_pkg:Model", "model=my_pkg:Model"),
        ("folder=a/b seed=1", "hydra.run.dir=a/b seed=1"),
    ],
)
def test_what_words_imply(words, full):
    assert [*Overrides(tuple(words.split())).with_implied()] == full.split()


def test_an_environment_of_ones_own_takes_no_options_of_another(command):
    code, (cfg,), *_ = command("env._target_=my_pkg.E", "+env.level=3", "env.action_repeat=2")
    chosen = cfg.env._target_, cfg.env.level, cfg.env.action_repeat
    assert code == 0 and chosen == ("my_pkg.E", 3, 2)
    assert "id" not in cfg.env


def test_models_of_ones_own_take_what_is_added(command):
    _, (cfg,), *_ = command("model=custom", "model._target_=my_pkg.M", "+model.hidden=32")
    assert cfg.model == {"_target_": "my_pkg.M", "hidden": 32}


def test_cfg_job_shows_the_configuration_and_trains_nothing(command):
    code, trained, out, _ = command("--cfg", "job", "training.batch_size=7")
    assert code == 0 and trained == []
    shown = OmegaConf.create(out)
    assert shown.training.batch_size == 7 and shown.model.units == 64


def test_a_name_and_a_folder_of_a_sweep():
    def added(*words):
        return [*Overrides(("-m", *words)).with_implied()][len(words) + 1 :]

    assert added("model=dreamerv3:tiny,tdmpc2:tiny", "seed=0,1") == ["sweep=model-seed"]
    assert added("seed=0,1", "sweep=mine") == added("seed=0,1", "hydra.sweep.dir=x") == []
    folder = Overrides(("--multirun", "seed=0,1", "folder=x")).with_implied()
    assert folder.args == ("--multirun", "seed=0,1", "hydra.sweep.dir=x")
    single = Overrides(("seed=0", "folder=x")).with_implied()
    assert single.args == ("seed=0", "hydra.run.dir=x")


def test_hydras_own_launcher_ends_one_job_only_at_a_mistake(command):
    code, trained, _, err = command(*BASIC, "-m", "training.batch_size=4,0,8")
    assert code == 1
    assert [cfg.training.batch_size for cfg in trained] == [4, 8]
    assert err.splitlines()[-1] == "error: training.batch_size is 0; expected at least 1"
    assert "training.batch_size=0" in err.splitlines()[-2]  # which job it was


def test_a_sweep_of_mistakes_leaves_no_folder(command, tmp_path):
    code, trained, *_ = command("-m", "seed=-1,-2")
    assert code == 1 and trained == [] and list(tmp_path.iterdir()) == []


# ---- as a process --------------------------------------------------------------------------------


def test_as_a_process_it_is_one_line_too(tmp_path):
    done = in_a_process("training.batchsize=3", f"hydra.run.dir={tmp_path}")
    assert done.returncode == 1 and done.stdout == ""
    (line,) = done.stderr.splitlines()
    assert line.startswith("error: unknown key 'training.batchsize' (did you mean 'training.batch_")


def test_hydra_full_error_shows_the_traceback(commands, tmp_path):
    words = ["training.batch_size=0", "hydra.run.dir=r"]
    done = commands.run(words, tmp_path, env={"HYDRA_FULL_ERROR": "1"})
    assert done["code"] == 1
    assert "Traceback (most recent call last)" in done["err"]
    assert "ValueError: training.batch_size is 0; expected at least 1" in done["err"]
    quiet = commands.run(words, tmp_path, env={"HYDRA_FULL_ERROR": "0"})
    assert quiet["err"] == "error: training.batch_size is 0; expected at least 1\n"


def test_looking_at_the_configuration_needs_no_torch():
    """Half a second instead of five."""
    code = (
        "import sys; sys.argv = ['run.py', '--cfg', 'job']; from worldloom.run import main; main();"
        "print([n for n in ('torch', 'lightning', 'gymnasium') if n in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# ---- the function itself -------------------------------------------------------------------------


def test_messages_of_several_lines_become_one():
    assert cli.explain_error(ValueError("first\n  second\n\nthird ")) == "first second third"
    assert cli.explain_error(ValueError()) == "ValueError()"


@pytest.mark.parametrize("value", ["0", "1"])
def test_the_users_own_choice_of_tracebacks_stays(monkeypatch, value, capsys):
    monkeypatch.setenv("HYDRA_FULL_ERROR", value)
    with pytest.raises(ValueError if value == "1" else SystemExit), cli.print_errors():
        raise ValueError("no")
    assert os.environ["HYDRA_FULL_ERROR"] == value
    assert capsys.readouterr().err == ("" if value == "1" else "error: no\n")
