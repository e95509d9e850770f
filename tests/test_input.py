"""What a user can get wrong, each run for real: one readable line, exit code 1, and nothing else.

Every case is a command with its words in a process of its own (a fork of one that has imported
everything, tests/forked_commands.py); the files that it is given are those of tests/input_files.py.
"""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch

from worldloom import check_world_model, create_world_model
from worldloom.datasets import open_dataset
from worldloom.training import ReplayBuffer

HERE = Path(__file__).resolve().parent
TRAINING = (
    "threads=1 env.workers=0 env.num_envs=2 model.deter=16 model.units=8 model.hidden=8 "
    "model.classes=4 model.stoch=4 training.batch_size=2 training.sequence_length=4 "
    "training.total_steps=40 training.train_ratio=8 training.anneal=0 training.warmup=1 "
    "evaluation.every=0 evaluation.episodes=1 data.capacity=1000 ~callbacks.open_loop"
)

# What follows `python -m worldloom.` -> parts of the line. F is the folder of files.
CASES = {
    # keys
    "run training.batchsize=3": "'training.batchsize' (did you mean 'training.batch_size'?)",
    "run +training.batchsize=3": "'training.batchsize' (did you mean 'training.batch_size'?)",
    "run evaluation.episode=3": "'evaluation.episode' (did you mean 'evaluation.episodes'?)",
    "run +evaluation.foo=3": "unknown key 'evaluation.foo'; evaluation has episodes, every",
    "run model.unitss=3": "unknown key 'model.unitss' (did you mean 'model.units'?)",
    "run +model.unitss=3": "no hyperparameter 'unitss' (did you mean 'units'?); it takes units",
    "run +model.encoder.layer=3": "'encoder.layer' (did you mean 'encoder.layers'?)",
    "run env.idd=x": "unknown key 'env.idd' (did you mean 'env.id'?)",
    "run env.workers=0 +env.levl=3": "got an unexpected keyword argument 'levl' … CartPole-v1",
    "run data.capcity=3": "unknown key 'data.capcity' (did you mean 'data.capacity'?)",
    "run +data.capcity=3": "unknown key 'data.capcity' (did you mean 'data.capacity'?)",
    "run +trainer.devicess=1": "unknown key 'trainer.devicess' (did you mean 'trainer.devices'?)",
    "run +logger.csv.foldr=1": "unknown key 'logger.csv.foldr' (did you mean 'logger.csv.folder'?)",
    "run +callbacks.open_loop.contxt=3": "(did you mean 'callbacks.open_loop.context'?)",
    "run callbacks.mine=3": "'callbacks.mine'; callbacks has … to add a key write +callbacks.mine=",
    "run optimizer.lrr=1": "unknown key 'optimizer.lrr' (did you mean 'optimizer.lr'?)",
    "run +planner.horizn=3": "unknown key 'planner.horizn' (did you mean 'planner.horizon'?)",
    "run sed=1": "unknown key 'sed' (did you mean 'seed'?)",
    "run +seeed=3": "unknown key 'seeed' (did you mean 'seed'?)",
    "run ~callbacks.openloop": "'callbacks.openloop' (did you mean 'callbacks.open_loop'?)",
    "run trainin.batch_size=1": "'trainin.batch_size'; write training.batch_size=1",
    "run ~model": "'model' is missing, but every run needs it; drop ~model",
    "run ~training": "'training.grad_clip' is missing, but other settings … put it back",
    # types
    "run training.batch_size=abc": "batch_size is 'abc'; expected a whole number such as 16",
    "run training.batch_size=2.5": "training.batch_size is 2.5; expected a whole number such as 16",
    "run training.batch_size=true": "training.batch_size is true; expected a whole number",
    "run training.batch_size=[1,2]": "training.batch_size is [1, 2]; expected a whole number",
    "run training.batch_size=null": "batch_size is null; expected a whole number such as 16",
    "run training.total_steps=1e6": "is 1000000.0; expected a whole number such as 1000000",
    "run evaluation.deterministic=3.5": "evaluation.deterministic is 3.5; expected true or false",
    "run model.units=null": "hyperparameter 'units' is None; expected int such as 64",
    "run model.encoder.layers=abc": "hyperparameter 'encoder.layers' is 'abc'; expected int such",
    "run model.encoder=3": "hyperparameter 'encoder' is 3; expected a dict with some of ['kernel'",
    "run seed=1.5": "seed is 1.5; expected a whole number",
    "run seed=null": "seed is null; expected a whole number",
    "run data.online_queue=3": "data.online_queue is 3; expected true or false",
    "run data.draw_by=rows": "data.draw_by is 'rows'; expected start or episode",
    "run data.draw_by=episode": "data.draw_by is 'episode', which … set data.across_episodes=false",
    "run data.across_episodes=false": "data.online_queue is true, … set data.online_queue=false or",
    "run data.finished_episodes=1": "data.finished_episodes is 1; expected true or false",
    "run training.prefill_counts=rows": "prefill_counts is 'rows'; expected steps or starts",
    "run training.count_resets=1": "training.count_resets is 1; expected true or false",
    "run training.prefill_counts=starts training.seed_episodes=5": "training.seed_episodes is 5, w",
    "run env.workers=0 data.finished_episodes=true data.capacity=400": "data.capacity is 400, 100",
    "run data.capacity=[1]": "data.capacity is [1]; expected steps such as 100000, or memory such",
    "run env.workers=0 callbacks.open_loop.every=abc": "every is 'abc'; expected a number of",
    "run optimizer.betas=3": "optimizer.betas is 3; expected a list such as [0.9, 0.999]",
    "run env.num_envs=2.5": "env.num_envs is 2.5; expected a whole number such as 4",
    "run env.pixels=3": "env.pixels is 3; expected true or false",
    "run env.id=3": "env.id is 3; expected a string",
    "run env.obs.keep=3": "env.obs.keep is 3; expected a regular expression",
    "run name=null": "name is null; expected a string",
    "run init_from=3": "init_from is 3; expected a string",
    # numbers and ranges
    "run training.learning_rate=nan": "training.learning_rate is nan; expected a finite number",
    "run training.train_ratio=inf": "training.train_ratio is inf; expected a finite number",
    "run model.free_nats=inf": "hyperparameter 'free_nats' is inf; expected a finite number such a",
    "run optimizer.eps=nan": "optimizer.eps is nan; expected a finite number such as 1e-20",
    "run training.sequence_length=1": "training.sequence_length is 1; expected at least 2",
    "run training.random_steps=9000": "random_steps is 9000; expected fewer than total_steps = 400",
    "run training.random_steps=9000 training.prefill=8000": (
        "training.random_steps is 9000 and training.prefill is 8000; expected fewer than"
    ),
    "run training.warmup=5000": "optimizer: anneal=1900; expected 0 for none, or more than warmup=",
    "run evaluation.seed=-5": "evaluation.seed is -5; expected from 0 to 4294967295",
    "run model.unimix=2": "hyperparameter 'unimix' is 2; expected a number in [0, 1]",
    "run model.actor.minstd=-1": "hyperparameter 'actor.minstd' is -1; expected a number above 0",
    "run seed=4294967296": "seed is 4294967296; expected an integer from 0 to 4294967295",
    "run optimizer.betas=[2,3]": "optimizer: betas=(2, 3); expected two, both at least 0 and below",
    "run env.num_envs=0": "env.num_envs is 0; expected at least 1",
    "run env.workers=-1": "env.workers is -1; expected auto, or at least 0",
    "run env.timeout=0": "env.timeout is 0; expected seconds, above 0",
    "run data.capacity=nan": "data.capacity is nan; expected steps such as 100000, or memory",
    "run data.capacity=10": "data.capacity is 10; expected at least 64, for 4 environments … lower",
    "run env.workers=0 data.capacity=5GBB": "capacity is '5GBB'; set data.capacity to steps such",
    "run env.workers=0 training.total_steps=9": "training would start after … raise training.total",
    # groups and words
    "run model=dreamerv3_size13m": "'dreamerv3_size13m' (did you mean 'dreamerv3_size1m'?); choice",
    "run training=tdmpc": "'tdmpc' (did you mean 'tdmpc2'?); choices: dreamerv3_tiny, tdmpc2, defa",
    "run model={a:1}": "model is not a single value; set its keys one by one: model.KEY=VALUE",
    "run trainer=null": "a group takes the name of a choice, such as trainer=gpu; only the rec",
    "run model=custom": "model._target_ is not set; add model._target_=my_pkg.MyClass",
    "run data=offline": "data.path is not set; add data.path=…",
    "run foo": "cannot read 'foo'; expected GROUP=CHOICE or SECTION.KEY=VALUE",
    "run env.obs.keep=[": "cannot read 'env.obs.keep=['; expected … quotes around a value",
    "run model.units=3,4": "commas separate the values of a sweep; write 'model.units=[3,4]' for",
    # models
    "run env.workers=0 model=custom model._target_=no_such.Model": "cannot import 'no_such.Model':",
    "run env.workers=0 model=custom model._target_=my_code.number": "my_code.number is 3; expected",
    "run env.workers=0 model=custom model._target_=my_code.Strange": "does not take obs_shape, act",
    "run env.workers=0 model=custom model._target_=my_code.NoModule": "is not a torch.nn.Module; ",
    "run env.workers=0 model=custom model._target_=my_code.NoMethods": "has no encode, predict, ob",
    "run env.workers=0 model.blocks=7": "7 blocks; blocks must divide both: change blocks or",
    "run env.workers=0 model=tdmpc2_1m model.num_elites=999": "num_elites is 999; expected at most",
    "run +callbacks.mine._target_=my_code.Plain": "no on_fit_start; expected a subclass of",
    "run +callbacks.mine._target_=no_such.Thing": "callbacks.mine._target_: cannot import 'no_such",
    "run env.workers=0 trainer.accelerator=abc": "trainer.accelerator is 'abc'; expected one of",
    # environments
    "run env.id=CartPol-v1": "There is no environment 'CartPol-v1' … CartPole-v1 … set env.id to o",
    "run env.id=no_such_pkg:Env-v0": "no_such_pkg:Env-v0 needs a package that cannot be imported",
    "run env._target_=my_code": "cannot import 'my_code': … give the full path, such as my_pkg.MyM",
    "run env._target_=my_code.nothing": "make_env returned a … expected a gymnasium.Env",
    "run env._target_=my_code.Old": "make_env returned a my_code.Old; expected a gymnasium.Env, wh",
    "run env._target_=my_code.raises": "raised RuntimeError … not licensed … fix it (HYD",
    "run env._target_=my_code.Env +env.acton=two": "'env.acton' (did you mean 'env.action'",
    "run env._target_=my_code.Env +env.action=unbounded": "infinite bounds; expected finite ones",
    "run env._target_=my_code.Env +env.action=tuple": "is not supported; expected Discrete, Multi",
    "run env._target_=my_code.make_odd": "20x30 pixels; expected sides divisible by 16; resize it",
    "run env._target_=my_code.make_words": "'note' has the space Text … expected Box, Discrete",
    "run env._target_=my_code.make_volume": "a box of shape (2, 3, 4) … expected up to two axes",
    "run env._target_=my_code.make_dict env.workers=0 env.obs.keep=nothing": "which matches no obs",
    "run env._target_=my_code.make_dict model=tdmpc2_1m env.workers=0": "images of 64x64 pixels, b",
    "run env._target_=my_code.Env +env.action=several model=tdmpc2_1m env.workers=0": "cannot act",
    "run env=none": "there is no environment; name one: env=gymnasium env.id=CartPole-v1",
    # weights
    "run init_from=nothing.pt": "init_from: no file or folder 'nothing.pt'; check the path",
    "run env.workers=0 init_from=F/weights/cut.ckpt": "it is truncated; … Expected a … copy it",
    "run env.workers=0 init_from=F/weights/text.ckpt": "it is a file of another kind; … Expecte",
    "run env.workers=0 init_from=F/weights/empty.ckpt": "it is empty; … Expected a check",
    "run env.workers=0 init_from=F/weights/other.ckpt": "it has no 'hyper_parameters'; … Expect",
    "run env.workers=0 init_from=F/weights/cut": "cannot be read: … expected a model written by",
    "run env.workers=0 init_from=F/weights/format": "newer worldloom (format 99), … update worldl",
    "run env.workers=0 init_from=F/weights/yaml": "not valid YAML (while parsing … copy it again",
    "run env.workers=0 init_from=F/weights/cut.npz": "cannot be read as plain arrays … copy them",
    "run env.workers=0 init_from=F/weights/other.npz": "it is not a parameter set of the official",
    "run env.workers=0 model=tdmpc2_tiny init_from=F/weights/cut.pt": "truncated; … Expected a c",
    "run env.workers=0 model=tdmpc2_tiny init_from=F/weights/other.pt": "no '_dynamics.0.w",
    # data sets
    "run data=offline data.path=F/nothing": "there is no file or folder F/nothing, … set data.path",
    "run data=offline data.path=F/data/empty": "holds no data; expected .npz files, one per episod",
    "run data=offline data.path=F/data/cut": "is a truncated zip file … expected arrays of numbers",
    "run data=offline data.path=F/data/text": "is not a zip file … expected arrays of numbers",
    "run data=offline data.path=F/data/nan": "obs holds nan at index [2, 1]; expected finite",
    "run data=offline data.path=F/data/inf_rewards": "rewards holds inf at index [0]; expected fin",
    "run data=offline data.path=F/data/strings": "obs is <U1 of shape (6, 1); expected an array of",
    "run data=offline data.path=F/data/lengths": "rewards has shape (4,); expected (5,), one for",
    "run data=offline data.path=F/data/outside": "[7.0, 7.0] at index 0 is outside … expected",
    "run data=offline data.path=F/data/no_rewards": "has no array rewards, only obs, … see worldlo",
    "run data=offline data.path=F/data/no_flag": "has no array terminated; add terminated=True if",
    "run data=offline data.path=F/data/unlike": "has shape (6, 4), … expected (3,), as in 0.npz",
    "run data=offline data.path=F/data/about": "dataset.yaml is not valid YAML … correct or d",
    "run data=offline data.path=F/data/about_old": "versions were recorded, … record the datas",
    "run data=offline data.path=F/data/good data.capacity=3": "has 5 steps, but the replay holds 3",
    "run data=offline data.path=F/data/good env=cartpole": "but the environment has … choose the e",
    "run data=offline data.path=F/hdf5/cut.hdf5": "cannot be read as HDF5 … copy it again or delet",
    "run data=offline data.path=F/hdf5/no_terminals.hdf5": "has no terminals, only … expected D4RL",
    "run data=offline data.path=F/hdf5/lengths.hdf5": "rewards has shape (3,) but actions (6, 2);",
    "run data=offline data.path=F/hdf5/dataset": "metadata.json is not valid JSON … copy the dat",
    # the other commands
    "eval episodes=3": "no run was named; add checkpoint=<run folder>",
    "eval checkpoint=F/runs/nothing": "contains no config.yaml; expected a folder written by",
    "eval checkpoint=F/run episode=3": "unknown key 'episode' (did you mean 'episodes'?)",
    "eval checkpoint=F/run episodes=few": "episodes is 'few'; expected a whole number",
    "eval checkpoint=F/run zzz": "cannot read 'zzz'; expected arguments such as seed=0",
    "eval checkpoint=F/run env.action_repeat=abc": "action_repeat is 'abc'; expected a whole num",
    "eval resume=F/run": "no run was named; add checkpoint=F/run",
    "eval F/run": "no run was named; add checkpoint=F/run",
    "eval checkpoint=F/run --seed 1": "there is no option --seed; write seed=1",
    "collect checkpoint=F/run episodes=1 out=o": "unknown key 'checkpoint'; write policy=F/run",
    "run F/run": "cannot read 'F/run', which is the folder of a run; write resume=F/run",
    "bench device=gpu": "device is 'gpu' (did you mean 'cuda'?); expected one of cpu",
    "run trainer.accelerator=gpuu": "trainer.accelerator is 'gpuu' (did you mean 'gpu'?)",
    "eval checkpoint=F/run env.id=Acrobot-v1": "has obs_shape (4,), but the environment (6,); choo",
    "eval checkpoint=F/runs/no_model_file": "contains no model.safetensors; expected a folder",
    "eval checkpoint=F/runs/empty": "is not the configuration of a run: it has no 'env'; expected",
    "eval checkpoint=F/runs/yaml": "is not valid YAML … expected a file written by python -m",
    "eval checkpoint=F/runs/no_model": "it has no 'model'; expected a file written by python",
    "eval checkpoint=F/runs/number": "it has threads 'many'; expected a file written by python",
    "eval checkpoint=F/runs/resolver": "is '${oc.env:SECRET}'; expected a value, or a reference",
    "eval checkpoint=F/runs/dangling": "cannot be resolved (Interpolation key 'no.such.key' not fo",
    "collect policy=random": "episodes, out is not set; add episodes=…",
    "collect policy=random episodes=2 out=o": "no environment was named; add env=gymnasium env.id",
    "collect policy=randm episodes=2 out=o": "policy is 'randm'; expected random, or the folder of",
    "collect policy=random episodes=2 out=o env=gymnasium seed=-1": "seed is -1; expected from 0 t",
    "collect policy=random episodes=2 out=F/data/good env=gymnasium": "already contains 1 episodes",
    "collect policy=F/run episodes=2 out=/proc/nowhere": "/proc/nowhere cannot be written … choose",
    "envs.check env=gymnasum": "unknown env 'gymnasum' (did you mean 'gymnasium'?); choices: atari",
    "envs.check env=gymnasium env.image_sze=3": "unknown key 'env.image_sze' (did you mean",
    "envs.check env=gymnasium steps=0": "steps is 0; expected at least 1",
    "bench model=dreamerv3:size1k": "'dreamerv3:size1k' (did you mean 'dreamerv3:size1m'?); preset",
    "bench model=dreamerv3:size1m obs=a,b": "obs is 'a,b'; expected whole numbers of at least 1",
    "bench repeats=few": "repeats is 'few'; expected a whole number",
    # files that would run code: F/marker is made if they do
    "run env.workers=0 init_from=F/weights/hostile.ckpt": "a file of another kind; nothing in it",
    "run env.workers=0 init_from=F/weights/hostile_zip.ckpt": "it would load posix.system; nothing",
    "run env.workers=0 init_from=F/weights/agent.pkl": "it refers to posix.system",
    "run env.workers=0 init_from=F/weights/hostile.npz": "Object arrays cannot be loaded … nothing",
    "run env.workers=0 model=tdmpc2_tiny init_from=F/weights/hostile.pt": "load posix.system; noth",
    "run data=offline data.path=F/data/objects": "Object arrays cannot be loaded … expected arrays",
    "run data=offline data.path=F/data/hostile_env": "add: env=custom env._target_=hostile.make",
    "run data=offline data.path=F/data/hostile_id": "add: env=gymnasium ++env.id=hostile:Env-v0",
    "run data=offline data.path=F/hdf5/no_spaces": "has no observation_space; create the dataset",
    "run data=offline data.path=F/data/hostile_deep": "add: env=gymnasium ++env.id=CartPole",
    "run data=offline data.path=F/data/hostile_nested": "_target_=hostile.Thing; or train without",
    "run data=offline data.path=F/data/hostile_hidden": "contains '${env._x.m}', but inter",
    "run data=offline data.path=F/data/hostile_relative": "contains '${._x}', but interpolations",
    "run data=offline data.path=F/data/hostile_key": "contains '${oc.env:HOME}', but",
    "run data=offline data.path=F/data/hostile_resolver": "contains '${oc.env:HOME}', but",
    "run data=offline data.path=F/data/hostile_tag": "line 2 has a tag or an alias, which are not",
    "eval checkpoint=F/runs/hostile_args": "add: planner._args_.0.0._target_=a.b",
    "eval checkpoint=F/runs/hostile_partial": "if you trust it, add: planner._partial_=True",
    "eval checkpoint=F/runs/hostile_deep_id": "if you trust it, add: env.more.0.id=hostile:Env-v0",
    "eval checkpoint=F/runs/hostile_reference": "if you trust it, add: env.id=hostile:Env-v0",
    "eval checkpoint=F/runs/hostile_target": "model._target_ in … is '${name}'; expected a value",
    "eval checkpoint=F/runs/hostile_defaults": "has 'defaults', which is no setting of a run",
    "eval checkpoint=F/runs/hostile_hydra": "has 'hydra', which is no setting of a run",
    "eval checkpoint=F/runs/hostile_tag": "has a tag or an alias, which are not allowed",
    "run resume=F/runs/hostile_reference": "if you trust it, add: env.id=hostile:Env-v0",
    "run resume=F/runs/hostile_hydra": "has 'hydra', which is no setting of a run",
    "eval checkpoint=F/runs/old": "by worldloom 0.1.0 before format versions were recorded",
    "run resume=F/runs/old": "by worldloom 0.1.0 before format versions were recorded, or",
    "eval checkpoint=F/runs/newer": "was written by a newer worldloom (format 99)",
    "eval checkpoint=F/runs/joined": "contains '${oc.env:HOME}', but interpolations are not",
    "eval checkpoint=F/runs/relative": "name in … is '${.seed}'; expected a value",
    "eval checkpoint=F/runs/escaped": "name in … is … oc.env:HOME}'; expected a value",
    "eval checkpoint=F/runs/inner": "name in … is '${training[${folder}]}'; expected a value",
    "eval checkpoint=F/runs/hostile_model": "if you trust it, add: model._target_=os.system",
    "eval checkpoint=F/runs/hostile_path": "add: model._target_=worldloom.app.compose.os.system",
    "eval checkpoint=F/runs/hostile_import": "if you trust it, add: model._target_=hostile.Model",
    "eval checkpoint=F/runs/hostile_env": "if you trust it, add: env._target_=hostile.make_env",
    "eval checkpoint=F/runs/hostile_id": "if you trust it, add: env.id=hostile:Env-v0",
    "eval checkpoint=F/runs/hostile_planner": "if you trust it, add: planner._target_=os.system",
    "eval checkpoint=F/runs/hostile_nested": "trust it, add: planner.model._target_=os.system",
    "eval checkpoint=F/runs/hostile_env model._target_=other.M": "differs from the value with",
    "collect policy=F/runs/hostile_model episodes=1 out=o": "add: model._target_=os.system",
    "collect policy=F/runs/hostile_env episodes=1 out=o": "add: env._target_=hostile.make_env",
}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """The variables with which the commands are run."""
    folder = tmp_path_factory.mktemp("input")
    env = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": f"{folder}:{HERE.parent}"}
    env.pop("HYDRA_FULL_ERROR", None)
    return folder, env


@pytest.fixture(scope="module")
def call(environment, commands):
    """Run `MODULE WORDS…` in a folder: {"code", "out", "err"}."""
    path, _ = environment

    def send(line, where):
        module, *words = shlex.split(line)
        return commands.run(words, where, module=f"worldloom.{module}", path=path)

    return send


@pytest.fixture(scope="module")
def files(environment, call):
    """The folder with a run, with everything that is wrong, and with nothing that has run."""
    folder, _ = environment
    pytest.importorskip("h5py", reason="needs the extra offline")
    pytest.importorskip("minari", reason="needs the extra offline")
    done = call(f"run {TRAINING} hydra.run.dir={folder}/run", folder)
    assert done["code"] == 0, done
    subprocess.run([sys.executable, HERE / "input_files.py", folder], check=True)
    return folder


def require_one_line(code, out, err, parts):
    assert (code, out) == (1, ""), (out, err)
    (line,) = err.splitlines()
    assert line.startswith("error: ") and "Traceback" not in line
    at = 0
    for part in parts.split(" … "):
        assert part in line[at:], line
        at = line.index(part, at) + len(part)


@pytest.mark.parametrize("line", CASES)
def test_a_mistake_ends_in_one_line(call, files, tmp_path, line):
    done = call(line.replace("F/", f"{files}/"), tmp_path)
    require_one_line(**done, parts=CASES[line].replace("F/", f"{files}/"))
    assert not (files / "marker").exists()
    # Nothing was trained or recorded, so there is no folder that looks as if.
    assert [path for path in tmp_path.rglob("*") if path.name[:4] != ".std"] == []


@pytest.mark.parametrize(
    "line",
    [
        "run training.batchsize=3",
        "eval checkpoint=F/runs/hostile_model",
        "collect policy=randm episodes=2 out=o",
        "envs.check env=gymnasium steps=0",
        "bench repeats=few",
    ],
)
def test_a_process_of_its_own_shows_the_same(environment, files, tmp_path, line):
    module, *words = shlex.split(line.replace("F/", f"{files}/"))
    command = [sys.executable, "-m", f"worldloom.{module}", *words]
    done = subprocess.run(command, cwd=tmp_path, env=environment[1], capture_output=True, text=True)
    require_one_line(done.returncode, done.stdout, done.stderr, CASES[line])


def test_what_a_command_does_not_use_of_a_run_does_not_run(call, files, tmp_path):
    """Evaluating makes no callbacks and no loggers, so they need no trust."""
    for name in ("hostile_callback", "hostile_logger"):
        done = call(f"eval checkpoint={files}/runs/{name} episodes=1 num_envs=1", tmp_path)
        assert done["code"] == 0 and done["out"].startswith("return ")
    assert not (files / "marker").exists()


def test_the_words_of_the_message_are_what_it_takes(call, files, tmp_path):
    """The same hostile environment runs once the user has named it."""
    words = f"eval checkpoint={files}/runs/hostile_env env._target_=hostile.make_env"
    done = call(words, tmp_path)
    ran = (files / "marker").exists()
    (files / "marker").unlink(missing_ok=True)
    require_one_line(**done, parts="cannot import 'hostile.make_env'")
    assert ran


# ---- the API -------------------------------------------------------------------------------------


def tiny():
    sizes = dict(deter=16, units=8, hidden=8, classes=4, stoch=4)
    return create_world_model("dreamerv3:size1m", (3,), 2, **sizes)


def add_row(**changes):
    row = {
        "obs": np.zeros((1, 3), np.float32),
        "actions": np.zeros((1, 2), np.float32),
        "rewards": np.zeros(1, np.float32),
        "is_first": np.ones(1, bool),
        "is_last": np.zeros(1, bool),
        "is_terminal": np.zeros(1, bool),
    }
    ReplayBuffer(10, (3,), 2).add(**(row | changes))


API = {
    "unknown preset": (lambda: create_world_model("dreamer4", (3,), 2), "did you mean 'dreamer'"),
    "no shape": (lambda: create_world_model("dreamer"), "needs obs_shape and action_dim, for exa"),
    "shape of text": (lambda: create_world_model("dreamer", "abc", 2), "expected a tuple such as"),
    "negative shape": (lambda: create_world_model("dreamer", (-1,), 2), "all positive"),
    "no actions": (
        lambda: create_world_model("dreamer", (3,), 0),
        "action_dim is 0; expected a pos",
    ),
    "odd image": (lambda: create_world_model("dreamer", (3, 20, 30), 2), "16"),
    "unknown option": (
        lambda: create_world_model("dreamer", (3,), 2, unit=3),
        "did you mean 'units'",
    ),
    "option of text": (lambda: create_world_model("dreamer", (3,), 2, units="x"), "expected int"),
    "no such file": (lambda: create_world_model("no/such/run"), "no file or folder 'no/such/run'"),
    "wrong width": (
        lambda: tiny().encode(torch.zeros(2, 4)),
        r"has shape \(2, 4\); expected \[B, 3",
    ),
    "wrong action": (
        lambda: tiny().predict(tiny().encode(torch.zeros(2, 3)), torch.zeros(2, 5)),
        r"action has shape \(2, 5\); expected \[B, 2\]",
    ),
    "half a batch": (lambda: tiny().compute_loss({"obs": torch.zeros(1)}), "the batch lacks"),
    "no model": (
        lambda: check_world_model(object(), (3,), 2),
        "is not a torch.nn.Module; expected one",
    ),
    "replay of text": (lambda: ReplayBuffer("lots", (3,), 2), "set data.capacity to steps such"),
    "row too wide": (lambda: add_row(obs=np.zeros((1, 4))), r"\(1, 4\)"),
    "row of nan": (lambda: add_row(rewards=np.array([np.nan])), "rewards"),
    "row of objects": (lambda: add_row(obs=np.array([[None] * 3])), "obs"),
    "empty replay": (lambda: ReplayBuffer(10, (3,), 2).sample(2, 3), "add episodes, or collect"),
    "no data": (lambda: open_dataset("no/such/data"), "there is no file or folder no/such/data"),
}


@pytest.mark.parametrize("name", API)
def test_a_mistake_in_a_call_says_what_was_expected(name):
    mistake, message = API[name]
    with pytest.raises((ValueError, TypeError, FileNotFoundError), match=message):
        mistake()
